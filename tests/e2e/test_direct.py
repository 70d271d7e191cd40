# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two real replicas without memory for a staging copy: the transfer is the install, so
each leaves routing for it, and there is no way back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.events import RefitFailed, WorkerFenced, WorkerStaged
from dynamo.refit.rpc import Caller
from graphs.client import Client, Load
from graphs.references import prompts
from tests.support.live_fleet import Fleet, live_fleet
from tests.support.processes import Trainer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.router,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("direct")
    with live_fleet("file", directory, "--refit-staging=direct") as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def no_faults(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.forget_orders()


@asynccontextmanager
async def watch_routing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[frozenset[int]]]:
    """Whom routers may send to, each time that it changes."""
    for name, value in fleet.graph.environment.items():
        monkeypatch.setenv(name, value)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    caller, path = Caller(runtime), f"{fleet.graph.namespace}.backend.generate"
    seen = [frozenset[int]()]

    async def watch() -> None:
        while True:
            now = frozenset(await caller.instances(path))
            if now != seen[-1]:
                seen.append(now)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        runtime.shutdown()


async def both_are_routed_to(fleet: Fleet, routed: list[frozenset[int]]) -> None:
    await asyncio.to_thread(
        fleet.graph.wait_until, "both are routed to", lambda: len(routed[-1]) == 2
    )


async def test_somebody_is_always_routed_to(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other leaves, installs and returns; no request fails."""
    workers = set(await asyncio.to_thread(fleet.members))
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        async with (
            watch_routing(fleet, monkeypatch) as routed,
            Client(fleet.graph.url, fleet.graph.name) as client,
        ):
            await both_are_routed_to(fleet, routed)
            load = Load(client, prompts(count=5, seed=11), streams=4, max_tokens=64)
            load.start()
            for name in "BCABC":
                del routed[:-1]
                done = await asyncio.to_thread(fleet.refit, trainer, name)
                assert set(done.workers) == workers
                assert done.excluded == ()
                staged = await asyncio.to_thread(
                    fleet.events.find_all, WorkerStaged, fleet.version, 2
                )
                assert {r.memory.mode for e in staged for r in e.ranks} == {"direct"}
                first, second = await asyncio.to_thread(fleet.refitted, 2)
                await both_are_routed_to(fleet, routed)
                # A look may find the first one back and the second one gone.
                assert [r for r in routed if r != workers] == [
                    {second.worker},
                    {first.worker},
                ]
            await load.stop()
        await fleet.assert_serves(name)
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 8


async def test_one_whose_trainer_dies_under_it_is_fenced(fleet: Fleet) -> None:
    """What it has read is not known, and there is no copy. The other one has not begun:
    it serves the old version, and the next one alone, in its pause. The last test."""
    members = await asyncio.to_thread(fleet.members)
    first, other = sorted(members)
    index = await asyncio.to_thread(fleet.index_of, first)
    trainer = Trainer(fleet.graph, fleet.models["A"])
    fleet.order(index, install={"rank": 0, "seconds": 3.0})
    version = next(fleet.versions)
    trainer.publish(version, fleet.models[fleet.other()])
    await asyncio.to_thread(fleet.wait_until_at, index, "install")
    trainer.kill()
    failed = await asyncio.to_thread(
        fleet.events.wait_for, RefitFailed, lambda e: e.version == version
    )
    fenced = await asyncio.to_thread(fleet.events.find, WorkerFenced, version)
    assert fenced.worker == first
    for failure in (failed.failure, fenced.failure):
        assert (failure.kind, failure.worker) == ("WeightsUnknown", first)
        assert re.search(
            "TransferFailed: (cannot read|the read) from 'trainer-0-", failure.message
        )
        assert "direct staging keeps no copy of the old weights" in failure.message
    assert failed.serving == ((other, fleet.version),)
    worker = fleet.graph.processes.pop(f"worker{index}")
    await asyncio.to_thread(fleet.wait_for_the_end, worker)
    await fleet.assert_serves(fleet.serving, workers=1)
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        done = await asyncio.to_thread(fleet.refit, trainer, fleet.other())
    assert done.workers == (other,)
    await fleet.assert_serves(fleet.serving, workers=1)
