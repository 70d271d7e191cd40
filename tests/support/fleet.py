# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a reconciler hears and says, in few words; and reconcilers at each stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    GiveBackLease,
    LeaseTaken,
    PrepareAnswered,
    Publish,
    ReleasePeer,
    SendAbort,
    SendCommit,
    SendFence,
    SendPrepare,
    ServeAnswered,
    TakeLease,
)
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.protocol import (
    CacheCounters,
    CommitStep,
    Committed,
    CommitTimings,
    FleetMember,
    MemoryUse,
    RankVote,
    Refused,
    StageTimings,
    StagingMode,
    Stepped,
    Vote,
    WeightsServed,
    WorkerPhase,
    WorkerStatus,
)

A = TypeVar("A")
E = TypeVar("E", bound=Event)

#: All workers change at once, and each alone: commits are one call and one reply.
POLICY = Policy(
    stage_seconds=100.0,
    commit_seconds=10.0,
    commit="rolling",
    max_unavailable=0,
    drain_seconds=20.0,
    hold_seconds=4.0,
    settle_seconds=2.0,
)
STAGE_DEADLINE = POLICY.stage_seconds + GRACE_SECONDS
COMMIT_DEADLINE = POLICY.commit_seconds + GRACE_SECONDS
TIMINGS = CommitTimings(
    pause_ms=1.0,
    install_ms=2.0,
    copy_ms=1.5,
    resume_ms=3.0,
    stall_ms=6.0,
    probe_ms=7.0,
    verify_ms=8.0,
)


def ready(
    version: int, announcement_id: str | None = None, model: str = "tiny", **fields: Any
) -> WeightVersionReady:
    trainer = {
        "endpoint": "ns.trainer.weights",
        "instance": 99,
        "manifest_digest": "0123abcd",
        "fingerprint": f"weights-{version}",
    }
    return WeightVersionReady(
        model=model,
        version=version,
        announcement_id=announcement_id or f"a{version}",
        slot=0,
        **(trainer | fields),
    )


V5, V6, V7 = ready(5), ready(6), ready(7)


# --- what the reconciler hears --------------------------------------------------


def member(
    worker: int,
    version: int | None = None,
    phase: WorkerPhase = "serving",
    pending: int | None = None,
    model: str = "tiny",
    fingerprint: str | None = None,
    admitted: bool = True,
    component: str = "backend",
) -> FleetMember:
    if fingerprint is None:
        fingerprint = "" if version is None else f"weights-{version}"
    status = WorkerStatus(
        model=model,
        phase=phase,
        version=version,
        fingerprint=fingerprint,
        pending=pending,
        epoch=1,
        kv_epoch="",
        ranks=1,
        admitted=admitted,
    )
    return FleetMember(worker=worker, component=component, status=status)


def joiner(worker: int) -> FleetMember:
    """One that routers do not see yet."""
    return member(worker, admitted=False)


def fleet(*members: FleetMember | int) -> FleetSeen:
    """The workers that are seen; a number stands for one with start-up weights."""
    return FleetSeen(tuple(member(m) if isinstance(m, int) else m for m in members))


def failure(worker: int | None = None, message: str = "no memory") -> Failure:
    return Failure(
        kind="TransferFailed", message=message, stage="stage", rank=1, worker=worker
    )


def leased(announced: WeightVersionReady) -> LeaseTaken:
    return LeaseTaken(announced.announcement_id, None)


def not_leased(announced: WeightVersionReady) -> LeaseTaken:
    return LeaseTaken(announced.announcement_id, failure())


def serves(peer: int, reader: int, announced: WeightVersionReady) -> ServeAnswered:
    reply = WeightsServed(
        announcement_id=f"at {peer} for {reader}",
        manifest_digest="of a peer",
        slot=1,
        runtime_fingerprint="of images",
    )
    return ServeAnswered(peer, reader, announced.announcement_id, reply)


def serves_not(peer: int, reader: int, announced: WeightVersionReady) -> ServeAnswered:
    why = Failure(
        kind="PeerUnsuitable", message="packed", stage="servweights", worker=peer
    )
    return ServeAnswered(peer, reader, announced.announcement_id, Refused(failure=why))


def voted(
    worker: int,
    announced: WeightVersionReady,
    fingerprint: str | None = None,
    mode: StagingMode = "device",
    converted: str = "",
) -> PrepareAnswered:
    vote = Vote(
        version=announced.version,
        fingerprint=fingerprint or announced.fingerprint,
        ranks=(_rank_vote(mode, converted),),
    )
    return PrepareAnswered(worker, announced.announcement_id, vote)


def _rank_vote(mode: StagingMode, converted: str) -> RankVote:
    timings = dict.fromkeys(StageTimings.__struct_fields__, 0.0)
    return RankVote(
        rank=0,
        nbytes=10,
        memory=MemoryUse(mode=mode, device_nbytes=10, host_nbytes=0),
        session="warm",
        counters=CacheCounters(),
        timings=StageTimings(**timings),
        can_undo=mode != "host-no-undo",
        converted=converted,
    )


def voted_for_others(worker: int, announced: WeightVersionReady) -> PrepareAnswered:
    return voted(worker, announced, fingerprint="of another version")


