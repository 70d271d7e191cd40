# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The order in which workers change to a version that they hold, and what follows when
one of them does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo.refit.coordinator.actions import (
    CommitAnswered,
    SendAbort,
    SendFence,
    Tick,
    Unanswered,
)
from dynamo.refit.coordinator.commit import ASK_AGAIN_SECONDS, HOLD_SHARE
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.coordinator.upkeep import SAY_AGAIN_SECONDS
from dynamo.refit.errors import MAX_MESSAGE
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    WeightVersionReady,
    decode,
    encode,
)
from dynamo.refit.protocol import Refused
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
    failed,
    failure,
    fences,
    fleet,
    joiner,
    member,
    preparing,
    stepped,
    voted,
    without,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

BARRIER = replace(POLICY, commit="barrier")
#: How long the coordinator waits for a step of a barrier.
STEP_SECONDS = HOLD_SHARE / 2 * BARRIER.hold_seconds
ONE_AT_A_TIME = replace(POLICY, max_unavailable=1)
CANARY = replace(POLICY, commit="canary")


# --- all at once --------------------------------------------------------------


def test_a_refusal_after_another_worker_has_changed_fences_who_refused() -> None:
    reconciler = committing(V5, 1, 2, 3)
    assert reconciler.handle(committed(1, V5), 3.0) == []
    assert reconciler.handle(commit_refused(2, V5), 4.0) == []
    fence, *end = reconciler.handle(committed(3, V5), 5.0)
    assert fence == SendFence(2, 5, V5.fingerprint, str(failure(2)))
    assert end == completed(V5, 1, 3, seconds=5.0, excluded=(failure(2),))
    assert reconciler.completed == 5


def test_a_refusal_before_another_worker_has_changed_fences_too() -> None:
    """The others were told already, and one of them does change."""
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(commit_refused(1, V5), 3.0) == []
    actions = reconciler.handle(committed(2, V5), 4.0)
    assert fences(actions) == {1: 5}
    assert [event.excluded for event in events(actions)] == [(failure(1),)]


def test_when_all_refuse_the_version_fails_and_nobody_is_fenced() -> None:
    reconciler = committing(V5, 1, member(2, 4))
    assert reconciler.handle(commit_refused(1, V5), 3.0) == []
    actions = reconciler.handle(commit_refused(2, V5), 4.0)
    assert actions == failed(V5, failure(1), (1, None), (2, 4))
    assert reconciler.completed is None


def test_a_silent_worker_is_fenced_and_named() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    assert reconciler.handle(Tick(), 2.0 + COMMIT_DEADLINE) == []
    actions = reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    assert fences(actions) == {2: 5}
    [event] = events(actions)
    assert isinstance(event, RefitCompleted) and event.workers == (1,)
    [why] = event.excluded
    assert (why.kind, why.stage, why.worker) == ("NoAnswer", "committing", 2)


def test_a_worker_that_answers_late_but_before_the_end_is_kept() -> None:
    reconciler = committing(V5, 1, 2, 3, policy=replace(POLICY, max_unavailable=2))
    assert reconciler.handle(committed(1, V5), 20.0) == commits(V5, 3)
    # It is given up, and 3 is still under way.
    assert reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE) == []
    assert reconciler.handle(committed(2, V5), 4.0 + COMMIT_DEADLINE) == []
    actions = reconciler.handle(committed(3, V5), 5.0 + COMMIT_DEADLINE)
    assert actions == completed(V5, 1, 2, 3, seconds=5.0 + COMMIT_DEADLINE)


def test_a_commit_of_other_weights_fences_the_worker() -> None:
    """It is not one of those that serve the version."""
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(committed(1, V5, fingerprint="weights-4"), 3.0) == []
    actions = reconciler.handle(committed(2, V5), 4.0)
    assert fences(actions) == {1: 5}
    [event] = events(actions)
    assert event.workers == (2,)
    [why] = event.excluded
    assert (why.kind, why.stage, why.worker) == (
        "FingerprintMismatch",
        "committing",
        1,
    )
    assert "weights-4" in why.message and "weights-5" in why.message


def test_a_worker_that_leaves_during_its_commit_is_told_of_only() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(fleet(1), 3.0) == []
    actions = reconciler.handle(committed(1, V5), 4.0)
    assert fences(actions) == {}
    [event] = events(actions)
    assert [(f.kind, f.worker) for f in event.excluded] == [("WorkerLeft", 2)]


