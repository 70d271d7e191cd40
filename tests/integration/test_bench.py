# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs: every case of its ranks, at the smallest size. What it measures
on a busy machine is not looked at; what does not depend on the machine is."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench import cases, parse, run, table, verdicts
from tests.benchmarks.shapes import dense, experts, tensors, total

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

MIB = 1 << 20


@pytest.mark.parametrize("mebibytes", [64, 512, 2048])
def test_models_have_the_wanted_size_and_real_tensor_counts(mebibytes: int) -> None:
    config = dense(mebibytes * MIB)
    assert len(tensors(config)) == 398
    assert abs(total(config) / MIB - mebibytes) < 1
    config = experts(mebibytes * MIB)
    assert len(tensors(config)) == 16 * (9 + 3 * 64) + 3
    assert abs(total(config) / MIB - mebibytes) < 1


def test_every_kind_of_model_is_measured() -> None:
    names = [case.name for case in cases([64, 512, 2048], [])]
    assert names == [
        *(f"dense-{size}" for size in (64, 512, 2048)),
        "snapshot-512",
        "moe-64",
        "moe-512",
        "columns-512",
        "tp2-512",
    ]


def test_a_small_run() -> None:
    options = parse(
        "--sizes 64 --cases dense columns --warm 2 --anew 1 --no-engine".split()
    )
    lines: list[str] = []
    results = run(options, lines.append)
    assert len(lines) == 2
    whole, columns = results["cases"]
    assert whole["tensors"] == columns["tensors"] == 398
    assert whole["wire_nbytes"] == columns["wire_nbytes"] == whole["nbytes"]
    for found in whole, columns:
        sessions = [found[kind]["session"] for kind in ("cold", "re-addressed", "warm")]
        assert sessions == ["cold", "re-addressed", "warm"]
        assert found["anew"]["session"] == "cold"
        assert found["warm"]["cycles"] == 2
        assert found["re-addressed"]["allocations"] == 0
        assert found["re-addressed"]["registrations"] == 0
        for kind in ("cold", "anew"):
            assert found[kind]["allocations"] == found[kind]["registrations"] == 3
        warm = found["warm"]
        assert 0 < warm["wire_ms"] <= warm["pull_ms"] < warm["total_ms"]
    built = [v for v in verdicts(results["cases"]) if "built in a warm" in v.what]
    assert len(built) == 2
    assert all(verdict.holds for verdict in built)
    printed = table(results["cases"]).splitlines()
    assert [line.split()[0] for line in printed if "cold" in line] == [
        "dense-64,",
        "columns-64,",
    ]
