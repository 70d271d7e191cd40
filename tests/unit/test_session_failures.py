# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Pulls that go wrong: how they end, what may still arrive, and what is given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from dynamo.refit.errors import StagingCancelled, TransferFailed
from dynamo.refit.fingerprint import Batch
from dynamo.refit.protocol import StagingMode
from dynamo.refit.rank import runtime_parts, session, sessions
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.pipeline import Submit
from dynamo.refit.rank.session import Session
from dynamo.refit.rank.sessions import (
    MAX_ABANDONED,
    AbandonedSessions,
    KeptSessions,
)
from dynamo.refit.rank.stager import RankStager
from tests.support.fake_nixl import NEVER
from tests.support.layouts import ALWAYS_EXACT, ROOMY
from tests.support.rank import Rank, bytes_of, layer

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.fixture(scope="module")
def follower() -> Iterator[Submit]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_a_refused_source_leaves_nothing_behind(follower: Submit) -> None:
    """And takes nothing with it: the requests before it are still there."""
    rank = layer()
    addressed, held = rank.session.addressed_to, list(rank.agent.held)
    connected = +rank.agent.connected
    assert held
    rank.agent.refused.add("trainer-1")
    with pytest.raises(TransferFailed, match="trainer-1"):
        rank.address()
    assert (rank.session.addressed_to, rank.agent.held) == (addressed, held)
    assert +rank.agent.connected == connected

    rank.session.forget_requests()
    assert rank.agent.held == []
    assert not rank.agent.connected
    assert rank.session.addressed_to is None
    with pytest.raises(TransferFailed, match="no prepared requests"):
        rank.pull(0, follower)

    rank.agent.refused.clear()
    full = rank.layout.random_tensors(seed=9)
    rank.trainers.write(0, full)
    rank.address()
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)


@pytest.mark.parametrize("nth", [1, 3], ids=["first", "later"])
def test_a_session_that_finds_no_memory_leaves_nothing_registered(
    monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """But for the arena, which the next one uses."""
    rank = layer()
    before = dict(rank.agent.registered)
    made = []

    def run_short(*arguments: object) -> Batch:
        made.append(dict(rank.agent.registered))
        if len(made) == nth:
            raise torch.OutOfMemoryError("out of memory")
        return Batch(*arguments)

    def build() -> Session:
        return Session(
            rank.agent,
            rank.session.layout,
            rank.session.plan,
            rank.session.memory,
            rank.arena,
            rank.live,
            Cycle(),
        )

    with monkeypatch.context() as short:
        for module in (session, runtime_parts):
            short.setattr(module, "Batch", run_short)
        with pytest.raises(torch.OutOfMemoryError):
            build()
    # Scratch was there.
    assert len(made[-1]) == len(before) + 1
    assert rank.agent.registered == before

    build().close()
    assert rank.agent.registered == before


def test_what_shows_the_live_weights_finds_no_memory_at_stage(
    monkeypatch: pytest.MonkeyPatch, follower: Submit
) -> None:
    """And not after an install, where it would fence the worker."""
    rank = layer()
    full = rank.layout.random_tensors(seed=9)
    rank.trainers.write(0, full)

    def run_short(*_: object) -> Batch:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as short:
        short.setattr(runtime_parts, "Batch", run_short)
        with pytest.raises(torch.OutOfMemoryError):
            rank.pull(0, follower)
    assert not rank.session.poll_active()
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)
    with monkeypatch.context() as short:
        short.setattr(runtime_parts, "Batch", run_short)
        rank.install()
        rank.session.live_parts.check(rank.session.landed, rank=0)


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("mode", ["host", "host-no-undo"])
def test_a_read_that_breaks_off_ends_the_pull_and_the_next_one_is_whole(
    late: int, mode: StagingMode, follower: Submit
) -> None:
    rank = layer(mode=mode)
    full = rank.layout.random_tensors(seed=10)
    rank.trainers.write(0, full)
    rank.agent.late = late
    rank.agent.broken.add("trainer-1")
    with pytest.raises(TransferFailed, match="the read from 'trainer-1' broke off"):
        rank.pull(0, follower)

    # Those of the other source may be under way still, and end with the polls.
    deadline = time.monotonic() + 10
    while rank.session.poll_active():
        assert time.monotonic() < deadline
    assert rank.agent.active == 0
    rank.agent.broken.clear()
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)


