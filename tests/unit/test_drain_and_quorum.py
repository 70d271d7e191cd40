# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Workers that are spared for a while, and workers that a version goes without."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dynamo.refit.coordinator.actions import (
    Action,
    GiveBackLease,
    SendAbort,
    SendCommit,
    SendFence,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.events import RefitFailed, RefitRefused
from dynamo.refit.protocol import FleetMember
from tests.support.fleet import (
    COMMIT_DEADLINE,
    POLICY,
    STAGE_DEADLINE,
    V5,
    aborts,
    commit_refused,
    commits,
    committed,
    committing,
    completed,
    events,
    failed,
    failure,
    fences,
    fleet,
    joiner,
    leased,
    member,
    new,
    of_type,
    preparing,
    ready,
    started,
    vote_refused,
    voted,
    without,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

BARRIER = replace(POLICY, commit="barrier")
#: Half of the workers are enough.
QUORUM = replace(POLICY, quorum=0.5)
#: An in-flight policy of the event's own.
DRAIN5 = ready(5, in_flight="drain")


# --- out of routing -----------------------------------------------------------


def withdrawn(actions: list[Action]) -> dict[int, bool]:
    return {a.worker: a.withdraw for a in of_type(actions, SendCommit)}


def test_workers_that_drain_are_withdrawn_but_never_all() -> None:
    reconciler = preparing(DRAIN5, 1, 2, 3)
    reconciler.handle(voted(1, DRAIN5), 2.0)
    reconciler.handle(voted(2, DRAIN5), 2.0)
    actions = reconciler.handle(voted(3, DRAIN5), 2.0)
    assert withdrawn(actions) == {1: True, 2: True}
    assert {a.in_flight for a in of_type(actions, SendCommit)} == {"drain"}
    assert withdrawn(reconciler.handle(committed(2, DRAIN5), 3.0)) == {3: True}


def test_a_drain_has_its_own_time() -> None:
    reconciler = committing(DRAIN5, 1, 2)
    reconciler.handle(Tick(), 2.0 + COMMIT_DEADLINE + POLICY.drain_seconds)
    assert reconciler.transaction is not None
    reconciler.handle(Tick(), 3.0 + COMMIT_DEADLINE + POLICY.drain_seconds)
    assert reconciler.transaction is None


def test_who_is_spared_counts_as_long_as_it_serves() -> None:
    """3 has left, so 2 waits for 1."""
    two = replace(POLICY, max_unavailable=2)
    reconciler = preparing(DRAIN5, 1, 2, 3, policy=two)
    reconciler.handle(fleet(1, 2), 1.5)
    reconciler.handle(voted(1, DRAIN5), 2.0)
    assert withdrawn(reconciler.handle(voted(2, DRAIN5), 2.0)) == {1: True}


def test_a_joiner_spares_nobody_before_it_serves() -> None:
    """Routers do not see it: it goes first, and then it can be sent to."""
    reconciler = preparing(DRAIN5, 1, 2, joiner(3))
    reconciler.handle(fleet(1, joiner(3)), 1.5)
    reconciler.handle(voted(1, DRAIN5), 2.0)
    assert withdrawn(reconciler.handle(voted(3, DRAIN5), 2.0)) == {3: False}
    assert withdrawn(reconciler.handle(committed(3, DRAIN5), 3.0)) == {1: True}


def test_one_that_hangs_in_an_earlier_commit_spares_nobody() -> None:
    """It may be withdrawn still."""
    hung = member(2, 4, phase="committing", pending=5)
    reconciler = new(member(1, 4), hung, policy=QUORUM)
    reconciler.handle(DRAIN5, 1.0)
    now = 2.0 + COMMIT_DEADLINE + POLICY.drain_seconds
    assert of_type(reconciler.handle(Tick(), now), TakeLease)
    reconciler.handle(leased(DRAIN5), now)
    reconciler.handle(vote_refused(2, DRAIN5), now)
    assert withdrawn(reconciler.handle(voted(1, DRAIN5), now)) == {1: False}


def test_the_only_one_left_is_not_withdrawn() -> None:
    reconciler = preparing(DRAIN5, 1, 2)
    reconciler.handle(fleet(1), 1.5)
    assert withdrawn(reconciler.handle(voted(1, DRAIN5), 2.0)) == {1: False}


def prefill(worker: int) -> FleetMember:
    return member(worker, component="prefill")


def test_who_prefills_is_no_stand_in_for_who_decodes() -> None:
    """2 is the only one left that decodes: it stays in routing while it installs."""
    reconciler = new(prefill(1), 2, prefill(3), 4)
    reconciler.handle(DRAIN5, 1.0)
    reconciler.handle(leased(DRAIN5), 1.0)
    reconciler.handle(fleet(prefill(1), 2, prefill(3)), 1.5)
    for worker in (1, 3):
        reconciler.handle(voted(worker, DRAIN5), 2.0)
    actions = reconciler.handle(voted(2, DRAIN5), 2.0)
    assert withdrawn(actions) == {1: True}
    assert withdrawn(reconciler.handle(committed(1, DRAIN5), 3.0)) == {3: True}
    assert withdrawn(reconciler.handle(committed(3, DRAIN5), 4.0)) == {2: False}


def test_of_each_component_somebody_is_left() -> None:
    four = replace(POLICY, max_unavailable=4)
    reconciler = new(prefill(1), 2, prefill(3), 4, policy=four)
    reconciler.handle(DRAIN5, 1.0)
    reconciler.handle(leased(DRAIN5), 1.0)
    for worker in (1, 2, 3):
        assert withdrawn(reconciler.handle(voted(worker, DRAIN5), 2.0)) == {}
    assert withdrawn(reconciler.handle(voted(4, DRAIN5), 2.0)) == {1: True, 2: True}


def test_who_cannot_undo_an_install_takes_part_in_no_barrier() -> None:
    """The failure of one would fence all of them. They go at once, and serve."""
    reconciler = preparing(V5, 1, 2, policy=BARRIER)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(voted(2, V5, mode="host-no-undo"), 2.0)
    assert actions == commits(V5, 1, 2)


# --- drain ----------------------------------------------------------------------


def drain_refusal(actions: list[Action]) -> RefitRefused:
    publish, release = actions
    assert isinstance(release, GiveBackLease) and release.outcome == "refused"
    assert publish.event.reason == "unsafe_policy"
    assert "drain" in publish.event.detail
    return publish.event


def test_drain_is_refused_at_a_barrier() -> None:
    reconciler = new(1, 2, policy=Policy(commit="barrier"))
    event = drain_refusal(reconciler.handle(ready(5, in_flight="drain"), 1.0))
    assert "barrier" in event.detail
    assert reconciler.handle(Tick(), 2.0) == []
    # Another policy may be announced under the same number.
    assert of_type(reconciler.handle(ready(5, "again"), 3.0), TakeLease)


def test_drain_by_default_is_refused_at_a_barrier_too() -> None:
    reconciler = new(1, 2, policy=Policy(commit="barrier", in_flight="drain"))
    drain_refusal(reconciler.handle(V5, 1.0))
    gentle = ready(5, "gentle", in_flight="continue")
    assert of_type(reconciler.handle(gentle, 2.0), TakeLease)


@pytest.mark.parametrize("second", [[], [joiner(2)], [member(2, phase="fenced")]])
def test_drain_is_refused_with_fewer_than_two_that_serve(
    second: list[FleetMember],
) -> None:
    reconciler = new(1, *second)
    event = drain_refusal(reconciler.handle(ready(5, in_flight="drain"), 1.0))
    assert "one worker" in event.detail


def test_drain_is_refused_where_a_component_has_one_worker_only() -> None:
    reconciler = new(prefill(1), 2, prefill(3))
    event = drain_refusal(reconciler.handle(ready(5, in_flight="drain"), 1.0))
    assert "one worker of 'backend'" in event.detail


def test_drain_is_refused_when_the_workers_turn_out_to_be_too_few() -> None:
    reconciler = Reconciler("tiny", POLICY)
    assert reconciler.handle(ready(5, in_flight="drain"), 1.0) == []
    _, *refusal = reconciler.handle(fleet(1), 2.0)
    drain_refusal(refusal)


def test_drain_with_two_workers_is_followed() -> None:
    reconciler = new(1, 2)
    drain = ready(5, in_flight="drain")
    assert reconciler.handle(drain, 1.0) == started(drain, 1, 2)


# --- quorum -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quorum", "workers", "needed"),
    [
        (1.0, 7, 7),
        (0.5, 7, 4),
        (0.55, 100, 55),
        (0.7, 10, 7),
        (0.1, 3, 1),
        (0.01, 5, 1),
    ],
)
def test_how_many_a_quorum_needs(quorum: float, workers: int, needed: int) -> None:
    assert Policy(quorum=quorum).needed(workers) == needed


