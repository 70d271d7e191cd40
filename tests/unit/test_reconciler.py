# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The reconciler as data: inputs in, actions out, examples first, then any order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    GiveBackLease,
    Input,
    LeaseTaken,
    PrepareAnswered,
    Publish,
    SendAbort,
    SendCommit,
    SendPrepare,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.reconciler import REMEMBERED, Reconciler
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
    WorkerJoined,
)
from dynamo.refit.protocol import (
    Committed,
    CommitTimings,
    FleetMember,
    Refused,
    Vote,
    WorkerPhase,
    WorkerStatus,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

POLICY = Policy(
    stage_seconds=100.0, commit_seconds=10.0, commit="rolling", max_unavailable=0
)
STAGE_DEADLINE = POLICY.stage_seconds + GRACE_SECONDS
COMMIT_DEADLINE = POLICY.commit_seconds + GRACE_SECONDS
TIMINGS = CommitTimings(
    pause_ms=1.0,
    install_ms=2.0,
    resume_ms=3.0,
    stall_ms=6.0,
    probe_ms=7.0,
    verify_ms=8.0,
)
#: A policy per event, other than the coordinator's.
RECOMPUTE = "recompute"


def ready(
    version: int, announcement: str | None = None, model: str = "tiny", **fields: Any
) -> WeightVersionReady:
    return WeightVersionReady(
        model=model,
        version=version,
        announcement=announcement or f"a{version}",
        endpoint="ns.trainer.weights",
        instance=99,
        manifest="0123abcd",
        slot=0,
        **({"weights": f"weights-{version}"} | fields),
    )


def member(
    worker: int,
    version: int | None = None,
    phase: WorkerPhase = "serving",
    pending: int | None = None,
    model: str = "tiny",
    weights: str | None = None,
) -> FleetMember:
    if weights is None:
        weights = "" if version is None else f"weights-{version}"
    status = WorkerStatus(
        model=model,
        phase=phase,
        version=version,
        weights=weights,
        pending=pending,
        epoch=1,
        kv_epoch="",
        ranks=1,
    )
    return FleetMember(worker=worker, component="backend", status=status)


def fleet(*members: FleetMember | int) -> FleetSeen:
    """The workers that are seen; a number stands for one with start-up weights."""
    return FleetSeen(tuple(member(m) if isinstance(m, int) else m for m in members))


def failure(worker: int | None = None, message: str = "no memory") -> Failure:
    return Failure(
        kind="TransferFailed", message=message, stage="stage", rank=1, worker=worker
    )


def voted(
    worker: int, announced: WeightVersionReady, weights: str | None = None
) -> PrepareAnswered:
    weights = weights or announced.weights
    vote = Vote(version=announced.version, weights=weights, ranks=())
    return PrepareAnswered(worker, announced.announcement, vote)


def voted_for_others(worker: int, announced: WeightVersionReady) -> PrepareAnswered:
    return voted(worker, announced, weights="of another version")


def vote_refused(worker: int, announced: WeightVersionReady) -> PrepareAnswered:
    return PrepareAnswered(
        worker, announced.announcement, Refused(failure=failure(worker))
    )


def committed(
    worker: int, announced: WeightVersionReady, weights: str | None = None
) -> CommitAnswered:
    reply = Committed(
        version=announced.version,
        weights=weights or announced.weights,
        unchecked=0,
        kv_epoch=f"{announced.version}-x",
        timings=TIMINGS,
    )
    return CommitAnswered(worker, announced.announcement, reply)


def commit_refused(worker: int, announced: WeightVersionReady) -> CommitAnswered:
    return CommitAnswered(
        worker, announced.announcement, Refused(failure=failure(worker))
    )


def started(announced: WeightVersionReady, *workers: int) -> list[Action]:
    """What starts a transaction."""
    event = RefitStarted(model="tiny", version=announced.version, workers=workers)
    return [Publish(event), TakeLease(announced, POLICY.lease_seconds(len(workers)))]


def completed(
    announced: WeightVersionReady, *workers: int, seconds: float | None
) -> list[Action]:
    """What ends one well."""
    event = RefitCompleted(
        model="tiny",
        version=announced.version,
        announcement=announced.announcement,
        weights=announced.weights,
        workers=workers,
        seconds=seconds,
    )
    return [Publish(event), GiveBackLease(announced, "completed", "")]


def superseded(old: WeightVersionReady, by: WeightVersionReady) -> list[Action]:
    detail = f"superseded by version {by.version}"
    event = RefitSuperseded(version=old.version, by=by.version)
    return [Publish(event), GiveBackLease(old, "superseded", detail)]


def failed(
    announced: WeightVersionReady, why: Failure, *serving: tuple[int, int | None]
) -> list[Action]:
    event = RefitFailed(version=announced.version, failure=why, serving=serving)
    return [Publish(event), GiveBackLease(announced, "failed", str(why))]


def events(actions: list[Action]) -> list[Event]:
    return [action.event for action in actions if isinstance(action, Publish)]


def aborts(actions: list[Action]) -> dict[int, int]:
    """Which worker is told to give up which version."""
    return {a.worker: a.version for a in actions if isinstance(a, SendAbort)}


def without_aborts(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, SendAbort)]