def test_a_pull_that_is_given_up_is_active_until_its_bytes_have_landed(
    follower: Submit,
) -> None:
    rank = layer()
    rank.agent.late = NEVER
    stop = [False]

    def cancelled() -> bool:
        was, stop[0] = stop[0], rank.agent.active > 0
        return was

    with pytest.raises(StagingCancelled, match="cancelled while pulling"):
        rank.pull(0, follower, limit=Limit(time.monotonic() + 60, cancelled))
    assert rank.session.poll_active()
    with pytest.raises(TransferFailed, match="is still active"):
        rank.session.close()

    rank.agent.late = 0
    assert not rank.session.poll_active()
    rank.session.close()
    assert rank.agent.held == []


def test_a_source_that_does_not_answer_is_given_up_at_the_deadline(
    follower: Submit,
) -> None:
    rank = layer(limits=ROOMY)
    rank.agent.late = NEVER
    with pytest.raises(StagingCancelled) as caught:
        rank.pull(0, follower, limit=Limit(time.monotonic() + 0.02, lambda: False))

    assert str(caught.value).startswith(
        "out of time while pulling from trainer-0, trainer-1: the source does not"
    )
    assert rank.session.poll_active()


@pytest.mark.parametrize("last", [False, True], ids=["midway", "last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_local_work_that_fails_ends_the_pull_with_its_cause(
    last: bool, dtype: str
) -> None:
    rank = layer(dtype)
    waves = len(rank.session.plan.waves)
    bad = waves - 1 if last else 3
    futures: list[Future] = []

    def work_or_fail(work: Callable[[int], None], number: int) -> None:
        if number == bad:
            raise RuntimeError(f"no memory for wave {bad}")
        work(number)

    with ThreadPoolExecutor(1) as pool:

        def submit(*work) -> Future:
            futures.append(pool.submit(work_or_fail, *work))
            return futures[-1]

        with pytest.raises(RuntimeError, match=f"no memory for wave {bad}"):
            rank.pull(0, submit)
        assert all(future.done() for future in futures)
    assert not rank.session.poll_active()
    assert bad < len(futures) <= waves


def test_nobody_works_on_the_buffers_after_a_pull_has_failed() -> None:
    """The local work is still at the first wave when a later read breaks off."""
    rank = layer(costs=ALWAYS_EXACT)
    rank.agent.broken.add("trainer-1")
    futures: list[Future] = []

    with ThreadPoolExecutor(1) as pool:

        def slowly(*work) -> Future:
            pool.submit(time.sleep, 0.05)
            futures.append(pool.submit(*work))
            return futures[-1]

        with pytest.raises(TransferFailed):
            rank.pull(0, slowly)
        assert futures
        assert all(future.done() for future in futures)


def _give_up(rank: Rank, submit: Submit) -> None:
    rank.agent.late = NEVER
    with pytest.raises(StagingCancelled):
        rank.pull(0, submit, limit=Limit(time.monotonic() + 0.01, lambda: False))


def test_asking_whether_reads_are_active_drives_all_of_them(follower: Submit) -> None:
    rank = layer()
    _give_up(rank, follower)
    active = [read for read in rank.agent.prepared if read.active]
    before = [read.polls for read in active]

    assert rank.session.poll_active()
    assert len(active) > 1
    assert [read.polls for read in active] == [polls + 1 for polls in before]


def test_an_abandoned_session_is_kept_until_its_reads_have_ended(
    follower: Submit,
) -> None:
    rank, abandoned = layer(), AbandonedSessions()
    _give_up(rank, follower)
    abandoned.add(rank.session)
    for _ in range(3):
        abandoned.sweep()
        assert len(abandoned) == 1
    assert len(rank.agent.registered) == 3

    rank.agent.late = 0
    abandoned.sweep()
    assert len(abandoned) == 0
    assert rank.agent.held == []
    assert rank.agent.registered == {}
    assert not rank.agent.connected


def test_an_abandoned_arena_that_others_read_is_kept(follower: Submit) -> None:
    rank, abandoned = layer(), AbandonedSessions()
    _give_up(rank, follower)
    abandoned.add(rank.session)
    rank.agent.late = 0
    abandoned.sweep(lambda arena: arena is rank.arena)
    assert len(abandoned) == 1
    assert len(rank.agent.registered) == 3

    abandoned.sweep(lambda arena: arena is None)
    assert len(abandoned) == 0
    assert rank.agent.registered == {}


def test_too_many_abandoned_sessions_are_an_error_until_one_ends(
    follower: Submit,
) -> None:
    abandoned = AbandonedSessions()
    ranks = [layer() for _ in range(MAX_ABANDONED + 1)]
    for rank in ranks:
        _give_up(rank, follower)
        abandoned.add(rank.session)
    with pytest.raises(TransferFailed, match="stop the stuck trainer"):
        abandoned.sweep()
    assert len(abandoned) == MAX_ABANDONED + 1

    ranks[1].agent.late = 0
    abandoned.sweep()
    assert len(abandoned) == MAX_ABANDONED
    assert ranks[1].agent.registered == {}
    assert len(ranks[0].agent.registered) == len(ranks[2].agent.registered) == 3


def _stager_of(rank: Rank) -> RankStager:
    """What a stager knows of sessions, without an engine."""
    made = object.__new__(RankStager)
    made._sessions = KeptSessions()
    made.memory = SimpleNamespace(arena=rank.arena)
    made._sessions.put_in_place(rank.session)
    made._sessions.installed()
    return made


@pytest.mark.parametrize(
    "error",
    [StagingCancelled("superseded"), TransferFailed("another source broke off")],
    ids=["superseded", "failed"],
)
def test_a_pull_that_is_given_up_keeps_the_arena_if_its_reads_end(
    follower: Submit, error: Exception
) -> None:
    """Over a network one read is under way for nearly the whole transfer."""
    rank = layer()
    _give_up(rank, follower)
    rank.agent.late = 50
    made = _stager_of(rank)
    made._retire(rank.session, error)
    assert rank.agent.active == 0
    kept = made._sessions
    assert (kept.current, kept.proven, made.memory.arena, len(kept.abandoned)) == (
        rank.session,
        rank.session,
        rank.arena,
        0,
    )

    rank.agent.late = 0
    if not isinstance(error, StagingCancelled):
        rank.address()
    full = rank.layout.random_tensors(seed=11)
    rank.trainers.write(0, full)
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)


def test_reads_that_do_not_end_are_waited_for_so_long_and_no_longer(
    follower: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SETTLE_SECONDS", 0.2)
    rank = layer()
    _give_up(rank, follower)
    made, began = _stager_of(rank), time.monotonic()
    made._retire(rank.session, StagingCancelled("superseded"))
    assert 0.2 <= time.monotonic() - began < 5
    kept = made._sessions
    assert (kept.current, kept.proven, made.memory.arena) == (None, None, None)
    assert len(kept.abandoned) == 1


def test_requests_to_a_source_that_was_loaded_anew_are_made_again(
    follower: Submit,
) -> None:
    rank = layer()
    fingerprint = rank.session.addressed_to
    assert fingerprint is not None
    rank.agent.held[-1].stale = True
    assert rank.session.addressed_to is None

    rank.address()
    assert rank.session.addressed_to == fingerprint
    full = rank.layout.random_tensors(seed=12)
    rank.trainers.write(0, full)
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)
