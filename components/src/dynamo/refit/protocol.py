# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The calls of a refit: requests and replies, as data.

Three conversations, each over one Dynamo endpoint or one ``collective_rpc``:

- coordinator to worker, ``<ns>.<worker>.refit``: prepare, commit, abort, status.
  Fenced by ``epoch`` (a worker refuses a lower one) and idempotent by
  ``(version, epoch)``.
- anyone to trainer, ``<ns>.<trainer>.weights``: manifest, lease, release.
- worker to its ranks: describe, stage, poll, install, restore, discard.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from dynamo.refit.errors import Failure

InFlightPolicy = Literal["continue", "recompute"]
"""What happens to requests that are running when the weights change.

``continue``: they go on with the KV they have; later requests cannot hit it,
since prefix-cache keys carry the KV epoch. ``recompute``: their KV is rebuilt
under the new weights, at the price of a prefill of everything that runs.
"""

SessionUse = Literal["cold", "re-addressed", "warm"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of everything that is called with or answered."""


class Refused(Message, frozen=True, kw_only=True, tag=True):
    """The request was not carried out; nothing has changed because of it."""

    failure: Failure


# --- what is measured -------------------------------------------------------


class CacheCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What one cycle of a rank had to build; a warm one shows three zeros."""

    allocations: int = 0
    registrations: int = 0
    descriptor_builds: int = 0
    hits: int = 0


class StageTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one rank's stage, and when it ran (Unix seconds)."""

    started_at: float
    finished_at: float
    plan_ms: float
    allocate_ms: float
    register_ms: float
    prepare_ms: float
    pull_ms: float
    backup_ms: float


class RankVote(msgspec.Struct, frozen=True, kw_only=True):
    """One rank holds the version: bytes read, what it cost, what was cached."""

    rank: int
    nbytes: int
    session: SessionUse
    counters: CacheCounters
    timings: StageTimings


class CommitTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one worker's commit.

    ``stall_ms`` is from the call that pauses the scheduler to the return of the
    one that resumes it: the time in which no token can be made.
    """

    pause_ms: float
    install_ms: float
    resume_ms: float
    stall_ms: float
    probe_ms: float
    install_retries: int = 0


# --- coordinator to worker --------------------------------------------------


class Prepare(Message, frozen=True, kw_only=True, tag=True):
    """Stage ``version`` while serving and vote on it.

    The worker reads the manifest with fingerprint ``manifest`` from instance
    ``instance`` of ``endpoint``. ``stage_seconds`` bounds the staging;
    ``commit_seconds`` is how long after its vote the worker keeps the version
    for a commit before it gives it up by itself.
    """

    version: int
    epoch: int
    endpoint: str
    instance: int
    manifest: str
    slot: int
    stage_seconds: float
    commit_seconds: float


class Commit(Message, frozen=True, kw_only=True, tag=True):
    """Install the staged ``version``. The worker then acts alone to the end."""

    version: int
    epoch: int
    in_flight: InFlightPolicy


class Abort(Message, frozen=True, kw_only=True, tag=True):
    """Give up ``version`` if it is not being committed."""

    version: int
    epoch: int
    reason: str


class GetStatus(Message, frozen=True, kw_only=True, tag=True):
    """What does the worker serve and do?"""


class Vote(Message, frozen=True, kw_only=True, tag=True):
    """Yes: every rank of the worker holds ``version``."""

    version: int
    ranks: tuple[RankVote, ...]


class Committed(Message, frozen=True, kw_only=True, tag=True):
    """The worker serves ``version``."""

    version: int
    kv_epoch: str
    timings: CommitTimings


class Aborted(Message, frozen=True, kw_only=True, tag=True):
    """Nothing of ``version`` is staged any more."""

    version: int


WorkerPhase = Literal["serving", "staging", "staged", "committing", "fenced"]


class WorkerStatus(Message, frozen=True, kw_only=True, tag=True):
    """A worker's own view.

    ``version`` is what it serves (``None``: the weights it started with),
    ``pending`` what it stages, holds or commits, ``epoch`` the highest seen.
    """

    model: str
    phase: WorkerPhase
    version: int | None
    pending: int | None
    epoch: int
    kv_epoch: str
    ranks: int


WorkerRequest = Prepare | Commit | Abort | GetStatus
WorkerReply = Vote | Committed | Aborted | WorkerStatus | Refused


# --- anyone to trainer ------------------------------------------------------


class GetManifest(Message, frozen=True, kw_only=True, tag=True):
    """Send the manifest, as msgpack of :class:`dynamo.refit.manifest.Manifest`."""

    manifest: str


class ManifestReply(Message, frozen=True, kw_only=True, tag=True):
    """The encoded manifest."""

    payload: bytes


class GetFingerprints(Message, frozen=True, kw_only=True, tag=True):
    """Send the fingerprint of every tensor of the announced version."""

    announcement: str


class FingerprintsReply(Message, frozen=True, kw_only=True, tag=True):
    """One little-endian uint64 per tensor, in the manifest's order; see
    :mod:`dynamo.refit.fingerprint`."""

    payload: bytes


class AcquireLease(Message, frozen=True, kw_only=True, tag=True):
    """Keep the announcement's bytes as they are, for at most ``seconds``."""

    announcement: str
    holder: str
    seconds: float


ReleaseOutcome = Literal["completed", "failed", "superseded", "refused"]


class ReleaseLease(Message, frozen=True, kw_only=True, tag=True):
    """Nobody reads the announcement's bytes any more, and how it went."""

    announcement: str
    outcome: ReleaseOutcome
    detail: str = ""


class Done(Message, frozen=True, kw_only=True, tag=True):
    """The lease was taken or given back."""


TrainerRequest = GetManifest | GetFingerprints | AcquireLease | ReleaseLease
TrainerReply = ManifestReply | FingerprintsReply | Done | Refused


# --- anyone to coordinator --------------------------------------------------


class FleetMember(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the coordinator last saw it."""

    worker: int
    component: str
    status: WorkerStatus


class FleetStatus(Message, frozen=True, kw_only=True, tag=True):
    """The coordinator's view: what is wanted, what is under way, who serves what."""

    model: str
    epoch: int
    desired: int | None
    completed: int | None
    under_way: int | None
    members: tuple[FleetMember, ...]


# --- worker to rank ---------------------------------------------------------


class Describe(Message, frozen=True, kw_only=True, tag=True):
    """Say who you are and get ready to plan; sent once, before serving."""


class Stage(Message, frozen=True, kw_only=True, tag=True):
    """Start staging ``version`` in the background.

    ``payload`` is the encoded manifest, or ``None`` if this rank has been given
    the one with fingerprint ``manifest`` before. ``want_reads`` asks for what the
    plan reads; see :class:`Staged`.
    """

    version: int
    manifest: str
    slot: int
    seconds: float
    payload: bytes | None
    want_reads: bool


class Poll(Message, frozen=True, kw_only=True, tag=True):
    """How far is the stage of ``version``?"""

    version: int


class Install(Message, frozen=True, kw_only=True, tag=True):
    """Copy the staged ``version`` into the live parameters. Repeating it is safe."""

    version: int


class Restore(Message, frozen=True, kw_only=True, tag=True):
    """Undo the install of ``version`` from the copy made before it."""

    version: int


class Discard(Message, frozen=True, kw_only=True, tag=True):
    """Stop staging ``version`` and forget it; the session stays for the next."""

    version: int


class Described(Message, frozen=True, kw_only=True, tag=True):
    """A rank's identity and the bytes of its parameters."""

    rank: int
    ranks: int
    parameters: int
    nbytes: int


class Running(Message, frozen=True, kw_only=True, tag=True):
    """The stage is under way."""


class Staged(Message, frozen=True, kw_only=True, tag=True):
    """The stage is done.

    ``reads`` has, if it was asked for, per source tensor the bounding box that this
    rank reads of it.
    """

    vote: RankVote
    reads: dict[str, tuple[tuple[int, int], ...]]


class Installed(Message, frozen=True, kw_only=True, tag=True):
    """The live parameters hold the bytes that were asked for."""

    rank: int
    copy_ms: float


RankRequest = Describe | Stage | Poll | Install | Restore | Discard
RankReply = Described | Running | Staged | Installed | Done | Refused


class RankCall(msgspec.Struct, frozen=True):
    """A request to every rank; ``call`` comes back with the answer."""

    call: int
    request: RankRequest


class RankAnswer(msgspec.Struct, frozen=True):
    """One rank's answer to call number ``call``."""

    call: int
    reply: RankReply


M = TypeVar("M")


def to_wire(message: Message) -> dict[str, Any]:
    """The message as the JSON-like data that a Dynamo endpoint carries."""
    return msgspec.to_builtins(message)


def from_wire(data: Any, expected: Any) -> Any:
    """The message in ``data``, one of the types in the union ``expected``.

    Raises:
        msgspec.ValidationError: it is none of them, or a field is missing or off.
    """
    return msgspec.convert(data, expected)
