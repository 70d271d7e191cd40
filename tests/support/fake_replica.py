# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica in which everything around the agent is faked: ranks that hold a version
number for weights, an engine that notes every step, a trainer that only talks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    InstallUndone,
    NothingStaged,
    NoWayBack,
    PeerUnsuitable,
    RefitError,
    SourceLost,
    failure_from,
)
from dynamo.refit.events import (
    Event,
    WorkerFenced,
)
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import Box, Manifest, Region, Shard, Source, TensorEntry
from dynamo.refit.protocol import (
    Abort,
    CacheCounters,
    Commit,
    Committed,
    Describe,
    Described,
    Discard,
    Done,
    FingerprintsReply,
    GetFingerprints,
    HeldTensor,
    Install,
    Installed,
    ManifestReply,
    MemoryUse,
    Message,
    Offer,
    Offered,
    Poll,
    Prepare,
    RankReply,
    RankRequest,
    RankVote,
    Refused,
    Reserve,
    Restore,
    Running,
    Stage,
    Staged,
    StageTimings,
    StagingMode,
    Verified,
    Verify,
    VerifyWeights,
    Vote,
    Withdraw,
)
from dynamo.refit.worker.agent import RefitAgent
from tests.support.fake_routing import FakeRouting

WORKER = 7
EPOCH = 100

#: What a good commit asks of the engine, in this order.
COMMIT_STEPS = ["pause", "install", "epoch", "resume", "probe", "verify"]

MEMORY = MemoryUse(mode="device", device_nbytes=3 << 20, host_nbytes=1 << 20)


def manifest(address: int = 0x1000) -> Manifest:
    """A model of two float32 tensors; ``address`` tells one trainer from another."""
    w = Shard(source=0, region=0, byte_offset=0, offset=(0, 0), shape=(4, 2))
    norm = Shard(source=0, region=0, byte_offset=32, offset=(0,), shape=(2,))
    return Manifest(
        model="tiny",
        tensors=(
            TensorEntry(name="w", dtype="float32", shape=(4, 2), shards=(w,)),
            TensorEntry(name="norm", dtype="float32", shape=(2,), shards=(norm,)),
        ),
        sources=(
            Source(
                agent="trainer",
                metadata=b"\0meta",
                memory="DRAM",
                device=0,
                slots=((Region(address, 40),), (Region(address + 64, 40),)),
            ),
        ),
    )


#: What each rank computes with: its half of ``w``, and ``norm``.
IMAGE = (
    HeldTensor("w", "float32", (2, 2), 0),
    HeldTensor("norm", "float32", (2,), 16),
)


def reads_of(rank: int, *, images: bool = False) -> tuple[tuple[int, Box], ...]:
    """``w`` is row-parallel: each of two ranks reads its half; both read ``norm``. Of
    images each rank reads its own, whole."""
    if images:
        return (2 * rank, ((0, 2), (0, 2))), (2 * rank + 1, ((0, 2),))
    rows = (2 * rank, 2 * rank + 2)
    return (0, (rows, (0, 2))), (1, ((0, 2),))


def parts_of(version: int, rank: int) -> np.ndarray:
    """A rank's parts of a version's fingerprint; those of ``w`` add up past 2^64."""
    big = 2**64 - 1000 * version
    return np.array([big if rank == 0 else 3000 * version, 77 * version], "<u8")


def fingerprints_of(version: int) -> np.ndarray:
    """What the trainer says of ``w`` and ``norm``."""
    return np.array([2000 * version, 77 * version], "<u8")


def weights_of(version: int) -> str:
    return version_fingerprint(fingerprints_of(version))


@dataclass
class Job:
    """What a rank was told to start, and what it answers when that has ended."""

    doing: str
    version: int
    end: Callable[[], RankReply]
    reply: RankReply | None = None


