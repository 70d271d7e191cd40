# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""In which order the workers that hold a version change to it, and what follows when
one of them does not."""

from __future__ import annotations

from collections.abc import Iterable

from dynamo.refit.coordinator.actions import Action, SendAbort, SendCommit
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import CommitStep, Committed, Refused, Stepped

#: A worker waits at a barrier for ``hold_seconds``; what the coordinator does with the
#: others must have reached it before.
HOLD_SHARE = 0.7


class NoAnswer(RefitError):
    """A worker did not answer in time."""


class WorkerLeft(RefitError):
    """A worker is gone from discovery."""


class CommitRound:
    """The commit of one version.

    From the first worker that has changed on there is no way back: those that refuse
    are to be fenced. Before it, a refusal ends the round and nothing has changed.

    Args:
        ready: the version.
        workers: that hold it.
        policy: the order.
        direct: some install straight from their source: they cannot be undone, so
            there is no barrier, and their pause is long.
        spare: other workers that routers may send to meanwhile.
    """

    def __init__(
        self,
        ready: WeightVersionReady,
        workers: Iterable[int],
        policy: Policy,
        *,
        direct: bool,
        spare: int,
    ) -> None:
        self.changed: set[int] = set()
        #: Which did not change, and why; and those that are gone.
        self.refused: dict[int, Failure] = {}
        self.lost: dict[int, Failure] = {}
        self._ready = ready
        self._policy = policy
        self._waiting = sorted(workers)
        self._members = list(self._waiting)
        self._busy: dict[int, float] = {}
        self._in_flight = ready.in_flight or policy.in_flight
        barrier = policy.commit == "barrier" and len(self._members) > 1 and not direct
        self._step: CommitStep = "pause" if barrier else "all"
        # Routers must always have somebody to send to.
        able = len(self._members) + spare > 1 and not barrier
        self._withdraw = able and (direct or self._in_flight == "drain")
        self._most = len(self._members) + spare - 1 if self._withdraw else None

    @property
    def ended(self) -> bool:
        """Nobody is under way, and nobody will be."""
        return not self._busy and not self._waiting

    def advance(self, now: float) -> list[Action]:
        """What to do next; after :attr:`ended`, nothing."""
        for worker in [w for w, deadline in self._busy.items() if now > deadline]:
            self._refuse(worker, NoAnswer(f"no answer to {self._step!r} of its commit"))
        if self._step in ("pause", "install"):
            return self._advance_barrier(now)
        if self.refused and not self.changed:
            # Nobody has changed: wait for those under way, and tell nobody else.
            if self._busy:
                return []
            back, self._waiting = self._waiting, []
            return self._aborts(back)
        room = self._policy.at_a_time(len(self._members), len(self.changed))
        room = min(room, self._most or room) - len(self._busy)
        chosen = self._waiting[: max(0, room)]
        del self._waiting[: len(chosen)]
        return self._send(chosen, now)

    def _advance_barrier(self, now: float) -> list[Action]:
        if self.refused or self.changed:
            # One cannot, or could not wait: those that still can go back.
            self._busy, self._waiting = {}, []
            return self._aborts(self._members)
        if self._waiting:
            chosen, self._waiting = self._waiting, []
            return self._send(chosen, now)
        if self._busy:
            return []
        self._step = "install" if self._step == "pause" else "resume"
        return self._send(self._members, now)

    def _send(self, workers: list[int], now: float) -> list[Action]:
        if self._step in ("pause", "install"):
            seconds = HOLD_SHARE / 2 * self._policy.hold_seconds
        else:
            seconds = self._policy.commit_seconds + GRACE_SECONDS
            if self._in_flight == "drain":
                seconds += self._policy.drain_seconds
        self._busy |= dict.fromkeys(workers, now + seconds)
        return [
            SendCommit(w, self._ready, self._in_flight, self._step, self._withdraw)
            for w in workers
        ]

    def _aborts(self, workers: Iterable[int]) -> list[Action]:
        cause = next(iter(self.refused.values()), None)
        reason = str(cause) if cause else "another worker did not wait"
        return [SendAbort(w, self._ready.version, reason) for w in sorted(workers)]

    def answered(self, worker: int, reply: Committed | Stepped | Refused) -> None:
        if worker not in self._busy:
            return
        if isinstance(reply, Refused):
            self._refuse(worker, reply.failure)
        elif isinstance(reply, Stepped):
            if reply.step == self._step:
                del self._busy[worker]
        elif reply.weights != self._ready.weights:
            error = FingerprintMismatch(
                f"the worker speaks of weights {reply.weights}, announced were "
                f"{self._ready.weights}"
            )
            self._refuse(worker, error)
        else:
            del self._busy[worker]
            self.changed.add(worker)

    def left(self, worker: int) -> None:
        """The worker is gone from discovery: it serves nobody, so the others go on."""
        if worker not in self._members or worker in self.changed:
            return
        self._members.remove(worker)
        self._busy.pop(worker, None)
        if worker in self._waiting:
            self._waiting.remove(worker)
        self.lost[worker] = self._failure(worker, WorkerLeft("left during its commit"))

    def _refuse(self, worker: int, why: Failure | RefitError) -> None:
        self._busy.pop(worker, None)
        if isinstance(why, RefitError):
            why = self._failure(worker, why)
        self.refused[worker] = why

    def _failure(self, worker: int, error: RefitError) -> Failure:
        return failure_from(
            error, stage="committing", worker=worker, version=self._ready.version
        )
