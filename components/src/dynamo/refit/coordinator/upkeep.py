# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What single workers are told between refits: to serve, to drop what nobody wants, to
leave; and when those that are behind are tried again."""

from __future__ import annotations

from collections.abc import Mapping

from dynamo.refit.coordinator.actions import (
    Action,
    Publish,
    SendAbort,
    SendAdmit,
    SendFence,
)
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.staging import NoSource
from dynamo.refit.errors import Failure
from dynamo.refit.events import WeightVersionReady, WorkerAdmitted
from dynamo.refit.protocol import FleetMember

#: How often a worker may fail to come to the fleet's version before it is fenced.
CATCH_UPS = 3

#: Between two tries of it: first, and at most.
CATCH_UP_SECONDS = 1.0, 30.0

#: An admission or a fence is said again if the worker does not show it.
SAY_AGAIN_SECONDS = 5.0


class Upkeep:
    """What has been said to single workers, and how often they have failed."""

    def __init__(self, policy: Policy) -> None:
        #: When those that are behind may be tried again, in monotonic seconds.
        self.retry_at = 0.0
        #: Next time the trainer is asked too, although workers hold the version.
        self.ask_trainer = False
        self._policy = policy
        self._backoff = CATCH_UP_SECONDS[0]
        self._tries: dict[int, int] = {}
        self._admitted: dict[int, float] = {}
        self._fences: dict[int, tuple[SendFence, float]] = {}
        self._tidied: dict[int, int] = {}
        self._committing: dict[int, float] = {}

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        for kept in (self._tries, self._admitted, self._fences, self._tidied):
            kept.pop(worker, None)

    def able(self, fleet: Mapping[int, FleetMember]) -> dict[int, FleetMember]:
        """The workers that a version may come to."""
        return {
            worker: member
            for worker, member in fleet.items()
            if member.status.phase != "fenced" and worker not in self._fences
        }

    def undecided(self, able: Mapping[int, FleetMember], now: float) -> bool:
        """A commit that this coordinator does not lead is under way. One that hangs is
        not waited for: the worker refuses whatever comes, and so gets its name told."""
        since = self._committing
        self._committing = {
            worker: since.get(worker, now)
            for worker, member in able.items()
            if member.status.phase == "committing"
        }
        policy = self._policy
        bound = policy.commit_seconds + policy.drain_seconds + GRACE_SECONDS
        return any(now <= began + bound for began in self._committing.values())

    # --- to serve -------------------------------------------------------------

    def admit(self, level: Mapping[int, FleetMember], now: float) -> list[Action]:
        """Those of ``level`` that do not serve yet are to."""
        actions: list[Action] = []
        for worker, member in sorted(level.items()):
            if member.status.admitted:
                if worker in self._admitted:
                    actions += self.serves(worker, member.status.version)
            elif now >= self._admitted.get(worker, now):
                self._admitted[worker] = now + SAY_AGAIN_SECONDS
                actions.append(SendAdmit(worker))
        return actions

    def serves(self, worker: int, version: int | None) -> list[Action]:
        """A worker was admitted, or has admitted itself in its commit."""
        self._admitted.pop(worker, None)
        return [Publish(WorkerAdmitted(worker=worker, version=version))]

    # --- to drop and to leave -------------------------------------------------

    def tidy(self, able: Mapping[int, FleetMember]) -> list[Action]:
        """What an earlier coordinator had staged will never be committed."""
        actions: list[Action] = []
        for worker, member in sorted(able.items()):
            pending = member.status.pending
            if pending is None:
                self._tidied.pop(worker, None)
            elif self._tidied.get(worker) != pending:
                self._tidied[worker] = pending
                reason = "staged for a coordinator that is gone"
                actions.append(SendAbort(worker, pending, reason))
        return actions

    def fence(
        self, worker: int, ready: WeightVersionReady, failure: Failure, now: float
    ) -> list[Action]:
        """The worker has to leave, now and until it does, or shows the version."""
        action = SendFence(worker, ready.version, ready.fingerprint, str(failure))
        self._fences[worker] = action, now + SAY_AGAIN_SECONDS
        return [action]

    def pardon(self, fleet: Mapping[int, FleetMember]) -> None:
        """Those that serve what they were to be fenced for stay: a reply was lost."""
        for worker, (action, _) in list(self._fences.items()):
            if shows(fleet[worker], action.version, action.fingerprint):
                del self._fences[worker]

    def fence_again(self, fleet: Mapping[int, FleetMember], now: float) -> list[Action]:
        """A worker refuses to leave while it commits, and a call may be lost."""
        actions: list[Action] = []
        for worker, (action, due) in self._fences.items():
            if now >= due and fleet[worker].status.phase != "fenced":
                self._fences[worker] = action, now + SAY_AGAIN_SECONDS
                actions.append(action)
        return actions

    # --- to be tried again ----------------------------------------------------

    def caught_up(self) -> None:
        """Nobody has failed for now."""
        self._backoff, self.ask_trainer = CATCH_UP_SECONDS[0], False

    def came(self, worker: int) -> None:
        """The worker serves a version that it was brought to."""
        self._tries.pop(worker, None)

    def failed_to_catch_up(
        self, failures: Mapping[int, Failure], ready: WeightVersionReady, now: float
    ) -> list[Action]:
        """Try again later; those that could not again and again have to leave."""
        self.retry_at = now + self._backoff
        self._backoff = min(2 * self._backoff, CATCH_UP_SECONDS[1])
        self.ask_trainer = not self.ask_trainer
        actions: list[Action] = []
        for worker, failure in sorted(failures.items()):
            if failure.kind == NoSource.__name__:
                continue
            self._tries[worker] = self._tries.get(worker, 0) + 1
            if self._tries[worker] >= CATCH_UPS:
                actions += self.fence(worker, ready, failure, now)
        return actions


def shows(member: FleetMember, version: int, fingerprint: str) -> bool:
    """The worker's status says that it serves the version, for good."""
    status = member.status
    what = status.version, status.fingerprint
    return what == (version, fingerprint) and status.phase not in (
        "committing",
        "fenced",
    )