@pytest.mark.parametrize("voted_before", [True, False])
def test_a_worker_that_leaves_before_the_commit_is_told_of(voted_before: bool) -> None:
    reconciler = preparing(V5, 1, 2)
    if voted_before:
        reconciler.handle(voted(2, V5), 2.0)
    reconciler.handle(fleet(1), 3.0)
    assert reconciler.handle(voted(1, V5), 4.0) == commits(V5, 1)
    actions = reconciler.handle(committed(1, V5), 5.0)
    assert fences(actions) == {}
    [event] = events(actions)
    [why] = event.excluded
    assert (why.kind, why.stage, why.worker) == ("WorkerLeft", "preparing", 2)


def test_a_worker_that_has_fenced_itself_is_not_waited_for() -> None:
    reconciler = preparing(V5, 1, 2, 3)
    reconciler.handle(voted(1, V5), 2.0)
    assert reconciler.handle(fleet(1, 2, member(3, phase="fenced")), 3.0) == []
    assert reconciler.handle(voted(2, V5), 4.0) == commits(V5, 1, 2)
    fenced = [member(w, phase="fenced") for w in (2, 3)]
    assert reconciler.handle(fleet(1, *fenced), 5.0) == []
    actions = reconciler.handle(committed(1, V5), 6.0)
    assert fences(actions) == {}
    [event] = events(actions, RefitCompleted)
    assert event.workers == (1,)
    # One while it staged, one during the commit.
    assert [(f.stage, f.worker) for f in event.excluded] == [
        ("preparing", 3),
        ("committing", 2),
    ]
    # Its late answer does not bring it back.
    reconciler.handle(committed(2, V5), 7.0)
    assert reconciler.serving() == ((1, 5),)


def test_a_worker_that_says_that_it_has_fenced_itself_serves_nothing() -> None:
    """From its answer on: what fails then says what is served, and a status that was
    asked for before it does not bring it back."""
    reconciler = committing(V5, 1, 2, policy=ONE_AT_A_TIME)
    actions = reconciler.handle(commit_refused(1, V5, fenced=True), 3.0)
    assert aborts(actions) == {2: 5}
    assert without(actions, SendAbort) == failed(V5, failure(1), (2, None))
    reconciler.handle(fleet(1, 2), 4.0)
    assert reconciler.serving() == ((2, None),)


def test_a_worker_that_has_fenced_itself_is_not_fenced_once_more() -> None:
    reconciler = committing(V5, 1, 2, policy=ONE_AT_A_TIME)
    reconciler.handle(committed(1, V5), 3.0)
    actions = reconciler.handle(commit_refused(2, V5, fenced=True), 4.0)
    assert fences(actions) == {}
    [event] = events(actions, RefitCompleted)
    assert (event.workers, event.excluded) == ((1,), (failure(2),))


def test_a_worker_that_leaves_after_its_commit_fails_nothing() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(2, V5), 3.0)
    assert reconciler.handle(fleet(1), 4.0) == []
    assert reconciler.handle(committed(1, V5), 5.0) == completed(V5, 1, seconds=5.0)


def test_when_every_worker_leaves_during_the_commit_the_version_fails() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(fleet(2), 3.0) == []
    [event] = events(reconciler.handle(fleet(), 4.0))
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.serving) == ("WorkerLeft", ())


def test_when_those_that_changed_are_gone_a_refusal_fences_nobody() -> None:
    """Else a version that kills its workers would take the whole fleet with it."""
    reconciler = committing(V5, 1, 2, 3, policy=ONE_AT_A_TIME)
    assert reconciler.handle(committed(1, V5), 3.0) == commits(V5, 2)
    assert reconciler.handle(fleet(2, 3), 4.0) == []
    actions = reconciler.handle(commit_refused(2, V5), 5.0)
    assert aborts(actions) == {3: 5}
    assert without(actions, SendAbort) == failed(V5, failure(2), (2, None), (3, None))


def test_a_commit_s_late_reply_is_still_taken_note_of() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(commit_refused(1, V5), 3.0)
    reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    assert reconciler.transaction is None
    reconciler.handle(committed(2, V5), 50.0)
    assert reconciler.serving() == ((1, None), (2, 5))


def test_a_late_reply_of_an_older_commit_does_not_take_the_view_back() -> None:
    reconciler = done(V6, 1)
    assert reconciler.handle(committed(1, V5), 4.0) == []
    assert reconciler.serving() == ((1, 6),)


