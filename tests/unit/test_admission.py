# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Admission: no worker serves start-up weights where the fleet serves, or may serve, a
version."""

from __future__ import annotations

import pytest

from dynamo.refit.coordinator.actions import (
    Action,
    FleetSeen,
    Publish,
    SendAdmit,
    SendServe,
    Tick,
)
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.coordinator.upkeep import SAY_AGAIN_SECONDS
from dynamo.refit.events import WeightVersionReady, WorkerAdmitted
from dynamo.refit.protocol import FleetMember
from tests.support.fleet import (
    POLICY,
    V5,
    committed,
    completed,
    events,
    fleet,
    joiner,
    leased,
    member,
    new,
    of_type,
    preparing,
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


# --- start-up weights -------------------------------------------------------------


def test_start_up_weights_are_admitted_when_the_fleet_has_been_seen() -> None:
    """Until then a worker that serves a version may be missing from discovery."""
    reconciler = new(joiner(1), joiner(2))
    assert reconciler.handle(Tick(), POLICY.settle_seconds - 0.1) == []
    actions = reconciler.handle(Tick(), POLICY.settle_seconds)
    assert actions == [SendAdmit(1), SendAdmit(2)]


def test_settling_begins_with_the_coordinator_and_not_with_a_worker() -> None:
    reconciler = new()
    reconciler.handle(Tick(), 0.0)
    assert admitted(reconciler.handle(fleet(joiner(1)), 10.0)) == [1]


def test_an_admission_is_said_again_until_the_worker_shows_it() -> None:
    reconciler = new(joiner(1))
    assert admitted(reconciler.handle(Tick(), 10.0)) == [1]
    assert reconciler.handle(fleet(joiner(1)), 11.0) == []
    assert admitted(reconciler.handle(Tick(), 10.0 + SAY_AGAIN_SECONDS)) == [1]
    actions = reconciler.handle(fleet(member(1)), 16.0)
    assert actions == [Publish(WorkerAdmitted(worker=1, version=None))]
    assert reconciler.handle(Tick(), 17.0) == []


def test_a_joiner_with_the_served_version_is_admitted() -> None:
    """Its coordinator died between its commit and the next look."""
    level = member(2, 5, admitted=False)
    actions = new().handle(fleet(member(1, 5), level), 0.0)
    assert admitted(actions) == [2]


def test_a_joiner_behind_the_fleet_is_not_admitted_whatever_fails() -> None:
    reconciler = new(member(1, 5), joiner(2))
    for now in range(1, 300):
        actions = reconciler.handle(Tick(), float(now))
        assert admitted(actions) == []
        if reconciler.transaction is not None:
            what = catch_up(reconciler)
            actions = reconciler.handle(serves_not(1, 2, what), float(now))
            assert admitted(actions) == []


def test_nobody_is_admitted_while_the_first_version_is_under_way() -> None:
    reconciler = preparing(V5, joiner(1))
    assert admitted(reconciler.handle(Tick(), 50.0)) == []
    reconciler.handle(voted(1, V5), 51.0)
    actions = reconciler.handle(committed(1, V5), 52.0)
    # The commit admits by itself.
    assert actions[0] == Publish(WorkerAdmitted(worker=1, version=5))
    assert actions[1:] == completed(V5, 1, seconds=52.0)


def test_an_admission_is_told_once() -> None:
    reconciler = new(joiner(1))
    assert admitted(reconciler.handle(Tick(), 10.0)) == [1]
    reconciler.handle(V5, 11.0)
    reconciler.handle(leased(V5), 11.0)
    reconciler.handle(voted(1, V5), 11.0)
    told = events(reconciler.handle(committed(1, V5), 12.0), WorkerAdmitted)
    told += events(reconciler.handle(fleet(member(1, 5)), 13.0), WorkerAdmitted)
    assert told == [WorkerAdmitted(worker=1, version=5)]


def test_a_failed_first_version_leaves_the_start_up_weights_to_serve() -> None:
    reconciler = preparing(V5, joiner(1))
    reconciler.handle(vote_refused(1, V5), 50.0)
    assert admitted(reconciler.handle(Tick(), 51.0)) == [1]


# --- workers of which nothing is known ------------------------------------------------


def unseen(*members: FleetMember | int, silent: int) -> FleetSeen:
    """``silent`` is in discovery, and has not answered yet."""
    return FleetSeen(fleet(*members).members, frozenset({silent}))


def test_start_up_weights_wait_for_a_worker_that_is_silent() -> None:
    """It may be the one that serves a version."""
    reconciler = new()
    reconciler.handle(unseen(joiner(1), silent=2), 0.0)
    assert admitted(reconciler.handle(Tick(), 100.0)) == []
    assert admitted(reconciler.handle(fleet(joiner(1), joiner(2)), 101.0)) == [1, 2]


def test_a_silent_worker_that_turns_out_to_serve_is_followed() -> None:
    reconciler = new()
    reconciler.handle(unseen(joiner(1), silent=2), 0.0)
    actions = reconciler.handle(fleet(joiner(1), member(2, 5)), 100.0)
    assert admitted(actions) == []
    assert of_type(actions, SendServe) == [SendServe(2, 1, catch_up(reconciler))]


def test_start_up_weights_wait_for_a_fenced_worker_to_go() -> None:
    """The version that it has was served."""
    fenced = member(2, 5, phase="fenced")
    reconciler = new(joiner(1), fenced)
    assert admitted(reconciler.handle(Tick(), 100.0)) == []
    assert admitted(reconciler.handle(fleet(joiner(1)), 101.0)) == [1]


def test_what_is_served_is_admitted_whoever_is_silent() -> None:
    reconciler = new()
    level = member(2, 5, admitted=False)
    actions = reconciler.handle(unseen(member(1, 5), level, silent=3), 0.0)
    assert admitted(actions) == [2]