def new(*members: FleetMember | int, model: str | None = "tiny") -> Reconciler:
    """A reconciler that has seen these workers."""
    reconciler = Reconciler(model, POLICY)
    if members:
        reconciler.handle(fleet(*members), 0.0)
    return reconciler


def preparing(announced: WeightVersionReady, *workers: FleetMember | int) -> Reconciler:
    reconciler = new(*workers)
    reconciler.handle(announced, 0.0)
    actions = reconciler.handle(LeaseTaken(announced.announcement, None), 1.0)
    assert {type(action) for action in actions} == {SendPrepare}
    return reconciler


def committing(
    announced: WeightVersionReady, *workers: FleetMember | int
) -> Reconciler:
    reconciler = preparing(announced, *workers)
    actions = []
    for worker in sorted(reconciler.fleet):
        actions = reconciler.handle(voted(worker, announced), 2.0)
    assert {type(action) for action in actions} == {SendCommit}
    return reconciler


def done(announced: WeightVersionReady, *workers: FleetMember | int) -> Reconciler:
    reconciler = committing(announced, *workers)
    for worker in sorted(reconciler.fleet):
        reconciler.handle(committed(worker, announced), 3.0)
    assert reconciler.completed == announced.version
    return reconciler


V5, V6, V7 = ready(5), ready(6), ready(7)


# --- one refit ----------------------------------------------------------------


