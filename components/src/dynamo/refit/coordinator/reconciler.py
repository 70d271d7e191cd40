# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What to do next, as a function of what is wanted, what is seen, and the time.

Pure: inputs in, actions out; no clock, no I/O. The coordinator feeds every event,
reply, fleet view and tick into :meth:`Reconciler.handle` and carries out what it
returns. One version is under way at a time; the newest announced one is desired:

    leasing --lease held--> preparing --all votes in--> committing --all in--> done
       |                       |                            |
       +-------- failed, superseded: nothing changed -------+ some may be behind
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    RefusalReason,
    WeightVersionReady,
    WorkerJoined,
)
from dynamo.refit.protocol import (
    Committed,
    FleetMember,
    InFlightPolicy,
    Refused,
    ReleaseOutcome,
    Vote,
)

#: Announcements whose end is remembered, so that a repeat of one starts nothing.
REMEMBERED = 256

#: Seconds on top of a worker's own deadline before its silence is a failure.
GRACE_SECONDS = 15.0


class NoAnswer(RefitError):
    """A worker did not answer in time."""


class WorkerLeft(RefitError):
    """A worker is gone from discovery."""


# --- inputs -------------------------------------------------------------------


@dataclass(frozen=True)
class FleetSeen:
    """The workers that are there now, each with its own status."""

    members: tuple[FleetMember, ...]


@dataclass(frozen=True)
class LeaseTaken:
    """The trainer keeps the announcement's bytes; or why it does not."""

    announcement: str
    failure: Failure | None


@dataclass(frozen=True)
class PrepareAnswered:
    worker: int
    announcement: str
    reply: Vote | Refused


@dataclass(frozen=True)
class CommitAnswered:
    worker: int
    announcement: str
    reply: Committed | Refused


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Input = (
    WeightVersionReady
    | FleetSeen
    | LeaseTaken
    | PrepareAnswered
    | CommitAnswered
    | Tick
)


# --- actions ------------------------------------------------------------------


@dataclass(frozen=True)
class TakeLease:
    ready: WeightVersionReady
    seconds: float


@dataclass(frozen=True)
class GiveBackLease:
    ready: WeightVersionReady
    outcome: ReleaseOutcome
    detail: str


@dataclass(frozen=True)
class SendPrepare:
    worker: int
    ready: WeightVersionReady


@dataclass(frozen=True)
class SendCommit:
    worker: int
    ready: WeightVersionReady
    in_flight: InFlightPolicy


@dataclass(frozen=True)
class SendAbort:
    worker: int
    version: int
    reason: str


@dataclass(frozen=True)
class Publish:
    event: Event


Action = TakeLease | GiveBackLease | SendPrepare | SendCommit | SendAbort | Publish


# --- state --------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """Deadlines in seconds, and what happens to running requests by default."""

    stage_seconds: float = 300.0
    commit_seconds: float = 30.0
    in_flight: InFlightPolicy = "continue"

    @property
    def lease_seconds(self) -> float:
        """The bytes are read until every worker has voted or given up; in ``direct``
        staging once more, in the commit."""
        return self.stage_seconds + self.commit_seconds + 3 * GRACE_SECONDS


@dataclass
class Transaction:
    """The version that is under way and how far each member is."""

    ready: WeightVersionReady
    members: set[int]
    began: float
    deadline: float
    phase: Literal["leasing", "preparing", "committing"] = "leasing"
    answered: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)


