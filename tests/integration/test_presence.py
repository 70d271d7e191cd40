# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer and a coordinator that stall for longer than their leases, over file
discovery; workers are in ``test_routing.py``."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.events import RefitRefused
from dynamo.refit.protocol import FleetStatus, GetStatus
from dynamo.refit.rpc import Caller
from tests.support.trainer_rank import RankProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.faults,
    pytest.mark.timeout(180),
]

STATUS = "dynamo.refit.status"
WEIGHTS = "dynamo.trainer.weights"

#: Dynamo's file discovery forgets a process after 10 s.
FORGOTTEN_SECONDS = 25.0

SECONDS = 60.0


@pytest.fixture
def trainer(runtime: DistributedRuntime) -> Iterator[RankProcess]:
    """Of the model ``tiny``."""
    trainer = RankProcess("replicas", 0, world_size=1)
    yield trainer
    trainer.kill()


@pytest.fixture
def coordinator(runtime: DistributedRuntime) -> Iterator[subprocess.Popen]:
    """Of another model: it answers every announcement at once, with a refusal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo.refit", "--model", "another"], env=os.environ
    )
    yield process
    process.kill()
    process.wait()


async def hear(trainer: RankProcess, what: str) -> Any:
    async with asyncio.timeout(SECONDS):
        return await asyncio.to_thread(trainer.hear, what)


async def refused(trainer: RankProcess, version: int) -> None:
    """A version is announced, the coordinator answers, and the handle ends."""
    trainer.order(version)
    await hear(trainer, "published")
    assert (await hear(trainer, "released"))["outcome"] == "refused"


async def instances(caller: Caller) -> tuple[int, int]:
    """How many of each are in discovery."""
    paths = (WEIGHTS, STATUS)
    trainers, coordinators = [len(await caller.instances(path)) for path in paths]
    return trainers, coordinators


async def until(caller: Caller, expected: tuple[int, int], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while await instances(caller) != expected:
            await asyncio.sleep(0.1)


async def test_a_trainer_and_a_coordinator_that_stall_past_their_leases_go_on(
    runtime: DistributedRuntime, trainer: RankProcess, coordinator: subprocess.Popen
) -> None:
    caller = Caller(runtime)
    await hear(trainer, "ready")
    await until(caller, (1, 1), SECONDS)
    await refused(trainer, 1)
    before = [await caller.instances(path) for path in (WEIGHTS, STATUS)]

    stalled = (trainer.child, coordinator)
    for process in stalled:
        process.send_signal(signal.SIGSTOP)
    try:
        await until(caller, (0, 0), FORGOTTEN_SECONDS)
    finally:
        for process in stalled:
            process.send_signal(signal.SIGCONT)

    await until(caller, (1, 1), SECONDS)
    assert before == [await caller.instances(path) for path in (WEIGHTS, STATUS)]
    topic = runtime.endpoint("dynamo.refit.refit_events")
    async with EventSubscriber(topic) as events:
        await refused(trainer, 2)
        [_, [instance]] = before
        status = await caller.call(STATUS, instance, GetStatus(), FleetStatus, 10)
        assert status.model == "another"
        # Whoever has come after the stall hears of it too, sooner or later.
        version = 2
        async with asyncio.timeout(SECONDS):
            hearing = asyncio.ensure_future(anext(events))
            while not hearing.done():
                version += 1
                await refused(trainer, version)
        event = await hearing
    assert isinstance(event, RefitRefused)
    assert (event.reason, event.sender) == (
        "unknown_model",
        f"coordinator-{instance}.1",
    )
