# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A pull's two threads: what is posted when, what follows in which order, and what
is waited for when something fails."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import StagingCancelled, TransferFailed
from dynamo.refit.rank import pipeline as pipeline_module
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.pipeline import Pipeline

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(60),
]

#: For what happens on another thread.
PATIENCE = 10.0

#: Long enough for a thread that does not wait to go on.
MOMENT = 0.05


class FakeRead:
    """A read that arrives when it is told to, or at its ``polls``-th poll.

    With an ``error`` it breaks off then. ``on_post`` stands for the bytes that begin
    to come in.
    """

    def __init__(
        self,
        peer: str = "trainer",
        *,
        polls: float = math.inf,
        error: Exception | None = None,
        on_post: Callable[[], None] = lambda: None,
    ) -> None:
        self.peer = peer
        self.posted = 0
        self.polled = 0
        self._polls = polls
        self._error = error
        self._on_post = on_post

    def post(self) -> bool:
        self.posted += 1
        self._on_post()
        return self.done()

    def done(self) -> bool:
        assert self.posted, "polled before it was posted"
        self.polled += 1
        if self.polled <= self._polls:
            return False
        if self._error is not None:
            raise self._error
        return True

    def arrive(self) -> None:
        self._polls = 0


def arrived(peer: str = "trainer") -> FakeRead:
    """A read that is done when it is posted."""
    return FakeRead(peer, polls=0)


def broken(polls: int = 2) -> FakeRead:
    return FakeRead(polls=polls, error=TransferFailed("the read broke off"))


@dataclass
class FakeFollower:
    """A follower that works when it is told to; ``waiting`` has what it was given."""

    settled: list[int] = field(default_factory=list)
    waiting: list[tuple[Future, int]] = field(default_factory=list)
    error: Exception | None = None

    def submit(self, settle: Callable[[int], None], number: int) -> Future:
        future: Future = Future()
        assert settle == self.settle
        self.waiting.append((future, number))
        return future

    def settle(self, number: int) -> None:
        self.settled.append(number)
        if self.error is not None:
            raise self.error

    @property
    def given(self) -> list[int]:
        return [number for _, number in self.waiting]

    def work(self) -> None:
        """Do everything that waits."""
        while self.waiting:
            future, number = self.waiting.pop(0)
            try:
                self.settle(number)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)


@dataclass
class FakeClock:
    """When to stop: ``cancelled``, or the ``deadline`` in monotonic seconds."""

    deadline: float = math.inf
    cancelled: bool = False

    def limit(self) -> Limit:
        return Limit(self.deadline, lambda: self.cancelled)


def new(follower: FakeFollower, clock: FakeClock | None = None) -> Pipeline:
    return Pipeline((clock or FakeClock()).limit(), follower.submit, follower.settle)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "MAX_POLL_SECONDS", 0.0001)


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    """Where the test lets something block."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def still_blocked(call: Future) -> bool:
    time.sleep(MOMENT)
    return not call.done()


# --- straight into the arena --------------------------------------------------


def test_straight_waves_are_posted_without_waiting() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    waves = [[FakeRead(), FakeRead()] for _ in range(5)]
    for number, reads in enumerate(waves):
        pipeline.post(number, None, reads)
    assert [[read.posted for read in reads] for reads in waves] == [[1, 1]] * 5
    assert follower.given == []


def test_what_has_arrived_is_handed_on_at_the_next_post() -> None:
    """The follower works while the reads of the other waves are posted."""
    follower = FakeFollower()
    pipeline = new(follower)
    pipeline.post(0, None, [arrived(), arrived()])
    assert follower.given == [0]
    late = FakeRead()
    pipeline.post(1, None, [late])
    pipeline.post(2, None, [arrived()])
    assert follower.given == [0]
    late.arrive()
    pipeline.post(3, None, [FakeRead()])
    assert follower.given == [0, 1, 2]


def test_waves_settle_in_order_whatever_arrives_first() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    reads = [FakeRead(polls=polls) for polls in (9, 0, 5, 1, 3)]
    for number, read in enumerate(reads):
        pipeline.post(number, None, [read])
    assert follower.given == []
    for read in reads:
        read.arrive()
    pipeline.post(5, None, [arrived()])
    assert follower.given == [0, 1, 2, 3, 4, 5]


def test_every_read_of_a_wave_is_polled_each_time() -> None:
    """A poll drives a read's progress, and the first of them may be the last."""
    pipeline = new(FakeFollower())
    reads = [FakeRead(), FakeRead(), FakeRead()]
    pipeline.post(0, None, reads)
    before = [read.polled for read in reads]
    assert len(set(before)) == 1
    pipeline.post(1, None, [FakeRead()])
    assert [read.polled for read in reads] == [before[0] + 1] * 3


