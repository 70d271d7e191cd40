# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Announcements, and one refit up to its commit: inputs in, actions out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dynamo.refit.coordinator.actions import (
    Action,
    GiveBackLease,
    LeaseTaken,
    Publish,
    SendAbort,
    SendCommit,
    SendPrepare,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.announcements import REMEMBERED
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.errors import Failure
from dynamo.refit.events import RefitCompleted, RefitFailed, RefitRefused, WorkerJoined
from dynamo.refit.protocol import FleetMember
from tests.support.fleet import (
    POLICY,
    STAGE_DEADLINE,
    V5,
    V6,
    V7,
    aborts,
    commit_refused,
    committed,
    committing,
    completed,
    done,
    events,
    failed,
    failure,
    fleet,
    leased,
    member,
    new,
    not_leased,
    of_type,
    preparing,
    ready,
    started,
    superseded,
    vote_refused,
    voted,
    without,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: A policy per event, other than the coordinator's.
RECOMPUTE = "recompute"

#: Half of the workers are enough.
QUORUM = replace(POLICY, quorum=0.5)


# --- one refit ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [(1,), (1, 2, 3)])
def test_happy_path(workers: tuple[int, ...]) -> None:
    reconciler = Reconciler(None, POLICY)
    joined = reconciler.handle(fleet(*workers), 0.0)
    assert joined == [Publish(WorkerJoined(worker=w, version=None)) for w in workers]
    assert reconciler.model == "tiny"

    assert reconciler.handle(V5, 10.0) == started(V5, *workers)
    assert reconciler.handle(leased(V5), 11.0) == [
        SendPrepare(worker, V5) for worker in workers
    ]
    *others, last = workers
    for worker in others:
        assert reconciler.handle(voted(worker, V5), 12.0) == []
    assert reconciler.handle(voted(last, V5), 13.0) == [
        SendCommit(worker, V5, "continue") for worker in workers
    ]
    for worker in others:
        assert reconciler.handle(committed(worker, V5), 14.0) == []
    actions = reconciler.handle(committed(last, V5), 14.5)
    assert actions == completed(V5, *workers, seconds=4.5)

    assert reconciler.completed == 5
    assert reconciler.serving() == tuple((worker, 5) for worker in workers)
    assert reconciler.handle(Tick(), 1000.0) == []


def test_a_second_vote_and_a_stranger_s_vote_do_not_count() -> None:
    reconciler = preparing(V5, 1, 2)
    assert reconciler.handle(voted(1, V5), 2.0) == []
    assert reconciler.handle(voted(1, V5), 2.0) == []
    assert reconciler.handle(voted(3, V5), 2.0) == []
    assert reconciler.handle(vote_refused(3, V5), 2.0) == []
    assert len(reconciler.handle(voted(2, V5), 2.0)) == 2


def test_answers_for_another_announcement_or_phase_count_for_nothing() -> None:
    reconciler = preparing(V5, 1)
    for what in (
        voted(1, ready(5, "other")),
        vote_refused(1, V6),
        not_leased(V5),
        LeaseTaken("other", failure()),
        commit_refused(1, V5),
    ):
        assert reconciler.handle(what, 2.0) == []
    assert reconciler.handle(voted(1, V5), 2.0) == [SendCommit(1, V5, "continue")]
    assert reconciler.handle(vote_refused(1, V5), 2.0) == []
    assert reconciler.handle(committed(1, V5), 2.0) == completed(V5, 1, seconds=2.0)


def test_the_event_s_in_flight_policy_goes_before_the_coordinator_s() -> None:
    announced = ready(5, in_flight=RECOMPUTE)
    reconciler = preparing(announced, 1)
    actions = reconciler.handle(voted(1, announced), 2.0)
    assert actions == [SendCommit(1, announced, RECOMPUTE)]


def test_an_announcement_before_any_worker_waits_for_workers() -> None:
    reconciler = Reconciler(None, POLICY)
    assert reconciler.handle(V5, 0.0) == []
    assert reconciler.handle(Tick(), 500.0) == []
    actions = reconciler.handle(fleet(1, 2), 501.0)
    joined = [Publish(WorkerJoined(worker=w, version=None)) for w in (1, 2)]
    assert actions == [*joined, *started(V5, 1, 2)]


def test_the_time_that_is_told_begins_with_the_announcement() -> None:
    reconciler = Reconciler(None, POLICY)
    reconciler.handle(V5, 100.0)
    reconciler.handle(fleet(1), 150.0)
    reconciler.handle(leased(V5), 151.0)
    reconciler.handle(voted(1, V5), 152.0)
    actions = reconciler.handle(committed(1, V5), 160.0)
    assert actions == completed(V5, 1, seconds=60.0)


# --- weights and leases -------------------------------------------------------


def test_a_number_that_is_served_with_other_weights_is_refused() -> None:
    reconciler = Reconciler("tiny", POLICY)
    reconciler.handle(fleet(member(1, version=5), member(2)), 0.0)
    other = ready(5, announcement_id="again", fingerprint="others")
    refused, release = reconciler.handle(other, 1.0)
    assert isinstance(refused, Publish) and isinstance(refused.event, RefitRefused)
    assert refused.event.reason == "stale"
    assert "worker 1" in refused.event.detail
    assert isinstance(release, GiveBackLease) and release.outcome == "refused"


def test_a_vote_for_other_weights_fails_the_version_and_aborts_all() -> None:
    """One worker read other bytes than the others: nothing may be committed."""
    reconciler = preparing(V5, 1, member(2, 4))
    assert reconciler.handle(voted(1, V5), 2.0) == []
    actions = reconciler.handle(voted(2, V5, fingerprint="weights-4"), 3.0)
    assert aborts(actions) == {1: 5, 2: 5}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    why = event.failure
    assert (why.kind, why.stage) == ("FingerprintMismatch", "preparing")
    assert (why.worker, why.version) == (2, 5)
    assert "weights-4" in why.message and "weights-5" in why.message
    assert without(actions, SendAbort) == failed(V5, why, (1, None), (2, 4))
    assert reconciler.completed is None
    # The next version starts from scratch.
    assert reconciler.handle(V6, 4.0) == started(V6, 1, 2)


def test_two_versions_may_have_the_same_weights() -> None:
    reconciler = done(V5, 1)
    same = ready(6, "same", fingerprint=V5.fingerprint)
    reconciler.handle(same, 4.0)
    reconciler.handle(leased(same), 5.0)
    assert reconciler.handle(voted(1, same), 6.0) == [SendCommit(1, same, "continue")]
    assert reconciler.handle(committed(1, same), 7.0) == completed(same, 1, seconds=3.0)


# --- repeats and refusals -----------------------------------------------------


@pytest.mark.parametrize("stage", [preparing, committing])
def test_a_repeated_announcement_does_nothing(stage: Any) -> None:
    reconciler = stage(V5, 1, 2)
    assert reconciler.handle(V5, 3.0) == []


def test_a_repeat_after_the_end_only_releases_again() -> None:
    reconciler = done(V5, 1)
    for _ in range(2):
        [again] = reconciler.handle(V5, 4.0)
        assert isinstance(again, GiveBackLease)
        assert (again.ready, again.outcome) == (V5, "completed")


def test_a_repeat_of_what_is_committing_is_not_stale_when_a_newer_waits() -> None:
    reconciler = committing(V5, 1)
    reconciler.handle(V6, 3.0)
    assert reconciler.handle(V5, 4.0) == []


def test_an_unknown_model_is_refused_and_released() -> None:
    reconciler = new(1)
    actions = reconciler.handle(ready(5, model="huge"), 1.0)
    [event] = events(actions)
    assert isinstance(event, RefitRefused)
    assert (event.reason, event.version) == ("unknown_model", 5)
    assert (event.announcement_id, "'tiny'" in event.detail) == ("a5", True)
    detail = event.detail
    assert actions[1:] == [
        GiveBackLease(ready(5, model="huge"), "refused", detail),
    ]
    assert reconciler.handle(ready(1), 2.0) == started(ready(1), 1)


def test_a_model_that_turns_out_to_be_unknown_is_refused_then() -> None:
    reconciler = Reconciler(None, POLICY)
    huge = ready(1000, "huge", model="huge")
    assert reconciler.handle(huge, 0.0) == []
    actions = reconciler.handle(fleet(1), 1.0)
    refused = [e for e in events(actions) if isinstance(e, RefitRefused)]
    assert [event.reason for event in refused] == ["unknown_model"]
    [release] = [a for a in actions if isinstance(a, GiveBackLease)]
    assert (release.ready, release.outcome) == (huge, "refused")
    assert reconciler.handle(Tick(), 2.0) == []


def test_another_model_s_version_makes_none_of_this_one_stale() -> None:
    reconciler = Reconciler(None, POLICY)
    reconciler.handle(ready(1000, "huge", model="huge"), 0.0)
    reconciler.handle(fleet(1), 1.0)
    assert reconciler.handle(V5, 2.0) == started(V5, 1)


@pytest.mark.parametrize("workers", [(member(1, 6),), (1, member(2, 6))])
def test_a_version_older_than_what_is_served_is_refused(
    workers: tuple[FleetMember | int, ...],
) -> None:
    reconciler = new(*workers)
    actions = reconciler.handle(V5, 1.0)
    [event] = events(actions)
    assert isinstance(event, RefitRefused)
    assert (event.reason, event.version) == ("stale", 5)
    assert actions[1:] == [GiveBackLease(V5, "refused", event.detail)]


@pytest.mark.parametrize("stage", [preparing, committing, done])
def test_a_version_older_than_what_is_wanted_is_refused(stage: Any) -> None:
    reconciler = stage(V6, 1)
    [event] = events(reconciler.handle(V5, 4.0))
    assert isinstance(event, RefitRefused)
    assert event.reason == "stale"


def test_an_old_announcement_is_refused_when_the_first_workers_are_newer() -> None:
    """A coordinator that starts before discovery has the workers takes none back."""
    reconciler = Reconciler("tiny", POLICY)
    assert reconciler.handle(V5, 0.0) == []
    actions = reconciler.handle(fleet(member(1, 6)), 1.0)
    assert not any(isinstance(action, TakeLease) for action in actions)
    refused = [e for e in events(actions) if isinstance(e, RefitRefused)]
    assert [event.reason for event in refused] == ["stale"]
    [release] = [a for a in actions if isinstance(a, GiveBackLease)]
    assert (release.ready, release.outcome) == (V5, "refused")


# --- numbers -------------------------------------------------------------------


def refusals(actions: list[Action]) -> list[str]:
    return [event.reason for event in events(actions, RefitRefused)]


@pytest.mark.parametrize("end", ["not leased", "not staged", "not committed"])
def test_a_failed_number_blocks_none_that_is_above_what_is_served(end: str) -> None:
    typo = ready(4_200_000)
    if end == "not leased":
        reconciler = new(member(1, 5))
        reconciler.handle(typo, 1.0)
        actions = reconciler.handle(not_leased(typo), 2.0)
    elif end == "not staged":
        reconciler = preparing(typo, member(1, 5))
        actions = reconciler.handle(vote_refused(1, typo), 2.0)
    else:
        reconciler = committing(typo, member(1, 5))
        actions = reconciler.handle(commit_refused(1, typo), 3.0)
    assert events(actions, RefitFailed)
    # While the trainer has not heard it, it is told again.
    assert of_type(reconciler.handle(typo, 4.0), GiveBackLease)
    assert reconciler.handle(V6, 5.0) == started(V6, 1)
    reconciler.handle(leased(V6), 6.0)
    reconciler.handle(voted(1, V6), 7.0)
    assert events(reconciler.handle(committed(1, V6), 8.0), RefitCompleted)
    assert refusals(reconciler.handle(ready(5, "older"), 9.0)) == ["stale"]
    # The same number, and it is meant this time.
    assert reconciler.handle(ready(4_200_000, "again"), 10.0) == started(
        ready(4_200_000, "again"), 1
    )


def test_a_failed_number_may_be_used_again_with_other_weights() -> None:
    reconciler = new(member(1, 5))
    reconciler.handle(V6, 1.0)
    reconciler.handle(not_leased(V6), 2.0)
    again = ready(6, "again", fingerprint="others")
    assert reconciler.handle(again, 3.0) == started(again, 1)


def test_what_was_served_is_not_forgotten_with_the_worker_that_served_it() -> None:
    reconciler = done(V6, 1)
    reconciler.handle(fleet(), 4.0)
    reconciler.handle(fleet(2), 5.0)
    assert refusals(reconciler.handle(V5, 6.0)) == ["stale"]


def test_a_version_that_waits_for_a_commit_makes_older_ones_stale() -> None:
    reconciler = committing(V5, 1)
    reconciler.handle(V7, 3.0)
    assert refusals(reconciler.handle(V6, 4.0)) == ["stale"]


@pytest.mark.parametrize("number", [-1, -(2**63), 2**63])
@pytest.mark.parametrize("served", [None, 0, 4])
def test_a_number_out_of_range_is_refused_whatever_is_served(
    number: int, served: int | None
) -> None:
    reconciler = new(member(1, served))
    actions = reconciler.handle(ready(number), 1.0)
    [event] = events(actions)
    assert isinstance(event, RefitRefused)
    assert (event.reason, event.version) == ("malformed_event", number)
    assert "2**63 - 1" in event.detail
    assert [a.outcome for a in of_type(actions, GiveBackLease)] == ["refused"]
    assert reconciler.completed == served


def test_zero_is_a_version() -> None:
    reconciler = new(member(1, 0))
    assert reconciler.handle(ready(1), 1.0) == started(ready(1), 1)
    assert refusals(reconciler.handle(ready(0, "older"), 2.0)) == ["stale"]


def test_how_it_ended_is_remembered_however_many_others_are_refused() -> None:
    reconciler = done(V5, 1)
    for number in range(REMEMBERED + 1):
        other = ready(number, f"other-{number}", model="huge")
        assert len(reconciler.handle(other, 4.0)) == 2
    assert reconciler.handle(Tick(), 5.0) == []
    [again] = reconciler.handle(V5, 6.0)
    assert (again.ready, again.outcome) == (V5, "completed")


# --- newer versions -----------------------------------------------------------


def test_a_newer_version_supersedes_one_that_is_leasing() -> None:
    reconciler = new(1, 2)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(V6, 1.0) == [
        *superseded(V5, V6),
        *started(V6, 1, 2),
    ]
    late = reconciler.handle(leased(V5), 2.0)
    assert not any(isinstance(action, SendPrepare) for action in late)


def test_a_newer_version_supersedes_one_that_is_preparing() -> None:
    reconciler = preparing(V5, 1, 2)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(V6, 3.0)
    assert aborts(actions) == {1: 5, 2: 5}
    assert without(actions, SendAbort) == [*superseded(V5, V6), *started(V6, 1, 2)]
    # The old one's late votes are not votes for the new one.
    reconciler.handle(leased(V6), 4.0)
    assert reconciler.handle(voted(1, V5), 4.0) == []
    assert reconciler.handle(voted(2, V5), 4.0) == []


def test_a_newer_version_supersedes_one_that_waits_for_workers() -> None:
    reconciler = Reconciler("tiny", POLICY)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(V6, 1.0) == superseded(V5, V6)


def test_a_newer_version_waits_for_a_commit_and_then_follows() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(V6, 3.0) == []
    assert reconciler.handle(committed(1, V5), 4.0) == []
    actions = reconciler.handle(committed(2, V5), 5.0)
    assert actions[:2] == completed(V5, 1, 2, seconds=5.0)
    actions = actions[2:] + reconciler.handle(Tick(), 6.0)
    assert actions == started(V6, 1, 2)


def test_a_newer_version_follows_a_commit_that_failed() -> None:
    reconciler = committing(V5, 1)
    reconciler.handle(V6, 3.0)
    actions = reconciler.handle(commit_refused(1, V5), 4.0)
    assert actions[:2] == failed(V5, failure(1), (1, None))
    assert actions[2:] + reconciler.handle(Tick(), 5.0) == started(V6, 1)


def test_what_waits_for_a_commit_is_superseded_by_a_still_newer_one() -> None:
    """Else its trainer waits for a release that never comes."""
    reconciler = committing(V5, 1)
    assert reconciler.handle(V6, 3.0) == []
    assert reconciler.handle(V7, 4.0) == superseded(V6, V7)
    reconciler.handle(committed(1, V5), 5.0)
    reconciler.handle(Tick(), 6.0)
    assert reconciler.transaction.ready == V7


# --- failures -----------------------------------------------------------------


def test_a_lease_that_is_refused_fails_the_version() -> None:
    reconciler = new(member(1, 4), member(2, 4))
    reconciler.handle(V5, 0.0)
    actions = reconciler.handle(not_leased(V5), 1.0)
    assert actions == failed(V5, failure(), (1, 4), (2, 4))
    assert reconciler.handle(Tick(), 2.0) == []


def test_a_vote_that_is_refused_fails_the_version_and_aborts_the_others() -> None:
    reconciler = preparing(V5, 1, member(2, 4), 3)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(vote_refused(2, V5), 3.0)
    assert aborts(actions).items() >= {1: 5, 3: 5}.items()
    assert without(actions, SendAbort) == failed(
        V5, failure(2), (1, None), (2, 4), (3, None)
    )
    assert reconciler.transaction is None


def test_one_that_has_fenced_itself_while_it_staged_serves_nothing() -> None:
    reconciler = preparing(V5, 1, member(2, 4))
    actions = reconciler.handle(vote_refused(2, V5, fenced=True), 3.0)
    assert without(actions, SendAbort) == failed(V5, failure(2), (1, None))


def test_a_failed_announcement_is_not_tried_again_and_a_new_one_is() -> None:
    reconciler = preparing(V5, 1)
    reconciler.handle(vote_refused(1, V5), 2.0)
    assert reconciler.handle(Tick(), 500.0) == []
    assert reconciler.handle(fleet(1), 501.0) == []
    [again] = reconciler.handle(V5, 502.0)
    assert (again.ready, again.outcome) == (V5, "failed")

    once_more = ready(5, "a5-again")
    assert reconciler.handle(once_more, 503.0) == started(once_more, 1)


def test_no_lease_in_time_fails_the_version() -> None:
    reconciler = new(1, 2)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(Tick(), STAGE_DEADLINE) == []
    actions = reconciler.handle(Tick(), STAGE_DEADLINE + 1)
    assert aborts(actions) == {}
    event, release = without(actions, SendAbort)
    assert (event.event.failure.kind, event.event.version) == ("NoAnswer", 5)
    assert (release.ready, release.outcome) == (V5, "failed")


def test_no_vote_in_time_fails_the_version_and_names_the_worker() -> None:
    reconciler = preparing(V5, 1, 2)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(Tick(), STAGE_DEADLINE + 1)
    assert aborts(actions).items() >= {1: 5}.items()
    [event] = events(actions)
    why = event.failure
    assert (why.kind, why.stage, why.worker) == ("NoAnswer", "preparing", 2)
    assert why.version == 5


# --- the fleet changes --------------------------------------------------------


def test_a_worker_that_leaves_while_preparing_is_not_waited_for() -> None:
    reconciler = preparing(V5, 1, 2)
    assert reconciler.handle(voted(1, V5), 2.0) == []
    assert reconciler.handle(fleet(1), 3.0) == [SendCommit(1, V5, "continue")]
    # And it is told of.
    why = Failure(
        kind="WorkerLeft",
        message="left while the version was staged",
        stage="preparing",
        worker=2,
        version=5,
    )
    end = completed(V5, 1, seconds=4.0, excluded=(why,))
    assert reconciler.handle(committed(1, V5), 4.0) == end


def test_a_worker_that_leaves_while_leasing_is_not_asked() -> None:
    reconciler = new(1, 2)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(fleet(2), 1.0) == []
    assert reconciler.handle(leased(V5), 2.0) == [SendPrepare(2, V5)]


@pytest.mark.parametrize("keeps", [False, True])
def test_when_every_worker_leaves_before_the_commit_the_version_fails(
    keeps: bool,
) -> None:
    reconciler = new(1)
    reconciler.handle(V5, 0.0)
    if keeps:
        reconciler.handle(leased(V5), 1.0)
    [event] = events(reconciler.handle(fleet(), 2.0))
    assert (event.failure.kind, event.serving) == ("WorkerLeft", ())


def test_a_fenced_worker_is_left_alone() -> None:
    reconciler = new(1, member(2, 4, phase="fenced"))
    assert reconciler.handle(V5, 1.0) == started(V5, 1)


@pytest.mark.parametrize("commit", ["barrier", "rolling", "canary"])
@pytest.mark.parametrize("stage_seconds", [0.5, 3600.0])
@pytest.mark.parametrize("commit_seconds", [0.5, 600.0])
@pytest.mark.parametrize("max_unavailable", [0, 1, 2])
def test_a_lease_outlives_the_last_commit(
    commit: Any, stage_seconds: float, commit_seconds: float, max_unavailable: int
) -> None:
    """The trainer hears how the version ended before its lease expires."""
    policy = Policy(
        stage_seconds,
        commit_seconds,
        commit=commit,
        max_unavailable=max_unavailable,
        in_flight="continue",
    )
    reconciler = new(1, 2, 3, policy=policy)
    began = 10.0
    [lease] = of_type(reconciler.handle(V5, began), TakeLease)

    # Every step at the last moment that is not yet too late.
    now = began + stage_seconds + GRACE_SECONDS
    reconciler.handle(leased(V5), began + 1)
    actions = [
        action
        for worker in (1, 2, 3)
        for action in reconciler.handle(voted(worker, V5), now)
    ]
    waiting, sent = of_type(actions, SendCommit), 0
    while waiting:
        now += commit_seconds + GRACE_SECONDS
        asked, waiting = waiting, []
        sent += len(asked)
        for commit_ in asked:
            actions = reconciler.handle(committed(commit_.worker, V5), now)
            waiting += of_type(actions, SendCommit)
    assert (sent, reconciler.completed) == (3, 5)
    assert began + lease.seconds >= now + GRACE_SECONDS
