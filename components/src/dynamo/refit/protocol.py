# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The calls of a refit: requests and replies, as data.

Three conversations, each over one Dynamo endpoint or one ``collective_rpc``:

- coordinator to worker, ``<ns>.<worker>.refit``: prepare, commit, abort, status.
  Fenced by ``epoch`` (a worker refuses a lower one) and idempotent by
  ``(version, epoch)``.
- anyone to trainer, ``<ns>.<trainer>.weights``: manifest, fingerprints, lease, release.
- worker to its ranks: describe, stage, poll, install, restore, discard, and offer and
  withdraw what they hold.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from dynamo.refit.errors import Failure
from dynamo.refit.manifest import Source

InFlightPolicy = Literal["continue", "recompute", "drain"]
"""What happens to requests that are running when the weights change.

``continue``: they go on with the KV they have; later requests cannot hit it,
since prefix-cache keys carry the KV epoch. ``recompute``: their KV is rebuilt
under the new weights, at the price of a prefill of everything that runs. ``drain``:
the worker takes no new ones, and they end under the old weights; those that take
longer than the bound go on as with ``continue``, and are counted.
"""

CommitStep = Literal["all", "pause", "install", "resume"]
"""How far a worker goes on its own: to the end, or to where it waits for the others."""

SessionUse = Literal["cold", "re-addressed", "warm"]

MAX_VERSION = 2**63 - 1
"""The highest version number; the lowest is 0."""

Version = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]

StagingMode = Literal["device", "host", "host-no-undo"]
"""Where a version waits for its commit; see :mod:`dynamo.refit.rank.memory`."""

StagingChoice = Literal["auto", "device", "host", "host-no-undo"]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of everything that is called with or answered."""


class Refused(Message, frozen=True, kw_only=True, tag=True):
    """The request was not carried out; nothing has changed because of it, unless the
    worker is ``fenced``: then it serves nobody any more."""

    failure: Failure
    fenced: bool = False


# --- what is measured -------------------------------------------------------


class CacheCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What one cycle of a rank had to build; a warm one shows three zeros."""

    allocations: int = 0
    registrations: int = 0
    descriptor_builds: int = 0
    hits: int = 0


class CacheUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks of a worker had to build for the stage before, all in all; the
    session is the one of the rank that had to build most."""

    session: SessionUse
    counters: CacheCounters


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that a rank's staging takes, in its mode."""

    mode: StagingMode
    device_nbytes: int
    host_nbytes: int

    @property
    def can_undo(self) -> bool:
        """The old weights are kept, so that an install that fails can be undone."""
        return self.mode != "host-no-undo"


class StageTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one rank's stage, and when it ran (Unix seconds).

    ``lead_ms`` is from the request's arrival in the rank to its first posted read, and
    ``wire_ms``, a part of ``pull_ms``, from there until all bytes are there.
    ``fingerprint_ms`` is work beside the pull, not after it; ``backup_ms`` is the wait
    for a copy of what is live before it, and ``convert_ms`` is from the last byte's
    arrival until all is made that is served in another form than it is read.
    """

    started_at: float
    finished_at: float
    lead_ms: float
    plan_ms: float
    allocate_ms: float
    register_ms: float
    prepare_ms: float
    pull_ms: float
    wire_ms: float
    fingerprint_ms: float
    backup_ms: float
    convert_ms: float = 0.0


class RankVote(msgspec.Struct, frozen=True, kw_only=True):
    """One rank holds the version: bytes read, what it cost, what was cached.

    With ``can_undo`` it has a copy of what is live, for an install that fails.
    ``converted`` is the fingerprint of what it made of the tensors that are not served
    as they are published, the same in every worker of one layout; empty: there are
    none, or it read what another worker had made.
    """

    rank: int
    nbytes: int
    memory: MemoryUse
    session: SessionUse
    counters: CacheCounters
    timings: StageTimings
    can_undo: bool = True
    converted: str = ""


class RankProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Of what a rank reads for a version, ``nbytes`` of ``total_nbytes`` are there; the
    total is 0 until it is known."""

    rank: int
    nbytes: int
    total_nbytes: int


class CommitTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of one worker's commit, and when it began (Unix seconds).

    ``stall_ms`` is the time in which no token can be made, at the most: from the call
    that pauses the scheduler to the return of the one that resumes it. ``install_ms``
    is the ranks' answer to the install, and ``copy_ms`` how long the slowest device
    wrote; on a GPU it does so beside the answer, and the longer of the two counts. An
    install between two steps has no pause. ``verify_ms`` is the check of the live
    weights after it.
    """

    pause_ms: float
    install_ms: float
    copy_ms: float
    resume_ms: float
    stall_ms: float
    probe_ms: float
    verify_ms: float
    install_retries: int = 0
    started_at: float = 0.0


# --- coordinator to worker --------------------------------------------------


class Command(Message, frozen=True, kw_only=True):
    """What a coordinator tells the workers of its ``model``.

    A worker of another model refuses it (:class:`dynamo.refit.errors.OtherModel`), and
    so does one that has heard of a higher ``epoch``. ``sequence`` counts the commands
    of one ``sender``, and ``mac`` is the place for a message authentication code: none
    is made or verified yet.
    """

    model: str
    epoch: int
    sender: str = ""
    sequence: int = 0
    mac: bytes = b""


class Prepare(Command, frozen=True, kw_only=True, tag=True):
    """Stage ``version`` while serving and vote on it.

    The worker reads the manifest with the digest ``manifest_digest`` from instance
    ``instance`` of ``endpoint``, and votes only for bytes that have this
    ``fingerprint``; or, where another worker is read, this ``runtime_fingerprint``,
    which that one has checked to be of the same version. ``stage_seconds`` bounds the
    staging; ``keep_seconds`` is how long after that bound the worker keeps the version
    for a commit before it gives it up by itself. ``traceparent`` (W3C) is the caller's
    span, here and in :class:`Commit`.
    """

    version: int
    announcement_id: str
    endpoint: str
    instance: int
    manifest_digest: str
    slot: int
    fingerprint: str
    stage_seconds: float
    keep_seconds: float
    runtime_fingerprint: str = ""
    traceparent: str | None = None


class Commit(Command, frozen=True, kw_only=True, tag=True):
    """Install the staged ``version``.

    With step ``all`` the worker acts alone to the end, and answers ``Committed``. A
    barrier takes it there by ``pause``, ``install`` and ``resume``, the first two
    answered with ``Stepped``: a paused worker that does not hear of its next step
    within ``hold_seconds`` goes on serving by itself, with the old weights if it has
    not installed yet, with the new ones if it has.

    ``withdraw``: routers do not see the worker meanwhile. ``drain_seconds`` bounds the
    wait for its requests, with ``drain``.
    """

    version: int
    in_flight: InFlightPolicy
    step: CommitStep = "all"
    hold_seconds: float = 0.0
    withdraw: bool = False
    drain_seconds: float = 0.0
    traceparent: str | None = None


class Abort(Command, frozen=True, kw_only=True, tag=True):
    """Give up ``version``, if it is not being committed for good: a worker that waits
    at a barrier goes back to the old weights."""

    version: int
    reason: str


class Admit(Command, frozen=True, kw_only=True, tag=True):
    """The weights that the worker has are the fleet's: it may serve."""


class Fence(Command, frozen=True, kw_only=True, tag=True):
    """Leave for good: the fleet serves a version, with this ``fingerprint``,
    that this worker could not take. A worker that serves it refuses."""

    version: int
    fingerprint: str
    reason: str


class ServeWeights(Command, frozen=True, kw_only=True, tag=True):
    """Let others read ``version``, staged or live here, for at most ``seconds``.

    It has this ``fingerprint``. A ``ReleaseLease`` for the announcement that is
    answered with ends it. Meanwhile the worker can be asked as a trainer is:
    ``GetManifest``, ``GetFingerprints``.
    """

    version: int
    fingerprint: str
    seconds: float


