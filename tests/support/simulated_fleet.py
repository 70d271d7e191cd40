# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Workers as the coordinator's calls find them: what an agent does, without a rank.

Every call has its coordinator's epoch. Time passes when it is told to.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    Input,
    LeaseTaken,
    PrepareAnswered,
    ReleasePeer,
    SendAbort,
    SendAdmit,
    SendCommit,
    SendFence,
    SendPrepare,
    SendServe,
    ServeAnswered,
    TakeLease,
    Unanswered,
)
from dynamo.refit.errors import Failure
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import (
    Committed,
    FleetMember,
    Refused,
    Stepped,
    Vote,
    WeightsServed,
    WorkerPhase,
)
from tests.support.fleet import committed, member, voted

Reply = Vote | WeightsServed | Committed | Stepped | Refused


@dataclass
class Call:
    """On its way, or (``running``) begun at the worker."""

    epoch: int
    action: Action
    running: bool = False

    @property
    def worker(self) -> int | None:
        match self.action:
            case SendServe(peer=worker) | ReleasePeer(peer=worker):
                return worker
            case TakeLease():
                return None
        return self.action.worker

    def no_answer(self) -> Input | None:
        """What the coordinator hears of a call whose reply does not come."""
        lost = refused("PeerLost", self.worker)
        if isinstance(self.action, SendCommit):
            name = self.action.ready.announcement_id
            return CommitAnswered(self.worker, name, Unanswered(lost.failure))
        return self.answer(lost)

    def answer(self, reply: Reply | None) -> Input | None:
        """What the coordinator hears; nothing, if it only tells somebody something."""
        action = self.action
        if reply is None:
            return None
        match action:
            case SendPrepare():
                name = action.ready.announcement_id
                return PrepareAnswered(action.worker, name, reply)
            case SendCommit():
                return CommitAnswered(
                    action.worker, action.ready.announcement_id, reply
                )
            case SendServe():
                name = action.ready.announcement_id
                return ServeAnswered(action.peer, action.reader, name, reply)
            case TakeLease():
                failure = reply.failure if isinstance(reply, Refused) else None
                return LeaseTaken(action.ready.announcement_id, failure)
        return None


def refused(kind: str, worker: int | None) -> Refused:
    return Refused(
        failure=Failure(kind=kind, message="simulated", stage="x", worker=worker)
    )