@pytest.mark.parametrize("workers", [(1,), (1, 2, 3)])
def test_happy_path(workers: tuple[int, ...]) -> None:
    reconciler = Reconciler(None, POLICY)
    joined = reconciler.handle(fleet(*workers), 0.0)
    assert joined == [Publish(WorkerJoined(worker=w, version=None)) for w in workers]
    assert reconciler.model == "tiny"

    assert reconciler.handle(V5, 10.0) == started(V5, *workers)
    assert reconciler.handle(LeaseTaken("a5", None), 11.0) == [
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
        LeaseTaken("a5", failure()),
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
    reconciler.handle(LeaseTaken("a5", None), 151.0)
    reconciler.handle(voted(1, V5), 152.0)
    actions = reconciler.handle(committed(1, V5), 160.0)
    assert actions == completed(V5, 1, seconds=60.0)


# --- weights and leases -------------------------------------------------------


def test_a_number_that_is_served_with_other_weights_is_refused() -> None:
    reconciler = Reconciler("tiny", POLICY)
    reconciler.handle(fleet(member(1, version=5), member(2)), 0.0)
    other = ready(5, announcement="again", weights="others")
    refused, release = reconciler.handle(other, 1.0)
    assert isinstance(refused, Publish) and isinstance(refused.event, RefitRefused)
    assert refused.event.reason == "stale"
    assert "worker 1" in refused.event.detail
    assert isinstance(release, GiveBackLease) and release.outcome == "refused"


def test_a_vote_for_other_weights_fails_the_version_and_aborts_all() -> None:
    """One worker read other bytes than the others: nothing may be committed."""
    reconciler = preparing(V5, 1, member(2, 4))
    assert reconciler.handle(voted(1, V5), 2.0) == []
    actions = reconciler.handle(voted(2, V5, weights="weights-4"), 3.0)
    assert aborts(actions) == {1: 5, 2: 5}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    why = event.failure
    assert (why.kind, why.stage) == ("FingerprintMismatch", "preparing")
    assert (why.worker, why.version) == (2, 5)
    assert "weights-4" in why.message and "weights-5" in why.message
    assert without_aborts(actions) == failed(V5, why, (1, None), (2, 4))
    assert reconciler.completed is None
    # The next version starts from scratch.
    assert reconciler.handle(V6, 4.0) == started(V6, 1, 2)


def test_a_commit_of_other_weights_fails_the_version() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(committed(1, V5, weights="weights-4"), 3.0) == []
    [event] = events(reconciler.handle(committed(2, V5), 4.0))
    assert isinstance(event, RefitFailed)
    why = event.failure
    assert (why.kind, why.stage, why.worker) == (
        "FingerprintMismatch",
        "committing",
        1,
    )
    assert reconciler.completed is None


def test_two_versions_may_have_the_same_weights() -> None:
    reconciler = done(V5, 1)
    same = ready(6, "same", weights=V5.weights)
    reconciler.handle(same, 4.0)
    reconciler.handle(LeaseTaken("same", None), 5.0)
    assert reconciler.handle(voted(1, same), 6.0) == [SendCommit(1, same, "continue")]
    assert reconciler.handle(committed(1, same), 7.0) == completed(same, 1, seconds=3.0)


@pytest.mark.parametrize("stage_seconds", [0.5, 100.0, 3600.0])
@pytest.mark.parametrize("commit_seconds", [0.5, 10.0, 600.0])
def test_a_lease_outlives_the_last_commit_that_may_read(
    stage_seconds: float, commit_seconds: float
) -> None:
    """In ``direct`` staging a worker reads once more, in its commit."""
    reconciler = Reconciler("tiny", Policy(stage_seconds, commit_seconds))
    reconciler.handle(fleet(1, 2), 0.0)
    began = 10.0
    actions = reconciler.handle(V5, began)
    [lease] = [action for action in actions if isinstance(action, TakeLease)]

    # Every step at the last moment that is not yet too late.
    last_vote = began + stage_seconds + GRACE_SECONDS
    reconciler.handle(LeaseTaken("a5", None), began + 1)
    reconciler.handle(voted(1, V5), began + 2)
    actions = reconciler.handle(voted(2, V5), last_vote)
    assert [type(action) for action in actions] == [SendCommit, SendCommit]
    last_read = last_vote + commit_seconds + GRACE_SECONDS
    assert reconciler.handle(Tick(), last_read) == []
    assert began + lease.seconds >= last_read + GRACE_SECONDS


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


def test_a_repeat_while_a_joiner_stages_it_does_not_release_it() -> None:
    """Its bytes are being read again: the lease of the first time is over."""
    reconciler = done(V5, 1)
    reconciler.handle(fleet(member(1, 5), 2), 4.0)
    assert reconciler.transaction is not None
    assert reconciler.handle(V5, 5.0) == []
    reconciler.handle(LeaseTaken("a5", None), 5.0)
    assert reconciler.handle(V5, 6.0) == []


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
    assert (event.announcement, "'tiny'" in event.detail) == ("a5", True)
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
    late = reconciler.handle(LeaseTaken("a5", None), 2.0)
    assert not any(isinstance(action, SendPrepare) for action in late)


def test_a_newer_version_supersedes_one_that_is_preparing() -> None:
    reconciler = preparing(V5, 1, 2)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(V6, 3.0)
    assert aborts(actions) == {1: 5, 2: 5}
    assert without_aborts(actions) == [*superseded(V5, V6), *started(V6, 1, 2)]
    # The old one's late votes are not votes for the new one.
    reconciler.handle(LeaseTaken("a6", None), 4.0)
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


@pytest.mark.parametrize("leased", [False, True])
def test_a_newer_version_ends_the_catching_up_of_a_joiner(leased: bool) -> None:
    reconciler = done(V5, 1)
    reconciler.handle(fleet(member(1, 5), 2), 4.0)
    if leased:
        reconciler.handle(LeaseTaken("a5", None), 5.0)
    actions = reconciler.handle(V6, 6.0)
    assert aborts(actions) == ({2: 5} if leased else {})
    assert without_aborts(actions) == [*superseded(V5, V6), *started(V6, 1, 2)]


def test_versions_after_a_joiner_s_leave_no_transaction_without_an_end() -> None:
    reconciler = done(V5, 1)
    reconciler.handle(fleet(member(1, 5), 2), 4.0)
    reconciler.handle(LeaseTaken("a5", None), 5.0)
    actions = [*reconciler.handle(V6, 6.0), *reconciler.handle(V7, 7.0)]
    assert aborts(actions) == {2: 5}
    ends = [e.version for e in events(actions) if isinstance(e, RefitSuperseded)]
    assert ends == [5, 6]


# --- failures -----------------------------------------------------------------


def test_a_lease_that_is_refused_fails_the_version() -> None:
    reconciler = new(member(1, 4), 2)
    reconciler.handle(V5, 0.0)
    actions = reconciler.handle(LeaseTaken("a5", failure()), 1.0)
    assert actions == failed(V5, failure(), (1, 4), (2, None))
    assert reconciler.handle(Tick(), 2.0) == []


def test_a_vote_that_is_refused_fails_the_version_and_aborts_the_others() -> None:
    reconciler = preparing(V5, 1, member(2, 4), 3)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(vote_refused(2, V5), 3.0)
    assert aborts(actions).items() >= {1: 5, 3: 5}.items()
    assert without_aborts(actions) == failed(
        V5, failure(2), (1, None), (2, 4), (3, None)
    )
    assert reconciler.transaction is None


def test_a_commit_that_is_refused_fails_when_all_have_answered() -> None:
    reconciler = committing(V5, 1, 2, 3)
    assert reconciler.handle(commit_refused(2, V5), 3.0) == []
    assert reconciler.handle(committed(1, V5), 4.0) == []
    actions = reconciler.handle(committed(3, V5), 5.0)
    assert actions == failed(V5, failure(2), (1, 5), (2, None), (3, 5))
    assert reconciler.completed is None


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
    event, release = without_aborts(actions)
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


def test_no_answer_to_a_commit_in_time_fails_and_tells_who_serves_what() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    assert reconciler.handle(Tick(), 2.0 + COMMIT_DEADLINE) == []
    actions = reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    assert aborts(actions) == {}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    why = event.failure
    assert (why.kind, why.stage, why.worker) == ("NoAnswer", "committing", 2)
    assert event.serving == ((1, 5), (2, None))


def test_a_commit_s_late_reply_is_still_taken_note_of() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    assert reconciler.handle(committed(2, V5), 50.0) == []
    assert reconciler.serving() == ((1, 5), (2, 5))


def test_a_late_reply_of_an_older_commit_does_not_take_the_view_back() -> None:
    reconciler = done(V6, 1)
    assert reconciler.handle(committed(1, V5), 4.0) == []
    assert reconciler.serving() == ((1, 6),)


# --- the fleet changes --------------------------------------------------------


def test_a_worker_that_leaves_while_preparing_is_not_waited_for() -> None:
    reconciler = preparing(V5, 1, 2)
    assert reconciler.handle(voted(1, V5), 2.0) == []
    assert reconciler.handle(fleet(1), 3.0) == [SendCommit(1, V5, "continue")]
    assert reconciler.handle(committed(1, V5), 4.0) == completed(V5, 1, seconds=4.0)


def test_a_worker_that_leaves_while_leasing_is_not_asked() -> None:
    reconciler = new(1, 2)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(fleet(2), 1.0) == []
    assert reconciler.handle(LeaseTaken("a5", None), 2.0) == [SendPrepare(2, V5)]


@pytest.mark.parametrize("leased", [False, True])
def test_when_every_worker_leaves_before_the_commit_the_version_fails(
    leased: bool,
) -> None:
    reconciler = new(1)
    reconciler.handle(V5, 0.0)
    if leased:
        reconciler.handle(LeaseTaken("a5", None), 1.0)
    [event] = events(reconciler.handle(fleet(), 2.0))
    assert (event.failure.kind, event.serving) == ("WorkerLeft", ())


def test_a_worker_that_leaves_during_its_commit_fails_the_version() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(fleet(1), 3.0) == []
    [event] = events(reconciler.handle(committed(1, V5), 4.0))
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.failure.worker) == ("WorkerLeft", 2)
    assert event.serving == ((1, 5),)


