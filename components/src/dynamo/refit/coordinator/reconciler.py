# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What to do next, as a function of what is wanted, what is seen, and the time.

Pure: inputs in, actions out; no clock, no I/O. The coordinator feeds every event,
reply, fleet view and tick into :meth:`Reconciler.handle` and carries out what it
returns. One version is under way at a time; the newest announced one is desired:

    leasing --lease held--> preparing --enough hold it--> committing --all in--> done
       |                       |                             |
       +---- failed, superseded: nothing changed ------------+ from the first that has
                                                               changed on: forward only

When nothing newer waits, workers that are behind what the others serve (joiners,
survivors of a coordinator that died half-way) are brought there, from those that have
it. Only then, or when nobody serves any version, may a joiner serve.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    GiveBackLease,
    Input,
    LeaseTaken,
    PrepareAnswered,
    Publish,
    ReleasePeer,
    SendAbort,
    SendAdmit,
    SendFence,
    ServeAnswered,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.commit import CommitRound, NoAnswer, WorkerLeft
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.staging import NoSource, Staging
from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    RefusalReason,
    WeightVersionReady,
    WorkerAdmitted,
    WorkerJoined,
)
from dynamo.refit.protocol import (
    Committed,
    FleetMember,
    Refused,
    ReleaseOutcome,
    Vote,
)

#: Announcements whose end is remembered, so that a repeat of one starts nothing.
REMEMBERED = 256

#: How often a worker may fail to come to the fleet's version before it is fenced.
CATCH_UPS = 3

#: Between two tries of it: first, and at most.
CATCH_UP_SECONDS = 1.0, 30.0

#: An admission is said again if the worker does not show it.
ADMIT_SECONDS = 5.0


@dataclass
class Transaction:
    """The version that is under way.

    ``catch_up``: the fleet serves it, and some workers are brought there. ``excluded``
    cannot stage it, and will be fenced if it is committed.
    """

    ready: WeightVersionReady
    staging: Staging
    began: float
    deadline: float
    catch_up: bool
    phase: Literal["leasing", "preparing", "committing"]
    excluded: dict[int, Failure]
    commit: CommitRound | None = None
    failure: Failure | None = None


