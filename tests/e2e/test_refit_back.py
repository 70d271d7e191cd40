# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit rollback`` on a serving graph: with no trainer there, every answer is
again that of a fresh engine on the weights of before, bit for bit."""

from __future__ import annotations

import asyncio
import subprocess

import pytest

from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    WorkerRefitted,
    WorkerStaged,
)
from graphs.client import Client, Load
from graphs.references import prompts
from tests.e2e.conftest import Bench
from tests.support.processes import Trainer, ask_cli, fleet_status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]


def roll_back(bench: Bench, *options: object) -> dict:
    """What the command says in the end, as the next version."""
    version = str(next(bench.versions))
    words = [str(option) for option in options]
    return ask_cli(bench.graph, "rollback", "--version", version, *words)


async def test_the_weights_of_before_are_served_again(bench: Bench) -> None:
    """A, B, and under load back to A, and back to B again; then on with a trainer."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        first = await asyncio.to_thread(bench.refit, trainer, "A")
        second = await asyncio.to_thread(bench.refit, trainer, "B")
    replaced = {"A": first, "B": second}
    async with Client(bench.graph.url, bench.graph.name) as client:
        load = Load(client, prompts(count=5, seed=11), streams=2, max_tokens=64)
        load.start()
        for name, restores in (("A", first.version), ("B", None)):
            old, now = replaced[name], replaced["B" if name == "A" else "A"]
            to = () if restores is None else ("--to", restores)
            end = await asyncio.to_thread(roll_back, bench, *to)
            version = end["version"]
            assert version > now.version
            assert end == {
                "version": version,
                "restores": old.version,
                "weights": old.weights,
                "outcome": "completed",
                "detail": "",
            }
            await bench.assert_serves(name)
            refitted = await asyncio.to_thread(
                bench.events.find, WorkerRefitted, version
            )
            assert refitted.weights == old.weights
            assert refitted.kv_epoch not in (old.kv_epoch, now.kv_epoch)
            for kind in (RefitStarted, RefitCompleted):
                event = await asyncio.to_thread(bench.events.find, kind, version)
                assert event.restores == old.version
            staged = bench.events.find(WorkerStaged, version)
            for rank in staged.ranks:
                assert (rank.session, rank.nbytes) == ("warm", 0)
                assert rank.counters.allocations == rank.counters.registrations == 0
            replaced[name] = refitted
            verified = await asyncio.to_thread(ask_cli, bench.graph, "verify")
            assert (verified["type"], verified["version"], verified["weights"]) == (
                "WeightsVerified",
                version,
                old.weights,
            )
        await load.stop()
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 4
    status = await asyncio.to_thread(fleet_status, bench.graph)
    (member,) = status["members"]
    assert member["status"]["kept_version"] == replaced["A"].version
    assert member["status"]["kept_weights"] == first.weights

    with Trainer(bench.graph, bench.models["A"]) as trainer:
        await asyncio.to_thread(bench.refit, trainer, "C")
    await bench.assert_serves("C")


async def test_one_that_cannot_be_installed_changes_nothing(bench: Bench) -> None:
    """And the copy is still there: the next one is good."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        await asyncio.to_thread(bench.refit, trainer, "A")
        await asyncio.to_thread(bench.refit, trainer, "B")
    bench.order(install={"rank": 1, "error": "broken", "times": 2})
    with pytest.raises(subprocess.CalledProcessError) as failed:
        await asyncio.to_thread(roll_back, bench)
    assert failed.value.returncode == 1
    assert "broken" in failed.value.stderr
    version = int(next(bench.versions)) - 1
    event = await asyncio.to_thread(bench.events.find, RefitFailed, version)
    assert event.failure.rank == 1
    assert event.restores is not None
    await bench.assert_serves("B")
    bench.faults.unlink()
    end = await asyncio.to_thread(roll_back, bench)
    assert (end["outcome"], end["restores"]) == ("completed", event.restores)
    bench.serving = "A"
    await bench.assert_serves("A")


async def test_a_stage_in_between_takes_the_copy(bench: Bench) -> None:
    """It is refused in one line that says what to do, and nothing is begun."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        for name in ("B", "A"):
            await asyncio.to_thread(bench.refit, trainer, name)
        bench.order(install={"rank": 0, "error": "broken", "times": 2})
        version = next(bench.versions)
        trainer.publish(version, bench.models["C"])
        await asyncio.to_thread(
            bench.events.wait_for, RefitFailed, lambda e: e.version == version
        )
        assert trainer.released()["outcome"] == "failed"
    bench.faults.unlink()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        await asyncio.to_thread(roll_back, bench)
    version = next(bench.versions) - 1
    # Dynamo's runtime logs there, too.
    said = refused.value.stderr.splitlines()
    (line,) = [line for line in said if line.startswith("dynamo-refit: ")]
    assert "no worker keeps a copy of a version before" in line
    assert line.endswith(f"dynamo-refit publish DIR --version {version}")
    assert bench.events.of(RefitStarted, version) == []
    await bench.assert_serves("A")
