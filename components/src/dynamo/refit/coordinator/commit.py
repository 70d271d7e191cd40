# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""In which order the workers that hold a version change to it, and what follows when
one of them does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from dynamo.refit.coordinator.actions import (
    Action,
    SendAbort,
    SendCommit,
    Unanswered,
)
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import CommitStep, Committed, Refused, Stepped

#: A worker whose reply was lost is asked again after so long.
ASK_AGAIN_SECONDS = 0.2

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
        can_undo: every worker can undo an install; without it there is no barrier,
            since one that fails would fence all that cannot.
        catch_up: the fleet serves it already: each goes alone, and there is no way
            back from the start.
    """

    def __init__(
        self,
        ready: WeightVersionReady,
        workers: Iterable[int],
        policy: Policy,
        *,
        can_undo: bool,
        catch_up: bool = False,
    ) -> None:
        self.changed: set[int] = set()
        #: Which did not change, and why; and those that are gone.
        self.refused: dict[int, Failure] = {}
        self.lost: dict[int, Failure] = {}
        self._ready = ready
        self._policy = policy
        self._catch_up = catch_up
        # In order; the values count for nothing.
        self._members = dict.fromkeys(sorted(workers))
        self._waiting = dict(self._members)
        self._busy: dict[int, float] = {}
        #: When those whose reply was lost are asked again; ``None``: not decided.
        self._unanswered: dict[int, float | None] = {}
        self._withdrawn: set[int] = set()
        self._in_flight = ready.in_flight or policy.in_flight
        barrier = policy.commit == "barrier" and len(self._members) > 1
        barrier = barrier and can_undo and not catch_up
        self._step: CommitStep = "pause" if barrier else "all"
        self._withdraw = self._in_flight == "drain" and not barrier

    @property
    def ended(self) -> bool:
        """Nobody is under way, and nobody will be."""
        return not self._busy and not self._waiting

    def advance(self, now: float, routable: Mapping[int, str]) -> list[Action]:
        """What to do next; after :attr:`ended`, nothing.

        Args:
            now: monotonic seconds.
            routable: the workers of the fleet that routers may send to, apart from
                what this round does, and each one's component: prefill workers cannot
                stand in for those that decode.
        """
        for worker in [w for w, deadline in self._busy.items() if now > deadline]:
            self._refuse(worker, NoAnswer(f"no answer to {self._step!r} of its commit"))
        return [*self._ask_again(now), *self._go_on(now, routable)]

    def _ask_again(self, now: float) -> list[Action]:
        """The same order to those whose reply was lost: they carry it out once."""
        actions: list[Action] = []
        for worker, due in list(self._unanswered.items()):
            if due is None:
                self._unanswered[worker] = now + ASK_AGAIN_SECONDS
            elif now >= due:
                del self._unanswered[worker]
                actions.append(self._order(worker, worker in self._withdrawn))
        return actions

    def _go_on(self, now: float, routable: Mapping[int, str]) -> list[Action]:
        if self._step in ("pause", "install"):
            return self._advance_barrier(now)
        if self.refused and not self.changed and not self._catch_up:
            # Nobody has changed: wait for those under way, and tell nobody else.
            if self._busy:
                return []
            back, self._waiting = self._waiting, {}
            return self._aborts(back)
        # In a catch-up there are some that have changed before.
        changed = len(self.changed) + self._catch_up
        room = self._policy.at_a_time(len(self._members), changed)
        return self._send(self._next(room - len(self._busy), routable), now)

    def _next(self, room: int, routable: Mapping[int, str]) -> dict[int, bool]:
        """Who is to change now, and whether it is withdrawn meanwhile."""
        if not self._withdraw:
            chosen = dict.fromkeys(list(self._waiting)[: max(0, room)], False)
        else:
            able = {w: c for w, c in routable.items() if w not in self.refused}
            chosen = self._spared(room, able)
        for worker in chosen:
            del self._waiting[worker]
        return chosen

    def _spared(self, room: int, routable: Mapping[int, str]) -> dict[int, bool]:
        """As :meth:`_next`: routers always have somebody of each component to send
        to."""
        left = Counter(c for w, c in routable.items() if w not in self._withdrawn)
        chosen: dict[int, bool] = {}
        for worker in self._waiting:
            if len(chosen) >= room:
                break
            component = routable.get(worker)
            if component is None:
                chosen[worker] = False
            elif left[component] > 1:
                left[component] -= 1
                chosen[worker] = True
        if not chosen and not self._busy and self._waiting:
            # Nobody else will ever serve meanwhile.
            chosen[next(iter(self._waiting))] = False
        return chosen

    def _advance_barrier(self, now: float) -> list[Action]:
        if self.refused and not self.changed:
            # One cannot, or could not wait: those that still can go back.
            self._busy, self._waiting, self._unanswered = {}, {}, {}
            return self._aborts(self._members)
        if self._waiting:
            chosen, self._waiting = self._waiting, {}
            return self._send(dict.fromkeys(chosen, False), now)
        if self._busy:
            return []
        self._step = "install" if self._step == "pause" else "resume"
        ended = self.changed | set(self.refused)
        going_on = [w for w in self._members if w not in ended]
        return self._send(dict.fromkeys(going_on, False), now)

    def _send(self, workers: dict[int, bool], now: float) -> list[Action]:
        if self._step in ("pause", "install"):
            seconds = HOLD_SHARE / 2 * self._policy.hold_seconds
        else:
            seconds = self._policy.commit_seconds + GRACE_SECONDS
            if self._in_flight == "drain":
                seconds += self._policy.drain_seconds
        self._busy |= dict.fromkeys(workers, now + seconds)
        self._withdrawn |= {w for w, withdraw in workers.items() if withdraw}
        return [self._order(worker, withdraw) for worker, withdraw in workers.items()]

    def _order(self, worker: int, withdraw: bool) -> SendCommit:
        return SendCommit(worker, self._ready, self._in_flight, self._step, withdraw)

    def _aborts(self, workers: Iterable[int]) -> list[Action]:
        cause = next(iter(self.refused.values()), None)
        reason = str(cause) if cause else "another worker did not wait"
        return [SendAbort(w, self._ready.version, reason) for w in workers]

    def answered(
        self, worker: int, reply: Committed | Stepped | Refused | Unanswered
    ) -> None:
        if (
            isinstance(reply, Committed)
            and reply.fingerprint == self._ready.fingerprint
        ):
            self.serves(worker)
        elif worker not in self._busy:
            return
        elif isinstance(reply, Unanswered):
            self._unanswered.setdefault(worker, None)
        elif isinstance(reply, Refused):
            self._refuse(worker, reply.failure)
        elif isinstance(reply, Committed):
            error = FingerprintMismatch(
                f"the worker speaks of weights {reply.fingerprint}, announced were "
                f"{self._ready.fingerprint}"
            )
            self._refuse(worker, error)
        elif reply.step == self._step:
            self._done(worker)

    def serves(self, worker: int) -> None:
        """The worker has changed, as it answers or its status shows: better late than
        fenced."""
        if worker in self._members and (worker in self._busy or worker in self.refused):
            self._done(worker)
            self.refused.pop(worker, None)
            self.changed.add(worker)

    def left(self, worker: int) -> None:
        """The worker is gone from discovery. If it was asked to change and has not
        answered, that is its refusal: it may have died of the version, and whether its
        answer is quicker than the news is chance. At a barrier that goes for a worker
        that has paused, too: it may have been told to install already. Else the worker
        serves nobody, and the others go on."""
        if worker not in self._members:
            return
        asked = worker in self._busy or (
            self._step == "pause" and worker not in self._waiting
        )
        gone = self.refused if asked else self.lost
        del self._members[worker]
        self._waiting.pop(worker, None)
        self._done(worker)
        if worker in self.changed:
            # If it was the only one, there is a way back again.
            self.changed.remove(worker)
        elif worker not in self.refused:
            error = WorkerLeft("left during its commit")
            gone[worker] = self._failure(worker, error)

    def _done(self, worker: int) -> None:
        self._busy.pop(worker, None)
        self._unanswered.pop(worker, None)
        self._withdrawn.discard(worker)

    def _refuse(self, worker: int, why: Failure | RefitError) -> None:
        self._done(worker)
        if isinstance(why, RefitError):
            why = self._failure(worker, why)
        self.refused[worker] = why

    def _failure(self, worker: int, error: RefitError) -> Failure:
        return failure_from(
            error, stage="committing", worker=worker, version=self._ready.version
        )
