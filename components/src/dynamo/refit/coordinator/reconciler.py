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
from collections import Counter
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
    ServeAnswered,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.announcements import Announcements
from dynamo.refit.coordinator.commit import CommitRound, NoAnswer, WorkerLeft
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.staging import NoSource, Staging
from dynamo.refit.coordinator.upkeep import Upkeep, shows
from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
    WorkerJoined,
)
from dynamo.refit.protocol import (
    Committed,
    FleetMember,
    Refused,
    ReleaseOutcome,
    Vote,
)

#: Bytes of the messages of all workers that a version went without: an event has its
#: bound.
EXCLUDED_BYTES = 64 * 1024


@dataclass
class Transaction:
    """The version that is under way.

    ``catch_up``: the fleet serves it, and some workers are brought there.
    """

    ready: WeightVersionReady
    staging: Staging
    began: float
    deadline: float
    catch_up: bool
    phase: Literal["leasing", "preparing", "committing"]
    commit: CommitRound | None = None
    failure: Failure | None = None


class Reconciler:
    """Brings every worker to the newest announced version, all or none.

    Args:
        model: the served model's name; ``None`` takes it from the first worker.
            Workers of another model are not in the fleet.
        policy: what the operator decides.
    """

    def __init__(self, model: str | None, policy: Policy) -> None:
        self.policy = policy
        self.fleet: dict[int, FleetMember] = {}
        self.completed: int | None = None
        self.transaction: Transaction | None = None
        self._model = model
        self._silent: frozenset[int] = frozenset()
        self._other_models: frozenset[str] = frozenset()
        self._began: float | None = None
        self._announcements = Announcements()
        self._upkeep = Upkeep(policy)
        #: The highest version that a worker of this model is known to have served.
        self._served_before: int | None = None
        #: What all workers served last.
        self._last: WeightVersionReady | None = None
        self._catch_ups = itertools.count(1)

    @property
    def desired(self) -> WeightVersionReady | None:
        """The newest announcement that was not refused at once."""
        return self._announcements.desired

    @property
    def model(self) -> str | None:
        """The model this fleet serves, once it is known."""
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
            case FleetSeen():
                actions = self._fleet_seen(what)
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
        self._upkeep.pardon(self.fleet)
        actions += self._upkeep.fence_again(self.fleet, now)
        return [*actions, *self._advance(now)]

    def serving(self) -> tuple[tuple[int, int | None], ...]:
        """What each worker serves, as far as it is known; a fenced one serves none."""
        return tuple(
            (worker, member.status.version)
            for worker, member in sorted(self.fleet.items())
            if member.status.phase != "fenced"
        )

    # --- inputs ---------------------------------------------------------------

    def _announced(self, ready: WeightVersionReady, now: float) -> list[Action]:
        under_way = self.transaction.ready.announcement_id if self.transaction else None
        if ready.announcement_id == under_way:
            return []
        if self._is_elsewhere(ready):
            return []
        announcements = self._announcements
        if outcome := announcements.outcome(ready):
            # The trainer has not heard how it ended: say it again.
            return [GiveBackLease(ready, outcome, "ended before")]
        if announcements.is_desired(ready):
            return []
        if refusal := self._refuse(ready):
            return refusal
        actions = self._supersede(ready)
        announcements.want(ready, now)
        return actions

    def _is_elsewhere(self, ready: WeightVersionReady) -> bool:
        """Whether another coordinator says how the announcement ends."""
        return ready.model in self._other_models - {self.model}

    def _refuse(self, ready: WeightVersionReady) -> list[Action]:
        """What to do about a version that must not be installed; empty if it may."""
        under_way = self.transaction.ready.version if self.transaction else None
        newest = _highest(self._served_before, under_way)
        return self._announcements.refuse(
            ready, self.model, self.fleet, self.policy, newest
        )

    def _supersede(self, by: WeightVersionReady) -> list[Action]:
        """End what is under way before its commit, and what waits for its turn."""
        actions: list[Action] = []
        detail = f"superseded by version {by.version}"
        transaction = self.transaction
        if transaction is not None and transaction.phase != "committing":
            self.transaction = None
            event = RefitSuperseded(
                version=transaction.ready.version,
                by=by.version,
                catch_up=transaction.catch_up,
            )
            actions += [*transaction.staging.drop(detail), Publish(event)]
            actions += self._give_back(transaction, "superseded", detail)
        waiting = self._announcements.open
        under_way = self.transaction.ready if self.transaction else None
        if waiting is not None and waiting is not under_way:
            event = RefitSuperseded(version=waiting.version, by=by.version)
            actions.append(Publish(event))
            actions += self._announcements.end(waiting, "superseded", detail)
        return actions

    def _fleet_seen(self, seen: FleetSeen) -> list[Action]:
        if self._model is None and seen.members:
            self._model = seen.members[0].status.model
        self._silent, self._other_models = seen.silent, seen.other_models
        before = self.fleet
        self.fleet = {
            m.worker: _newer(before.get(m.worker), m)
            for m in seen.members
            if m.status.model == self.model
        }
        versions = (m.status.version for m in self.fleet.values())
        self._served_before = _highest(self._served_before, *versions)
        actions: list[Action] = [
            Publish(WorkerJoined(worker=w, version=m.status.version))
            for w, m in sorted(self.fleet.items())
            if w not in before
        ]
        transaction = self.transaction
        # One that has fenced itself is as good as gone.
        there = {w for w, m in self.fleet.items() if m.status.phase != "fenced"}
        for worker in sorted(set(before) - there):
            if worker not in self.fleet:
                self._upkeep.forget(worker)
            if transaction is None:
                continue
            if transaction.commit is None:
                actions += transaction.staging.left(worker)
            else:
                actions += transaction.staging.forget(worker)
                transaction.commit.left(worker)
        self._note_changed()
        return actions

    def _note_changed(self) -> None:
        """A commit's reply may be lost: the worker's status says it all the same."""
        transaction = self.transaction
        if transaction is None or transaction.commit is None:
            return
        ready = transaction.ready
        for worker, member in self.fleet.items():
            if shows(member, ready.version, ready.fingerprint):
                transaction.commit.serves(worker)

    def _lease_taken(self, lease: LeaseTaken) -> list[Action]:
        transaction = self._concerned(lease.announcement_id, "leasing")
        if transaction is None:
            return []
        if lease.failure is not None:
            transaction.failure = self._not_leased(transaction, lease.failure)
            return []
        transaction.phase = "preparing"
        transaction.staging.from_trainer = True
        return []

    def _not_leased(self, transaction: Transaction, failure: Failure) -> Failure:
        if not transaction.catch_up or transaction.staging.holders:
            return failure
        error = NoSource(
            f"the trainer does not lend it ({failure}), and no worker has it any more: "
            "publish a new version"
        )
        return self._failure(error, None)

    def _serve_answered(self, answer: ServeAnswered) -> list[Action]:
        transaction = self._concerned(answer.announcement_id, "preparing")
        if transaction is not None:
            return transaction.staging.served(answer)
        if isinstance(answer.reply, Refused):
            return []
        return [ReleasePeer(answer.peer, answer.reply.announcement_id)]

    def _prepare_answered(self, answer: PrepareAnswered) -> list[Action]:
        self._note_fence(answer)
        transaction = self._concerned(answer.announcement_id, "preparing")
        if transaction is None:
            return []
        reply, ready = answer.reply, transaction.ready
        if isinstance(reply, Vote) and reply.fingerprint != ready.fingerprint:
            error = FingerprintMismatch(
                f"the worker speaks of weights {reply.fingerprint}, announced were "
                f"{ready.fingerprint}"
            )
            reply = Refused(failure=self._failure(error, answer.worker))
        return transaction.staging.answered(answer.worker, reply)

    def _commit_answered(self, answer: CommitAnswered) -> list[Action]:
        admitted: list[Action] = []
        self._note_fence(answer)
        if isinstance(answer.reply, Committed):
            version = answer.reply.version
            self._served_before = _highest(self._served_before, version)
            admitted = self._now_serving(answer.worker, answer.reply)
        transaction = self._concerned(answer.announcement_id, "committing")
        if transaction is not None:
            transaction.commit.answered(answer.worker, answer.reply)
        return admitted

    def _concerned(self, announcement_id: str, phase: str) -> Transaction | None:
        """The transaction, if an answer is for what it does now."""
        current = self.transaction
        if current is None or current.ready.announcement_id != announcement_id:
            return None
        return current if current.phase == phase else None

    def _now_serving(self, worker: int, committed: Committed) -> list[Action]:
        member = self.fleet.get(worker)
        if member is None or member.status.phase == "fenced":
            return []
        status = msgspec.structs.replace(
            member.status,
            phase="serving",
            version=committed.version,
            fingerprint=committed.fingerprint,
            pending=None,
            kv_epoch=committed.kv_epoch,
            admitted=True,
        )
        seen = msgspec.structs.replace(member, status=status)
        self.fleet[worker] = _newer(member, seen)
        if member.status.admitted:
            return []
        return self._upkeep.serves(worker, committed.version)

    def _note_fence(self, answer: PrepareAnswered | CommitAnswered) -> None:
        """A worker that says that it has fenced itself is so in the view at once."""
        member = self.fleet.get(answer.worker)
        if member and isinstance(answer.reply, Refused) and answer.reply.fenced:
            status = msgspec.structs.replace(member.status, phase="fenced")
            self.fleet[answer.worker] = msgspec.structs.replace(member, status=status)

    # --- progress ---------------------------------------------------------------

    def _advance(self, now: float) -> list[Action]:
        transaction = self.transaction
        if transaction is None:
            return self._start(now)
        if transaction.phase == "committing":
            return self._advance_commit(now)
        staging = transaction.staging
        actions: list[Action] = []
        if now > transaction.deadline:
            actions = self._too_late(transaction)
        if transaction.failure is None:
            transaction.failure = self._shortfall(transaction)
        if transaction.failure is None and transaction.phase == "preparing":
            actions += staging.assign()
            # Some may have nobody left to read from.
            transaction.failure = self._shortfall(transaction)
        if transaction.failure is not None:
            actions += staging.drop(str(transaction.failure))
            return [*actions, *self._fail(now)]
        if transaction.phase == "preparing" and staging.done:
            return [*actions, *self._commit(now)]
        return actions

    def _too_late(self, transaction: Transaction) -> list[Action]:
        if transaction.phase == "preparing":
            return transaction.staging.end(NoAnswer("no answer while preparing"))
        error = NoAnswer("no answer of the trainer to the request for a lease")
        transaction.failure = self._failure(error, None)
        return []

    def _shortfall(self, transaction: Transaction) -> Failure | None:
        """Why the version cannot be committed any more, if it cannot."""
        staging = transaction.staging
        able = self._components(staging.readers)
        unable = self._components(staging.failures)
        enough = transaction.catch_up or all(
            able[name] >= self.policy.needed(able[name] + unable[name])
            for name in able | unable
        )
        if able and enough:
            return None
        first = next(iter(staging.failures.values()), None)
        error = WorkerLeft("every worker left before the commit")
        return first or self._failure(error, None)

    def _components(self, workers: Iterable[int]) -> Counter[str]:
        """How many of them each component has, of those that are there."""
        return Counter(self.fleet[w].component for w in workers if w in self.fleet)

    def _start(self, now: float) -> list[Action]:
        able = self._upkeep.able(self.fleet)
        if not able or self._upkeep.undecided(able, now):
            return []
        ready = self._announcements.open
        if ready is not None and self._is_elsewhere(ready):
            # It was announced before the workers were seen.
            ready = self._announcements.desired = None
        if ready is None:
            return self._keep_together(able, now)
        if refusal := self._refuse(ready):
            # It was announced before the workers were seen.
            return refusal
        behind = {w for w, m in able.items() if _is_behind(m, ready)}
        if behind:
            return self._begin(ready, behind, able, now)
        return [*self._complete(ready, None), *self._keep_together(able, now)]

    def _keep_together(self, able: dict[int, FleetMember], now: float) -> list[Action]:
        """Everyone to what the fleet serves; then everyone may serve."""
        served = self._served(able)
        level, behind = able, set()
        if served is not None:
            level = {w: m for w, m in able.items() if not _is_behind(m, served)}
            behind = set(able) - set(level)
            if not behind:
                self._last, self.completed = served, served.version
        elif now < self._began + self.policy.settle_seconds or self._may_be_served():
            level = {}
        actions = self._upkeep.admit(level, now)
        if behind and now >= self._upkeep.retry_at:
            return [*actions, *self._begin(served, behind, able, now, catch_up=True)]
        return [*actions, *self._upkeep.tidy(able)]

    def _may_be_served(self) -> bool:
        """Somebody who has a version cannot be asked for it."""
        members = self.fleet.values()
        return bool(self._silent) or any(m.status.version is not None for m in members)

    def _served(self, able: dict[int, FleetMember]) -> WeightVersionReady | None:
        """The newest version that a worker has, and none older than the last that all
        had."""
        last = self._last
        statuses = [m.status for m in able.values() if m.status.version is not None]
        count = Counter(status.fingerprint for status in statuses)
        # Of two with one number, what more workers have.
        newest = max(
            statuses,
            key=lambda status: (status.version, count[status.fingerprint]),
            default=None,
        )
        if newest is None or (last is not None and newest.version <= last.version):
            return last
        desired = self.desired
        what = (newest.version, newest.fingerprint)
        if desired is not None and (desired.version, desired.fingerprint) == what:
            return desired
        # Its trainer is not known.
        return WeightVersionReady(
            model=newest.model,
            version=newest.version,
            announcement_id="",
            endpoint="",
            instance=0,
            manifest_digest="",
            slot=0,
            fingerprint=newest.fingerprint,
        )

    def _begin(
        self,
        ready: WeightVersionReady,
        behind: set[int],
        able: dict[int, FleetMember],
        now: float,
        *,
        catch_up: bool = False,
    ) -> list[Action]:
        holders = {
            worker
            for worker, member in able.items()
            if member.status.version == ready.version
            and member.status.fingerprint == ready.fingerprint
        }
        layouts = {w: member.status.layout for w, member in self.fleet.items()}
        lease = bool(ready.announcement_id)
        if catch_up:
            served = {layouts[worker] for worker in holders}
            by_peers = any(layouts[worker] in served for worker in behind)
            lease = lease and (not by_peers or self._upkeep.ask_trainer)
            # Answers to an earlier try must not be taken for this one's.
            name = f"catch-up {next(self._catch_ups)} to version {ready.version}"
            ready = msgspec.structs.replace(
                ready,
                announcement_id=ready.announcement_id if lease else name,
                in_flight="continue",
            )
        self.transaction = Transaction(
            ready=ready,
            staging=Staging(ready, behind, holders, layouts, self.policy),
            began=now if catch_up else self._announcements.heard,
            deadline=now + self.policy.stage_seconds + GRACE_SECONDS,
            catch_up=catch_up,
            phase="leasing" if lease else "preparing",
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
        transaction.phase = "committing"
        transaction.commit = CommitRound(
            transaction.ready,
            transaction.staging.readers,
            self.policy,
            can_undo=transaction.staging.can_undo,
            catch_up=transaction.catch_up,
        )
        return self._advance_commit(now)

    def _advance_commit(self, now: float) -> list[Action]:
        transaction = self.transaction
        able, mine = self._upkeep.able(self.fleet), transaction.staging.readers
        # One that hangs in an earlier commit may be withdrawn.
        routable = {
            worker: member.component
            for worker, member in able.items()
            if member.status.admitted
            and (worker in mine or member.status.phase != "committing")
        }
        actions = transaction.commit.advance(now, routable)
        if not transaction.commit.ended:
            return actions
        if transaction.commit.changed:
            return [*actions, *self._finish(now)]
        transaction.failure = next(iter(_unchanged(transaction).values()))
        return [*actions, *self._fail(now)]

    def _finish(self, now: float) -> list[Action]:
        """Some serve the version: those that do not must not go on."""
        transaction, self.transaction = self.transaction, None
        ready, seconds = transaction.ready, now - transaction.began
        for worker in transaction.commit.changed:
            self._upkeep.came(worker)
        actions = self._settle(transaction, now)
        without = {**transaction.staging.lost, **_unchanged(transaction)}
        excluded = _bounded(tuple(without.values()))
        if not transaction.catch_up:
            return [*actions, *self._complete(ready, seconds, excluded)]
        event = self._completed(ready, seconds, excluded, catch_up=True)
        return [*actions, Publish(event), *self._give_back(transaction, "completed")]

    def _settle(self, transaction: Transaction, now: float) -> list[Action]:
        """Who did not change goes, or may try again to catch up."""
        ready, able = transaction.ready, self._upkeep.able(self.fleet)
        stay = {w: f for w, f in _unchanged(transaction).items() if w in able}
        if not transaction.catch_up:
            return [
                action
                for worker, failure in sorted(stay.items())
                for action in self._upkeep.fence(worker, ready, failure, now)
            ]
        if stay or transaction.failure is not None:
            return self._upkeep.failed_to_catch_up(stay, ready, now)
        self._upkeep.caught_up()
        return []

    def _complete(
        self,
        ready: WeightVersionReady,
        seconds: float | None,
        excluded: tuple[Failure, ...] = (),
    ) -> list[Action]:
        self.completed = ready.version
        self._last = ready
        event = self._completed(ready, seconds, excluded)
        return [Publish(event), *self._announcements.end(ready, "completed", "")]

    def _completed(
        self,
        ready: WeightVersionReady,
        seconds: float | None,
        excluded: tuple[Failure, ...],
        *,
        catch_up: bool = False,
    ) -> RefitCompleted:
        what = (ready.version, ready.fingerprint)
        return RefitCompleted(
            model=ready.model,
            version=ready.version,
            announcement_id=ready.announcement_id,
            fingerprint=ready.fingerprint,
            workers=tuple(
                worker
                for worker, member in sorted(self._upkeep.able(self.fleet).items())
                if (member.status.version, member.status.fingerprint) == what
            ),
            excluded=excluded,
            seconds=seconds,
            catch_up=catch_up,
        )

    def _fail(self, now: float) -> list[Action]:
        """The transaction ends, and nobody has changed."""
        transaction, self.transaction = self.transaction, None
        failure, ready = transaction.failure, transaction.ready
        event = RefitFailed(
            version=ready.version,
            failure=failure,
            serving=self.serving(),
            catch_up=transaction.catch_up,
        )
        actions: list[Action] = [Publish(event)]
        if transaction.catch_up:
            actions += self._settle(transaction, now)
        return [*actions, *self._give_back(transaction, "failed", str(failure))]

    def _give_back(
        self, transaction: Transaction, outcome: ReleaseOutcome, detail: str = ""
    ) -> list[Action]:
        """The trainer need not keep the version for it any more."""
        if not transaction.catch_up:
            return self._announcements.end(transaction.ready, outcome, detail)
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


def _unchanged(transaction: Transaction) -> dict[int, Failure]:
    """The workers that the version went without, and why."""
    commit = transaction.commit
    if commit is None:
        return transaction.staging.failures
    return {**transaction.staging.failures, **commit.refused, **commit.lost}


def _bounded(failures: tuple[Failure, ...]) -> tuple[Failure, ...]:
    """What an event can carry of them."""
    most = EXCLUDED_BYTES // max(1, len(failures))

    def cut(message: str) -> str:
        return message.encode(errors="replace")[:most].decode(errors="ignore")

    return tuple(
        msgspec.structs.replace(failure, message=cut(failure.message))
        for failure in failures
    )


def _highest(*versions: int | None) -> int | None:
    return max((v for v in versions if v is not None), default=None)


def _is_behind(member: FleetMember, ready: WeightVersionReady) -> bool:
    """Other weights under the same number are behind, too."""
    status = member.status
    if status.version == ready.version:
        return status.fingerprint != ready.fingerprint
    return status.version is None or status.version < ready.version


def _newer(known: FleetMember | None, seen: FleetMember) -> FleetMember:
    """``seen``, unless it is an older answer than a commit's reply.

    Versions grow for as long as a worker lives, a fence is for good, and a new process
    is a new worker.
    """
    if known is None:
        return seen
    if known.status.phase == "fenced":
        return known
    if known.status.version is None:
        return seen
    version = seen.status.version
    older = version is None or version < known.status.version
    return known if older else seen