class Reconciler:
    """Brings every worker to the newest announced version, all or none.

    Args:
        model: the served model's name; ``None`` takes it from the workers.
        policy: what the operator decides.
    """

    def __init__(self, model: str | None, policy: Policy) -> None:
        self.policy = policy
        self.fleet: dict[int, FleetMember] = {}
        self.desired: WeightVersionReady | None = None
        self.completed: int | None = None
        self.transaction: Transaction | None = None
        self._model = model
        self._began: float | None = None
        self._heard: float = 0.0
        self._desired_outcome: ReleaseOutcome | None = None
        self._ended: OrderedDict[str, ReleaseOutcome] = OrderedDict()
        self._last: WeightVersionReady | None = None
        self._catch_ups = itertools.count(1)
        self._backoff = CATCH_UP_SECONDS[0]
        self._retry_at = 0.0
        self._tries: dict[int, int] = {}
        self._admitted: dict[int, float] = {}
        self._told_to_go: set[int] = set()
        self._tidied: dict[int, int] = {}

    @property
    def model(self) -> str | None:
        """The model this deployment serves, once it is known."""
        if self._model is None and self.fleet:
            self._model = next(iter(self.fleet.values())).status.model
        return self._model

    def handle(self, what: Input, now: float) -> list[Action]:
        """Take in ``what`` and return what to do.

        Args:
            now: monotonic seconds.
        """
        if self._began is None:
            self._began = now
        match what:
            case WeightVersionReady():
                actions = self._announced(what, now)
            case FleetSeen(members=members):
                actions = self._fleet_seen(members)
            case LeaseTaken():
                actions = self._lease_taken(what)
            case ServeAnswered():
                actions = self._serve_answered(what)
            case PrepareAnswered():
                actions = self._prepare_answered(what)
            case CommitAnswered():
                actions = self._commit_answered(what)
            case Tick():
                actions = []
        return [*actions, *self._advance(now)]

    def serving(self) -> tuple[tuple[int, int | None], ...]:
        """What each worker serves, as far as it is known."""
        return tuple((w, m.status.version) for w, m in sorted(self.fleet.items()))

    # --- inputs ---------------------------------------------------------------

    def _announced(self, ready: WeightVersionReady, now: float) -> list[Action]:
        under_way = self.transaction.ready.announcement if self.transaction else None
        if ready.announcement == under_way:
            return []
        if outcome := self._outcome(ready):
            # The trainer has not heard how it ended: say it again.
            return [GiveBackLease(ready, outcome, "ended before")]
        if self.desired and ready.announcement == self.desired.announcement:
            return []
        if refusal := self._refusal(ready):
            return refusal
        actions = self._supersede(ready)
        self.desired, self._heard, self._desired_outcome = ready, now, None
        return actions

    def _refusal(self, ready: WeightVersionReady) -> list[Action]:
        """What to do about a version that must not be installed; empty if it may."""
        if self.model is not None and ready.model != self.model:
            return self._refuse(
                ready,
                "unknown_model",
                f"model {ready.model!r} is not served here (served: {self.model!r})",
            )
        newest = max(self._newest_known(ready.model), default=ready.version)
        if ready.version < newest:
            return self._refuse(
                ready,
                "stale",
                f"version {ready.version} is older than {newest}: versions must grow; "
                "publish old weights under a new number to go back",
            )
        for member in self.fleet.values():
            status = member.status
            if status.version == ready.version and status.weights != ready.weights:
                return self._refuse(
                    ready,
                    "stale",
                    f"worker {member.worker} serves other weights as version "
                    f"{ready.version}: publish these under a new number",
                )
        in_flight = ready.in_flight or self.policy.in_flight
        if in_flight == "drain" and self.fleet:
            return self._refuse_drain(ready)
        return []

    def _refuse_drain(self, ready: WeightVersionReady) -> list[Action]:
        """A worker that drains is not routed to: somebody else has to be."""
        if self.policy.commit == "barrier":
            why = "with commit policy barrier nobody would be left to serve"
        elif len([m for m in self.fleet.values() if m.status.admitted]) < 2:
            why = "one worker alone cannot be spared"
        else:
            return []
        return self._refuse(
            ready,
            "unsafe_policy",
            f"in-flight policy drain takes workers out of routing, and {why}: use "
            "continue or recompute, or rolling with two workers",
        )

    def _newest_known(self, model: str) -> Iterable[int]:
        if self.desired is not None and self.desired.model == model:
            yield self.desired.version
        for member in self.fleet.values():
            if member.status.version is not None:
                yield member.status.version

    def _supersede(self, by: WeightVersionReady) -> list[Action]:
        """End what is under way before its commit, and what waits for its turn."""
        actions: list[Action] = []
        detail = f"superseded by version {by.version}"
        transaction = self.transaction
        if transaction is not None and transaction.phase != "committing":
            actions += self._drop_stages(detail)
            self.transaction = None
            event = RefitSuperseded(version=transaction.ready.version, by=by.version)
            actions += [Publish(event)]
            actions += self._give_back(transaction, "superseded", detail)
        waiting = self.desired
        under_way = self.transaction.ready if self.transaction else None
        if (
            waiting is not None
            and self._desired_outcome is None
            and waiting is not under_way
        ):
            event = RefitSuperseded(version=waiting.version, by=by.version)
            actions += [Publish(event), *self._end(waiting, "superseded", detail)]
        return actions

    def _drop_stages(self, reason: str) -> list[Action]:
        """Nobody goes on staging the transaction's version."""
        transaction = self.transaction
        if transaction.phase != "preparing":
            return []
        staging = transaction.staging
        aborts = [
            SendAbort(worker, transaction.ready.version, reason)
            for worker in sorted(staging.asked)
        ]
        return [*aborts, *staging.release_all()]

    def _refuse(
        self, ready: WeightVersionReady, reason: RefusalReason, detail: str
    ) -> list[Action]:
        event = RefitRefused(
            reason=reason,
            detail=detail,
            version=ready.version,
            announcement=ready.announcement,
        )
        return [Publish(event), *self._end(ready, "refused", detail)]

    def _fleet_seen(self, members: tuple[FleetMember, ...]) -> list[Action]:
        before = self.fleet
        self.fleet = {m.worker: _newer(before.get(m.worker), m) for m in members}
        actions: list[Action] = [
            Publish(WorkerJoined(worker=w, version=m.status.version))
            for w, m in sorted(self.fleet.items())
            if w not in before
        ]
        gone = set(before) - set(self.fleet)
        for worker in gone:
            for kept in (self._tries, self._admitted, self._tidied):
                kept.pop(worker, None)
            self._told_to_go.discard(worker)
        transaction = self.transaction
        if transaction is not None:
            for worker in sorted(gone):
                actions += transaction.staging.forget(worker)
                if transaction.commit is not None:
                    transaction.commit.left(worker)
        return actions

    def _lease_taken(self, lease: LeaseTaken) -> list[Action]:
        transaction = self._concerned(lease.announcement, "leasing")
        if transaction is None:
            return []
        if lease.failure is not None:
            transaction.failure = lease.failure
            return []
        transaction.phase = "preparing"
        transaction.staging.from_trainer = True
        return []

    def _serve_answered(self, answer: ServeAnswered) -> list[Action]:
        transaction = self._concerned(answer.announcement, "preparing")
        if transaction is not None:
            return transaction.staging.served(answer)
        if isinstance(answer.reply, Refused):
            return []
        return [ReleasePeer(answer.peer, answer.reply.announcement)]

    def _prepare_answered(self, answer: PrepareAnswered) -> list[Action]:
        transaction = self._concerned(answer.announcement, "preparing")
        if transaction is None:
            return []
        reply, ready = answer.reply, transaction.ready
        if isinstance(reply, Vote) and reply.weights != ready.weights:
            error = FingerprintMismatch(
                f"the worker speaks of weights {reply.weights}, announced were "
                f"{ready.weights}"
            )
            reply = Refused(failure=self._failure(error, answer.worker))
        return transaction.staging.answered(answer.worker, reply)

    def _commit_answered(self, answer: CommitAnswered) -> list[Action]:
        admitted: list[Action] = []
        if isinstance(answer.reply, Committed):
            admitted = self._now_serving(answer.worker, answer.reply)
        transaction = self._concerned(answer.announcement, "committing")
        if transaction is not None:
            transaction.commit.answered(answer.worker, answer.reply)
        return admitted

    def _concerned(self, announcement: str, phase: str) -> Transaction | None:
        """The transaction, if an answer is for what it does now."""
        current = self.transaction
        if current is None or current.ready.announcement != announcement:
            return None
        return current if current.phase == phase else None

    def _now_serving(self, worker: int, committed: Committed) -> list[Action]:
        member = self.fleet.get(worker)
        if member is None:
            return []
        status = msgspec.structs.replace(
            member.status,
            phase="serving",
            version=committed.version,
            weights=committed.weights,
            pending=None,
            kv_epoch=committed.kv_epoch,
            admitted=True,
        )
        seen = msgspec.structs.replace(member, status=status)
        self.fleet[worker] = _newer(member, seen)
        if member.status.admitted:
            return []
        return [Publish(WorkerAdmitted(worker=worker, version=committed.version))]

    # --- progress ---------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        transaction = self.transaction
        if transaction is None:
            return self._start(now)
        if transaction.phase == "committing":
            return self._advance_commit(now)
        staging = transaction.staging
        if now > transaction.deadline:
            if transaction.phase == "leasing":
                error = NoAnswer("no answer of the trainer to the request for a lease")
                transaction.failure = self._failure(error, None)
            for worker in staging.late():
                error = NoAnswer(f"no answer while {transaction.phase}")
                staging.fail(worker, self._failure(error, worker))
        actions: list[Action] = []
        if transaction.phase == "preparing":
            actions = staging.assign()
        if transaction.failure is None:
            transaction.failure = self._shortfall(transaction)
        if transaction.failure is not None:
            return [*actions, *self._give_up(now)]
        if transaction.phase == "preparing" and staging.done:
            return [*actions, *self._commit(now)]
        return actions

    def _shortfall(self, transaction: Transaction) -> Failure | None:
        """Why the version cannot be committed any more, if it cannot."""
        staging = transaction.staging
        transaction.excluded |= staging.failures
        if staging.readers:
            able = len(staging.readers)
            enough = able >= self.policy.needed(able + len(transaction.excluded))
            if enough or transaction.catch_up:
                return None
        first = next(iter(transaction.excluded.values()), None)
        error = WorkerLeft("every worker left before the commit")
        return first or self._failure(error, None)

    def _start(self, now: float) -> list[Action]:
        if not self.fleet:
            return []
        members = self.fleet.values()
        if any(member.status.phase == "committing" for member in members):
            # A commit of an earlier coordinator: wait until it is decided.
            return []
        able = {
            m.worker: m
            for m in members
            if m.status.phase != "fenced" and m.worker not in self._told_to_go
        }
        ready = self.desired
        if ready is not None and self._desired_outcome is None:
            if refusal := self._refusal(ready):
                # It was announced before the workers were seen.
                return refusal
            behind = {w for w, m in able.items() if _is_behind(m, ready.version)}
            if behind:
                return self._begin(ready, behind, able, now)
            if able:
                return [*self._complete(ready, None), *self._keep_together(able, now)]
            return []
        return self._keep_together(able, now)

    def _keep_together(self, able: dict[int, FleetMember], now: float) -> list[Action]:
        """Everyone to what the fleet serves; then everyone may serve."""
        served = self._served(able)
        if served is None:
            if now < self._began + self.policy.settle_seconds:
                return []
            return self._admit(able, now)
        level = {w: m for w, m in able.items() if m.status.version == served.version}
        behind = set(able) - set(level)
        if not behind:
            self.completed = served.version
        actions = self._admit(level, now)
        if behind and now >= self._retry_at:
            actions += self._begin(served, behind, able, now, catch_up=True)
        return actions or self._tidy(able)

    def _served(self, able: dict[int, FleetMember]) -> WeightVersionReady | None:
        """The newest version that a worker has, or the last one that all had."""
        newest = max(
            (m.status for m in able.values() if m.status.version is not None),
            key=lambda status: status.version,
            default=None,
        )
        for known in (self._last, self.desired):
            if known is None:
                continue
            if newest is None and known is self._last:
                return known
            if newest is not None and known.version == newest.version:
                return known
        if newest is None:
            return None
        return WeightVersionReady(
            model=newest.model,
            version=newest.version,
            announcement="",
            endpoint="",
            instance=0,
            manifest="",
            slot=0,
            weights=newest.weights,
        )

    def _admit(self, level: dict[int, FleetMember], now: float) -> list[Action]:
        actions: list[Action] = []
        for worker, member in sorted(level.items()):
            before = self._admitted.get(worker)
            if member.status.admitted:
                if before is not None:
                    del self._admitted[worker]
                    event = WorkerAdmitted(worker=worker, version=member.status.version)
                    actions.append(Publish(event))
            elif before is None or now > before + ADMIT_SECONDS:
                self._admitted[worker] = now
                actions.append(SendAdmit(worker))
        return actions

    def _tidy(self, able: dict[int, FleetMember]) -> list[Action]:
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

    def _begin(
        self,
        ready: WeightVersionReady,
        behind: set[int],
        able: dict[int, FleetMember],
        now: float,
        *,
        catch_up: bool = False,
    ) -> list[Action]:
        holders = {w for w, m in able.items() if m.status.version == ready.version}
        lease = bool(ready.announcement) and not holders
        if catch_up:
            # Answers to an earlier try must not be taken for this one's.
            name = f"catch-up {next(self._catch_ups)} to version {ready.version}"
            ready = msgspec.structs.replace(
                ready,
                announcement=ready.announcement if lease else name,
                in_flight="continue",
            )
        self.transaction = Transaction(
            ready=ready,
            staging=Staging(ready, behind, holders, self.policy),
            began=now if catch_up else self._heard,
            deadline=now + self.policy.stage_seconds + GRACE_SECONDS,
            catch_up=catch_up,
            phase="leasing" if lease else "preparing",
            excluded={},
        )
        started = RefitStarted(
            model=ready.model,
            version=ready.version,
            workers=tuple(sorted(behind)),
            catch_up=catch_up,
        )
        if lease:
            seconds = self.policy.lease_seconds(len(self.fleet))
            return [Publish(started), TakeLease(ready, seconds)]
        return [Publish(started), *self._advance(now)]

    def _commit(self, now: float) -> list[Action]:
        transaction = self.transaction
        staging = transaction.staging
        transaction.phase = "committing"
        others = set(self.fleet) - set(staging.readers) - set(transaction.excluded)
        spare = [w for w in others if self.fleet[w].status.admitted]
        transaction.commit = CommitRound(
            transaction.ready,
            staging.readers,
            self.policy,
            direct=staging.direct,
            spare=len(spare),
        )
        return self._advance_commit(now)

    def _advance_commit(self, now: float) -> list[Action]:
        commit = self.transaction.commit
        actions = commit.advance(now)
        if not commit.ended:
            return actions
        if commit.changed:
            return [*actions, *self._finish(now)]
        failures = {**self.transaction.excluded, **commit.refused, **commit.lost}
        self.transaction.failure = next(iter(failures.values()))
        return [*actions, *self._report_failure(now)]

    def _finish(self, now: float) -> list[Action]:
        """Some serve the version: those that do not must not go on."""
        transaction, self.transaction = self.transaction, None
        commit, ready = transaction.commit, transaction.ready
        stay = {**transaction.excluded, **commit.refused}
        actions: list[Action] = []
        for worker in sorted(commit.changed):
            self._tries.pop(worker, None)
        for worker, failure in sorted(stay.items()):
            if transaction.catch_up:
                actions += self._failed_to_catch_up(worker, ready.version, failure)
            else:
                actions += self._fence(worker, ready.version, failure)
        excluded = (*stay.values(), *commit.lost.values())
        seconds = now - transaction.began
        if transaction.catch_up:
            self._backoff = CATCH_UP_SECONDS[0]
            event = self._completed(ready, seconds, excluded, catch_up=True)
            return [
                *actions,
                Publish(event),
                *self._give_back(transaction, "completed"),
            ]
        return [*actions, *self._complete(ready, seconds, excluded)]

    def _failed_to_catch_up(
        self, worker: int, version: int, failure: Failure
    ) -> list[Action]:
        if failure.kind == NoSource.__name__:
            return []
        self._tries[worker] = self._tries.get(worker, 0) + 1
        if self._tries[worker] < CATCH_UPS:
            return []
        return self._fence(worker, version, failure)

    def _fence(self, worker: int, version: int, failure: Failure) -> list[Action]:
        if worker not in self.fleet:
            return []
        self._told_to_go.add(worker)
        return [SendFence(worker, version, str(failure))]

    def _complete(
        self,
        ready: WeightVersionReady,
        seconds: float | None,
        excluded: tuple[Failure, ...] = (),
    ) -> list[Action]:
        self.completed = ready.version
        self._last = ready
        event = self._completed(ready, seconds, excluded)
        return [Publish(event), *self._end(ready, "completed", "")]

    def _completed(
        self,
        ready: WeightVersionReady,
        seconds: float | None,
        excluded: tuple[Failure, ...],
        *,
        catch_up: bool = False,
    ) -> RefitCompleted:
        return RefitCompleted(
            model=ready.model,
            version=ready.version,
            announcement=ready.announcement,
            weights=ready.weights,
            workers=tuple(w for w, v in self.serving() if v == ready.version),
            excluded=excluded,
            seconds=seconds,
            catch_up=catch_up,
        )

    def _give_up(self, now: float) -> list[Action]:
        dropped = self._drop_stages(str(self.transaction.failure))
        return [*dropped, *self._report_failure(now)]

    def _report_failure(self, now: float) -> list[Action]:
        transaction, self.transaction = self.transaction, None
        failure, ready = transaction.failure, transaction.ready
        event = RefitFailed(
            version=ready.version, failure=failure, serving=self.serving()
        )
        actions: list[Action] = [Publish(event)]
        if transaction.catch_up:
            self._retry_at = now + self._backoff
            self._backoff = min(2 * self._backoff, CATCH_UP_SECONDS[1])
            refused = transaction.commit.refused if transaction.commit else {}
            failures = {**transaction.excluded, **refused}
            for worker, why in sorted(failures.items()):
                actions += self._failed_to_catch_up(worker, ready.version, why)
        return [*actions, *self._give_back(transaction, "failed", str(failure))]

    def _give_back(
        self, transaction: Transaction, outcome: ReleaseOutcome, detail: str = ""
    ) -> list[Action]:
        """The trainer need not keep the version for it any more."""
        if not transaction.catch_up:
            return self._end(transaction.ready, outcome, detail)
        if transaction.phase == "leasing" or transaction.staging.from_trainer:
            return [GiveBackLease(transaction.ready, outcome, detail)]
        return []

    def _failure(self, error: RefitError, worker: int | None) -> Failure:
        transaction = self.transaction
        return failure_from(
            error,
            stage=transaction.phase,
            worker=worker,
            version=transaction.ready.version,
        )

    def _outcome(self, ready: WeightVersionReady) -> ReleaseOutcome | None:
        """How an announcement ended, if it did; the desired one is not forgotten."""
        if self.desired and ready.announcement == self.desired.announcement:
            return self._desired_outcome
        return self._ended.get(ready.announcement)

    def _end(
        self, ready: WeightVersionReady, outcome: ReleaseOutcome, detail: str
    ) -> list[Action]:
        if self.desired and ready.announcement == self.desired.announcement:
            self._desired_outcome = outcome
        self._ended[ready.announcement] = outcome
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        return [GiveBackLease(ready, outcome, detail)]


def _is_behind(member: FleetMember, version: int) -> bool:
    return member.status.version is None or member.status.version < version


def _newer(known: FleetMember | None, seen: FleetMember) -> FleetMember:
    """``seen``, unless it is an older answer than a commit's reply.

    Versions grow for as long as a worker lives, and a new process is a new worker.
    """
    if known is None or known.status.version is None:
        return seen
    version = seen.status.version
    older = version is None or version < known.status.version
    return known if older else seen