def test_a_wave_without_reads_has_arrived() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    pipeline.post(0, 0, [])
    pipeline.post(1, None, [])
    assert follower.given == [0, 1]


def test_a_drain_ends_when_everything_has_settled(thread: ThreadPoolExecutor) -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    reads = [FakeRead(), FakeRead()]
    for number, read in enumerate(reads):
        pipeline.post(number, None, [read])
    drained = thread.submit(pipeline.drain)
    assert still_blocked(drained)
    reads[1].arrive()
    assert still_blocked(drained)
    assert follower.given == []
    reads[0].arrive()
    until(lambda: follower.given == [0, 1])
    assert still_blocked(drained)
    follower.work()
    assert drained.result(PATIENCE) is None
    assert follower.settled == [0, 1]


def test_a_pull_of_nothing_ends_at_once() -> None:
    pipeline = new(FakeFollower())
    pipeline.drain()
    pipeline.join()


def test_the_wire_is_timed_from_the_first_post_to_the_last_arrival(
    thread: ThreadPoolExecutor,
) -> None:
    """What follows the arrivals is not part of it."""
    follower = FakeFollower()
    pipeline = new(follower)
    assert pipeline.wire_seconds == 0.0
    read = FakeRead()
    pipeline.post(0, None, [read])
    assert pipeline.wire_seconds == 0.0
    drained = thread.submit(pipeline.drain)
    assert still_blocked(drained)
    read.arrive()
    until(lambda: follower.given == [0])
    taken = pipeline.wire_seconds
    assert MOMENT <= taken < PATIENCE
    assert still_blocked(drained)
    follower.work()
    drained.result(PATIENCE)
    assert pipeline.wire_seconds == taken


# --- through scratch ----------------------------------------------------------


def test_each_half_of_scratch_has_a_wave_under_way() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    reads = [FakeRead(), FakeRead()]
    for half, read in enumerate(reads):
        pipeline.post(half, half, [read])
    assert [read.posted for read in reads] == [1, 1]


def test_a_half_is_not_read_into_before_its_wave_has_settled(
    thread: ThreadPoolExecutor,
) -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    first, second, third = FakeRead(), FakeRead(), FakeRead()
    pipeline.post(0, 0, [first])
    pipeline.post(1, 1, [second])
    posting = thread.submit(pipeline.post, 2, 0, [third])
    # Its bytes have not arrived, ...
    assert still_blocked(posting)
    assert third.posted == 0
    first.arrive()
    # ... have arrived and are waiting for the follower, ...
    until(lambda: follower.given == [0])
    assert still_blocked(posting)
    assert third.posted == 0
    # ... and have been dealt with.
    follower.work()
    posting.result(PATIENCE)
    assert third.posted == 1
    # The other half was no part of it.
    assert second.posted == 1
    assert follower.settled == [0]


def test_a_half_is_waited_for_over_the_waves_before_it(
    thread: ThreadPoolExecutor,
) -> None:
    """They are handed on first: the follower's order is the order of the waves."""
    follower = FakeFollower()
    pipeline = new(follower)
    straight, first = FakeRead(), arrived()
    pipeline.post(0, None, [straight])
    pipeline.post(1, 0, [first])
    again = FakeRead()
    posting = thread.submit(pipeline.post, 2, 0, [again])
    assert still_blocked(posting)
    assert follower.given == []
    straight.arrive()
    until(lambda: follower.given == [0, 1])
    assert again.posted == 0
    follower.work()
    posting.result(PATIENCE)
    assert again.posted == 1