class FakeRank:
    """A rank whose weights are the number of their version.

    ``fail`` maps a kind of request to the errors that its next ones end in; ``held``
    names the work that does not end; ``letting_go`` is how often it answers Running
    before a discard is done; ``wrong`` is added to its parts, by their number. In mode
    ``host-no-undo`` an install cannot be undone.

    It has two shadows by turns, as a real one in host memory, and others read from
    them: ``peers`` has the ranks that it can read from, by the name of their source.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.mode = "device"
        self.live: int | None = None
        self.backup: int | None = None
        self.started: Job | None = None
        self.staged: int | None = None
        self.held: set[str] = set()
        #: Of a stage that is held: bytes that are there, and all.
        self.progress = (0, 0)
        self.letting_go = 0
        self.manifest: str | None = None
        self.fail: dict[type, list[Exception]] = {}
        self.wrong: dict[int, int] = {}
        #: What the trainer has under every number, if not the number.
        self.content: int | None = None
        #: It has planned anew, and reads in another order; it says so once unasked.
        self.reordered = False
        self._said_reordered = False
        self.name = f"rank-{rank}"
        self.peers: dict[str, FakeRank] = {}
        self.shadows: list[int | None] = [None, None]
        self.live_shadow = 1
        #: Until when others read a shadow, on the loop's clock.
        self.offered: dict[int, float] = {}
        self._sources: tuple[str, ...] = ()
        self._images = False

    @property
    def memory(self) -> MemoryUse:
        return msgspec.structs.replace(MEMORY, mode=self.mode)

    @property
    def job(self) -> int | None:
        """The version that it was told to start something for."""
        return self.started.version if self.started else None

    def answer(self, request: RankRequest) -> RankReply:
        return self._refusing(request, lambda: self._carry_out(request))

    def _refusing(
        self, request: RankRequest, work: Callable[[], RankReply]
    ) -> RankReply:
        try:
            return work()
        except RefitError as error:
            stage = type(request).__name__.lower()
            version = getattr(request, "version", None)
            return Refused(
                failure=failure_from(
                    error, stage=stage, rank=self.rank, version=version
                )
            )

    def _carry_out(self, request: RankRequest) -> RankReply:
        match request:
            case Verify():
                return self._start(request, "verify", self._verify)
        self._fail_if_told(request)
        match request:
            case Describe():
                return Described(
                    rank=self.rank,
                    ranks=2,
                    parameters=2,
                    nbytes=24,
                    memory=self.memory,
                    layout=f"form of rank {self.rank}",
                )
            case Reserve():
                return Done()
            case Stage():
                if request.payload is not None:
                    self.manifest = request.manifest
                    sent = msgspec.msgpack.decode(request.payload, type=Manifest)
                    self._sources = tuple(source.agent for source in sent.sources)
                    self._images = bool(sent.layouts)
                if self.manifest != request.manifest:
                    raise RefitError(f"this rank has no manifest {request.manifest}")
                self.staged = None
                return self._start(request, "stage", self._stage)
            case Poll(version=version):
                return self._poll(version)
            case Offer():
                return self._offer(request)
            case Withdraw(version=version):
                for shadow in (0, 1):
                    if self.shadows[shadow] == version:
                        self.offered.pop(shadow, None)
                return Done()
            case Install():
                return self._install(request)
            case Restore(version=version):
                self._require(version)
                if not self.memory.can_undo:
                    raise NoWayBack(f"{self.mode} keeps no copy of the old weights")
                self.undo()
                return Installed(rank=self.rank)
            case Discard(version=version):
                return self._discard(version)

    def _fail_if_told(self, request: RankRequest) -> None:
        if errors := self.fail.get(type(request)):
            raise errors.pop(0)

    def _start(
        self,
        request: Stage | Verify,
        doing: str,
        work: Callable[[Any], RankReply],
    ) -> RankReply:
        if self.started is not None and self.started.reply is None:
            raise RefitError(f"version {self.job} is still being worked on")

        def carry_out() -> RankReply:
            if doing != "stage":
                self._fail_if_told(request)
            return work(request)

        self.started = Job(
            doing, request.version, lambda: self._refusing(request, carry_out)
        )
        return Running()

    def _poll(self, version: int) -> RankReply:
        job = self.started
        if job is None or job.version != version:
            raise NothingStaged(f"nothing was started for version {version} here")
        if job.reply is None:
            target = 1 - self.live_shadow
            if job.doing in self.held:
                nbytes, total = self.progress
                return Running(nbytes=nbytes, total_nbytes=total)
            read_until = self.offered.get(target, 0.0)
            if job.doing == "stage" and read_until > asyncio.get_running_loop().time():
                # Somebody reads what it would overwrite.
                return Running()
            job.reply = job.end()
        return job.reply

    def _stage(self, request: Stage) -> RankReply:
        content = self._read(request)
        self.staged, self.backup = request.version, self.live
        self.shadows[1 - self.live_shadow] = content
        parts = parts_of(content, self.rank)
        for number, error in self.wrong.items():
            parts[number] = (int(parts[number]) + error) % 2**64
        known = reads_of(self.rank, images=self._images)
        reads = known if request.want_reads else ()
        if self.reordered:
            parts, reads = parts[::-1], reads[::-1]
            if not self._said_reordered:
                self._said_reordered, reads = True, known[::-1]
        vote = vote_of(self.rank, self.mode)
        return Staged(vote=vote, parts=parts.tobytes(), reads=reads)

    def _read(self, request: Stage) -> int:
        """What lies where it reads: a trainer has what it says, a peer perhaps not."""
        peers = [self.peers[name] for name in self._sources if name in self.peers]
        if not peers:
            return request.version if self.content is None else self.content
        contents = {peer.shadows[request.slot] for peer in peers}
        return contents.pop() if len(contents) == 1 else 0

    def _offer(self, request: Offer) -> RankReply:
        shadow = self.live_shadow if request.live else 1 - self.live_shadow
        if self.shadows[shadow] != request.version:
            raise PeerUnsuitable(f"version {request.version} is not in its shadows")
        now = asyncio.get_running_loop().time()
        self.offered[shadow] = max(self.offered.get(shadow, 0.0), now + request.seconds)
        content = self.shadows[shadow]
        parts = () if content is None else parts_of(content, self.rank)
        region = Region(0x1000, 24)
        return Offered(
            rank=self.rank,
            slot=shadow,
            source=Source(
                agent=self.name,
                metadata=b"",
                memory="DRAM",
                device=0,
                slots=((region,), (region,)),
            ),
            tensors=IMAGE,
            parts=np.asarray(parts, "<u8").tobytes(),
            layout=f"form of rank {self.rank}",
        )

    def _install(self, request: Install) -> RankReply:
        self._require(request.version)
        if self.live != request.version:
            self.live_shadow = 1 - self.live_shadow
        self.live = request.version
        return Installed(rank=self.rank)

    def undo(self) -> None:
        """Put back what was live before."""
        if self.live != self.backup:
            self.live_shadow = 1 - self.live_shadow
        self.live = self.backup

    def _verify(self, request: Verify) -> RankReply:
        if self.live != request.version:
            raise FingerprintMismatch("1 block is not what was staged", tensor="w")
        return Verified(rank=self.rank, copy_ms=0.1 + self.rank)

    def _discard(self, version: int) -> RankReply:
        if self.job == version:
            if self.letting_go:
                self.letting_go -= 1
                return Running()
            self.started = self.staged = None
            self.offered.pop(1 - self.live_shadow, None)
        return Done()

    def _require(self, version: int) -> None:
        if self.staged != version:
            raise NothingStaged(f"version {version} is not staged here")


def vote_of(rank: int, mode: StagingMode = "device") -> RankVote:
    timings = dict.fromkeys(StageTimings.__struct_fields__, 1.0)
    return RankVote(
        rank=rank,
        nbytes=24,
        memory=msgspec.structs.replace(MEMORY, mode=mode),
        session="cold",
        counters=CacheCounters(allocations=1),
        timings=StageTimings(**timings),
        can_undo=mode != "host-no-undo",
    )


VOTES = (vote_of(0), vote_of(1))


class FakeEngine:
    """Implements :class:`switch.Engine` with two fake ranks, and notes every step.

    Where it ``installs_in_step``, its ranks agree within the call, as the real ones do.
    """

    def __init__(self) -> None:
        self.kv_epoch = ""
        self.admin_lock = asyncio.Lock()
        self.paused_by_user = False
        self.asleep = False
        self.installs_in_step = False
        self.ranks = [FakeRank(0), FakeRank(1)]
        self.requests: list[RankRequest] = []
        self.steps: list[str] = []
        self.paused = False
        #: Requests that a drain waits for.
        self.running = 0
        self.declared: int | None = None
        self.fail: dict[str, Exception] = {}
        #: Cleared to hold an install back.
        self.may_install = asyncio.Event()
        self.may_install.set()
        #: Cleared to let a pause hang.
        self.may_pause = asyncio.Event()
        self.may_pause.set()
        #: Called with every step; may be replaced.
        self.on_step: Callable[[str], object] = lambda name: None

    async def call_ranks(self, request: RankRequest) -> list[RankReply]:
        self.requests.append(request)
        if isinstance(request, Install | Restore):
            self._step(type(request).__name__.lower(), locked=True)
            in_step = isinstance(request, Install) and request.in_step
            assert self.paused != in_step, "written in a pause, or between two steps"
            assert self.installs_in_step or not in_step
            await self.may_install.wait()
        if isinstance(request, Verify):
            self._step("verify")
            assert self.paused == self.paused_by_user, "it makes the pause longer"
        await asyncio.sleep(0)
        if error := self.fail.get(type(request).__name__):
            raise error
        replies = [rank.answer(request) for rank in self.ranks]
        if isinstance(request, Install) and request.in_step:
            replies = self._agree(request, replies)
        return replies

    def _agree(self, request: Install, replies: list[RankReply]) -> list[RankReply]:
        """All ranks have installed, or all have their old weights and say so."""
        if all(isinstance(reply, Installed) for reply in replies):
            return replies
        for rank in self.ranks:
            rank.undo()
        undone = InstallUndone(f"another rank failed to install {request.version}")
        return [
            reply
            if isinstance(reply, Refused)
            else Refused(
                failure=failure_from(
                    undone, stage="install", rank=number, version=request.version
                )
            )
            for number, reply in enumerate(replies)
        ]

    async def pause(self, in_flight: str) -> None:
        self.in_flight = in_flight
        # One that fails may have paused all the same; one that hangs has not.
        self.paused = self.paused or self.may_pause.is_set()
        self._step("pause", locked=True)
        await self.may_pause.wait()

    async def resume(self) -> None:
        self._step("resume", locked=True)
        self.paused = False

    async def forget_media(self) -> None:
        self._step("forget_media", locked=True)

    def begin_epoch(self, version: int) -> str:
        assert self.paused or self.installs_in_step, (
            "a new request could hit blocks of older weights"
        )
        self._step("epoch", locked=True)
        self.kv_epoch = f"{version}-{len(self.steps)}"
        return self.kv_epoch

    async def declare_version(self, version: int) -> None:
        self.declared = version

    async def probe(self) -> None:
        self._step("probe")
        for _ in range(5):
            await asyncio.sleep(0)
        assert not self.paused_by_user, "would wait for a token that cannot come"

    async def drain(self, seconds: float) -> int:
        self._step("drain")
        deadline = asyncio.get_running_loop().time() + seconds
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0)
        return self.running

    def _step(self, name: str, *, locked: bool = False) -> None:
        self.steps.append(name)
        self.on_step(name)
        assert self.admin_lock.locked() or not locked, f"{name} without the lock"
        if error := self.fail.get(name):
            raise error

    def asked(self, kind: type) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    def live(self) -> list[int | None]:
        return [rank.live for rank in self.ranks]

    def jobs(self) -> list[int | None]:
        return [rank.job for rank in self.ranks]

    def hold(self, doing: str) -> None:
        """Ranks that are told to do this do not end."""
        for rank in self.ranks:
            rank.held.add(doing)

    def let(self, doing: str) -> None:
        for rank in self.ranks:
            rank.held.discard(doing)

    def keep_no_way_back(self) -> None:
        """Before the agent starts: all ranks stage in mode ``host-no-undo``."""
        for rank in self.ranks:
            rank.mode = "host-no-undo"


class FakeTrainer:
    """A caller that reaches a trainer with ``manifests``, or fails with ``error``.

    Announcement ``a5`` is one of version 5; ``fingerprints`` has the answers that are
    other than the version's own, by announcement.
    """

    def __init__(self, *manifests: Manifest) -> None:
        self.payloads = {m.fingerprint(): msgspec.msgpack.encode(m) for m in manifests}
        self.fingerprints: dict[str, bytes | Failure] = {}
        self.error: Exception | None = None
        self.requests: list[tuple[str, int, Message]] = []

    async def instances(self, path: str) -> list[int]:
        return [99]

    async def call(
        self, path: str, instance: int, request: Any, expected: Any, seconds: float
    ) -> Any:
        self.requests.append((path, instance, request))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if isinstance(request, GetFingerprints):
            name = request.announcement_id
            own = fingerprints_of(int(name[1:])).tobytes()
            sent = self.fingerprints.get(name, own)
            if isinstance(sent, Failure):
                return Refused(failure=sent)
            return FingerprintsReply(payload=sent)
        if request.manifest_digest not in self.payloads:
            why = SourceLost(
                f"no manifest {request.manifest_digest[:12]} is served here"
            )
            return Refused(failure=failure_from(why, stage="trainer"))
        return ManifestReply(payload=self.payloads[request.manifest_digest])

    def asked(self, kind: type) -> list[Any]:
        return [request for _, _, request in self.requests if isinstance(request, kind)]


class Bench:
    """An agent with everything around it faked."""

    def __init__(self, staging: str = "auto", *, admitted: bool = True) -> None:
        self.engine = FakeEngine()
        self.manifest = manifest()
        self.other_manifest = manifest(address=0x2000)
        self.trainer = FakeTrainer(self.manifest, self.other_manifest)
        self.events: list[Event] = []
        self.fences = 0
        self.routing = FakeRouting(admitted=admitted)
        self.agent = RefitAgent(
            self.engine,
            self.trainer,
            self.events.append,
            self.routing,
            self._fence,
            model="tiny",
            worker=WORKER,
            staging=staging,
        )

    def _fence(self) -> None:
        self.fences += 1

    def prepare(self, version: int, **changes: Any) -> Prepare:
        fields = {
            "model": "tiny",
            "version": version,
            "epoch": EPOCH,
            "announcement_id": f"a{version}",
            "endpoint": "ns.trainer.weights",
            "instance": 99,
            "manifest_digest": self.manifest.fingerprint(),
            "slot": 0,
            "fingerprint": weights_of(version),
            "stage_seconds": 60.0,
            "keep_seconds": 60.0,
        }
        return Prepare(**(fields | changes))

    async def staged(self, version: int, **changes: Any) -> Vote:
        vote = await self.agent.answer(self.prepare(version, **changes))
        assert isinstance(vote, Vote)
        return vote

    async def committed(self, version: int, **changes: Any) -> Committed:
        await self.staged(version, **changes)
        reply = await self.agent.answer(commit(version))
        assert isinstance(reply, Committed)
        return reply

    async def staging(self, version: int) -> asyncio.Task:
        """A prepare whose ranks do not finish."""
        self.engine.hold("stage")
        return await self.staging_on(version)

    async def staging_on(self, version: int) -> asyncio.Task:
        task = asyncio.create_task(self.agent.answer(self.prepare(version)))
        await until(lambda: self.engine.jobs() == [version, version])
        return task

    async def committing(self, version: int) -> asyncio.Task:
        """A commit that stands between its pause and its install."""
        await self.staged(version)
        self.engine.may_install.clear()
        task = asyncio.create_task(self.agent.answer(commit(version)))
        await until(lambda: "install" in self.engine.steps)
        return task

    async def checking(self, version: int) -> asyncio.Task:
        """A check on request of ``version``, whose ranks do not finish."""
        await self.committed(version)
        self.engine.hold("verify")
        before = len(self.engine.asked(Verify))
        task = asyncio.create_task(self.agent.answer(VerifyWeights()))
        await until(lambda: len(self.engine.asked(Verify)) > before)
        return task

    def assert_serving(self, version: int | None) -> None:
        """On ``version`` on every rank, not paused, with nothing pending."""
        status = self.agent.status()
        assert (status.phase, status.version, status.pending) == (
            "serving",
            version,
            None,
        )
        assert self.engine.live() == [version, version]
        assert not self.engine.paused
        assert self.fences == 0

    def assert_fenced(self, version: int, kind: str) -> Failure:
        [event] = [e for e in self.events if isinstance(e, WorkerFenced)]
        assert (event.worker, event.version) == (WORKER, version)
        assert event.failure.kind == kind
        assert self.fences == 1
        assert self.agent.status().phase == "fenced"
        return event.failure


def commit(
    version: int, epoch: int = EPOCH, in_flight: str = "continue", **fields: Any
) -> Commit:
    return Commit(
        model="tiny", version=version, epoch=epoch, in_flight=in_flight, **fields
    )


def abort(version: int, epoch: int = EPOCH) -> Abort:
    reason = "superseded by version 9"
    return Abort(model="tiny", version=version, epoch=epoch, reason=reason)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def refusal(reply: Message) -> Failure:
    assert isinstance(reply, Refused), reply
    return reply.failure