def test_completed_lists_the_workers_that_serve_the_version_only() -> None:
    """The router trusts it: a joiner still has its start-up weights."""
    reconciler = committing(V5, 1)
    reconciler.handle(fleet(1, joiner(2)), 3.0)
    [event] = events(reconciler.handle(committed(1, V5), 4.0))[:1]
    assert event.workers == (1,)


def test_a_fence_is_said_again_until_the_worker_shows_it() -> None:
    """It refuses while it commits, and a call may be lost."""
    reconciler = committing(V5, 1, 2)
    reconciler.handle(commit_refused(2, V5), 3.0)
    assert fences(reconciler.handle(committed(1, V5), 4.0)) == {2: 5}
    seen = fleet(member(1, 5), member(2, 4, phase="committing", pending=5))
    assert reconciler.handle(seen, 5.0) == []
    assert fences(reconciler.handle(Tick(), 4.0 + SAY_AGAIN_SECONDS)) == {2: 5}
    assert reconciler.handle(Tick(), 5.0 + SAY_AGAIN_SECONDS) == []
    assert reconciler.handle(fleet(member(1, 5), member(2, 4, "fenced")), 50.0) == []
    assert reconciler.handle(fleet(member(1, 5)), 60.0) == []


def test_a_worker_that_must_leave_does_not_hold_up_the_next_version() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(commit_refused(2, V5), 3.0)
    reconciler.handle(committed(1, V5), 4.0)
    hung = member(2, 4, phase="committing", pending=5)
    reconciler.handle(fleet(member(1, 5), hung), 5.0)
    assert [e.workers for e in events(reconciler.handle(V6, 6.0))] == [(1,)]


@pytest.mark.parametrize("character", ["x", "\U0001f4a5"])
def test_what_all_were_excluded_for_fits_into_an_event(character: str) -> None:
    everyone = range(1, 1001)
    reconciler = committing(V5, *everyone)
    why = failure(message=character * MAX_MESSAGE)
    for worker in everyone[1:]:
        refused = Refused(failure=why)
        reconciler.handle(CommitAnswered(worker, "a5", refused), 3.0)
    [event] = events(reconciler.handle(committed(1, V5), 4.0))
    assert len(event.excluded) == 999
    assert decode(encode(event)) == event


# --- barrier ------------------------------------------------------------------


def barrier_at(step: str) -> Reconciler:
    """Three workers, told to take ``step`` at 2.0."""
    reconciler = committing(V5, 1, 2, 3, policy=BARRIER)
    for before, after in (("pause", "install"), ("install", "resume")):
        if step == before:
            break
        for worker in (1, 2, 3):
            actions = reconciler.handle(stepped(worker, V5, before), 2.0)
        assert actions == commits(V5, 1, 2, 3, step=after)
    return reconciler


def test_a_barrier_pauses_all_then_installs_all_then_resumes_all() -> None:
    reconciler = preparing(V5, 1, 2, policy=BARRIER)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(voted(2, V5), 2.0)
    assert actions == commits(V5, 1, 2, step="pause")
    assert reconciler.handle(stepped(2, V5, "pause"), 2.1) == []
    actions = reconciler.handle(stepped(1, V5, "pause"), 2.2)
    assert actions == commits(V5, 1, 2, step="install")
    # A repeat of the last step's reply is not this one's.
    assert reconciler.handle(stepped(1, V5, "pause"), 2.2) == []
    assert reconciler.handle(stepped(1, V5, "install"), 2.3) == []
    actions = reconciler.handle(stepped(2, V5, "install"), 2.4)
    assert actions == commits(V5, 1, 2, step="resume")
    assert reconciler.handle(committed(1, V5), 2.5) == []
    actions = reconciler.handle(committed(2, V5), 2.6)
    assert actions == completed(V5, 1, 2, seconds=2.6)


def test_one_worker_needs_no_barrier() -> None:
    reconciler = preparing(V5, 1, policy=BARRIER)
    assert reconciler.handle(voted(1, V5), 2.0) == commits(V5, 1, step="all")


@pytest.mark.parametrize("step", ["pause", "install"])
def test_a_refusal_at_the_barrier_sends_everyone_back(step: str) -> None:
    reconciler = barrier_at(step)
    reconciler.handle(stepped(1, V5, step), 2.1)
    actions = reconciler.handle(commit_refused(2, V5), 2.2)
    assert aborts(actions) == {1: 5, 2: 5, 3: 5}
    assert without(actions, SendAbort) == failed(
        V5, failure(2), (1, None), (2, None), (3, None)
    )
    assert reconciler.handle(stepped(3, V5, step), 2.3) == []