@dataclass
class Worker:
    """What is true of a worker, whatever the coordinator has seen of it."""

    number: int
    version: int | None = None
    fingerprint: str = ""
    admitted: bool = False
    #: Has no way back from an install.
    no_undo: bool = False
    #: Does not say its status.
    silent: bool = False
    phase: WorkerPhase = "serving"
    epoch: int = 0
    staged: WeightVersionReady | None = None
    #: Who serves what is staged, and under which name.
    source: tuple[int, str] | None = None
    #: At a barrier: until when it waits, and whether it has installed.
    until: float | None = None
    installed: bool = False
    last_commit: tuple[int, int] | None = None
    leases: set[str] = field(default_factory=set)

    def seen(self) -> FleetMember:
        return member(
            self.number,
            self.version,
            self.phase,
            pending=self.staged.version if self.staged else None,
            fingerprint=self.fingerprint,
            admitted=self.admitted,
            component="prefill" if self.number % 3 == 0 else "backend",
        )

    def pass_time(self, now: float) -> None:
        """Who waits at a barrier and hears nothing goes on by itself; a fence is for
        good."""
        if self.phase == "fenced":
            return
        if self.until is not None and now > self.until:
            self._finish() if self.installed else self._drop()

    def take(
        self, action: Action, epoch: int, now: float, fleet: SimulatedFleet
    ) -> Reply | None:
        """Its reply; ``None`` to a commit that has only begun."""
        if self.phase == "fenced":
            return refused("WeightsUnknown", self.number)
        if isinstance(action, ReleasePeer):
            self.leases.discard(action.announcement_id)
            return None
        if epoch < self.epoch:
            return refused("StaleEpoch", self.number)
        self.epoch = epoch
        match action:
            case SendPrepare():
                return self._prepare(action, fleet)
            case SendCommit():
                return self._commit(action, now, fleet)
            case SendServe(ready=ready):
                return self._serve(ready, fleet)
            case SendAbort(version=version):
                self._abort(version)
            case SendAdmit():
                self.admitted = True
            case SendFence():
                served = self.version, self.fingerprint
                ordered = action.version, action.fingerprint
                if self.phase != "committing" and served != ordered:
                    self.phase = "fenced"
        return None

    def _prepare(self, action: SendPrepare, fleet: SimulatedFleet) -> Reply:
        if self.phase == "committing":
            return refused("RefitError", self.number)
        if action.ready.version < (self.version or 0):
            # The coordinator has not seen what an earlier one's late commit did.
            return refused("StaleVersion", self.number)
        self._drop()
        peer = action.peer
        source = None if peer is None else (peer, action.served.announcement_id)
        if not fleet.can_read(source, action.ready):
            return refused("SourceLost", self.number)
        self.staged, self.source, self.phase = action.ready, source, "staged"
        mode = "host-no-undo" if self.no_undo else "device"
        return voted(self.number, action.ready, mode=mode).reply

    def _serve(self, ready: WeightVersionReady, fleet: SimulatedFleet) -> Reply:
        if not self.holds(ready):
            return refused("PeerUnsuitable", self.number)
        name = f"lease {next(fleet.names)}"
        self.leases.add(name)
        return WeightsServed(
            announcement_id=name,
            manifest_digest="of a peer",
            slot=0,
            runtime_fingerprint="of images",
        )

    def holds(self, ready: WeightVersionReady) -> bool:
        what = ready.version, ready.fingerprint
        held = [(self.version, self.fingerprint)]
        if self.staged is not None:
            held.append((self.staged.version, self.staged.fingerprint))
        return self.phase != "fenced" and what in held

    def _abort(self, version: int) -> None:
        if self.staged is None or self.staged.version != version:
            return
        if self.phase != "committing" or self.until is not None:
            self._drop()

    def _commit(
        self, action: SendCommit, now: float, fleet: SimulatedFleet
    ) -> Reply | None:
        if self.last_commit == (self.epoch, action.ready.version):
            return self._committed(action.ready)
        if self.staged is None or self.staged.version != action.ready.version:
            return refused("NothingStaged", self.number)
        if self.phase == "staged":
            if action.step in ("install", "resume"):
                return refused("NothingStaged", self.number)
            assert not (self.no_undo and action.step == "pause"), "cannot go back"
            self.phase = "committing"
            if action.step == "pause":
                self.until = now + fleet.hold_seconds
        elif (self.until is None) != (action.step == "all"):
            return refused("NothingStaged", self.number)
        match action.step:
            case "install":
                self.installed = True
            case "resume" if not self.installed:
                return refused("NothingStaged", self.number)
            case "resume":
                return self._finish()
            case "all":
                return None
        return Stepped(version=action.ready.version, step=action.step)

    def end_commit(self, fleet: SimulatedFleet) -> Reply:
        """Of one that it takes to the end alone."""
        if self.phase != "committing" or self.staged is None:
            return refused("NothingStaged", self.number)
        return self._finish()

    def _finish(self) -> Committed:
        ready = self.staged
        assert ready.version >= (self.version or 0), "taken back"
        self.version, self.fingerprint, self.admitted = (
            ready.version,
            ready.fingerprint,
            True,
        )
        self.last_commit = self.epoch, ready.version
        self._drop()
        return self._committed(ready)

    def _committed(self, ready: WeightVersionReady) -> Committed:
        return committed(self.number, ready).reply

    def _drop(self) -> None:
        self.phase, self.staged, self.source = "serving", None, None
        self.until, self.installed = None, False


class SimulatedFleet:
    """The workers that there are, and the calls that are on their way to them."""

    def __init__(self, hold_seconds: float) -> None:
        self.hold_seconds = hold_seconds
        self.workers: dict[int, Worker] = {}
        self.calls: list[Call] = []
        self.names = itertools.count(1)
        self._numbers = itertools.count(1)
        self._known: dict[int, FleetMember] = {}

    def join(self, *, no_undo: bool = False) -> Worker:
        """A worker with the weights it starts with, which routers do not see."""
        number = next(self._numbers)
        self.workers[number] = Worker(number, no_undo=no_undo)
        return self.workers[number]

    def seen(self) -> FleetSeen:
        """Of a silent one, what it said last."""
        found = {
            worker.number: self._known.get(worker.number)
            if worker.silent
            else worker.seen()
            for worker in self.workers.values()
        }
        self._known = {number: seen for number, seen in found.items() if seen}
        silent = frozenset(found) - self._known.keys()
        return FleetSeen(tuple(self._known.values()), silent)

    def forget(self) -> None:
        """Another coordinator looks."""
        self._known = {}

    def able(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.phase != "fenced"]

    def pass_time(self, now: float) -> None:
        for worker in self.workers.values():
            worker.pass_time(now)

    def can_read(
        self, source: tuple[int, str] | None, ready: WeightVersionReady
    ) -> bool:
        """From a peer as long as it is leased; from the trainer always."""
        if source is None:
            return True
        number, name = source
        peer = self.workers.get(number)
        return peer is not None and name in peer.leases and peer.holds(ready)

    def carry_out(self, call: Call, now: float) -> Input | None:
        """What the coordinator hears of it; nothing yet, if it has only begun."""
        self.calls.remove(call)
        if isinstance(call.action, TakeLease):
            return LeaseTaken(call.action.ready.announcement_id, None)
        worker = self.workers.get(call.worker)
        if worker is None:
            return call.no_answer()
        if call.running:
            return call.answer(worker.end_commit(self))
        reply = worker.take(call.action, call.epoch, now, self)
        begun = reply is None and isinstance(call.action, SendCommit)
        if begun:
            self.calls.append(Call(call.epoch, call.action, running=True))
        return call.answer(reply)