def test_a_worker_that_leaves_after_its_commit_fails_nothing() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(2, V5), 3.0)
    assert reconciler.handle(fleet(1), 4.0) == []
    assert reconciler.handle(committed(1, V5), 5.0) == completed(V5, 1, seconds=5.0)


def test_a_joiner_is_brought_to_the_completed_version_alone() -> None:
    reconciler = done(V5, 1)
    actions = reconciler.handle(fleet(member(1, 5), 2), 10.0)
    joined = Publish(WorkerJoined(worker=2, version=None))
    assert actions == [joined, *started(V5, 2)]
    assert reconciler.handle(LeaseTaken("a5", None), 11.0) == [SendPrepare(2, V5)]
    assert reconciler.handle(voted(2, V5), 12.0) == [SendCommit(2, V5, "continue")]
    event, release = reconciler.handle(committed(2, V5), 13.0)
    assert isinstance(event.event, RefitCompleted)
    assert (event.event.version, event.event.workers) == (5, (1, 2))
    assert release == GiveBackLease(V5, "completed", "")


def test_a_joiner_during_a_commit_is_caught_up_after_it() -> None:
    reconciler = committing(V5, 1)
    reconciler.handle(fleet(1, 2), 3.0)
    actions = reconciler.handle(committed(1, V5), 4.0)
    assert isinstance(actions[0].event, RefitCompleted)
    assert actions[2:] + reconciler.handle(Tick(), 5.0) == started(V5, 2)


