# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's loop: what it hears, in which order, and what ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from dynamo.refit import __main__ as program
from dynamo.refit.args import parse_args
from dynamo.refit.coordinator import commit, policy
from dynamo.refit.coordinator.actions import FleetSeen
from dynamo.refit.coordinator.component import (
    STEP_SECONDS,
    Coordinator,
    CoordinatorReplaced,
    SteadyClock,
)
from dynamo.refit.errors import EventRefused, RefitError, failure_from
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    WeightVersionReady,
    encode,
)
from dynamo.refit.protocol import (
    AcquireLease,
    Command,
    Commit,
    Done,
    Fence,
    FleetMember,
    Message,
    Prepare,
    Refused,
    ReleaseLease,
)
from dynamo.refit.publish.publication import PublicationLog
from dynamo.refit.rpc import PeerLost
from dynamo.refit.worker import ranks
from tests.support.fake_replica import WORKER, fingerprints_of
from tests.support.fake_replica import Bench as ReplicaBench
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
        self.coordinator = Coordinator(
            config, self.workers, self.events.append, EPOCH, "coordinator-7"
        )
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


# --- what everything carries --------------------------------------------------


async def test_commands_and_events_say_whose_they_are_and_in_which_order() -> None:
    bench = Bench()
    await bench.completed()
    commands = [r for r in bench.workers.requests if isinstance(r, Command)]
    assert {type(r) for r in commands} >= {AcquireLease, Prepare, Commit}
    assert {(r.model, r.epoch, r.sender) for r in commands} == {
        ("tiny", EPOCH, "coordinator-7")
    }
    sequences = [r.sequence for r in commands]
    assert sorted(sequences) == list(range(1, len(commands) + 1))
    assert {event.model for event in bench.events} == {"tiny"}


# --- events that cannot be sent -----------------------------------------------


async def heard(bench: Bench, event: WeightVersionReady) -> list[Event]:
    """What is published because of ``event``, by a loop that goes on afterwards."""
    bench.coordinator.hear(event)
    await bench.completed()
    return bench.events


async def test_a_refusal_of_70_kb_is_cut_and_ends_nobody() -> None:
    bench = Bench()
    huge = msgspec.structs.replace(
        V5, model="\x01" * 70_000, version=6, announcement_id="huge"
    )
    [refused] = [e for e in await heard(bench, huge) if isinstance(e, RefitRefused)]
    assert refused.reason == "unknown_model"
    assert len(encode(refused)) < 32 * 1024


async def test_a_publish_that_fails_does_not_end_the_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[Event] = []

    def publish(event: Event) -> None:
        told.append(event)
        raise EventRefused("too large")

    workers = Workers()
    coordinator = Coordinator(parse_args(["--model", "tiny"]), workers, publish, EPOCH)
    coordinator.hear(fleet(member(1, 4)))
    coordinator.hear(V5)
    running = asyncio.create_task(coordinator.run())
    await until_true(lambda: any(isinstance(e, RefitCompleted) for e in told))
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    assert "RefitCompleted was not published" in caplog.text


# --- two coordinators ---------------------------------------------------------


async def test_one_that_sees_a_newer_epoch_ends_and_says_nothing_more() -> None:
    bench = Bench()
    bench.workers.before_commit = lambda worker: None
    obeys = member(1, 4)
    status = msgspec.structs.replace(obeys.status, epoch=EPOCH + 1)
    obeys = msgspec.structs.replace(obeys, status=status)
    bench.coordinator.hear(fleet(obeys, member(2, 4)))
    with pytest.raises(CoordinatorReplaced, match=r"worker 1 obeys.* 101"):
        await bench.coordinator.run()
    assert bench.workers.asked(ReleaseLease) == []


class Namespace:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: the product's agent, and a
    trainer's log of one version that is published in place."""

    def __init__(self) -> None:
        self.replica = ReplicaBench()
        self.log = PublicationLog("t", slots=1, in_place=True, ready_seconds=300.0)
        self.published = self.log.open(5, 0.0)
        # What the replica's fake trainer knows it as.
        self.published.announcement_id = "a5"
        self.published.complete(fingerprints_of(5))
        self.log.to_announce()
        self.replies: list[tuple[int, str, Message]] = []

    def ready(self) -> WeightVersionReady:
        prepare = self.replica.prepare(5)
        return WeightVersionReady(
            model="tiny",
            version=5,
            announcement_id=self.published.announcement_id,
            endpoint=prepare.endpoint,
            instance=prepare.instance,
            manifest_digest=prepare.manifest_digest,
            slot=0,
            fingerprint=self.published.fingerprint,
        )

    async def call(
        self, path: str, instance: int, request: Message, *_: object
    ) -> Message:
        await asyncio.sleep(0.002)
        now = time.monotonic()
        try:
            match request:
                case AcquireLease():
                    name = request.announcement_id
                    self.log.acquire(name, request.epoch, request.seconds, now)
                    reply = Done()
                case ReleaseLease():
                    name, outcome = request.announcement_id, request.outcome
                    self.log.release(name, request.epoch, outcome, request.detail, now)
                    reply = Done()
                case _:
                    reply = await self.replica.agent.answer(request)
        except RefitError as error:
            reply = Refused(failure=failure_from(error, stage="x"))
        self.replies.append((request.epoch, type(request).__name__, reply))
        return reply


async def test_the_older_of_two_gives_way_while_it_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It neither ends the trainer's handle nor drops the newer one's lease."""
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.001)
    namespace = Namespace()
    replica, published = namespace.replica, namespace.published
    await replica.agent.start()
    config = parse_args(["--model", "tiny"])
    told: list[Event] = []
    old, new = (
        Coordinator(config, namespace, told.append, epoch) for epoch in (100, 200)
    )
    seen = FleetMember(
        worker=WORKER, component="backend", status=replica.agent.status()
    )
    replica.engine.hold("stage")
    running = {}
    for coordinator in (old, new):
        coordinator.hear(FleetSeen((seen,)))
        coordinator.hear(namespace.ready())
        running[coordinator] = asyncio.create_task(coordinator.run())
        await until_true(lambda: bool(replica.engine.jobs()[0]))
        await asyncio.sleep(0.05)
    with pytest.raises(CoordinatorReplaced):
        await running[old]
    (given_up,) = [
        reply for epoch, kind, reply in namespace.replies
        if (epoch, kind) == (100, "Prepare")
    ]  # fmt: skip
    assert given_up.failure.kind == "StaleEpoch"
    assert not published.ended and published.leased(time.monotonic())
    replica.engine.let("stage")
    await until_true(lambda: published.ended)
    assert published.verdict.outcome == "completed"
    replica.assert_serving(5)
    running[new].cancel()
    await asyncio.wait([running[new]])
    assert not [event for event in told if isinstance(event, RefitFailed)]


async def until_true(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_process_ends_with_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def worker(config: object) -> None:
        replaced = CoordinatorReplaced("worker 1 obeys a newer one")
        raise ExceptionGroup("tasks", [ExceptionGroup("tasks", [replaced])])

    monkeypatch.setattr(program, "worker", worker)
    monkeypatch.setattr(program, "parse_args", lambda: None)
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 1
    [record] = [r for r in caplog.records if r.levelname == "ERROR"]
    assert "CoordinatorReplaced: worker 1 obeys a newer one" in record.getMessage()