@pytest.mark.parametrize("step", ["pause", "install"])
def test_silence_at_the_barrier_sends_everyone_back_before_they_go_on(
    step: str,
) -> None:
    reconciler = barrier_at(step)
    reconciler.handle(stepped(1, V5, step), 2.1)
    assert reconciler.handle(Tick(), 2.0 + STEP_SECONDS) == []
    actions = reconciler.handle(Tick(), 2.1 + STEP_SECONDS)
    assert aborts(actions) == {1: 5, 2: 5, 3: 5}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.failure.worker) == ("NoAnswer", 2)
    assert repr(step) in event.failure.message


def test_both_waits_at_the_barrier_are_shorter_than_the_hold() -> None:
    assert BARRIER.hold_seconds > 2 * STEP_SECONDS


def test_a_worker_that_has_installed_and_leaves_makes_the_fleet_smaller() -> None:
    reconciler = barrier_at("install")
    reconciler.handle(stepped(3, V5, "install"), 2.1)
    reconciler.handle(stepped(1, V5, "install"), 2.1)
    assert reconciler.handle(fleet(1, 2), 2.2) == []
    actions = reconciler.handle(stepped(2, V5, "install"), 2.3)
    assert actions == commits(V5, 1, 2, step="resume")


def test_a_worker_that_has_paused_and_leaves_sends_everyone_back() -> None:
    """As it does when it was told to install meanwhile."""
    reconciler = barrier_at("pause")
    reconciler.handle(stepped(3, V5, "pause"), 2.1)
    actions = reconciler.handle(fleet(1, 2), 2.2)
    assert aborts(actions) == {1: 5, 2: 5}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.failure.worker) == ("WorkerLeft", 3)


@pytest.mark.parametrize("step", ["pause", "install"])
@pytest.mark.parametrize("said", ["refusal first", "departure first", "departure only"])
def test_a_worker_that_dies_at_the_barrier_sends_everyone_back(
    step: str, said: str
) -> None:
    """Whether its answer is quicker than the news that it is gone is chance."""
    reconciler = barrier_at(step)
    reconciler.handle(stepped(1, V5, step), 2.1)
    answer = commit_refused(3, V5, fenced=True)
    told = {
        "refusal first": [answer, fleet(1, 2)],
        "departure first": [fleet(1, 2), answer],
        "departure only": [fleet(1, 2)],
    }
    actions = [a for each in told[said] for a in reconciler.handle(each, 2.2)]
    assert aborts(actions).items() >= {1: 5, 2: 5}.items()
    assert fences(actions) == {}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    kind = "TransferFailed" if said == "refusal first" else "WorkerLeft"
    assert (event.failure.kind, event.failure.worker) == (kind, 3)
    assert dict(event.serving) | {3: None} == {1: None, 2: None, 3: None}
    assert reconciler.handle(stepped(2, V5, step), 2.3) == []


def test_one_that_cannot_resume_is_fenced_when_another_has() -> None:
    reconciler = barrier_at("resume")
    reconciler.handle(committed(1, V5), 2.1)
    reconciler.handle(commit_refused(2, V5), 2.2)
    actions = reconciler.handle(committed(3, V5), 2.3)
    assert aborts(actions) == {}
    assert fences(actions) == {2: 5}
    assert [e.workers for e in events(actions, RefitCompleted)] == [(1, 3)]


def test_when_none_can_resume_the_version_fails() -> None:
    """All waited too long and have gone back by themselves."""
    reconciler = barrier_at("resume")
    reconciler.handle(commit_refused(1, V5), 2.1)
    reconciler.handle(commit_refused(2, V5), 2.2)
    actions = reconciler.handle(commit_refused(3, V5), 2.3)
    assert actions == failed(V5, failure(1), (1, None), (2, None), (3, None))


def test_one_that_went_ahead_takes_the_others_along() -> None:
    """It resumed with the new weights by itself: there is no way back."""
    reconciler = barrier_at("install")
    reconciler.handle(committed(1, V5), 2.1)
    reconciler.handle(commit_refused(2, V5), 2.2)
    actions = reconciler.handle(stepped(3, V5, "install"), 2.3)
    assert actions == commits(V5, 3, step="resume")
    actions = reconciler.handle(committed(3, V5), 2.4)
    assert fences(actions) == {2: 5}
    assert [e.workers for e in events(actions, RefitCompleted)] == [(1, 3)]