def test_completed_lists_the_workers_that_serve_the_version_only() -> None:
    """The router trusts it: a joiner still has its start-up weights."""
    reconciler = committing(V5, 1)
    reconciler.handle(fleet(1, 2), 3.0)
    [event] = events(reconciler.handle(committed(1, V5), 4.0))[:1]
    assert event.workers == (1,)


def test_a_fenced_worker_is_left_alone() -> None:
    reconciler = new(1, member(2, 4, phase="fenced"))
    assert reconciler.handle(V5, 1.0) == started(V5, 1)


def test_a_fleet_of_fenced_workers_has_completed_nothing() -> None:
    reconciler = new(member(1, 4, phase="fenced"))
    actions = [*reconciler.handle(V5, 1.0), *reconciler.handle(Tick(), 2.0)]
    assert not [e for e in events(actions) if isinstance(e, RefitCompleted)]
    assert reconciler.completed is None


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


# --- a coordinator that starts anew -------------------------------------------


def test_a_restarted_coordinator_finds_the_version_installed() -> None:
    reconciler = new(member(1, 5), member(2, 5))
    assert reconciler.handle(V5, 1.0) == completed(V5, 1, 2, seconds=None)
    assert reconciler.completed == 5
    assert reconciler.handle(Tick(), 2.0) == []


def test_a_restarted_coordinator_goes_on_with_those_that_are_behind() -> None:
    reconciler = new(member(1, 5), member(2, 4, phase="staged", pending=5))
    assert reconciler.handle(V5, 1.0) == started(V5, 2)


def test_a_restarted_coordinator_waits_for_a_commit_it_finds() -> None:
    undecided = member(2, 4, phase="committing", pending=5)
    reconciler = new(member(1, 5), undecided)
    assert reconciler.handle(V5, 1.0) == []
    assert reconciler.handle(fleet(member(1, 5), undecided), 2.0) == []
    actions = reconciler.handle(fleet(member(1, 5), member(2, 5)), 3.0)
    assert actions == completed(V5, 1, 2, seconds=None)