def vote_refused(
    worker: int, announced: WeightVersionReady, *, fenced: bool = False
) -> PrepareAnswered:
    reply = Refused(failure=failure(worker), fenced=fenced)
    return PrepareAnswered(worker, announced.announcement_id, reply)


def committed(
    worker: int, announced: WeightVersionReady, fingerprint: str | None = None
) -> CommitAnswered:
    reply = Committed(
        version=announced.version,
        fingerprint=fingerprint or announced.fingerprint,
        kv_epoch=f"{announced.version}-x",
        timings=TIMINGS,
    )
    return CommitAnswered(worker, announced.announcement_id, reply)


def stepped(
    worker: int, announced: WeightVersionReady, step: CommitStep
) -> CommitAnswered:
    reply = Stepped(version=announced.version, step=step)
    return CommitAnswered(worker, announced.announcement_id, reply)


def commit_refused(
    worker: int, announced: WeightVersionReady, *, fenced: bool = False
) -> CommitAnswered:
    reply = Refused(failure=failure(worker), fenced=fenced)
    return CommitAnswered(worker, announced.announcement_id, reply)


# --- what it says ---------------------------------------------------------------


def started(announced: WeightVersionReady, *workers: int) -> list[Action]:
    """What starts a refit."""
    event = RefitStarted(model="tiny", version=announced.version, workers=workers)
    return [Publish(event), TakeLease(announced, POLICY.lease_seconds(len(workers)))]


def completed(
    announced: WeightVersionReady,
    *workers: int,
    seconds: float | None,
    excluded: tuple[Failure, ...] = (),
) -> list[Action]:
    """What ends one well."""
    event = RefitCompleted(
        model="tiny",
        version=announced.version,
        announcement_id=announced.announcement_id,
        fingerprint=announced.fingerprint,
        workers=workers,
        seconds=seconds,
        excluded=excluded,
    )
    return [Publish(event), GiveBackLease(announced, "completed", "")]


def superseded(old: WeightVersionReady, by: WeightVersionReady) -> list[Action]:
    detail = f"superseded by version {by.version}"
    event = RefitSuperseded(version=old.version, by=by.version)
    return [Publish(event), GiveBackLease(old, "superseded", detail)]


def failed(
    announced: WeightVersionReady, why: Failure, *serving: tuple[int, int | None]
) -> list[Action]:
    event = RefitFailed(version=announced.version, failure=why, serving=serving)
    return [Publish(event), GiveBackLease(announced, "failed", str(why))]


def commits(
    announced: WeightVersionReady, *workers: int, step: CommitStep = "all"
) -> list[Action]:
    return [SendCommit(worker, announced, "continue", step) for worker in workers]


def prepares(announced: WeightVersionReady, *workers: int) -> list[Action]:
    """Staged from the trainer."""
    return [SendPrepare(worker, announced) for worker in workers]


def of_type(actions: Iterable[Action], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def events(actions: list[Action], kind: type[E] = Event) -> list[E]:
    told = [action.event for action in of_type(actions, Publish)]
    return [event for event in told if isinstance(event, kind)]


def aborts(actions: list[Action]) -> dict[int, int]:
    """Which worker is told to give up which version."""
    return {a.worker: a.version for a in of_type(actions, SendAbort)}


def fences(actions: list[Action]) -> dict[int, int]:
    """Which worker is told to leave, for which version."""
    return {a.worker: a.version for a in of_type(actions, SendFence)}


def released(actions: list[Action]) -> list[tuple[int, str]]:
    """Which peer is told that a reader has ended."""
    return [(a.peer, a.announcement_id) for a in of_type(actions, ReleasePeer)]


def without(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, kind)]


# --- reconcilers at a stage -----------------------------------------------------


def new(
    *members: FleetMember | int, model: str | None = "tiny", policy: Policy = POLICY
) -> Reconciler:
    """A reconciler that has seen these workers."""
    reconciler = Reconciler(model, policy)
    if members:
        reconciler.handle(fleet(*members), 0.0)
    return reconciler


def preparing(
    announced: WeightVersionReady, *workers: FleetMember | int, policy: Policy = POLICY
) -> Reconciler:
    reconciler = new(*workers, policy=policy)
    reconciler.handle(announced, 0.0)
    actions = reconciler.handle(leased(announced), 1.0)
    assert of_type(actions, SendPrepare)
    return reconciler


def committing(
    announced: WeightVersionReady, *workers: FleetMember | int, policy: Policy = POLICY
) -> Reconciler:
    """Everyone has voted; what that led to was said."""
    reconciler = preparing(announced, *workers, policy=policy)
    actions: list[Action] = []
    for worker in sorted(reconciler.fleet):
        actions = reconciler.handle(voted(worker, announced), 2.0)
    assert {type(action) for action in actions} == {SendCommit}
    return reconciler


def done(announced: WeightVersionReady, *workers: FleetMember | int) -> Reconciler:
    reconciler = committing(announced, *workers)
    for worker in sorted(reconciler.fleet):
        reconciler.handle(committed(worker, announced), 3.0)
    assert reconciler.completed == announced.version
    return reconciler