def test_one_that_went_ahead_after_the_others_went_back_is_followed() -> None:
    reconciler = barrier_at("install")
    reconciler.handle(commit_refused(2, V5), 2.1)
    seen = fleet(member(1, 5), 2, 3)
    [event] = events(reconciler.handle(seen, 3.0), RefitStarted)
    assert (event.version, event.workers, event.catch_up) == (5, (2, 3), True)


# --- replies that are lost ----------------------------------------------------


def lost(worker: int, announced: WeightVersionReady = V5) -> CommitAnswered:
    return CommitAnswered(
        worker, announced.announcement_id, Unanswered(failure(worker))
    )


@pytest.mark.parametrize("policy", [POLICY, ONE_AT_A_TIME, CANARY])
def test_a_worker_whose_reply_is_lost_is_asked_again(policy: Policy) -> None:
    reconciler = committing(V5, 1, 2, policy=policy)
    assert reconciler.handle(lost(1), 3.0) == []
    again = reconciler.handle(Tick(), 3.0 + ASK_AGAIN_SECONDS)
    assert again == commits(V5, 1)
    assert reconciler.handle(Tick(), 4.0) == []
    # As often as its reply is lost, until its deadline.
    reconciler.handle(lost(1), 5.0)
    assert reconciler.handle(Tick(), 6.0) == commits(V5, 1)
    actions = reconciler.handle(committed(1, V5), 7.0)
    actions += reconciler.handle(committed(2, V5), 8.0)
    assert fences(actions) == {}
    [event] = events(actions, RefitCompleted)
    assert (event.workers, event.excluded) == ((1, 2), ())


@pytest.mark.parametrize("step", ["pause", "install", "resume"])
def test_a_step_whose_reply_is_lost_is_ordered_again(step: str) -> None:
    reconciler = barrier_at(step)
    reconciler.handle(lost(2), 2.1)
    again = reconciler.handle(Tick(), 2.1 + ASK_AGAIN_SECONDS)
    assert again == commits(V5, 2, step=step)


def test_one_that_cannot_be_reached_is_given_up_at_its_deadline() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    now = 2.0
    while now < 1.0 + COMMIT_DEADLINE:
        now += 1.0
        assert events(reconciler.handle(lost(2), now)) == []
    actions = reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    assert fences(actions) == {2: 5}
    [event] = events(actions, RefitCompleted)
    assert [f.kind for f in event.excluded] == ["NoAnswer"]


def test_a_withdrawn_one_is_asked_again_as_it_was() -> None:
    drain = replace(ONE_AT_A_TIME, in_flight="drain")
    reconciler = committing(V5, 1, 2, policy=drain)
    reconciler.handle(lost(1), 3.0)
    [again] = reconciler.handle(Tick(), 3.0 + ASK_AGAIN_SECONDS)
    assert (again.worker, again.withdraw) == (1, True)


def test_a_status_that_shows_the_version_is_as_good_as_a_reply() -> None:
    """Rolling: the reply to a commit that succeeded is lost."""
    reconciler = committing(V5, 1, 2, 3, 4, policy=ONE_AT_A_TIME)
    reconciler.handle(committed(1, V5), 3.0)
    seen = fleet(member(1, 5), member(2, 5), 3, 4)
    assert reconciler.handle(seen, 3.5) == commits(V5, 3)
    assert reconciler.handle(commit_refused(2, V5), 4.0) == []
    reconciler.handle(committed(3, V5), 5.0)
    actions = reconciler.handle(committed(4, V5), 6.0)
    assert actions == completed(V5, 1, 2, 3, 4, seconds=6.0)


def test_at_a_barrier_lost_replies_fence_nobody_who_serves_the_version() -> None:
    reconciler = barrier_at("resume")
    reconciler.handle(committed(1, V5), 2.3)
    actions = reconciler.handle(fleet(*(member(w, 5) for w in (1, 2, 3))), 2.8)
    for worker in (2, 3):
        actions += reconciler.handle(commit_refused(worker, V5), 2.9)
    assert actions == completed(V5, 1, 2, 3, seconds=2.8)


