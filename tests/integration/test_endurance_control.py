# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two hundred versions of one publisher, and of one coordinator with two agents: what
their processes hold does not grow. No engine; the bus and all endpoints are real."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventPublisher, EventSubscriber
from dynamo.refit.events import REFIT_EVENTS, WEIGHT_VERSIONS, WeightVersionReady
from dynamo.refit.presence import WATCH_SECONDS
from dynamo.refit.protocol import (
    AcquireLease,
    Done,
    FingerprintsReply,
    GetFingerprints,
    Refused,
    ReleaseLease,
    TrainerRequest,
)
from dynamo.refit.rpc import Caller, serve, unary
from tests.benchmarks.scale import FakeTrainer, one_version, start
from tests.benchmarks.scale_agents import NAMESPACE
from tests.support.fake_replica import weights_of
from tests.support.rank_group import Resources
from tests.support.trainer_rank import RankProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(240),
]

CYCLES = 200
SETTLED = 40

#: Meanwhile it has looked for itself in discovery, which keeps three descriptors.
SETTLING_SECONDS = 4 * WATCH_SECONDS

#: What a process may grow by after it has settled, in bytes: a leak of 10 KiB per
#: version would show. Until version 200 they grow by 3 to 6 KiB each, of 1000 the last
#: 500 add 0.4 (publisher) and 0.5 (coordinator).
GROWTH = 1536 << 10

#: Threads of a pool that stay for ten seconds, and what they hold; one leaked in forty
#: versions would be as many.
COMES_AND_GOES = 3

#: Looks at a process, one after the other: some descriptors are there for a moment.
LOOKS = 10

AGENTS = 2


async def resources(pid: int) -> Resources:
    process = psutil.Process(pid)
    descriptors = []
    for _ in range(LOOKS):
        descriptors.append(process.num_fds())
        await asyncio.sleep(0.05)
    return Resources(
        resident=process.memory_info().rss,
        descriptors=min(descriptors),
        threads=process.num_threads(),
    )


def check_flat(before: Resources, after: Resources) -> None:
    assert after.descriptors - before.descriptors <= COMES_AND_GOES
    assert after.threads - before.threads <= COMES_AND_GOES
    assert after.resident - before.resident < GROWTH


async def test_a_publisher(runtime: DistributedRuntime) -> None:
    """Publish, lease, read the fingerprints, release."""
    caller = Caller(runtime)
    held: dict[int, Resources] = {}
    topic = runtime.endpoint(f"dynamo.refit.{WEIGHT_VERSIONS}")
    trainer = RankProcess("replicas", 0, world_size=1)
    async with EventSubscriber(topic) as events:
        await asyncio.to_thread(trainer.hear, "ready")
        for version in range(1, CYCLES + 1):
            trainer.order(version)
            slot = await asyncio.to_thread(trainer.hear, "published")
            assert slot == (version - 1) % 2
            ready = await announced(events, version)
            await read_and_release(caller, ready)
            ended = await asyncio.to_thread(trainer.hear, "released")
            assert ended["outcome"] == "completed"
            if version == SETTLED:
                await asyncio.sleep(SETTLING_SECONDS)
            if version in (SETTLED, CYCLES):
                held[version] = await resources(trainer.child.pid)
        trainer.order("counters")
        counters = await asyncio.to_thread(trainer.hear, "counters")
    trainer.close()
    assert counters["published"] == CYCLES
    assert (counters["registrations"], counters["manifests_built"]) == (1, 1)
    check_flat(held[SETTLED], held[CYCLES])


async def announced(events: EventSubscriber, version: int) -> WeightVersionReady:
    async for event in events:
        # Earlier ones are repeated until they have ended.
        if event.version == version:
            return event
    raise AssertionError("the subscription has ended")


async def read_and_release(caller: Caller, ready: WeightVersionReady) -> None:
    name = ready.announcement_id
    for request, expected in (
        (AcquireLease(model="tiny", epoch=1, announcement_id=name, seconds=60), Done),
        (GetFingerprints(announcement_id=name), FingerprintsReply),
        (
            ReleaseLease(
                model="tiny", epoch=1, announcement_id=name, outcome="completed"
            ),
            Done,
        ),
    ):
        where = ready.endpoint, ready.instance
        reply = await caller.call(*where, request, expected | Refused, 10)
        assert isinstance(reply, expected), reply


async def test_a_coordinator_and_its_agents(
    runtime: DistributedRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every version is staged, committed and completed; both agents are one process."""
    monkeypatch.setenv("DYN_NAMESPACE", NAMESPACE)
    trainer = FakeTrainer()
    path = f"{NAMESPACE}.trainer.weights"
    endpoint = runtime.endpoint(path)
    serving = asyncio.create_task(
        serve(endpoint, unary(TrainerRequest, trainer.answer, "trainer"))
    )
    topics = (f"{NAMESPACE}.refit.{name}" for name in (REFIT_EVENTS, WEIGHT_VERSIONS))
    out, into = map(runtime.endpoint, topics)
    held: dict[int, list[Resources]] = {}
    with ExitStack() as stack:
        log = tmp_path / "children.log"
        agents = start(stack, log, "tests.benchmarks.scale_agents", str(AGENTS))
        assert await asyncio.to_thread(agents.stdout.readline) == "ready\n"
        coordinator = start(stack, log, "dynamo.refit")
        async with (
            EventSubscriber(out) as events,
            EventPublisher(into, "trainer-0") as bus,
        ):
            for version in range(1, CYCLES + 1):
                ready = WeightVersionReady(
                    model="tiny",
                    version=version,
                    announcement_id=f"a{version}",
                    endpoint=path,
                    instance=endpoint.connection_id(),
                    manifest_digest=trainer.manifest.fingerprint(),
                    slot=0,
                    fingerprint=weights_of(version),
                )
                workers, _ = await one_version(events, bus, ready)
                # The first one may find one of them only.
                assert workers == AGENTS or version == 1
                if version == SETTLED:
                    await asyncio.sleep(SETTLING_SECONDS)
                if version in (SETTLED, CYCLES):
                    children = (agents, coordinator)
                    held[version] = [await resources(child.pid) for child in children]
    serving.cancel()
    for before, after in zip(held[SETTLED], held[CYCLES], strict=True):
        check_flat(before, after)
