# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's settings: what is not allowed ends it at its start, by name."""

from __future__ import annotations

import pytest

from dynamo.refit.args import parse_args

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

ABOVE_0 = "number of seconds above 0"
FROM_0 = "number of seconds from 0 up"
WHOLE = "whole number from 0 up"

REFUSED = [
    ("namespace", "DYN_NAMESPACE", ("", "a.b"), "name without dots"),
    ("model", "DYN_REFIT_MODEL", ("",), "leave it out"),
    (
        "worker-components",
        "DYN_REFIT_WORKER_COMPONENTS",
        ("", "backend,", "backend,a.b"),
        "name without dots",
    ),
    (
        "in-flight",
        "DYN_REFIT_IN_FLIGHT",
        ("Drain", ""),
        "continue, recompute, drain",
    ),
    (
        "commit-policy",
        "DYN_REFIT_COMMIT_POLICY",
        ("canery",),
        "barrier, rolling, canary",
    ),
    (
        "stage-seconds",
        "DYN_REFIT_STAGE_SECONDS",
        ("nan", "-5", "0", "inf", "5s", ""),
        ABOVE_0,
    ),
    ("commit-seconds", "DYN_REFIT_COMMIT_SECONDS", ("nan", "-5", "0"), ABOVE_0),
    ("fleet-poll-seconds", "DYN_REFIT_FLEET_POLL_SECONDS", ("nan", "0"), ABOVE_0),
    ("hold-seconds", "DYN_REFIT_HOLD_SECONDS", ("nan", "-1", "inf"), FROM_0),
    ("drain-seconds", "DYN_REFIT_DRAIN_SECONDS", ("nan", "-1", "inf"), FROM_0),
    ("settle-seconds", "DYN_REFIT_SETTLE_SECONDS", ("nan", "-1", "inf"), FROM_0),
    ("max-unavailable", "DYN_REFIT_MAX_UNAVAILABLE", ("-1", "1.5", ""), WHOLE),
    ("direct-readers", "DYN_REFIT_DIRECT_READERS", ("-1",), WHOLE),
    ("peer-readers", "DYN_REFIT_PEER_READERS", ("-1",), WHOLE),
    ("quorum", "DYN_REFIT_QUORUM", ("nan", "0", "1.1", "most"), "above 0 and up to 1"),
]
CASES = [
    (flag, variable, value, allowed)
    for flag, variable, values, allowed in REFUSED
    for value in values
]


@pytest.mark.parametrize(("flag", "variable", "value", "allowed"), CASES)
def test_what_is_not_allowed_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flag: str,
    variable: str,
    value: str,
    allowed: str,
) -> None:
    def refusal(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            parse_args(list(arguments))
        assert ended.value.code == 2
        # The choices are quoted in one release of Python and not in the next.
        return capsys.readouterr().err.splitlines()[-1].replace("'", "")

    told = refusal(f"--{flag}={value}")
    assert f"--{flag}" in told
    assert allowed in told
    monkeypatch.setenv(variable, value)
    told = refusal()
    assert variable in told
    assert allowed in told


def test_the_least_that_is_allowed() -> None:
    zeros = ("hold-seconds", "drain-seconds", "settle-seconds")
    counts = ("max-unavailable", "direct-readers", "peer-readers")
    config = parse_args([f"--{flag}=0" for flag in zeros + counts])
    policy = config.policy
    assert (policy.hold_seconds, policy.drain_seconds, policy.settle_seconds) == (
        0,
    ) * 3
    assert (policy.max_unavailable, policy.direct_readers, policy.peer_readers) == (
        0,
    ) * 3


def test_a_component_counts_once() -> None:
    config = parse_args(["--worker-components", "backend, prefill,backend"])
    assert config.worker_components == ("backend", "prefill")