class Reconciler:
    """Brings every worker to the newest announced version, all or none.

    Args:
        model: the served model's name; ``None`` takes it from the workers.
        policy: deadlines and the default in-flight policy.
    """

    def __init__(self, model: str | None, policy: Policy) -> None:
        self.policy = policy
        self.fleet: dict[int, FleetMember] = {}
        self.desired: WeightVersionReady | None = None
        self.completed: int | None = None
        self.transaction: Transaction | None = None
        self._model = model
        self._heard: float = 0.0
        self._desired_outcome: ReleaseOutcome | None = None
        self._ended: OrderedDict[str, ReleaseOutcome] = OrderedDict()

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
        match what:
            case WeightVersionReady():
                actions = self._announced(what, now)
            case FleetSeen(members=members):
                actions = self._fleet_seen(members)
            case LeaseTaken():
                actions = self._lease_taken(what)
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
        return []

    def _newest_known(self, model: str) -> Iterable[int]:
        if self.desired is not None and self.desired.model == model:
            yield self.desired.version
        for member in self.fleet.values():
            if member.status.version is not None:
                yield member.status.version

    def _supersede(self, by: WeightVersionReady) -> list[Action]:
        """End what is under way before its commit, and what waits for its turn."""
        actions: list[Action] = []
        transaction = self.transaction
        replaced = []
        if transaction is not None and transaction.phase != "committing":
            replaced.append(transaction.ready)
            if transaction.phase == "preparing":
                actions += self._aborts(f"superseded by version {by.version}")
            self.transaction = None
        committing = self.transaction is not None
        waiting = self.desired
        if (
            waiting is not None
            and self._desired_outcome is None
            and waiting not in replaced
            and not (committing and waiting is self.transaction.ready)
        ):
            replaced.append(waiting)
        for old in replaced:
            detail = f"superseded by version {by.version}"
            event = RefitSuperseded(version=old.version, by=by.version)
            actions += [Publish(event), *self._end(old, "superseded", detail)]
        return actions

    def _aborts(self, reason: str) -> list[Action]:
        transaction = self.transaction
        return [
            SendAbort(worker, transaction.ready.version, reason)
            for worker in sorted(transaction.members)
        ]

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
        joined = [
            Publish(WorkerJoined(worker=w, version=m.status.version))
            for w, m in sorted(self.fleet.items())
            if w not in before
        ]
        transaction = self.transaction
        if transaction is not None:
            for worker in transaction.members - set(self.fleet):
                transaction.members.discard(worker)
                left = worker not in transaction.answered
                if left and transaction.phase == "committing":
                    self._fail(worker, WorkerLeft("left during its commit"))
        return joined

    def _lease_taken(self, lease: LeaseTaken) -> list[Action]:
        transaction = self.transaction
        if not self._concerns(lease.announcement, "leasing"):
            return []
        if lease.failure is not None:
            transaction.failures.append(lease.failure)
            return []
        transaction.phase = "preparing"
        return [
            SendPrepare(worker, transaction.ready)
            for worker in sorted(transaction.members)
        ]

    def _prepare_answered(self, answer: PrepareAnswered) -> list[Action]:
        if self._concerns(answer.announcement, "preparing"):
            self._take_answer(answer.worker, answer.reply)
        return []

    def _commit_answered(self, answer: CommitAnswered) -> list[Action]:
        if isinstance(answer.reply, Committed):
            self._now_serving(answer.worker, answer.reply)
        if self._concerns(answer.announcement, "committing"):
            self._take_answer(answer.worker, answer.reply)
        return []

    def _take_answer(self, worker: int, reply: Vote | Committed | Refused) -> None:
        if worker not in self.transaction.members:
            return
        self.transaction.answered.add(worker)
        if isinstance(reply, Refused):
            self.transaction.failures.append(reply.failure)
        elif reply.weights != self.transaction.ready.weights:
            error = FingerprintMismatch(
                f"the worker speaks of weights {reply.weights}, announced were "
                f"{self.transaction.ready.weights}"
            )
            self._fail(worker, error)

    def _concerns(self, announcement: str, phase: str) -> bool:
        current = self.transaction
        return (
            current is not None
            and current.ready.announcement == announcement
            and current.phase == phase
        )

    def _now_serving(self, worker: int, committed: Committed) -> None:
        member = self.fleet.get(worker)
        if member is None:
            return
        status = msgspec.structs.replace(
            member.status,
            phase="serving",
            version=committed.version,
            weights=committed.weights,
            pending=None,
            kv_epoch=committed.kv_epoch,
        )
        seen = msgspec.structs.replace(member, status=status)
        self.fleet[worker] = _newer(member, seen)

    # --- progress -------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        transaction = self.transaction
        if transaction is None:
            return self._start(now)
        if now > transaction.deadline:
            for worker in transaction.members - transaction.answered:
                self._fail(worker, NoAnswer(f"no answer while {transaction.phase}"))
            transaction.answered |= transaction.members
        match transaction.phase:
            case "committing":
                if transaction.answered >= transaction.members:
                    return self._finish(now)
            case "preparing" | "leasing":
                if transaction.failures:
                    return self._give_up(now)
                if not transaction.members:
                    error = WorkerLeft("every worker left before the commit")
                    self._fail(None, error)
                    return self._give_up(now)
                voted = transaction.answered >= transaction.members
                if voted and transaction.phase == "preparing":
                    return self._commit(now)
        return []

    def _start(self, now: float) -> list[Action]:
        ready = self.desired
        if ready is None or not self.fleet:
            return []
        if self._desired_outcome not in (None, "completed"):
            return []
        members = self.fleet.values()
        if any(member.status.phase == "committing" for member in members):
            # A commit of an earlier coordinator: wait until it is decided.
            return []
        if self._desired_outcome is None and (refusal := self._refusal(ready)):
            # It was announced before the workers were seen.
            return refusal
        able = {m.worker: m for m in members if m.status.phase != "fenced"}
        behind = {w for w, m in able.items() if _is_behind(m, ready.version)}
        if not behind:
            if able and self._desired_outcome is None:
                return self._complete(ready, None)
            return []
        deadline = now + self.policy.stage_seconds + GRACE_SECONDS
        self.transaction = Transaction(ready, behind, self._heard, deadline)
        started = RefitStarted(
            model=ready.model, version=ready.version, workers=tuple(sorted(behind))
        )
        return [Publish(started), TakeLease(ready, self.policy.lease_seconds)]

    def _commit(self, now: float) -> list[Action]:
        transaction = self.transaction
        transaction.phase = "committing"
        transaction.answered.clear()
        transaction.deadline = now + self.policy.commit_seconds + GRACE_SECONDS
        in_flight = transaction.ready.in_flight or self.policy.in_flight
        return [
            SendCommit(worker, transaction.ready, in_flight)
            for worker in sorted(transaction.members)
        ]

    def _finish(self, now: float) -> list[Action]:
        transaction = self.transaction
        if transaction.failures:
            return self._report_failure()
        self.transaction = None
        return self._complete(transaction.ready, now - transaction.began)

    def _complete(
        self, ready: WeightVersionReady, seconds: float | None
    ) -> list[Action]:
        self.completed = ready.version
        event = RefitCompleted(
            model=ready.model,
            version=ready.version,
            announcement=ready.announcement,
            weights=ready.weights,
            workers=tuple(w for w, v in self.serving() if v == ready.version),
            seconds=seconds,
        )
        return [Publish(event), *self._end(ready, "completed", "")]

    def _give_up(self, now: float) -> list[Action]:
        transaction = self.transaction
        aborts = []
        if transaction.phase == "preparing":
            aborts = self._aborts(str(transaction.failures[0]))
        return [*aborts, *self._report_failure()]

    def _report_failure(self) -> list[Action]:
        transaction, self.transaction = self.transaction, None
        failure = transaction.failures[0]
        event = RefitFailed(
            version=transaction.ready.version, failure=failure, serving=self.serving()
        )
        return [
            Publish(event),
            *self._end(transaction.ready, "failed", str(failure)),
        ]

    def _fail(self, worker: int | None, error: RefitError) -> None:
        transaction = self.transaction
        transaction.failures.append(
            failure_from(
                error,
                stage=transaction.phase,
                worker=worker,
                version=transaction.ready.version,
            )
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