def test_enough_workers_go_on_without_the_one_that_cannot_stage() -> None:
    reconciler = preparing(V5, 1, 2, 3, policy=QUORUM)
    assert reconciler.handle(voted(1, V5), 2.0) == []
    assert reconciler.handle(vote_refused(2, V5), 3.0) == []
    assert reconciler.handle(voted(3, V5), 4.0) == commits(V5, 1, 3)
    # Nobody is fenced before the version is there.
    assert reconciler.handle(committed(1, V5), 5.0) == []
    fence, *rest = reconciler.handle(committed(3, V5), 6.0)
    assert fence == SendFence(2, 5, V5.fingerprint, str(failure(2)))
    assert rest == completed(V5, 1, 3, seconds=6.0, excluded=(failure(2),))


def test_too_few_workers_fail_the_version_and_nobody_is_fenced() -> None:
    reconciler = preparing(V5, 1, 2, 3, policy=QUORUM)
    assert reconciler.handle(vote_refused(2, V5), 2.0) == []
    actions = reconciler.handle(vote_refused(3, V5), 3.0)
    assert aborts(actions) == {1: 5, 2: 5, 3: 5}
    assert without(actions, SendAbort) == failed(
        V5, failure(2), (1, None), (2, None), (3, None)
    )


def test_a_quorum_is_one_of_each_component() -> None:
    """Half of the fleet could go on, and nobody would be left to decode."""
    reconciler = new(prefill(1), 2, prefill(3), policy=QUORUM)
    reconciler.handle(V5, 1.0)
    reconciler.handle(leased(V5), 1.0)
    reconciler.handle(voted(1, V5), 2.0)
    actions = reconciler.handle(vote_refused(2, V5), 2.0)
    assert aborts(actions) == {1: 5, 2: 5, 3: 5}
    assert fences(actions) == {}
    (event,) = [e for e in events(actions) if isinstance(e, RefitFailed)]
    assert event.failure == failure(2)