# --- any order ----------------------------------------------------------------


@dataclass
class SimulatedWorker:
    """What is true of a worker, whatever the coordinator has seen of it."""

    version: int | None = None
    staged: str | None = None
    committing: WeightVersionReady | None = None
    fenced: bool = False

    def seen_as(self, worker: int) -> FleetMember:
        phase: WorkerPhase = "serving"
        if self.fenced:
            phase = "fenced"
        elif self.committing is not None:
            phase = "committing"
        elif self.staged is not None:
            phase = "staged"
        return member(worker, self.version, phase)


@dataclass
class Watch:
    """What one coordinator has done, and whether it was allowed to."""

    reconciler: Reconciler = field(default_factory=lambda: Reconciler("tiny", POLICY))
    open: str | None = None
    members: set[int] = field(default_factory=set)
    newest_started: int = 0
    asked: set[int] = field(default_factory=set)
    votes: dict[int, bool] = field(default_factory=dict)
    present: set[int] = field(default_factory=set)
    answered_version: dict[int, int] = field(default_factory=dict)
    heard: set[str] = field(default_factory=set)
    weights: dict[str, str] = field(default_factory=dict)
    starts: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, str] = field(default_factory=dict)
    told: list[Event] = field(default_factory=list)

    def handle(self, what: Input, now: float) -> list[Action]:
        self._take_in(what)
        actions = self.reconciler.handle(what, now)
        for number, action in enumerate(actions):
            match action:
                case TakeLease():
                    self._begun(action, actions[number - 1])
                case SendPrepare():
                    assert action.ready.announcement == self.open
                    assert action.worker in self.present
                    self.asked.add(action.worker)
                case SendCommit():
                    self._commit_sent(action)
                case GiveBackLease():
                    before = actions[number - 1] if number else None
                    self._released(action, before, what)
                case Publish(event=event):
                    self._published(event, actions[number + 1 :])
        assert (self.reconciler.transaction is None) == (self.open is None)
        for worker, version in self.reconciler.serving():
            assert (version or 0) >= self.answered_version.get(worker, 0)
        return actions

    def _take_in(self, what: Input) -> None:
        match what:
            case WeightVersionReady():
                self.heard.add(what.announcement)
                self.weights[what.announcement] = what.weights
            case FleetSeen():
                self.present = {m.worker for m in what.members}
                self.members &= self.present
                for worker in set(self.answered_version) - self.present:
                    del self.answered_version[worker]
            case PrepareAnswered(worker=worker, announcement=name):
                if name == self.open and worker in self.asked & self.members:
                    yes = isinstance(what.reply, Vote)
                    yes = yes and what.reply.weights == self.weights[name]
                    self.votes[worker] = self.votes.get(worker, True) and yes
            case CommitAnswered(worker=worker, reply=Committed(version=version)):
                if worker in self.present:
                    highest = max(version, self.answered_version.get(worker, 0))
                    self.answered_version[worker] = highest

    def _begun(self, action: TakeLease, before: Action) -> None:
        assert self.open is None, "two transactions at a time"
        started = before.event
        assert isinstance(started, RefitStarted)
        assert started.version == action.ready.version
        assert started.version >= self.newest_started
        self.newest_started = started.version
        self.open = action.ready.announcement
        assert self.outcomes.get(self.open, "completed") == "completed", "tried again"
        fleet = self.reconciler.fleet.values()
        assert not any(m.status.phase == "committing" for m in fleet)
        self.members, self.asked, self.votes = set(started.workers), set(), {}
        assert self.members <= self.present
        self.starts[self.open] += 1

    def _commit_sent(self, action: SendCommit) -> None:
        assert action.ready.announcement == self.open
        assert action.worker in self.members
        for worker in self.members:
            assert self.votes.get(worker) is True, f"worker {worker} did not vote yes"
        assert action.ready.version >= self.answered_version.get(action.worker, 0)

    def _released(
        self, action: GiveBackLease, before: Action | None, what: Input
    ) -> None:
        name = action.ready.announcement
        if isinstance(before, Publish):
            outcome = {
                RefitCompleted: "completed",
                RefitFailed: "failed",
                RefitSuperseded: "superseded",
                RefitRefused: "refused",
            }[type(before.event)]
            assert before.event.version == action.ready.version
            self.outcomes[name] = outcome
            if name == self.open:
                assert outcome != "refused"
                self.open = None
                self.ends[name] += 1
        else:
            # Said again, because the trainer has not heard it.
            assert isinstance(what, WeightVersionReady | LeaseTaken)
            assert what.announcement == name
            assert name != self.open, "released while it is read"
        assert action.outcome == self.outcomes[name]

    def _published(self, event: Event, rest: list[Action]) -> None:
        self.told.append(event)
        if isinstance(
            event, RefitCompleted | RefitFailed | RefitSuperseded | RefitRefused
        ):
            assert rest and isinstance(rest[0], GiveBackLease), "ended, not released"
        if isinstance(event, RefitCompleted):
            serving = dict(self.reconciler.serving())
            assert {serving[w] for w in event.workers} <= {event.version}
            if event.announcement == self.open:
                assert self.members <= set(event.workers)
                assert {self.answered_version[w] for w in self.members} == {
                    event.version
                }
        if isinstance(event, RefitSuperseded):
            assert event.by >= event.version


