# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The worker's own arguments, and what it takes out of Dynamo's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dynamo.common.utils.namespace import get_worker_namespace

from dynamo.refit.errors import PackedWeights
from dynamo.refit.rank.start_failure import (
    START_FAILURE_VARIABLE,
    take_failure,
    told_to_worker,
)
from dynamo.refit.worker.torchvision_stub import stand_in_if_missing
from graphs.tiny_model import make_checkpoint

stand_in_if_missing()

from dynamo.refit.worker import main  # noqa: E402
from dynamo.refit.worker.args import (  # noqa: E402
    GENERATION,
    Options,
    graph_namespace,
    take_own_arguments,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DYN_REFIT_STAGING", "DYN_REFIT_ADMISSION", main.HEALTHY_ENDPOINTS):
        monkeypatch.delenv(name, raising=False)


def take(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options:
    monkeypatch.setattr(sys, "argv", ["worker", *arguments])
    return take_own_arguments()


def test_a_worker_waits_for_the_coordinator_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert take(monkeypatch) == Options(staging="auto", admission="coordinator")


def test_our_arguments_are_taken_and_the_others_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ["--refit-admission", "immediate", "--refit-staging=host"]
    options = take(monkeypatch, "--model", "m", *own, "--refit", "x")
    assert options == Options(staging="host", admission="immediate")
    assert sys.argv == ["worker", "--model", "m", "--refit", "x"]


def test_an_argument_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYN_REFIT_ADMISSION", "immediate")
    monkeypatch.setenv("DYN_REFIT_STAGING", "host-no-undo")
    assert take(monkeypatch) == Options(staging="host-no-undo", admission="immediate")
    chosen = take(monkeypatch, "--refit-admission", "coordinator")
    assert chosen.admission == "coordinator"


@pytest.mark.parametrize("variable", ["DYN_REFIT_STAGING", "DYN_REFIT_ADMISSION"])
def test_what_is_no_choice_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variable: str
) -> None:
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(SystemExit):
        take(monkeypatch)
    assert f"{variable}='maybe' is none of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "left"), [('["generate"]', None), ('["other"]', '["other"]')]
)
def test_health_does_not_wait_for_what_waits_for_health(
    monkeypatch: pytest.MonkeyPatch, told: str, left: str | None
) -> None:
    """Dynamo's operator makes a worker's health that of its generate endpoint."""
    monkeypatch.setenv(main.HEALTHY_ENDPOINTS, told)
    main._be_healthy_before_admission()
    assert os.environ.get(main.HEALTHY_ENDPOINTS) == left


def test_a_worker_that_ends_takes_along_what_it_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(main, "_exit", codes.append)
    with subprocess.Popen(["sleep", "60"]) as child:
        main._end(3)
        assert child.wait(10) == -signal.SIGKILL
    assert codes == [3]


def test_a_refusal_is_the_last_line_of_the_log(tmp_path: Path) -> None:
    """Through the real process; no engine is loaded, nothing is downloaded."""
    model = make_checkpoint(tmp_path, seed=1)
    command = [sys.executable, "-m", "dynamo.refit.worker", "--model", str(model)]
    environment = {
        **os.environ,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_EVENT_PLANE": "zmq",
    }
    ended = subprocess.run(
        [*command, "--enable-expert-parallel"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stdout
    *_, last = ended.stdout.splitlines()
    _, refusal = last.split("dynamo-refit: ")
    assert refusal.startswith("UnsupportedConfiguration: this release does not refit")
    assert "--enable-expert-parallel" in refusal


def test_what_a_rank_left_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "failure"
    monkeypatch.setenv(START_FAILURE_VARIABLE, str(path))
    assert take_failure(path) is None
    for rank, tensor in ((1, "a"), (0, "b")):
        with pytest.raises(PackedWeights), told_to_worker(rank):
            raise PackedWeights("cannot be written", tensor=tensor)
    # The first of all ranks.
    assert take_failure(path).line() == (
        "PackedWeights: cannot be written (rank 1, tensor a)"
    )
    assert take_failure(path) is None


@pytest.mark.parametrize(
    ("suffix", "served", "graph"),
    [
        (None, "prod-chat", "prod-chat"),
        ("a1b2c3d4", "prod-chat-a1b2c3d4", "prod-chat"),
        ("a1b2c3d4", "prod-chat", "prod-chat"),
    ],
)
def test_refits_go_through_the_namespace_of_the_graph(
    monkeypatch: pytest.MonkeyPatch, suffix: str | None, served: str, graph: str
) -> None:
    """Dynamo's operator gives each generation of workers a namespace of its own."""
    monkeypatch.delenv(GENERATION, raising=False)
    if suffix is not None:
        monkeypatch.setenv(GENERATION, suffix)
    assert graph_namespace(served) == graph


def test_the_suffix_is_that_of_dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GENERATION, "a1b2c3d4")
    assert graph_namespace(get_worker_namespace("prod-chat")) == "prod-chat"
    assert get_worker_namespace("prod-chat") != "prod-chat"
