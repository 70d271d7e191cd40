# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A thousand replicas: no decision takes long, whatever is under way."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from dynamo.refit.coordinator.actions import (
    Action,
    FleetSeen,
    Input,
    SendAdmit,
    SendCommit,
    SendFence,
    SendPrepare,
    SendServe,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.events import RefitCompleted
from tests.support.fleet import (
    POLICY,
    STAGE_DEADLINE,
    V5,
    V6,
    aborts,
    commit_refused,
    committed,
    events,
    fleet,
    joiner,
    leased,
    member,
    serves,
    stepped,
    voted,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


WORKERS = 1000
DECISION_SECONDS = 0.05


@pytest.fixture(autouse=True)
def only_our_own_garbage() -> Iterator[None]:
    """What other tests have left behind is not collected during a decision."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Timed:
    """A reconciler, and the longest decision that it took: of this thread's own time,
    since the machine is shared."""

    def __init__(self, policy: Policy) -> None:
        self.reconciler = Reconciler("tiny", policy)
        self.longest = 0.0
        self.now = 0.0
        self.said: list[Action] = []

    def hear(self, what: Input) -> list[Action]:
        began = time.thread_time()
        actions = self.reconciler.handle(what, self.now)
        self.longest = max(self.longest, time.thread_time() - began)
        self.said += actions
        return actions

    def look(self) -> list[Action]:
        """The fleet is as the reconciler believes."""
        return self.hear(FleetSeen(tuple(self.reconciler.fleet.values())))

    def go_on(self, actions: list[Action], refuse: bool = False) -> None:
        """Answer everything; look at the fleet and at the clock in between."""
        while actions:
            answers = [what for a in actions if (what := answer(a, refuse)) is not None]
            actions = []
            for number, what in enumerate(answers):
                actions += self.hear(what)
                if number % 100 == 0:
                    actions += [*self.look(), *self.hear(Tick())]
            self.now += 0.001


def answer(action: Action, refuse: bool) -> Input | None:
    """Yes; with ``refuse``, a third of the workers cannot commit."""
    match action:
        case TakeLease(ready=announced):
            return leased(announced)
        case SendServe(peer=peer, reader=reader, ready=announced):
            return serves(peer, reader, announced)
        case SendPrepare(worker=worker, ready=announced):
            return voted(worker, announced)
        case SendCommit(worker=worker, ready=announced, step="pause" | "install"):
            return stepped(worker, announced, action.step)
        case SendCommit(worker=worker, ready=announced) if refuse and worker % 3 == 0:
            return commit_refused(worker, announced)
        case SendCommit(worker=worker, ready=announced):
            return committed(worker, announced)
    return None


POLICIES = {
    "barrier": replace(POLICY, commit="barrier"),
    "barrier, as a tree": replace(POLICY, commit="barrier", direct_readers=2),
    "one at a time": replace(POLICY, max_unavailable=1),
    "one at a time, draining": replace(POLICY, max_unavailable=1, in_flight="drain"),
    "all but one, draining": replace(POLICY, in_flight="drain"),
    "canary, as a tree": replace(POLICY, commit="canary", direct_readers=1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_decision_about_a_thousand_workers_is_quick(name: str) -> None:
    timed = Timed(POLICIES[name])
    everyone = range(1, WORKERS + 1)
    timed.hear(fleet(*map(joiner, everyone)))
    timed.now = POLICY.settle_seconds
    admitted = [a.worker for a in timed.hear(Tick()) if isinstance(a, SendAdmit)]
    assert admitted == list(everyone)
    timed.hear(fleet(*everyone))

    # A refit; in the next one, a third of the workers refuses at the last moment.
    timed.go_on(timed.hear(V5))
    assert timed.reconciler.completed == 5
    timed.go_on(timed.hear(V6), refuse=True)
    fences = [a.worker for a in timed.said if isinstance(a, SendFence)]
    assert fences == [worker for worker in everyone if worker % 3 == 0]
    # Half of the fleet is replaced.
    kept = [member(w, 6) for w in everyone if w % 3 and w > WORKERS // 2]
    joiners = range(WORKERS + 1, 2 * WORKERS + 1 - len(kept))
    timed.go_on(timed.hear(fleet(*kept, *map(joiner, joiners))))
    timed.go_on(timed.hear(Tick()))
    [*_, last] = events(timed.said, RefitCompleted)
    assert last.catch_up and len(last.workers) == WORKERS
    assert {version for _, version in timed.reconciler.serving()} == {6}
    assert timed.longest < DECISION_SECONDS


def test_every_decision_is_quick_when_a_thousand_workers_leave_a_commit() -> None:
    timed = Timed(POLICIES["barrier"])
    everyone = range(1, WORKERS + 1)
    timed.hear(fleet(*everyone))
    timed.hear(V5)
    timed.hear(leased(V5))
    for worker in everyone:
        timed.hear(voted(worker, V5))
    for worker in everyone:
        timed.hear(stepped(worker, V5, "pause"))
    # They have installed, and wait for the last one.
    for worker in range(1, WORKERS):
        timed.hear(stepped(worker, V5, "install"))
    timed.hear(fleet(WORKERS))
    assert timed.reconciler.transaction.commit is not None
    timed.hear(stepped(WORKERS, V5, "install"))
    [event] = events(timed.hear(committed(WORKERS, V5)), RefitCompleted)
    assert len(event.excluded) == WORKERS - 1
    assert timed.longest < DECISION_SECONDS


def test_every_decision_is_quick_when_a_thousand_workers_are_silent() -> None:
    timed = Timed(replace(POLICY, quorum=0.001))
    everyone = range(1, WORKERS + 1)
    timed.hear(fleet(*everyone))
    timed.hear(V5)
    timed.hear(leased(V5))
    timed.hear(voted(1, V5))
    timed.now = STAGE_DEADLINE + 1
    assert len(aborts(timed.hear(Tick()))) == WORKERS - 1
    timed.hear(committed(1, V5))
    timed.now += 10
    assert len([a for a in timed.hear(Tick()) if isinstance(a, SendFence)]) == 999
    assert timed.longest < DECISION_SECONDS
