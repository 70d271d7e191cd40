# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Any order: a coordinator and a fleet, with messages that are late, lost or doubled,
workers and coordinators that come and go, and clocks that jump."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dynamo.refit.coordinator.actions import (
    FleetSeen,
    GiveBackLease,
    Input,
    Publish,
    SendCommit,
    SendPrepare,
    Tick,
)
from dynamo.refit.events import WeightVersionReady
from tests.support.coordinator_watch import Watch
from tests.support.fleet import (
    COMMIT_DEADLINE,
    POLICY,
    commit_refused,
    ready,
    vote_refused,
    voted,
    voted_for_others,
)
from tests.support.simulated_fleet import Call, SimulatedFleet

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

ANSWERS = [voted, voted_for_others, vote_refused, commit_refused]


class AnyOrder(RuleBasedStateMachine):
    """Calls wait until a rule carries one out, and their replies until a rule delivers
    one, in any order."""

    @initialize(
        commit=st.sampled_from(["barrier", "rolling", "canary"]),
        max_unavailable=st.integers(0, 2),
        quorum=st.sampled_from([1.0, 0.5]),
        direct_readers=st.integers(0, 1),
        drain=st.booleans(),
        workers=st.integers(0, 4),
        served=st.booleans(),
    )
    def begin(
        self,
        commit: Any,
        max_unavailable: int,
        quorum: float,
        direct_readers: int,
        drain: bool,
        workers: int,
        served: bool,
    ) -> None:
        self.policy = replace(
            POLICY,
            commit=commit,
            max_unavailable=max_unavailable,
            quorum=quorum,
            direct_readers=direct_readers,
            peer_readers=1,
            in_flight="drain" if drain and commit != "barrier" else "continue",
        )
        self.now = 0.0
        self.epoch = 1
        self.watch = Watch(self.policy)
        self.fleet = SimulatedFleet(self.policy.hold_seconds)
        self.announced: list[WeightVersionReady] = []
        self.replies: list[Input] = []
        self.delivered: list[Input] = []
        self.snapshots: list[FleetSeen] = []
        for _ in range(workers):
            worker = self.fleet.join()
            worker.admitted = True
            if served:
                worker.version, worker.fingerprint = 1, "weights-1"
        self._feed(self.fleet.seen())

    # --- what the coordinator hears -------------------------------------------

    @rule(step=st.sampled_from([1, 1, 1, 2, 0, -1]))
    def announce(self, step: int) -> None:
        """A newer version, or anew one that there was before."""
        newest = max((a.version for a in self.announced), default=1)
        self._announce(max(1, newest + step))

    @rule(messages=st.integers(1, 20))
    def announce_and_go_on(self, messages: int) -> None:
        self.announce(1)
        self.some_goes_well(messages)

    @precondition(lambda self: self.announced)
    @rule(data=st.data(), version=st.integers(1, 9))
    def hear_nonsense(self, data: st.DataObject, version: int) -> None:
        """What must change nothing."""
        announced = data.draw(st.sampled_from(self.announced[-4:]))
        match data.draw(st.integers(0, 4)):
            case 0:
                self._announce(version, model="huge")
            case 1:
                self._announce(version, in_flight="drain")
            case 2:
                self._feed(announced)
            case 3 if self.delivered:
                self._feed(data.draw(st.sampled_from(self.delivered)))
            case _ if self.fleet.workers:
                worker = data.draw(st.sampled_from(sorted(self.fleet.workers)))
                self._feed(data.draw(st.sampled_from(ANSWERS))(worker, announced))

    @rule(
        seconds=st.sampled_from([0.1, 1.5, 5.0, 20.0, COMMIT_DEADLINE + 1, 400.0]),
    )
    def time_passes(self, seconds: float) -> None:
        self._pass_time(seconds)
        self._feed(Tick())

    @rule(now=st.booleans())
    def look(self, now: bool) -> None:
        """Statuses are read now, and may arrive later."""
        self.snapshots.append(self.fleet.seen())
        while now and self.snapshots:
            self.see()

    @precondition(lambda self: self.snapshots)
    @rule()
    def see(self) -> None:
        self._feed(self.snapshots.pop(0))

    @precondition(lambda self: self.fleet.calls)
    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        self._carry_out(data.draw(st.sampled_from(self.fleet.calls)))

    @precondition(lambda self: self._to_stage())
    @rule(data=st.data(), answer=st.sampled_from([vote_refused, voted_for_others]))
    def refuse_to_stage(self, data: st.DataObject, answer: Any) -> None:
        call = data.draw(st.sampled_from(self._to_stage()))
        self.fleet.calls.remove(call)
        self.replies.append(answer(call.worker, call.action.ready))

    @precondition(lambda self: self._to_commit())
    @rule(data=st.data())
    def refuse_to_commit(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self._to_commit()))
        self.fleet.calls.remove(call)
        self.replies.append(commit_refused(call.worker, call.action.ready))

    @precondition(lambda self: self.fleet.calls)
    @rule(data=st.data(), done=st.booleans(), heard=st.booleans())
    def lose(self, data: st.DataObject, done: bool, heard: bool) -> None:
        """A call does not come through, or its reply; the coordinator hears that it has
        no answer, or nothing."""
        call = data.draw(st.sampled_from(self.fleet.calls))
        if done or call.running:
            self.fleet.carry_out(call, self.now)
        else:
            self.fleet.calls.remove(call)
        answer = call.no_answer()
        if heard and answer is not None:
            self.replies.append(answer)

    @precondition(lambda self: self.replies)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        self._deliver(data.draw(st.sampled_from(self.replies)))

    @rule(messages=st.integers(1, 12))
    def some_goes_well(self, messages: int) -> None:
        """Calls and replies come through in the order in which they were sent."""
        for _ in range(messages):
            if self.fleet.calls:
                self._carry_out(self.fleet.calls[0])
            elif self.replies:
                self._deliver(self.replies[0])

    @rule(rounds=st.integers(1, 2))
    def all_goes_well(self, rounds: int) -> None:
        """Every call is carried out and answered, and those that must go do."""
        for _ in range(rounds):
            self._pass_time(0.3)
            self._everyone_answers()

    # --- what happens to the fleet --------------------------------------------

    @precondition(lambda self: len(self.fleet.workers) < 5)
    @rule(no_undo=st.sampled_from([False, False, True]))
    def join_and_be_seen(self, no_undo: bool) -> None:
        self.fleet.join(no_undo=no_undo)
        self.look(now=True)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        del self.fleet.workers[data.draw(st.sampled_from(sorted(self.fleet.workers)))]

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data(), silent=st.booleans())
    def say_no_status(self, data: st.DataObject, silent: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.fleet.workers)))
        self.fleet.workers[worker].silent = silent

    @precondition(lambda self: len(self.fleet.workers) > 2)
    @rule(data=st.data())
    def fence(self, data: st.DataObject) -> None:
        """A worker finds by itself that its weights are not known."""
        worker = data.draw(st.sampled_from(sorted(self.fleet.workers)))
        self.fleet.workers[worker].phase = "fenced"

    @precondition(lambda self: len(self.announced) > 1)
    @rule()
    def restart_the_coordinator(self) -> None:
        """Its calls are still on their way; what they answer nobody hears."""
        self.watch = Watch(self.policy)
        self.epoch += 1
        self.replies, self.delivered = [], []
        self.fleet.forget()
        self.snapshots = [self.fleet.seen()]
        self.see()

    # --- how it must end ------------------------------------------------------

    def teardown(self) -> None:
        """Everyone answers, and yes: then all serve the newest version, and nothing is
        left open."""
        self._everything_ends()
        self._announce(max((a.version for a in self.announced), default=0) + 1)
        self._everything_ends()
        last = self.announced[-1]
        assert self.watch.outcomes[last.announcement_id] == "completed"
        for worker in self.fleet.workers.values():
            assert worker.phase == "serving"
            assert (worker.version, worker.fingerprint) == (
                last.version,
                last.fingerprint,
            )
            assert worker.admitted
            assert worker.staged is None and worker.until is None

    def _everything_ends(self) -> None:
        for _ in range(16):
            self._pass_time(20.0)
            self._everyone_answers()
        for call in list(self.fleet.calls):
            assert call.epoch < self.epoch or not call.running
        able = self.fleet.able()
        newest = max((w.version or 0 for w in able), default=0)
        # Nobody can bring those along whose trainer is not known.
        if newest >= (self.watch.reconciler.completed or 0):
            assert {w.version or 0 for w in able} <= {newest}
            assert all(w.admitted for w in able)
            assert self.watch.open is None
            self.watch.assert_all_released()

    # --- the world ------------------------------------------------------------

    def _announce(self, version: int, model: str = "tiny", **fields: Any) -> None:
        name = f"a{len(self.announced)}-{version}"
        fields.setdefault("in_flight", "continue")
        announced = ready(version, name, model, **fields)
        self.announced.append(announced)
        self._feed(announced)

    def _to_stage(self) -> list[Call]:
        return [c for c in self.fleet.calls if isinstance(c.action, SendPrepare)]

    def _to_commit(self) -> list[Call]:
        """Those that have not begun."""
        calls = [c for c in self.fleet.calls if isinstance(c.action, SendCommit)]
        return [call for call in calls if not call.running]

    def _pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.fleet.pass_time(self.now)

    def _everyone_answers(self) -> None:
        for worker in list(self.fleet.workers.values()):
            worker.silent = False
            if worker.phase == "fenced":
                del self.fleet.workers[worker.number]
        if not self.fleet.workers:
            self.fleet.join()
        self.snapshots.clear()
        self._feed(self.fleet.seen())
        while self.fleet.calls or self.replies:
            while self.fleet.calls:
                self._carry_out(self.fleet.calls[0])
            while self.replies:
                self._deliver(self.replies[0])

    def _feed(self, what: Input) -> None:
        for action in self.watch.handle(what, self.now):
            if not isinstance(action, Publish | GiveBackLease):
                self.fleet.calls.append(Call(self.epoch, action))

    def _deliver(self, reply: Input) -> None:
        self.replies.remove(reply)
        self.delivered.append(reply)
        self._feed(reply)

    def _carry_out(self, call: Call) -> None:
        answer = self.fleet.carry_out(call, self.now)
        if answer is not None and call.epoch == self.epoch:
            self.replies.append(answer)


#: How many times more examples than usual.
THOROUGH = int(os.environ.get("REFIT_ANY_ORDER", "1"))

TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=400 * THOROUGH,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
)
