# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Old weights are published under a higher number: on a serving graph, with no trainer
there, every answer is again that of a fresh engine on them, bit for bit."""

from __future__ import annotations

import asyncio

import pytest

from dynamo.refit.events import RefitCompleted, WorkerRefitted, WorkerStaged
from graphs.client import Client, Load
from graphs.references import prompts
from tests.e2e.conftest import Bench
from tests.support.processes import Trainer, ask_cli

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]


def publish(bench: Bench, name: str) -> dict:
    """What ``dynamo-refit publish`` of checkpoint ``name`` says in the end, as the next
    version."""
    version = str(next(bench.versions))
    directory = str(bench.models[name])
    return ask_cli(bench.graph, "publish", directory, "--version", version)


async def test_old_weights_are_served_again_as_a_new_version(bench: Bench) -> None:
    """A, B, and under load back to A, and back to B again; then on with a trainer."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        first = await asyncio.to_thread(bench.refit, trainer, "A")
        second = await asyncio.to_thread(bench.refit, trainer, "B")
    replaced = {"A": first, "B": second}
    async with Client(bench.graph.url, bench.graph.name) as client:
        load = Load(client, prompts(count=5, seed=11), streams=2, max_tokens=64)
        load.start()
        for name in "AB":
            old, now = replaced[name], replaced["B" if name == "A" else "A"]
            end = await asyncio.to_thread(publish, bench, name)
            version = end["version"]
            assert version > now.version
            assert end == {
                "model": bench.graph.name,
                "version": version,
                "outcome": "completed",
                "detail": "",
            }
            bench.serving = name
            await bench.assert_serves(name)
            refitted = await asyncio.to_thread(
                bench.events.find, WorkerRefitted, version
            )
            assert refitted.fingerprint == old.fingerprint
            assert refitted.kv_epoch not in (old.kv_epoch, now.kv_epoch)
            completed = await asyncio.to_thread(
                bench.events.find, RefitCompleted, version
            )
            assert completed.fingerprint == old.fingerprint
            staged = bench.events.find(WorkerStaged, version)
            for rank in staged.ranks:
                assert rank.counters.allocations == rank.counters.registrations == 0
            replaced[name] = refitted
            verified = await asyncio.to_thread(ask_cli, bench.graph, "verify")
            assert (verified["type"], verified["version"], verified["fingerprint"]) == (
                "WeightsVerified",
                version,
                old.fingerprint,
            )
        await load.stop()
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 4

    with Trainer(bench.graph, bench.models["A"]) as trainer:
        await asyncio.to_thread(bench.refit, trainer, "C")
    await bench.assert_serves("C")