def test_a_half_that_has_settled_is_free_at_once() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    for number in range(6):
        pipeline.post(number, number % 2, [arrived()])
        follower.work()
    assert follower.settled == [0, 1, 2, 3, 4, 5]


def test_a_half_whose_wave_could_not_be_dealt_with_is_not_read_into() -> None:
    follower = FakeFollower(error=TransferFailed("no room to land"))
    pipeline = new(follower)
    pipeline.post(0, 0, [arrived()])
    follower.work()
    read = FakeRead()
    with pytest.raises(TransferFailed, match="no room to land"):
        pipeline.post(1, 0, [read])
    assert read.posted == 0


@dataclass
class Scratch:
    """Two halves that hold the number of the wave that was read into them last."""

    held: dict[int | None, int] = field(default_factory=dict)
    settled: list[int] = field(default_factory=list)
    spoiled: list[int] = field(default_factory=list)


@st.composite
def pulls(draw: st.DrawFn) -> list[tuple[int | None, list[int], int]]:
    """As planned: straight waves, then the halves by turns. Per wave its half, after
    how many polls each read arrives, and milliseconds of what follows."""
    straight = draw(st.integers(0, 3))
    through = draw(st.integers(0, 6))
    halves = [None] * straight + [number % 2 for number in range(through)]
    reads = st.lists(st.integers(0, 6), min_size=1, max_size=3)
    return [(half, draw(reads), draw(st.integers(0, 2))) for half in halves]


@settings(max_examples=100, deadline=None)
@given(waves=pulls())
def test_nothing_is_overwritten_and_everything_settles_in_order(
    waves: list[tuple[int | None, list[int], int]],
) -> None:
    scratch = Scratch()

    def settle(number: int) -> None:
        half, _, milliseconds = waves[number]
        for _ in range(2):
            if half is not None and scratch.held[half] != number:
                scratch.spoiled.append(number)
            time.sleep(milliseconds / 1e3)
        scratch.settled.append(number)

    with ThreadPoolExecutor(1) as follower:
        pipeline = Pipeline(FakeClock().limit(), follower.submit, settle)
        for number, (half, reads, _) in enumerate(waves):

            def come_in(half: int | None = half, number: int = number) -> None:
                scratch.held[half] = number

            fakes = [FakeRead(polls=polls, on_post=come_in) for polls in reads]
            pipeline.post(number, half, fakes)
        pipeline.drain()
        assert scratch.settled == list(range(len(waves)))
        pipeline.join()
    assert scratch.spoiled == []


# --- limits -------------------------------------------------------------------


def test_nothing_is_posted_after_a_cancel() -> None:
    follower, clock = FakeFollower(), FakeClock()
    pipeline = new(follower, clock)
    pipeline.post(0, None, [FakeRead()])
    clock.cancelled = True
    read = FakeRead()
    with pytest.raises(StagingCancelled, match="cancelled while pulling"):
        pipeline.post(1, None, [read])
    assert read.posted == 0


def test_nothing_is_posted_after_the_deadline() -> None:
    pipeline = new(FakeFollower(), FakeClock(deadline=time.monotonic() - 1))
    read = FakeRead()
    with pytest.raises(StagingCancelled, match="out of time while pulling"):
        pipeline.post(0, None, [read])
    assert read.posted == 0


@pytest.mark.parametrize("half", [None, 0])
def test_a_cancel_ends_the_wait_for_sources_that_are_silent(
    half: int | None, thread: ThreadPoolExecutor
) -> None:
    clock = FakeClock()
    pipeline = new(FakeFollower(), clock)
    pipeline.post(0, half, [FakeRead("trainer-0"), FakeRead("trainer-3")])
    wait = pipeline.drain if half is None else (lambda: pipeline.post(1, 0, []))
    waiting = thread.submit(wait)
    assert still_blocked(waiting)
    clock.cancelled = True
    with pytest.raises(
        StagingCancelled, match="cancelled while pulling from trainer-0, trainer-3"
    ):
        waiting.result(PATIENCE)


