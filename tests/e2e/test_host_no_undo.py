# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two real replicas without memory for a copy of the old weights: refits go on, each in
a short pause of its own, and an install that fails fences."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.events import WorkerFenced, WorkerStaged
from dynamo.refit.rank.limits import LIMITS
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
    directory = tmp_path_factory.mktemp("host-no-undo")
    with live_fleet("file", directory, "--refit-staging=host-no-undo") as fleet:
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


async def test_it_refits_in_half_of_the_memory(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P instead of 2 P. Both stay routed to, and no request fails or is cut short."""
    log = (fleet.graph.directory / "worker0.log").read_text()
    assert "mode host-no-undo keeps no copy of the old weights" in log
    workers = set(await asyncio.to_thread(fleet.members))
    scratch = 2 * LIMITS["cpu"].scratch
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        async with (
            watch_routing(fleet, monkeypatch) as routed,
            Client(fleet.graph.url, fleet.graph.name) as client,
        ):
            await both_are_routed_to(fleet, routed)
            del routed[:-1]
            load = Load(client, prompts(count=5, seed=11), streams=4, max_tokens=64)
            load.start()
            for cycle, name in enumerate("BCABC"):
                done = await asyncio.to_thread(fleet.refit, trainer, name)
                assert set(done.workers) == workers
                assert done.excluded == ()
                staged = await asyncio.to_thread(
                    fleet.events.find_all, WorkerStaged, fleet.version, 2
                )
                for vote in (vote for event in staged for vote in event.ranks):
                    assert vote.memory.mode == "host-no-undo"
                    assert vote.memory.device_nbytes == 0
                    arena = vote.memory.host_nbytes - scratch
                    assert vote.nbytes <= arena < 1.5 * vote.nbytes
                    # Scratch; the shadow was there before the first version.
                    assert vote.counters.allocations == (0 if cycle else 1)
                await asyncio.to_thread(fleet.refitted, 2)
                # Requests are to run between refits, too: warm ones are quick.
                await fleet.assert_serves(name)
            await load.stop()
    assert routed == [workers]
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 8


async def test_one_that_cannot_install_is_fenced(fleet: Fleet) -> None:
    """There is no copy of what it served. The other one serves the new version, and
    takes the next one alone. The last test."""
    members = await asyncio.to_thread(fleet.members)
    broken, other = sorted(members)
    index = await asyncio.to_thread(fleet.index_of, broken)
    fleet.order(index, after_install={"rank": 0, "error": "cannot write"})
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        done = await asyncio.to_thread(fleet.refit, trainer, fleet.other())
        assert done.workers == (other,)
        (why,) = done.excluded
        fenced = await asyncio.to_thread(fleet.events.find, WorkerFenced, fleet.version)
        assert fenced.worker == broken
        for failure in (why, fenced.failure):
            assert (failure.kind, failure.worker) == ("WeightsUnknown", broken)
            assert "cannot write" in failure.message
            assert "NoWayBack: host-no-undo staging keeps no copy" in failure.message
        worker = fleet.graph.processes.pop(f"worker{index}")
        await asyncio.to_thread(fleet.wait_for_the_end, worker)
        await fleet.assert_serves(fleet.serving, workers=1)
        done = await asyncio.to_thread(fleet.refit, trainer, fleet.other())
    assert done.workers == (other,)
    await fleet.assert_serves(fleet.serving, workers=1)
