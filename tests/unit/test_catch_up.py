# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Workers that join or were left behind come to what the fleet serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from dynamo.refit.coordinator.actions import (
    Action,
    GiveBackLease,
    Publish,
    ReleasePeer,
    SendAdmit,
    SendCommit,
    SendPrepare,
    SendServe,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.coordinator.upkeep import (
    CATCH_UP_SECONDS,
    CATCH_UPS,
)
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
    WorkerAdmitted,
    WorkerJoined,
)
from tests.support.fleet import (
    COMMIT_DEADLINE,
    POLICY,
    V5,
    V6,
    aborts,
    commit_refused,
    commits,
    committed,
    committing,
    completed,
    done,
    events,
    failure,
    fences,
    fleet,
    joiner,
    leased,
    member,
    new,
    not_leased,
    of_type,
    prepares,
    ready,
    serves,
    serves_not,
    vote_refused,
    voted,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def catch_up(reconciler: Reconciler) -> WeightVersionReady:
    """What is under way, as it is called this time."""
    assert reconciler.transaction is not None and reconciler.transaction.catch_up
    return reconciler.transaction.ready


def admitted(actions: list[Action]) -> list[int]:
    return [action.worker for action in of_type(actions, SendAdmit)]


def tries(reconciler: Reconciler, now: float) -> bool:
    """Whether somebody is brought along from then on."""
    reconciler.handle(Tick(), now)
    return reconciler.transaction is not None


# --- joiners ----------------------------------------------------------------------


def test_a_joiner_is_brought_to_the_served_version_by_a_worker() -> None:
    reconciler = done(V5, 1)
    joined, started, asked = reconciler.handle(fleet(member(1, 5), joiner(2)), 10.0)
    assert joined == Publish(WorkerJoined(worker=2, version=None))
    assert started == Publish(
        RefitStarted(model="tiny", version=5, workers=(2,), catch_up=True)
    )
    what = catch_up(reconciler)
    assert (what.version, what.fingerprint) == (5, "weights-5")
    assert what.announcement_id != "a5"
    assert asked == SendServe(1, 2, what)

    answer = serves(1, 2, what)
    assert reconciler.handle(answer, 11.0) == [SendPrepare(2, what, 1, answer.reply)]
    assert reconciler.handle(voted(2, what), 12.0) == [
        ReleasePeer(1, "at 1 for 2"),
        SendCommit(2, what, "continue"),
    ]
    assert reconciler.handle(committed(2, what), 13.5) == [
        Publish(WorkerAdmitted(worker=2, version=5)),
        Publish(
            RefitCompleted(
                model="tiny",
                version=5,
                announcement_id=what.announcement_id,
                fingerprint="weights-5",
                workers=(1, 2),
                seconds=3.5,
                catch_up=True,
            )
        ),
    ]
    assert reconciler.handle(Tick(), 14.0) == []


def test_a_joiner_during_a_commit_is_caught_up_after_it() -> None:
    reconciler = committing(V5, 1)
    assert admitted(reconciler.handle(fleet(1, joiner(2)), 3.0)) == []
    reconciler.handle(committed(1, V5), 4.0)
    actions = reconciler.handle(Tick(), 5.0)
    assert admitted(actions) == []
    assert of_type(actions, SendServe) == [SendServe(1, 2, catch_up(reconciler))]


def test_a_joiner_takes_part_in_the_next_version() -> None:
    reconciler = new(member(1, 5), joiner(2))
    what = catch_up(reconciler)
    actions = reconciler.handle(V6, 1.0)
    assert actions[0] == Publish(RefitSuperseded(version=5, by=6, catch_up=True))
    assert of_type(actions, TakeLease)[0].ready == V6
    assert of_type(actions, GiveBackLease) == []
    assert [e.workers for e in events(actions, RefitStarted)] == [(1, 2)]
    # An answer to what was given up.
    assert reconciler.handle(serves(1, 2, what), 2.0) == [ReleasePeer(1, "at 1 for 2")]


def test_joiners_go_alone_even_with_a_barrier() -> None:
    """The fleet serves the version: nobody has to wait for anybody."""
    policy = replace(POLICY, commit="barrier")
    reconciler = new(member(1, 5), joiner(2), joiner(3), policy=policy)
    what = catch_up(reconciler)
    for worker in (2, 3):
        reconciler.handle(serves(1, worker, what), 1.0)
    reconciler.handle(voted(2, what), 2.0)
    actions = reconciler.handle(voted(3, what), 2.0)
    assert of_type(actions, SendCommit) == commits(what, 2, 3, step="all")
    reconciler.handle(commit_refused(2, what), 3.0)
    actions = reconciler.handle(committed(3, what), 4.0)
    [event] = events(actions, RefitCompleted)
    assert event.workers == (1, 3)
    assert event.excluded == (failure(2),)
    assert fences(actions) == {}


@pytest.mark.parametrize("order", ["rolling", "canary"])
def test_one_that_refuses_first_keeps_nobody_else_behind(order: Any) -> None:
    """Whatever the commit policy: there is no way back to wait for."""
    policy = replace(POLICY, commit=order, max_unavailable=1)
    reconciler = new(member(1, 5), joiner(2), joiner(3), policy=policy)
    what = catch_up(reconciler)
    for worker in (2, 3):
        reconciler.handle(serves(1, worker, what), 1.0)
    reconciler.handle(voted(2, what), 2.0)
    actions = reconciler.handle(voted(3, what), 2.0)
    assert of_type(actions, SendCommit) == commits(what, 2)
    assert reconciler.handle(commit_refused(2, what), 3.0) == commits(what, 3)


def test_one_that_cannot_stage_keeps_nobody_else_behind() -> None:
    reconciler = new(member(1, 5), joiner(2), joiner(3))
    what = catch_up(reconciler)
    for worker in (2, 3):
        reconciler.handle(serves(1, worker, what), 1.0)
    reconciler.handle(voted(2, what), 2.0)
    # Whoever has staged it may serve it, too.
    actions = reconciler.handle(vote_refused(3, what), 3.0)
    assert of_type(actions, SendServe) == [SendServe(2, 3, what)]
    reconciler.handle(serves(2, 3, what), 4.0)
    actions = reconciler.handle(vote_refused(3, what), 5.0)
    assert of_type(actions, SendCommit) == commits(what, 2)
    [event] = events(reconciler.handle(committed(2, what), 6.0), RefitCompleted)
    assert event.excluded == (failure(3),)


# --- where the version comes from ---------------------------------------------------


def test_what_no_worker_holds_comes_from_the_trainer_again() -> None:
    reconciler = done(V5, 1)
    actions = reconciler.handle(fleet(joiner(2)), 10.0)
    [lease] = of_type(actions, TakeLease)
    assert lease.ready == replace_policy(V5)
    assert reconciler.handle(V5, 10.5) == []
    assert reconciler.handle(leased(V5), 11.0) == [SendPrepare(2, lease.ready)]
    reconciler.handle(voted(2, V5), 12.0)
    actions = reconciler.handle(committed(2, V5), 13.0)
    assert actions[-1] == GiveBackLease(lease.ready, "completed", "")
    assert reconciler.handle(V5, 14.0) == [
        GiveBackLease(V5, "completed", "ended before")
    ]


def replace_policy(announced: WeightVersionReady) -> WeightVersionReady:
    """Catching up drains nobody."""
    return msgspec.structs.replace(announced, in_flight="continue")


def test_nobody_serves_older_weights_than_the_fleet_did() -> None:
    """All that had the version are gone, and so is the trainer: wait for a version."""
    reconciler = done(V5, 1, 2)
    reconciler.handle(fleet(member(3, 4), joiner(4)), 10.0)
    actions = reconciler.handle(not_leased(V5), 11.0)
    [event] = events(actions, RefitFailed)
    assert event.failure.kind == "NoSource"
    assert str(failure()) in event.failure.message
    assert "publish a new version" in event.failure.message
    for now in range(12, 200):
        actions = reconciler.handle(Tick(), float(now))
        assert admitted(actions) == [] and fences(actions) == {}
        if of_type(actions, TakeLease):
            reconciler.handle(not_leased(V5), float(now))
    assert of_type(reconciler.handle(V6, 200.0), TakeLease)


def test_a_coordinator_that_found_the_version_remembers_it_too() -> None:
    """It does not know the trainer: nobody has what the fleet served."""
    reconciler = new(member(1, 5), member(2, 5))
    assert reconciler.completed == 5
    actions = reconciler.handle(fleet(joiner(3)), 10.0)
    assert admitted(actions) == []
    [event] = events(actions, RefitFailed)
    assert event.failure.kind == "NoSource"


def test_the_trainer_is_asked_when_no_worker_can_serve() -> None:
    """Their layout may not be the published one."""
    reconciler = done(V5, 1)
    reconciler.handle(fleet(member(1, 5), joiner(2)), 10.0)
    reconciler.handle(serves_not(1, 2, catch_up(reconciler)), 10.0)
    assert reconciler.transaction is None
    actions = reconciler.handle(Tick(), 10.0 + CATCH_UP_SECONDS[0])
    assert [a.ready.announcement_id for a in of_type(actions, TakeLease)] == ["a5"]
    assert reconciler.handle(leased(V5), 12.0) == [SendPrepare(2, replace_policy(V5))]
    # The trainer is gone as well: a worker next time.
    reconciler = done(V5, 1)
    reconciler.handle(fleet(member(1, 5), joiner(2)), 10.0)
    reconciler.handle(serves_not(1, 2, catch_up(reconciler)), 10.0)
    reconciler.handle(Tick(), 11.0)
    reconciler.handle(not_leased(V5), 11.0)
    actions = reconciler.handle(Tick(), 11.0 + 2 * CATCH_UP_SECONDS[0])
    assert of_type(actions, SendServe) == [SendServe(1, 2, catch_up(reconciler))]


# --- tries ----------------------------------------------------------------------------


def fail_to_catch_up(reconciler: Reconciler, now: float) -> list[Action]:
    what = catch_up(reconciler)
    reconciler.handle(serves(1, 2, what), now)
    return reconciler.handle(vote_refused(2, what), now)


def test_a_worker_that_cannot_catch_up_is_fenced_after_some_tries() -> None:
    reconciler = new(member(1, 5), joiner(2))
    now = 1.0
    for number in range(CATCH_UPS):
        assert tries(reconciler, now)
        actions = fail_to_catch_up(reconciler, now)
        assert fences(actions) == ({2: 5} if number == CATCH_UPS - 1 else {})
        assert admitted(actions) == []
        now += 100.0
    # It is not tried again, and has to leave.
    assert not tries(reconciler, now)


def test_the_fleet_s_own_version_does_not_seem_to_fail() -> None:
    """It was completed: only the one that comes to it has failed, or waits."""
    reconciler = new(member(1, 5), joiner(2))
    [told] = events(fail_to_catch_up(reconciler, 1.0), RefitFailed)
    assert (told.version, told.catch_up) == (5, True)
    assert told.serving == ((1, 5), (2, None))
    assert tries(reconciler, 2.0)
    [given_up] = events(reconciler.handle(V6, 3.0), RefitSuperseded)
    assert given_up == RefitSuperseded(version=5, by=6, catch_up=True)
    # The fleet's next version is none.
    reconciler.handle(leased(V6), 4.0)
    [told] = events(reconciler.handle(vote_refused(2, V6), 5.0), RefitFailed)
    assert (told.version, told.catch_up) == (6, False)


def test_tries_are_further_and_further_apart() -> None:
    reconciler = new(member(1, 5), joiner(2))
    first, most = CATCH_UP_SECONDS
    now, wait = 1.0, first
    for _ in range(8):
        actions = reconciler.handle(serves_not(1, 2, catch_up(reconciler)), now)
        # Nobody can serve it: that is not the worker's fault.
        assert fences(actions) == {}
        assert not tries(reconciler, now + wait - 0.01)
        now += wait
        assert tries(reconciler, now)
        wait = min(2 * wait, most)
    assert wait == most


def test_one_success_makes_the_tries_close_again() -> None:
    reconciler = new(member(1, 5), joiner(2))
    fail_to_catch_up(reconciler, 1.0)
    assert tries(reconciler, 2.0)
    fail_to_catch_up(reconciler, 2.0)
    assert not tries(reconciler, 3.5) and tries(reconciler, 4.0)
    what = catch_up(reconciler)
    for answer in (serves(1, 2, what), voted(2, what), committed(2, what)):
        reconciler.handle(answer, 5.0)
    assert reconciler.serving() == ((1, 5), (2, 5))
    reconciler.handle(fleet(member(1, 5), joiner(3)), 6.0)
    what = catch_up(reconciler)
    reconciler.handle(serves_not(1, 3, what), 7.0)
    assert tries(reconciler, 8.0)


def test_what_a_worker_could_not_do_is_forgotten_when_it_has_come() -> None:
    reconciler = new(member(1, 5), joiner(2))
    for now in (1.0, 50.0):
        assert tries(reconciler, now)
        fail_to_catch_up(reconciler, now)
    tries(reconciler, 100.0)
    what = catch_up(reconciler)
    for answer in (serves(1, 2, what), voted(2, what), committed(2, what)):
        reconciler.handle(answer, 100.0)
    # The next version fails for it alone; then it has all its tries again.
    reconciler.handle(fleet(member(1, 6), member(2, 5)), 101.0)
    assert fences(fail_to_catch_up(reconciler, 102.0)) == {}


# --- survivors ------------------------------------------------------------------------


def test_a_restarted_coordinator_finds_the_version_installed() -> None:
    reconciler = new(member(1, 5), member(2, 5))
    assert reconciler.handle(V5, 1.0) == completed(V5, 1, 2, seconds=None)
    assert reconciler.completed == 5
    assert reconciler.handle(Tick(), 2.0) == []


def test_a_restarted_coordinator_brings_along_who_missed_the_commit() -> None:
    """Its trainer may be gone, and nobody announces the version again."""
    reconciler = new(member(1, 5), member(2, 4, phase="staged", pending=5))
    what = catch_up(reconciler)
    answer = serves(1, 2, what)
    assert reconciler.handle(answer, 1.0) == [SendPrepare(2, what, 1, answer.reply)]
    reconciler.handle(voted(2, what), 2.0)
    reconciler.handle(committed(2, what), 3.0)
    assert reconciler.serving() == ((1, 5), (2, 5))
    assert reconciler.handle(Tick(), 4.0) == []
    assert reconciler.completed == 5


def test_an_announcement_anew_goes_on_with_those_that_are_behind() -> None:
    """The trainer is there: it is asked, and workers that hold the version help."""
    policy = replace(POLICY, direct_readers=1)
    reconciler = Reconciler("tiny", policy)
    reconciler.handle(V5, 0.0)
    seen = fleet(member(1, 5), member(2, 4), member(3, 4))
    actions = reconciler.handle(seen, 1.0)
    assert of_type(actions, TakeLease)
    actions = reconciler.handle(leased(V5), 2.0)
    assert actions == [*prepares(V5, 2), SendServe(1, 3, V5)]


def test_a_restarted_coordinator_waits_for_a_commit_it_finds() -> None:
    undecided = member(2, 4, phase="committing", pending=5)
    reconciler = new(member(1, 5), undecided)
    assert reconciler.handle(V5, 1.0) == []
    assert reconciler.handle(fleet(member(1, 5), undecided), 2.0) == []
    actions = reconciler.handle(fleet(member(1, 5), member(2, 5)), 3.0)
    assert actions == completed(V5, 1, 2, seconds=None)


def test_a_commit_that_hangs_is_not_waited_for_for_ever() -> None:
    """The worker refuses, so that the version fails with its name."""
    undecided = member(2, 4, phase="committing", pending=5)
    reconciler = new(member(1, 5), undecided)
    assert reconciler.handle(V6, 1.0) == []
    bound = COMMIT_DEADLINE + POLICY.drain_seconds
    assert reconciler.handle(Tick(), bound) == []
    actions = reconciler.handle(Tick(), bound + 1.0)
    assert [e.workers for e in events(actions, RefitStarted)] == [(1, 2)]


def test_an_older_view_of_the_fleet_does_not_undo_a_commit() -> None:
    """The status was read before the commit and arrives after its reply."""
    reconciler = done(V5, member(1, 4))
    stale = fleet(member(1, 4, phase="committing", pending=5))
    assert reconciler.handle(stale, 4.0) == []
    assert reconciler.serving() == ((1, 5),)
    assert reconciler.handle(Tick(), 5.0) == []
    # Of start-up weights, too.
    assert reconciler.handle(fleet(1), 6.0) == []
    assert reconciler.handle(Tick(), 7.0) == []


def test_what_an_earlier_coordinator_had_staged_is_dropped() -> None:
    staged = member(1, 4, phase="staged", pending=5)
    actions = new().handle(fleet(staged, member(2, 4)), 0.0)
    assert aborts(actions) == {1: 5}


def test_it_is_dropped_where_nobody_serves_a_version_too() -> None:
    reconciler = new()
    actions = reconciler.handle(fleet(member(1, phase="staged", pending=5)), 0.0)
    assert aborts(actions) == {1: 5}
    # Once; if the worker does not hear it, its stage ends by itself.
    assert reconciler.handle(Tick(), 100.0) == []
    reconciler.handle(fleet(1), 101.0)
    actions = reconciler.handle(fleet(member(1, phase="staged", pending=5)), 102.0)
    assert aborts(actions) == {1: 5}


def test_a_fleet_of_fenced_workers_has_completed_nothing() -> None:
    reconciler = new(member(1, 4, phase="fenced"))
    actions = [*reconciler.handle(V5, 1.0), *reconciler.handle(Tick(), 2.0)]
    assert not events(actions, RefitCompleted)
    assert reconciler.completed is None


def test_the_same_number_with_other_weights_is_behind() -> None:
    """A worker that installed 5 was lost; another 5 completed without it."""
    one_at_a_time = replace(POLICY, max_unavailable=1)
    reconciler = committing(V5, 1, 2, policy=one_at_a_time)
    reconciler.handle(commit_refused(1, V5), 3.0)
    reconciler.handle(fleet(2), 4.0)
    again = ready(5, "again", fingerprint="weights-5b")
    reconciler.handle(again, 5.0)
    reconciler.handle(leased(again), 5.1)
    reconciler.handle(voted(2, again), 6.0)
    assert events(reconciler.handle(committed(2, again), 7.0), RefitCompleted)
    mixed = fleet(member(1, 5), member(2, 5, fingerprint="weights-5b"))
    actions = reconciler.handle(mixed, 8.0)
    [started] = events(actions, RefitStarted)
    assert (started.version, started.workers, started.catch_up) == (5, (1,), True)
    # It may not read from itself.
    [serve] = of_type(actions, SendServe)
    assert (serve.peer, serve.reader) == (2, 1)


def test_a_new_coordinator_takes_what_more_workers_have_under_one_number() -> None:
    other = member(1, 5, fingerprint="others")
    reconciler = Reconciler("tiny", POLICY)
    actions = reconciler.handle(fleet(other, member(2, 5), member(3, 5)), 0.0)
    [started] = events(actions, RefitStarted)
    assert (started.workers, started.catch_up) == ((1,), True)
    [serve] = of_type(actions, SendServe)
    assert (serve.reader, serve.ready.fingerprint) == (1, "weights-5")
