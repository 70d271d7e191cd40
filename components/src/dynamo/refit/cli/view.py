# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a person watching sees of a refit: a function of the events that came and of
the coordinator's status. Pure.

Events are quick and may be lost; the status is slower and right. So a status corrects
everything but a worker that an event has told of just before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from dynamo.refit.cli.words import headline
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    StageProgress,
    WorkerAdmitted,
    WorkerFenced,
    WorkerJoined,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import (
    FleetMember,
    FleetStatus,
    RankProgress,
    WorkerPhase,
)

#: A status that was on its way meanwhile does not overrule an event so soon.
EVENT_SECONDS = 1.5

#: Events that are kept for the view.
LOG_EVENTS = 50


@dataclass(frozen=True)
class Replica:
    """A worker; with ``target`` it is being brought to that version, and its ranks are
    as far as ``ranks`` says. An event told of it last at ``heard`` (local seconds)."""

    worker: int
    component: str = ""
    version: int | None = None
    phase: WorkerPhase = "serving"
    admitted: bool = True
    target: int | None = None
    ranks: tuple[RankProgress, ...] = ()
    stall_ms: float | None = None
    heard: float = float("-inf")

    @property
    def voted(self) -> bool:
        return self.target is not None and self.phase in ("staged", "committing")


@dataclass(frozen=True)
class View:
    """The whole: ``log`` has the last events, as Unix seconds and text;
    ``complaint`` says why there is no status."""

    model: str = ""
    completed: int | None = None
    under_way: int | None = None
    replicas: Mapping[int, Replica] = field(
        default_factory=lambda: MappingProxyType({})
    )
    log: tuple[tuple[float, str], ...] = ()
    complaint: str = ""

    @property
    def votes(self) -> tuple[int, int]:
        """How many hold, or serve, the version under way, of those that are to."""
        concerned = [
            r
            for r in self.replicas.values()
            if self.under_way in (r.target, r.version) and self.under_way is not None
        ]
        there = sum(r.voted or r.version == self.under_way for r in concerned)
        return there, len(concerned)

    def with_replica(self, replica: Replica) -> View:
        return replace(self, replicas={**self.replicas, replica.worker: replica})


def after_event(view: View, event: Event, now: float) -> View:
    """The view when ``event`` has come; ``now`` in seconds of any one clock."""
    line = headline(event)
    if line is not None:
        view = replace(view, log=(*view.log, (event.at, line))[-LOG_EVENTS:])
    match event:
        case RefitStarted(version=version, workers=workers, model=model):
            view = replace(view, model=model, under_way=version)
            for worker in workers:
                view = _changed(
                    view, worker, now, target=version, phase="staging", ranks=()
                )
        case RefitCompleted(version=version, catch_up=catch_up):
            view = _ended(view, version)
            if not catch_up:
                view = replace(view, completed=version)
        case RefitFailed(version=version) if event.epoch > 0:
            view = _ended(view, version)
        case RefitSuperseded(version=version):
            view = _ended(view, version)
        case StageProgress() | WorkerStaged() | WorkerRefitted():
            view = _of_worker(view, event, now)
        case WorkerFenced(worker=worker):
            view = _changed(view, worker, now, phase="fenced", target=None, ranks=())
        case WorkerJoined(worker=worker, version=version):
            view = _changed(view, worker, now, version=version)
        case WorkerAdmitted(worker=worker):
            view = _changed(view, worker, now, admitted=True)
    return view


def _of_worker(
    view: View, event: StageProgress | WorkerStaged | WorkerRefitted, now: float
) -> View:
    worker, version = event.worker, event.version
    match event:
        case StageProgress(ranks=ranks):
            what = {"target": version, "phase": "staging", "ranks": ranks}
        case WorkerStaged(ranks=votes):
            ranks = tuple(
                RankProgress(rank=v.rank, nbytes=v.nbytes, total_nbytes=v.nbytes)
                for v in votes
            )
            what = {"target": version, "phase": "staged", "ranks": ranks}
        case WorkerRefitted(timings=timings):
            what = {
                "target": None,
                "phase": "serving",
                "ranks": (),
                "version": version,
                "admitted": True,
                "stall_ms": timings.stall_ms,
            }
    return _changed(view, worker, now, **what)


def _changed(view: View, worker: int, now: float, **what: object) -> View:
    known = view.replicas.get(worker, Replica(worker))
    return view.with_replica(replace(known, heard=now, **what))


def _ended(view: View, version: int) -> View:
    """Nobody is brought to ``version`` any more."""
    replicas = {
        worker: replace(r, target=None, ranks=(), phase="serving")
        if r.target == version
        else r
        for worker, r in view.replicas.items()
    }
    under_way = None if view.under_way == version else view.under_way
    return replace(view, replicas=replicas, under_way=under_way)


def after_status(view: View, status: FleetStatus, now: float) -> View:
    """The view when the coordinator has given its own."""
    replicas = {}
    for member in status.members:
        known = view.replicas.get(member.worker)
        recent = known is not None and now - known.heard < EVENT_SECONDS
        replicas[member.worker] = (
            replace(known, component=member.component)
            if recent
            else _as_told(member, known)
        )
    just_heard = any(now - r.heard < EVENT_SECONDS for r in replicas.values())
    return replace(
        view,
        model=status.model or view.model,
        completed=view.completed if just_heard else status.completed,
        under_way=view.under_way if just_heard else status.under_way,
        replicas=replicas,
        complaint="",
    )


def _as_told(member: FleetMember, known: Replica | None) -> Replica:
    told = member.status
    same = known is not None and known.target == told.pending
    stall = told.stall_ms
    if stall is None and known is not None and known.version == told.version:
        stall = known.stall_ms
    return Replica(
        worker=member.worker,
        component=member.component,
        version=told.version,
        phase=told.phase,
        admitted=told.admitted,
        target=told.pending,
        ranks=known.ranks if same else (),
        stall_ms=stall,
        heard=known.heard if known is not None else float("-inf"),
    )