def test_silent_workers_are_excluded_at_the_deadline_and_told_to_stop() -> None:
    reconciler = preparing(V5, 1, 2, 3, policy=QUORUM)
    reconciler.handle(voted(1, V5), 2.0)
    reconciler.handle(voted(2, V5), 2.0)
    assert reconciler.handle(Tick(), STAGE_DEADLINE) == []
    abort, *rest = reconciler.handle(Tick(), STAGE_DEADLINE + 1)
    assert (abort.worker, abort.version) == (3, 5)
    assert rest == commits(V5, 1, 2)
    assert reconciler.handle(voted(3, V5), STAGE_DEADLINE + 2) == []
    reconciler.handle(committed(1, V5), STAGE_DEADLINE + 3)
    actions = reconciler.handle(committed(2, V5), STAGE_DEADLINE + 4)
    assert fences(actions) == {3: 5}
    [event] = events(actions)
    assert [(f.worker, f.kind) for f in event.excluded] == [(3, "NoAnswer")]


def test_an_excluded_worker_that_leaves_does_not_count_against_the_quorum() -> None:
    reconciler = preparing(V5, 1, 2, 3, policy=QUORUM)
    reconciler.handle(vote_refused(3, V5), 2.0)
    reconciler.handle(voted(1, V5), 2.0)
    assert reconciler.handle(fleet(1), 3.0) == commits(V5, 1)
    [end, _] = reconciler.handle(committed(1, V5), 4.0)
    # It is told of all the same, and so is the one that only left.
    gone, excluded = end.event.excluded
    assert (gone.kind, gone.worker) == ("WorkerLeft", 2)
    assert excluded == failure(3)


def test_a_refit_without_anybody_in_the_quorum_s_other_half_fences_nobody() -> None:
    """The commit fails: those that could not stage serve what the others do."""
    reconciler = preparing(V5, 1, 2, policy=QUORUM)
    reconciler.handle(vote_refused(2, V5), 2.0)
    assert reconciler.handle(voted(1, V5), 3.0) == commits(V5, 1)
    actions = reconciler.handle(commit_refused(1, V5), 4.0)
    assert fences(actions) == {}
    assert [type(event) for event in events(actions)] == [RefitFailed]