def test_the_deadline_ends_the_wait_and_names_the_sources() -> None:
    began = time.monotonic()
    pipeline = new(FakeFollower(), FakeClock(deadline=began + 0.1))
    pipeline.post(0, None, [arrived("trainer-0")])
    pipeline.post(1, None, [FakeRead("trainer-1")])
    with pytest.raises(
        StagingCancelled, match="out of time while pulling from trainer-1: the source"
    ):
        pipeline.drain()
    assert 0.1 <= time.monotonic() - began < PATIENCE


def test_a_cancel_after_the_last_byte_does_not_undo_the_pull() -> None:
    follower, clock = FakeFollower(), FakeClock()
    pipeline = new(follower, clock)
    pipeline.post(0, None, [arrived()])
    clock.cancelled = True
    follower.work()
    pipeline.drain()
    assert follower.settled == [0]


# --- failures -----------------------------------------------------------------


def test_a_read_that_breaks_off_ends_the_drain() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    pipeline.post(0, None, [arrived()])
    pipeline.post(1, None, [FakeRead(), broken(polls=3)])
    pipeline.post(2, None, [arrived()])
    with pytest.raises(TransferFailed, match="the read broke off"):
        pipeline.drain()
    # The broken wave and what came after it are not looked at.
    assert follower.given == [0]


def test_a_read_that_breaks_off_ends_a_later_post() -> None:
    follower = FakeFollower()
    pipeline = new(follower)
    pipeline.post(0, None, [broken(polls=2)])
    with pytest.raises(TransferFailed, match="the read broke off"):
        pipeline.post(1, None, [FakeRead()])
    assert follower.given == []


def test_a_read_that_cannot_be_posted_ends_the_post() -> None:
    def refuse() -> None:
        raise TransferFailed("cannot read from 'trainer'")

    follower = FakeFollower()
    pipeline = new(follower)
    pipeline.post(0, None, [arrived()])
    after = FakeRead()
    with pytest.raises(TransferFailed, match="cannot read"):
        pipeline.post(1, None, [arrived(), FakeRead(on_post=refuse), after])
    assert after.posted == 0
    assert follower.given == [0]


def test_the_first_failure_of_the_follower_is_the_drain_s() -> None:
    follower = FakeFollower(error=ValueError("cannot convert"))
    pipeline = new(follower)
    pipeline.post(0, None, [arrived()])
    pipeline.post(1, None, [arrived()])
    follower.work()
    with pytest.raises(ValueError, match="cannot convert"):
        pipeline.drain()
    pipeline.join()


@pytest.mark.parametrize("failure", ["read", "post", "cancel", "deadline", "settle"])
def test_a_join_waits_for_the_follower_whatever_failed(
    failure: str, thread: ThreadPoolExecutor
) -> None:
    """The buffers are given back after it: nobody may still be at work in them."""
    working, may_end = threading.Event(), threading.Event()
    ended: list[int] = []

    def settle(number: int) -> None:
        if number == 0 and failure == "settle":
            raise TransferFailed("settle")
        working.set()
        assert may_end.wait(PATIENCE)
        ended.append(number)

    def refuse() -> None:
        raise TransferFailed("post")

    clock = FakeClock()
    with ThreadPoolExecutor(1) as follower:
        limit = Limit(math.inf, lambda: clock.cancelled)
        if failure == "deadline":
            limit = Limit(time.monotonic() + MOMENT, lambda: False)
        pipeline = Pipeline(limit, follower.submit, settle)
        pipeline.post(0, 0, [arrived()])
        pipeline.post(1, 1, [arrived()])
        assert working.wait(PATIENCE)
        clock.cancelled = failure == "cancel"
        with pytest.raises((TransferFailed, StagingCancelled)):
            match failure:
                case "read":
                    pipeline.post(2, None, [broken()])
                    pipeline.drain()
                case "post":
                    pipeline.post(2, None, [FakeRead(on_post=refuse)])
                case "settle":
                    pipeline.drain()
                case "deadline":
                    pipeline.post(2, None, [FakeRead()])
                    pipeline.drain()
                case "cancel":
                    pipeline.post(2, None, [FakeRead()])
        joined = thread.submit(pipeline.join)
        assert still_blocked(joined)
        assert ended == []
        may_end.set()
        joined.result(PATIENCE)
        assert ended == ([1] if failure == "settle" else [0, 1])