ANSWERS = [voted, voted_for_others, vote_refused, commit_refused]


class AnyOrder(RuleBasedStateMachine):
    """A coordinator and a fleet; messages are late, are lost, and come twice.

    Calls wait in ``calls`` until a rule carries one out, and their replies in
    ``replies`` until a rule delivers one, in any order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.watch = Watch()
        self.workers: dict[int, SimulatedWorker] = {}
        self.announced: list[WeightVersionReady] = []
        self.calls: list[TakeLease | SendPrepare | SendCommit] = []
        self.replies: list[Input] = []
        self.delivered: list[Input] = []
        self.snapshots: list[FleetSeen] = []
        self.next_worker = 1

    @initialize(workers=st.integers(0, 2))
    def begin(self, workers: int) -> None:
        for _ in range(workers):
            self.join()
        self._feed(self._view())

    # --- what the coordinator hears -------------------------------------------

    @rule(step=st.sampled_from([1, 1, 1, 2, 0, -1]))
    def announce(self, step: int) -> None:
        """A newer version, or anew one that there was before."""
        newest = max((a.version for a in self.announced), default=1)
        self._announce(max(1, newest + step))

    @rule(rounds=st.integers(1, 4))
    def announce_and_go_on(self, rounds: int) -> None:
        self.announce(1)
        self.all_goes_well(rounds)

    @rule(version=st.integers(1, 9))
    def announce_another_model(self, version: int) -> None:
        self._announce(version, model="huge")

    @precondition(lambda self: self.announced)
    @rule(back=st.integers(0, 3))
    def repeat_an_announcement(self, back: int) -> None:
        self._feed(self.announced[max(-1 - back, -len(self.announced))])

    @rule(seconds=st.sampled_from([0.1, 20.0, COMMIT_DEADLINE + 1, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._feed(Tick())

    @rule(now=st.booleans())
    def look(self, now: bool) -> None:
        """Statuses are read now, and may arrive later."""
        self.snapshots.append(self._view())
        while now and self.snapshots:
            self.see()

    @precondition(lambda self: self.snapshots)
    @rule()
    def see(self) -> None:
        self._feed(self.snapshots.pop(0))

    @precondition(lambda self: self.calls)
    @rule(
        data=st.data(),
        no=st.sampled_from([None, None, None, None, vote_refused, voted_for_others]),
    )
    def carry_out(self, data: st.DataObject, no: Any) -> None:
        """``no`` is how a prepare is answered that goes wrong."""
        self._carry_out(data.draw(st.sampled_from(self.calls)), no)

    @precondition(lambda self: self.replies)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self._deliver(data.draw(st.sampled_from(self.replies)))

    @rule(rounds=st.integers(1, 4))
    def all_goes_well(self, rounds: int) -> None:
        """Every call is carried out and answered; ``rounds`` of 4 finish a refit."""
        for _ in range(rounds):
            self.snapshots.clear()
            self._feed(self._view())
            while self.calls:
                self._carry_out(self.calls[0])
            while self.replies:
                self._deliver(self.replies[0])

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        self._feed(data.draw(st.sampled_from(self.delivered)))

    @precondition(lambda self: self.announced and self.workers)
    @rule(data=st.data(), answer=st.sampled_from(ANSWERS))
    def answer_out_of_nowhere(self, data: st.DataObject, answer: Any) -> None:
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        self._feed(answer(worker, data.draw(st.sampled_from(self.announced))))

    # --- what happens to the fleet --------------------------------------------

    @precondition(lambda self: len(self.workers) < 4)
    @rule()
    def join_and_be_seen(self) -> None:
        self.join()
        self.look(now=True)

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        del self.workers[data.draw(st.sampled_from(sorted(self.workers)))]

    @precondition(lambda self: len(self.workers) > 2)
    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        self.workers[data.draw(st.sampled_from(sorted(self.workers)))].fenced = True

    @precondition(lambda self: len(self.announced) > 2)
    @rule()
    def restart_the_coordinator(self) -> None:
        """Its calls and their replies are lost; a commit under way goes on."""
        self.watch = Watch()
        self.calls = [c for c in self.calls if isinstance(c, SendCommit)]
        self.replies, self.delivered, self.snapshots = [], [], []

    # --- how it must end ------------------------------------------------------

    def teardown(self) -> None:
        """Everyone answers, and yes: then nothing is left open."""
        if not any(not worker.fenced for worker in self.workers.values()):
            self.join()
        self.all_goes_well(12)
        watch = self.watch
        assert watch.open is None
        assert watch.starts == watch.ends
        assert watch.heard == set(watch.outcomes)
        desired = watch.reconciler.desired
        if desired is None:
            return
        outcome = watch.outcomes[desired.announcement]
        assert outcome in ("completed", "failed", "refused")
        if outcome == "completed":
            serving = {w.version for w in self.workers.values() if not w.fenced}
            assert serving == {desired.version}

    # --- the world ------------------------------------------------------------

    def join(self) -> None:
        self.workers[self.next_worker] = SimulatedWorker()
        self.next_worker += 1

    def _announce(self, version: int, model: str = "tiny") -> None:
        announced = ready(version, f"a{len(self.announced)}-{version}", model)
        self.announced.append(announced)
        self._feed(announced)

    def _view(self) -> FleetSeen:
        return FleetSeen(tuple(w.seen_as(n) for n, w in sorted(self.workers.items())))

    def _feed(self, what: Input) -> None:
        for action in self.watch.handle(what, self.now):
            match action:
                case TakeLease() | SendPrepare():
                    self.calls.append(action)
                case SendCommit():
                    self.calls.append(action)
                    worker = self.workers.get(action.worker)
                    if worker and worker.staged == action.ready.announcement:
                        worker.committing = action.ready
                case SendAbort(worker=number):
                    worker = self.workers.get(number)
                    if worker and worker.committing is None:
                        worker.staged = None

    def _deliver(self, reply: Input) -> None:
        self.replies.remove(reply)
        self.delivered.append(reply)
        self._feed(reply)

    def _carry_out(self, call: Action, no: Any = None) -> None:
        good = no is None
        self.calls.remove(call)
        name = call.ready.announcement
        if isinstance(call, TakeLease):
            self.replies.append(LeaseTaken(name, None if good else failure()))
            return
        worker = self.workers.get(call.worker)
        able = good and worker is not None and not worker.fenced
        if isinstance(call, SendPrepare):
            able = able and worker.committing is None
            if able:
                worker.staged = name
            reply = voted if able else no or vote_refused
        else:
            able = able and worker.committing == call.ready
            if worker is not None and worker.committing == call.ready:
                worker.committing = worker.staged = None
            if able:
                assert call.ready.version >= (worker.version or 0), "taken back"
                worker.version = call.ready.version
            reply = committed if able else commit_refused
        self.replies.append(reply(call.worker, call.ready))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
)