def test_one_that_still_commits_is_not_taken_for_changed() -> None:
    """Its live weights are not proved yet."""
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    seen = fleet(member(1, 5), member(2, 5, phase="committing", pending=5))
    assert reconciler.handle(seen, 4.0) == []
    assert reconciler.transaction is not None


def test_a_fence_ends_when_the_worker_shows_what_it_was_to_be_fenced_for() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    assert fences(reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)) == {2: 5}
    both = fleet(member(1, 5), member(2, 5))
    assert reconciler.handle(both, 50.0) == []
    assert reconciler.handle(Tick(), 60.0) == []
    # It takes part in what comes next.
    assert [e.workers for e in events(reconciler.handle(V6, 61.0))] == [(1, 2)]


def test_a_fence_goes_on_for_one_that_shows_other_weights_of_that_number() -> None:
    reconciler = committing(V5, 1, 2)
    reconciler.handle(committed(1, V5), 3.0)
    reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE)
    other = fleet(member(1, 5), member(2, 5, fingerprint="others"))
    assert fences(reconciler.handle(other, 50.0)) == {2: 5}


# --- some at a time -----------------------------------------------------------


def test_rolling_changes_so_many_at_a_time() -> None:
    two = replace(POLICY, max_unavailable=2)
    reconciler = preparing(V5, 1, 2, 3, 4, 5, policy=two)
    for worker in (1, 2, 3, 4):
        assert reconciler.handle(voted(worker, V5), 2.0) == []
    assert reconciler.handle(voted(5, V5), 2.0) == commits(V5, 1, 2)
    assert reconciler.handle(committed(2, V5), 3.0) == commits(V5, 3)
    assert reconciler.handle(commit_refused(1, V5), 4.0) == commits(V5, 4)
    assert reconciler.handle(fleet(1, 2, 4, 5), 5.0) == commits(V5, 5)
    reconciler.handle(committed(4, V5), 6.0)
    actions = reconciler.handle(committed(5, V5), 7.0)
    assert fences(actions) == {1: 5}
    [event] = events(actions)
    assert event.workers == (2, 4, 5)
    assert [f.worker for f in event.excluded] == [1, 3]


@pytest.mark.parametrize("policy", [ONE_AT_A_TIME, CANARY])
def test_the_first_one_s_refusal_leaves_the_others_as_they_are(policy: Policy) -> None:
    reconciler = committing(V5, 1, 2, 3, policy=policy)
    actions = reconciler.handle(commit_refused(1, V5), 3.0)
    assert aborts(actions) == {2: 5, 3: 5}
    assert without(actions, SendAbort) == failed(
        V5, failure(1), (1, None), (2, None), (3, None)
    )


def test_nobody_else_is_told_while_it_is_not_known_whether_one_has_changed() -> None:
    reconciler = committing(V5, 1, 2, 3, policy=replace(POLICY, max_unavailable=2))
    assert reconciler.handle(commit_refused(1, V5), 3.0) == []
    assert reconciler.handle(Tick(), 4.0) == []
    # The other one has: there is no way back.
    assert reconciler.handle(committed(2, V5), 5.0) == commits(V5, 3)
    assert fences(reconciler.handle(committed(3, V5), 6.0)) == {1: 5}


def test_a_canary_goes_first_and_alone() -> None:
    reconciler = preparing(V5, 1, 2, 3, policy=CANARY)
    reconciler.handle(voted(3, V5), 2.0)
    reconciler.handle(voted(2, V5), 2.0)
    assert reconciler.handle(voted(1, V5), 2.0) == commits(V5, 1)
    assert reconciler.handle(committed(1, V5), 3.0) == commits(V5, 2, 3)


def test_a_canary_that_leaves_before_it_has_answered_is_followed_by_nobody() -> None:
    """It may have died of the version."""
    reconciler = committing(V5, 1, 2, 3, policy=CANARY)
    actions = reconciler.handle(fleet(2, 3), 3.0)
    assert commits(V5, 2)[0] not in actions
    assert aborts(actions) == {2: 5, 3: 5}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.failure.worker) == ("WorkerLeft", 1)


def test_the_answer_of_a_worker_that_is_gone_changes_nothing() -> None:
    reconciler = committing(V5, 1, 2)
    assert reconciler.handle(fleet(1), 3.0) == []
    assert reconciler.handle(committed(2, V5), 3.5) == []
    [event] = events(reconciler.handle(commit_refused(1, V5), 4.0))
    assert isinstance(event, RefitFailed)