class GetStatus(Message, frozen=True, kw_only=True, tag=True):
    """What does the worker serve and do?"""


class VerifyWeights(Message, frozen=True, kw_only=True, tag=True):
    """Are the live weights, now, those of the version that was installed last?"""


class Vote(Message, frozen=True, kw_only=True, tag=True):
    """Yes: the ranks of the worker hold ``version``, and the parts that they hold add
    up to the fingerprint ``fingerprint``."""

    version: int
    fingerprint: str
    ranks: tuple[RankVote, ...]


class Committed(Message, frozen=True, kw_only=True, tag=True):
    """The worker serves ``version``, and its live weights were found to be the ones
    with this ``fingerprint``."""

    version: int
    fingerprint: str
    kv_epoch: str
    timings: CommitTimings


class Stepped(Message, frozen=True, kw_only=True, tag=True):
    """The worker waits where the commit's ``step`` ends."""

    version: int
    step: CommitStep


class WeightsServed(Message, frozen=True, kw_only=True, tag=True):
    """Where the version can be read: as in ``WeightVersionReady``, but in the form that
    the worker computes with, whose bytes have this ``runtime_fingerprint``."""

    announcement_id: str
    manifest_digest: str
    slot: int
    runtime_fingerprint: str


class Aborted(Message, frozen=True, kw_only=True, tag=True):
    """Nothing of ``version`` is staged any more."""

    version: int


class WeightsVerified(Message, frozen=True, kw_only=True, tag=True):
    """The live weights are those of ``version``, as for :class:`Committed`."""

    version: int
    fingerprint: str


WorkerPhase = Literal["serving", "staging", "staged", "committing", "fenced"]


class WorkerStatus(Message, frozen=True, kw_only=True, tag=True):
    """A worker's own view.

    ``version`` is what it serves (``None``: the weights it started with) and
    ``fingerprint`` its fingerprint, ``pending`` what it stages, holds or commits,
    ``epoch`` the highest seen. One that is not ``admitted`` is unknown to routers, and
    serves nobody. ``since`` (Unix seconds) it serves that version, which cost it
    ``stall_ms``; ``staging`` and ``cache`` are the last stage's. ``release`` and
    ``schema`` (of the events) say what it runs, and are empty and 0 in releases that
    did not tell. Workers of one ``layout`` compute with the same form of the weights,
    rank by rank, and can read them from each other.
    """

    model: str
    phase: WorkerPhase
    version: int | None
    fingerprint: str
    pending: int | None
    epoch: int
    kv_epoch: str
    ranks: int
    admitted: bool = True
    since: float | None = None
    stall_ms: float | None = None
    staging: StagingMode | None = None
    cache: CacheUse | None = None
    release: str = ""
    schema: int = 0
    layout: str = ""


# --- anyone to trainer ------------------------------------------------------


class GetManifest(Message, frozen=True, kw_only=True, tag=True):
    """Send the manifest, as msgpack of :class:`dynamo.refit.manifest.Manifest`."""

    manifest_digest: str


class ManifestReply(Message, frozen=True, kw_only=True, tag=True):
    """The encoded manifest."""

    payload: bytes


class GetFingerprints(Message, frozen=True, kw_only=True, tag=True):
    """Send the fingerprint of every tensor of the announced version."""

    announcement_id: str


class FingerprintsReply(Message, frozen=True, kw_only=True, tag=True):
    """One little-endian uint64 per tensor, in the manifest's order; see
    :mod:`dynamo.refit.fingerprint`."""

    payload: bytes


class AcquireLease(Command, frozen=True, kw_only=True, tag=True):
    """Keep the announcement's bytes as they are, for at most ``seconds``. A coordinator
    has one lease, which its ``epoch`` names."""

    announcement_id: str
    seconds: float


ReleaseOutcome = Literal["completed", "failed", "superseded", "refused"]


