# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's loop: what it hears, in which order, and what ends it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from dynamo.refit.args import parse_args
from dynamo.refit.coordinator import commit, policy
from dynamo.refit.coordinator.component import (
    STEP_SECONDS,
    Coordinator,
    SteadyClock,
)
from dynamo.refit.events import Event, RefitCompleted
from dynamo.refit.protocol import (
    AcquireLease,
    Commit,
    Done,
    Fence,
    Message,
    Prepare,
    ReleaseLease,
)
from dynamo.refit.rpc import PeerLost
from tests.support.fleet import V5, committed, fleet, member, voted

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(30),
]

EPOCH = 100


class Workers:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: workers that do as they are
    told, and a trainer. ``before_commit`` is called with every commit, and may raise.
    """

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self.before_commit: Any = lambda worker: None

    def asked(self, kind: type) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    async def call(
        self, path: str, instance: int, request: Message, *_: object
    ) -> Message:
        self.requests.append(request)
        await asyncio.sleep(0)
        match request:
            case AcquireLease() | ReleaseLease():
                return Done()
            case Prepare():
                return voted(instance, V5).reply
            case Commit():
                self.before_commit(instance)
                # A reply takes some turns of the loop until it is read.
                for _ in range(10):
                    await asyncio.sleep(0)
                return committed(instance, V5).reply
        return Done()


class Bench:
    """A coordinator of two workers, which hears of version 5."""

    def __init__(self, *arguments: str) -> None:
        self.workers = Workers()
        self.events: list[Event] = []
        config = parse_args(["--model", "tiny", *arguments])
        self.coordinator = Coordinator(config, self.workers, self.events.append, EPOCH)
        self.coordinator.hear(fleet(member(1, 4), member(2, 4)))
        self.coordinator.hear(V5)

    async def completed(self) -> RefitCompleted:
        running = asyncio.create_task(self.coordinator.run())
        try:
            async with asyncio.timeout(10):
                while not self.of(RefitCompleted) and not running.done():
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.wait([running])
        [event] = self.of(RefitCompleted)
        return event

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


async def test_a_commit_whose_reply_is_lost_is_asked_for_again() -> None:
    bench = Bench("--commit-policy", "rolling")
    lost = {1: 2, 2: 1}

    def lose(worker: int) -> None:
        if lost[worker]:
            lost[worker] -= 1
            raise PeerLost("the stream is broken")

    bench.workers.before_commit = lose
    event = await bench.completed()
    assert (event.workers, event.excluded) == ((1, 2), ())
    assert bench.workers.asked(Fence) == []
    assert len(bench.workers.asked(Commit)) == 5


async def test_replies_that_wait_are_read_before_a_deadline_has_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process stands still for longer than a commit may take."""
    monkeypatch.setattr(commit, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(policy, "GRACE_SECONDS", 0.0)
    seconds = STEP_SECONDS + 0.2
    bench = Bench(
        "--commit-policy", "rolling", "--max-unavailable", "0",
        "--commit-seconds", str(seconds),
    )  # fmt: skip

    def stall(worker: int) -> None:
        if worker == 2:
            time.sleep(seconds + 0.5)

    bench.workers.before_commit = stall
    event = await bench.completed()
    assert (event.workers, event.excluded) == ((1, 2), ())
    assert bench.workers.asked(Fence) == []


def test_the_clock_does_not_count_a_stall() -> None:
    now = 50.0
    clock = SteadyClock(lambda: now)
    first = clock.read()
    now += 0.25
    assert clock.read() - first == 0.25
    now += 1000.0
    assert clock.read() - first == 0.25 + STEP_SECONDS
    now += 0.25
    assert clock.read() - first == 0.5 + STEP_SECONDS