class ReleaseLease(Command, frozen=True, kw_only=True, tag=True):
    """The coordinator reads the announcement's bytes no more; and how it went."""

    announcement_id: str
    outcome: ReleaseOutcome
    detail: str = ""


class Done(Message, frozen=True, kw_only=True, tag=True):
    """It was done, now or when it was first asked for."""


TrainerRequest = GetManifest | GetFingerprints | AcquireLease | ReleaseLease
TrainerReply = ManifestReply | FingerprintsReply | Done | Refused


# --- a worker's endpoint ----------------------------------------------------

WorkerRequest = (
    Prepare
    | Commit
    | Abort
    | Admit
    | Fence
    | GetStatus
    | VerifyWeights
    | ServeWeights
    | GetManifest
    | GetFingerprints
    | ReleaseLease
)
WorkerReply = (
    Vote
    | Committed
    | Stepped
    | Aborted
    | WorkerStatus
    | WeightsVerified
    | WeightsServed
    | ManifestReply
    | FingerprintsReply
    | Done
    | Refused
)


# --- anyone to coordinator --------------------------------------------------


class GetHistory(Message, frozen=True, kw_only=True, tag=True):
    """What became of the versions that came?"""


class RefitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One announcement and how it ended.

    It came at ``announced_at`` and ended ``seconds`` later, at ``ended_at`` (Unix
    seconds); ``stall_ms`` is the longest stall of a worker. ``workers`` served it in
    the end, all but those ``excluded``, each with a failure that names it.
    """

    version: int
    announcement_id: str
    outcome: ReleaseOutcome | Literal["under way"]
    announced_at: float
    ended_at: float | None = None
    seconds: float | None = None
    stall_ms: float | None = None
    detail: str = ""
    workers: tuple[int, ...] = ()
    excluded: tuple[Failure, ...] = ()


class History(Message, frozen=True, kw_only=True, tag=True):
    """The last announcements, oldest first, since this coordinator began (``since``,
    Unix seconds): nothing is kept from one to the next."""

    since: float
    records: tuple[RefitRecord, ...]


class FleetMember(msgspec.Struct, frozen=True, kw_only=True):
    """One worker as the coordinator last saw it.

    It is ``behind`` by so many announced versions, since the first of them was
    announced ``behind_seconds`` ago (``None``: before this coordinator began).
    """

    worker: int
    component: str
    status: WorkerStatus
    behind: int = 0
    behind_seconds: float | None = None


class FleetStatus(Message, frozen=True, kw_only=True, tag=True):
    """The coordinator's view: what is wanted, what is under way, who serves what; and
    its own ``release`` and ``schema``, as in :class:`WorkerStatus`."""

    model: str
    epoch: int
    desired: int | None
    completed: int | None
    under_way: int | None
    members: tuple[FleetMember, ...]
    release: str = ""
    schema: int = 0


CoordinatorRequest = GetStatus | GetHistory
CoordinatorReply = FleetStatus | History | Refused


# --- worker to rank ---------------------------------------------------------


class Describe(Message, frozen=True, kw_only=True, tag=True):
    """Say who you are and get ready to plan; sent once, before serving."""

    staging: StagingChoice


class Reserve(Message, frozen=True, kw_only=True, tag=True):
    """Take the memory that a version will need, in the mode of all ranks, and keep a
    copy of what is live, if it is known already what a version fills; before serving.
    """

    staging: StagingMode


class Stage(Message, frozen=True, kw_only=True, tag=True):
    """Start staging ``version`` in the background.

    ``payload`` is the encoded manifest, or ``None`` if this rank has been given
    the one with fingerprint ``manifest`` before. ``want_reads`` asks for what the
    plan reads; see :class:`Staged`.
    """

    version: int
    manifest: str
    slot: int
    staging: StagingChoice
    seconds: float
    payload: bytes | None
    want_reads: bool


class Poll(Message, frozen=True, kw_only=True, tag=True):
    """How far is the stage of ``version``?

    Before it answers, a rank carries out its ready conversions up to number
    ``convert``, exclusive: on the model's thread, and each on all ranks at once.
    """

    version: int
    convert: int = 0


class Install(Message, frozen=True, kw_only=True, tag=True):
    """Put the staged ``version`` into the live parameters. Repeating it is safe.

    With ``in_step`` the model is not paused, and the ranks agree within the call: it
    succeeds on all of them, or all have their old weights when it returns.
    """

    version: int
    in_step: bool = False


class Restore(Message, frozen=True, kw_only=True, tag=True):
    """Undo the install of ``version`` from the copy made before it."""

    version: int


class Verify(Message, frozen=True, kw_only=True, tag=True):
    """Start comparing the live parameters with what was staged for ``version``."""

    version: int


class Discard(Message, frozen=True, kw_only=True, tag=True):
    """Stop staging ``version`` and forget it; the session stays for the next."""

    version: int


class Offer(Message, frozen=True, kw_only=True, tag=True):
    """Let others read this rank's copy of ``version`` until ``Withdraw``, or for
    ``seconds``. Repeating it is safe, and never shortens it.

    ``live`` asks for the copy of what was installed, otherwise for what is staged.
    Answered with ``Running`` while the copy is checked: ask again.
    """

    version: int
    live: bool
    seconds: float


class Withdraw(Message, frozen=True, kw_only=True, tag=True):
    """Nobody reads ``version`` from this rank any more."""

    version: int


class Described(Message, frozen=True, kw_only=True, tag=True):
    """A rank's identity, the bytes of its parameters, where it would stage, and the
    fingerprint of the form in which it computes (``layout``)."""

    rank: int
    ranks: int
    parameters: int
    nbytes: int
    memory: MemoryUse
    layout: str


class Running(Message, frozen=True, kw_only=True, tag=True):
    """What was started is under way.

    Of a pull ``nbytes`` of ``total_nbytes`` are there and fingerprinted; the total is 0
    until the rank knows it, and for other work. Of ``conversions``, if that many are to
    be made of what is pulled, the first ``ready``
    have all that they take in, and the first ``converted`` are done; the last ones took
    ``convert_ms``.
    """

    nbytes: int = 0
    total_nbytes: int = 0
    conversions: int | None = None
    ready: int = 0
    converted: int = 0
    convert_ms: float = 0.0


class Staged(Message, frozen=True, kw_only=True, tag=True):
    """The stage is done.

    ``parts`` are this rank's parts of the version's fingerprint, little-endian uint64,
    one per read. ``reads`` says, if it was asked for, what each one is of: a tensor's
    number in the manifest, and a box of it.
    """

    vote: RankVote
    parts: bytes
    reads: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


class HeldTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that a rank computes with: it lies contiguously from ``byte_offset`` of
    the rank's region on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    byte_offset: int


class Offered(Message, frozen=True, kw_only=True, tag=True):
    """The rank's copy can be read from ``slot`` of ``source``, which has one region.

    ``tensors`` lie there, in every slot; ``parts`` are their fingerprints in ``slot``,
    little-endian uint64. ``layout`` is the fingerprint of the form that they have; see
    :func:`dynamo.refit.rank.image.runtime_layout`.
    """

    rank: int
    slot: int
    source: Source
    tensors: tuple[HeldTensor, ...]
    parts: bytes
    layout: str


class Installed(Message, frozen=True, kw_only=True, tag=True):
    """The live parameters hold the bytes that were asked for, or will before the
    next step: on a GPU the copy is queued like a step."""

    rank: int


class Verified(Message, frozen=True, kw_only=True, tag=True):
    """The live weights are those of the version.

    ``copy_ms``: how long the device wrote for the install, or for the undoing of one.
    """

    rank: int
    copy_ms: float


RankRequest = (
    Describe
    | Reserve
    | Stage
    | Poll
    | Install
    | Restore
    | Verify
    | Discard
    | Offer
    | Withdraw
)
RankReply = (
    Described | Running | Staged | Installed | Verified | Offered | Done | Refused
)


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
