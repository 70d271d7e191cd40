# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One replica's refit against ranks that hold a version number for weights."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    MemoryShort,
    NothingStaged,
    NoWayBack,
    OutOfStep,
    RefitError,
    SourceLost,
    StaleEpoch,
    TransferFailed,
    failure_from,
)
from dynamo.refit.events import (
    Event,
    RefitFailed,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import Box, Manifest, Region, Shard, Source, TensorEntry
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    CacheCounters,
    Commit,
    Committed,
    Describe,
    Described,
    Discard,
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    GetStatus,
    Install,
    Installed,
    ManifestReply,
    MemoryUse,
    Message,
    Poll,
    Prepare,
    RankAnswer,
    RankCall,
    RankReply,
    RankRequest,
    RankVote,
    Refused,
    Restore,
    Running,
    Stage,
    Staged,
    StageTimings,
    Verified,
    Verify,
    VerifyWeights,
    Vote,
    WeightsVerified,
    WorkerStatus,
)
from dynamo.refit.rpc import PeerLost
from dynamo.refit.worker import ranks as ranks_module
from dynamo.refit.worker.agent import RefitAgent
from dynamo.refit.worker.engine import ProbeFailed, RefitEngine, with_epoch
from dynamo.refit.worker.ranks import RanksFailed, WeightsUnknown

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(30),
]

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


def reads_of(rank: int) -> tuple[tuple[int, Box], ...]:
    """``w`` is row-parallel: each of two ranks reads its half; both read ``norm``."""
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
    before a discard is done; ``wrong`` is added to its parts, by their number. In
    ``direct`` mode an install is started and polled, and cannot be undone.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.mode = "device"
        self.live: int | None = None
        self.backup: int | None = None
        self.started: Job | None = None
        self.staged: int | None = None
        self.held: set[str] = set()
        self.letting_go = 0
        self.manifest: str | None = None
        self.fail: dict[type, list[Exception]] = {}
        self.wrong: dict[int, int] = {}
        self.direct = False
        self.unchecked = 0
        #: It has planned anew, and reads in another order; it says so unasked.
        self.reordered = False

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
            case Install() if self.direct:
                return self._start(request, "install", self._install)
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
                    memory=msgspec.structs.replace(MEMORY, mode=self.mode),
                )
            case Stage():
                if request.payload is not None:
                    self.manifest = request.manifest
                if self.manifest != request.manifest:
                    raise RefitError(f"this rank has no manifest {request.manifest}")
                self.staged = None
                return self._start(request, "stage", self._stage)
            case Poll(version=version):
                return self._poll(version)
            case Install():
                return self._install(request)
            case Restore(version=version):
                self._require(version)
                if self.direct:
                    raise NoWayBack("direct staging keeps no copy of the old weights")
                self.live = self.backup
                return Installed(rank=self.rank, copy_ms=0.1)
            case Discard(version=version):
                return self._discard(version)

    def _fail_if_told(self, request: RankRequest) -> None:
        if errors := self.fail.get(type(request)):
            raise errors.pop(0)

    def _start(
        self,
        request: Stage | Install | Verify,
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
            if job.doing in self.held:
                return Running()
            job.reply = job.end()
        return job.reply

    def _stage(self, request: Stage) -> RankReply:
        self.staged, self.backup = request.version, self.live
        parts = parts_of(request.version, self.rank)
        for number, error in self.wrong.items():
            parts[number] = (int(parts[number]) + error) % 2**64
        reads = reads_of(self.rank) if request.want_reads else ()
        if self.reordered:
            parts, reads = parts[::-1], reads_of(self.rank)[::-1]
        return Staged(vote=vote_of(self.rank), parts=parts.tobytes(), reads=reads)

    def _install(self, request: Install) -> RankReply:
        self._require(request.version)
        self.live = request.version
        return Installed(rank=self.rank, copy_ms=0.1)

    def _verify(self, request: Verify) -> RankReply:
        if self.live != request.version:
            raise FingerprintMismatch("1 block is not what was staged", tensor="w")
        return Verified(rank=self.rank, unchecked=self.unchecked)

    def _discard(self, version: int) -> RankReply:
        if self.job == version:
            if self.letting_go:
                self.letting_go -= 1
                return Running()
            self.started = self.staged = None
        return Done()

    def _require(self, version: int) -> None:
        if self.staged != version:
            raise NothingStaged(f"version {version} is not staged here")


def vote_of(rank: int) -> RankVote:
    timings = dict.fromkeys(StageTimings.__struct_fields__, 1.0)
    return RankVote(
        rank=rank,
        nbytes=24,
        memory=MEMORY,
        session="cold",
        counters=CacheCounters(allocations=1),
        timings=StageTimings(**timings),
    )


VOTES = (vote_of(0), vote_of(1))


class FakeEngine:
    """Implements :class:`agent.Engine` with two fake ranks, and notes every step."""

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
        self.declared: int | None = None
        self.fail: dict[str, Exception] = {}
        #: Set to hold an install back.
        self.may_install = asyncio.Event()
        self.may_install.set()

    async def call_ranks(self, request: RankRequest) -> list[RankReply]:
        self.requests.append(request)
        if isinstance(request, Install | Restore):
            self._step(type(request).__name__.lower(), locked=True)
            assert self.paused, "live weights are written between pause and resume"
            await self.may_install.wait()
        if isinstance(request, Verify):
            self._step("verify")
            assert self.paused == self.paused_by_user, "it makes the pause longer"
        await asyncio.sleep(0)
        if error := self.fail.get(type(request).__name__):
            raise error
        replies = [rank.answer(request) for rank in self.ranks]
        installing = [rank for rank in self.ranks if rank.direct and self._writes(rank)]
        assert self.paused or not installing, "resumed while a rank writes"
        return replies

    @staticmethod
    def _writes(rank: FakeRank) -> bool:
        job = rank.started
        return job is not None and job.doing == "install" and job.reply is None

    async def pause(self, in_flight: str) -> None:
        self.in_flight = in_flight
        self.paused = True
        self._step("pause", locked=True)

    async def resume(self) -> None:
        assert not [r for r in self.ranks if self._writes(r)], "a rank still writes"
        self._step("resume", locked=True)
        self.paused = False

    async def forget_media(self) -> None:
        self._step("forget_media", locked=True)

    def begin_epoch(self, version: int) -> str:
        assert self.paused, "a new request could hit blocks of older weights"
        self._step("epoch", locked=True)
        self.kv_epoch = f"{version}-{len(self.steps)}"
        return self.kv_epoch

    async def declare_version(self, version: int) -> None:
        self.declared = version

    async def probe(self) -> None:
        self._step("probe")
        for _ in range(5):
            await asyncio.sleep(0)
        if self.paused_by_user:
            raise ProbeFailed("no token within 30 s")

    def _step(self, name: str, *, locked: bool = False) -> None:
        self.steps.append(name)
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

    def stage_directly(self) -> None:
        for rank in self.ranks:
            rank.direct = True


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

    async def call(
        self, path: str, instance: int, request: Any, expected: Any, seconds: float
    ) -> Any:
        self.requests.append((path, instance, request))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if isinstance(request, GetFingerprints):
            name = request.announcement
            own = fingerprints_of(int(name[1:])).tobytes()
            sent = self.fingerprints.get(name, own)
            if isinstance(sent, Failure):
                return Refused(failure=sent)
            return FingerprintsReply(payload=sent)
        if request.manifest not in self.payloads:
            why = SourceLost(f"no manifest {request.manifest[:12]} is served here")
            return Refused(failure=failure_from(why, stage="trainer"))
        return ManifestReply(payload=self.payloads[request.manifest])

    def asked(self, kind: type) -> list[Any]:
        return [request for _, _, request in self.requests if isinstance(request, kind)]


class Bench:
    """An agent with everything around it faked."""

    def __init__(self, staging: str = "auto") -> None:
        self.engine = FakeEngine()
        self.manifest = manifest()
        self.other_manifest = manifest(address=0x2000)
        self.trainer = FakeTrainer(self.manifest, self.other_manifest)
        self.events: list[Event] = []
        self.fences = 0
        self.agent = RefitAgent(
            self.engine,
            self.trainer,
            self.events.append,
            self._fence,
            model="tiny",
            worker=WORKER,
            staging=staging,
        )

    def _fence(self) -> None:
        self.fences += 1

    def prepare(self, version: int, **changes: Any) -> Prepare:
        fields = {
            "version": version,
            "epoch": EPOCH,
            "announcement": f"a{version}",
            "endpoint": "ns.trainer.weights",
            "instance": 99,
            "manifest": self.manifest.fingerprint(),
            "slot": 0,
            "weights": weights_of(version),
            "stage_seconds": 60.0,
            "commit_seconds": 60.0,
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


def commit(version: int, epoch: int = EPOCH, in_flight: str = "continue") -> Commit:
    return Commit(version=version, epoch=epoch, in_flight=in_flight)


def abort(version: int, epoch: int = EPOCH) -> Abort:
    return Abort(version=version, epoch=epoch, reason="superseded by version 9")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(ranks_module, "POLL_SECONDS", 0.001)
    bench = Bench()
    await bench.agent.start()
    return bench


def refusal(reply: Message) -> Failure:
    assert isinstance(reply, Refused), reply
    return reply.failure


# --- prepare ------------------------------------------------------------------


async def test_before_the_first_refit(bench: Bench) -> None:
    assert await bench.agent.answer(GetStatus()) == WorkerStatus(
        model="tiny",
        phase="serving",
        version=None,
        weights="",
        pending=None,
        epoch=0,
        kv_epoch="",
        ranks=2,
    )


async def test_a_rank_that_cannot_be_refitted_fails_the_start(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Describe] = [RefitError("packed")]
    with pytest.raises(RanksFailed, match="packed") as caught:
        await bench.agent.start()
    assert caught.value.failure.rank == 1


async def test_prepare_gives_the_votes_of_all_ranks(bench: Bench) -> None:
    vote = await bench.agent.answer(bench.prepare(5, slot=1))
    assert vote == Vote(version=5, weights=weights_of(5), ranks=VOTES)
    assert bench.events == [WorkerStaged(worker=WORKER, version=5, ranks=VOTES)]

    fingerprint = bench.manifest.fingerprint()
    assert bench.trainer.requests == [
        ("ns.trainer.weights", 99, GetManifest(manifest=fingerprint)),
        ("ns.trainer.weights", 99, GetFingerprints(announcement="a5")),
    ]
    [stage] = bench.engine.asked(Stage)
    assert (stage.version, stage.manifest, stage.slot) == (5, fingerprint, 1)
    assert (stage.staging, stage.want_reads) == ("device", True)
    assert stage.seconds == 60.0
    assert msgspec.msgpack.decode(stage.payload, type=Manifest) == bench.manifest

    status = bench.agent.status()
    assert (status.phase, status.version, status.pending) == ("staged", None, 5)
    assert (status.epoch, bench.engine.steps) == (EPOCH, [])
    assert bench.engine.live() == [None, None]


async def test_status_while_staging(bench: Bench) -> None:
    task = await bench.staging(5)
    status = bench.agent.status()
    assert (status.phase, status.pending) == ("staging", 5)
    bench.engine.let("stage")
    assert isinstance(await task, Vote)


async def test_a_repeated_prepare_stages_once(bench: Bench) -> None:
    first = await bench.staging(5)
    second = asyncio.create_task(bench.agent.answer(bench.prepare(5)))
    await asyncio.sleep(0)
    bench.engine.let("stage")
    vote = await first
    assert await second == vote
    assert await bench.agent.answer(bench.prepare(5)) == vote
    assert len(bench.engine.asked(Stage)) == 1
    assert len(bench.events) == 1


async def test_a_known_manifest_is_neither_fetched_nor_sent_again(
    bench: Bench,
) -> None:
    await bench.committed(5)
    await bench.committed(6)
    assert len(bench.trainer.asked(GetManifest)) == 1
    assert [stage.payload is None for stage in bench.engine.asked(Stage)] == [
        False,
        True,
    ]
    other = bench.other_manifest.fingerprint()
    await bench.committed(7, manifest=other)
    assert len(bench.trainer.asked(GetManifest)) == 2
    assert bench.engine.asked(Stage)[-1].payload is not None


async def test_a_manifest_is_sent_again_to_ranks_that_refused_it(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Stage] = [RefitError("busy")]
    assert refusal(await bench.agent.answer(bench.prepare(5))).message == "busy"
    await bench.staged(6)
    assert bench.engine.asked(Stage)[-1].payload is not None
    assert len(bench.trainer.asked(GetManifest)) == 1


@pytest.mark.parametrize("request_kind", [Stage, Poll])
async def test_a_rank_that_refuses_is_a_refusal_of_all(
    bench: Bench, request_kind: type
) -> None:
    error = SourceLost("the trainer is gone")
    error.tensor = "w"
    bench.engine.ranks[0].held.add("stage")
    bench.engine.ranks[0].letting_go = 3
    bench.engine.ranks[1].fail[request_kind] = [error]

    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert (failure.kind, failure.rank, failure.worker) == ("SourceLost", 1, WORKER)
    assert (failure.version, failure.tensor) == (5, "w")
    assert failure.message == "the trainer is gone"
    assert bench.engine.jobs() == [None, None]
    assert len(bench.engine.asked(Discard)) == 4
    assert bench.events == []
    bench.assert_serving(None)

    bench.engine.let("stage")
    await bench.staged(5)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda t: setattr(t, "error", PeerLost("no instance 99")), "PeerLost"),
        (lambda t: t.payloads.clear(), "SourceLost"),
        (lambda t: t.payloads.update(dict.fromkeys(t.payloads, b"\xc1")), "ManifestInvalid"),
        (
            lambda t: t.payloads.update(
                dict.fromkeys(
                    t.payloads,
                    msgspec.msgpack.encode(
                        msgspec.structs.replace(manifest(), tensors=())
                    ),
                )
            ),
            "ManifestInvalid",
        ),
    ],
    ids=["no answer", "not served", "malformed", "invalid"],
)
async def test_a_manifest_that_cannot_be_had_is_refused(
    bench: Bench, spoil: Callable[[FakeTrainer], Any], kind: str
) -> None:
    good = dict(bench.trainer.payloads)
    spoil(bench.trainer)
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert failure.kind.startswith(kind)
    assert (failure.worker, bench.engine.asked(Stage)) == (WORKER, [])
    bench.assert_serving(None)

    bench.trainer.error, bench.trainer.payloads = None, good
    await bench.staged(5)


async def test_a_tensor_that_no_rank_reads_whole_is_refused(bench: Bench) -> None:
    bench.engine.ranks[1].rank = 0
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert (failure.kind, failure.tensor) == ("LayoutRefused", "w")
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(None)


async def test_answers_out_of_step_while_staging_fence_the_worker(
    bench: Bench,
) -> None:
    """Nothing that the ranks say can be trusted from here on."""
    bench.engine.fail["Poll"] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(bench.prepare(5)))
    bench.assert_fenced(5, "OutOfStep")


async def test_the_caller_of_a_prepare_may_go(bench: Bench) -> None:
    task = await bench.staging(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.engine.let("stage")
    await bench.staged(5)
    assert len(bench.engine.asked(Stage)) == 1


# --- epochs -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prepare", "commit", "abort"])
async def test_a_lower_epoch_is_refused(bench: Bench, kind: str) -> None:
    await bench.staged(5)
    request = {
        "prepare": bench.prepare(6, epoch=EPOCH - 1),
        "commit": commit(5, EPOCH - 1),
        "abort": abort(5, EPOCH - 1),
    }[kind]
    with pytest.raises(StaleEpoch, match=f"epoch {EPOCH - 1} was replaced by {EPOCH}"):
        await bench.agent.answer(request)
    assert bench.agent.status().phase == "staged"
    assert bench.agent.status().epoch == EPOCH


async def test_a_newer_coordinator_takes_over_what_is_staged(bench: Bench) -> None:
    await bench.staged(5)
    await bench.staged(5, epoch=EPOCH + 1)
    assert len(bench.engine.asked(Stage)) == 2
    assert isinstance(await bench.agent.answer(commit(5, EPOCH + 1)), Committed)
    bench.assert_serving(5)


# --- commit -------------------------------------------------------------------


async def test_commit_steps_in_order(bench: Bench) -> None:
    reply = await bench.committed(5)
    assert bench.engine.steps == COMMIT_STEPS
    assert bench.engine.declared == 5
    bench.assert_serving(5)

    assert (reply.version, reply.kv_epoch) == (5, bench.engine.kv_epoch)
    assert reply.kv_epoch.startswith("5-")
    timings = reply.timings
    assert timings.install_retries == 0
    assert timings.stall_ms == pytest.approx(
        timings.pause_ms + timings.install_ms + timings.resume_ms
    )
    assert min(timings.pause_ms, timings.install_ms, timings.resume_ms) > 0
    assert min(timings.probe_ms, timings.verify_ms) > 0
    assert bench.events[1:] == [
        WorkerRefitted(
            worker=WORKER,
            version=5,
            weights=weights_of(5),
            unchecked=0,
            kv_epoch=reply.kv_epoch,
            in_flight="continue",
            timings=timings,
        )
    ]


async def test_the_in_flight_policy_reaches_the_engine_and_the_event(
    bench: Bench,
) -> None:
    await bench.staged(5)
    await bench.agent.answer(commit(5, in_flight="recompute"))
    assert bench.engine.in_flight == "recompute"
    assert bench.events[-1].in_flight == "recompute"


async def test_each_commit_has_an_epoch_of_its_own(bench: Bench) -> None:
    epochs = {(await bench.committed(version)).kv_epoch for version in (5, 6, 7)}
    assert len(epochs) == 3
    bench.assert_serving(7)


async def test_a_repeated_commit_installs_once(bench: Bench) -> None:
    first = await bench.committing(5)
    second = asyncio.create_task(bench.agent.answer(commit(5)))
    await asyncio.sleep(0)
    assert bench.agent.status().phase == "committing"
    bench.engine.may_install.set()
    reply = await first
    assert await second == reply
    assert await bench.agent.answer(commit(5)) == reply
    assert bench.engine.steps == COMMIT_STEPS
    assert [type(event) for event in bench.events] == [WorkerStaged, WorkerRefitted]


async def test_a_commit_without_a_stage_is_refused(bench: Bench) -> None:
    with pytest.raises(NothingStaged, match="version 5 is not staged"):
        await bench.agent.answer(commit(5))
    await bench.staged(5)
    with pytest.raises(NothingStaged, match="version 6 is not staged"):
        await bench.agent.answer(commit(6))
    assert bench.engine.steps == []
    assert isinstance(await bench.agent.answer(commit(5)), Committed)


async def test_a_commit_while_staging_is_refused(bench: Bench) -> None:
    task = await bench.staging(5)
    with pytest.raises(NothingStaged, match="still being staged"):
        await bench.agent.answer(commit(5))
    bench.engine.let("stage")
    assert isinstance(await task, Vote)


async def test_a_commit_runs_on_when_its_caller_goes(bench: Bench) -> None:
    task = await bench.committing(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    bench.engine.may_install.set()
    await until(lambda: bench.agent.status().phase == "serving")
    assert bench.engine.steps == COMMIT_STEPS
    bench.assert_serving(5)
    assert isinstance(bench.events[-1], WorkerRefitted)


async def test_nothing_interrupts_a_commit(bench: Bench) -> None:
    task = await bench.committing(5)
    with pytest.raises(RefitError, match="version 5 is being committed"):
        await bench.agent.answer(abort(5))
    with pytest.raises(RefitError, match="version 5 is being committed"):
        await bench.agent.answer(bench.prepare(6, epoch=EPOCH + 1))
    assert await bench.agent.answer(abort(6, EPOCH + 1)) == Aborted(version=6)
    bench.engine.may_install.set()
    assert isinstance(await task, Committed)
    bench.assert_serving(5)


async def test_an_install_that_fails_once_is_done_again(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Install] = [RefitError("copy engine")]
    reply = await bench.committed(5)
    assert reply.timings.install_retries == 1
    assert bench.engine.steps == ["pause", "install", *COMMIT_STEPS[1:]]
    bench.assert_serving(5)


async def test_an_install_that_fails_for_good_is_undone_on_all_ranks(
    bench: Bench,
) -> None:
    before = await bench.committed(5)
    bench.engine.steps.clear()
    bench.events.clear()
    bench.engine.ranks[1].fail[Install] = [RefitError("1st"), RefitError("2nd")]

    await bench.staged(6)
    failure = refusal(await bench.agent.answer(commit(6)))
    assert (failure.message, failure.rank, failure.worker) == ("2nd", 1, WORKER)
    assert (failure.stage, failure.version) == ("install", 6)
    assert bench.engine.steps == ["pause", "install", "install", "restore", "resume"]
    assert (bench.engine.kv_epoch, bench.engine.declared) == (before.kv_epoch, 5)
    assert [type(event) for event in bench.events] == [WorkerStaged]
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(5)

    await bench.committed(7)
    bench.assert_serving(7)


async def test_a_restore_that_fails_fences(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.ranks[1].fail[Install] = [RefitError("1st"), RefitError("2nd")]
    bench.engine.ranks[0].fail[Restore] = [RefitError("3rd")]
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, "WeightsUnknown")
    assert "2nd" in failure.message and "3rd" in failure.message
    assert failure.worker == WORKER
    assert "resume" not in bench.engine.steps
    assert bench.engine.paused

    for request in (bench.prepare(6), commit(5), abort(5)):
        with pytest.raises(WeightsUnknown, match="fenced: restart it"):
            await bench.agent.answer(request)
    assert bench.agent.status().phase == "fenced"
    assert bench.fences == 1


@pytest.mark.parametrize(
    ("call", "kind"),
    [("Install", "OutOfStep"), ("Restore", "OutOfStep"), ("Install", "OSError")],
)
async def test_answers_that_cannot_be_trusted_fence(
    bench: Bench, call: str, kind: str
) -> None:
    await bench.staged(5)
    if call == "Restore":
        twice = [RefitError("1st"), RefitError("2nd")]
        bench.engine.ranks[0].fail[Install] = twice
    error = OutOfStep("call 3", rank=1) if kind == "OutOfStep" else OSError("dead")
    bench.engine.fail[call] = error
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, kind)
    assert "resume" not in bench.engine.steps
    assert not [event for event in bench.events if isinstance(event, WorkerRefitted)]


async def test_a_pause_that_fails_leaves_the_old_version_serving(bench: Bench) -> None:
    await bench.committed(5)
    bench.engine.steps.clear()
    bench.engine.fail["pause"] = TimeoutError("scheduler busy")
    await bench.staged(6)
    failure = refusal(await bench.agent.answer(commit(6)))
    assert (failure.kind, failure.stage) == ("TimeoutError", "pause")
    assert (failure.worker, failure.version) == (WORKER, 6)
    assert bench.engine.steps == ["pause", "resume"]
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(5)


async def test_a_resume_that_fails_fences(bench: Bench) -> None:
    bench.engine.fail["resume"] = OSError("engine core died")
    await bench.staged(5)
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, "OSError")


async def test_a_probe_that_fails_fences(bench: Bench) -> None:
    bench.engine.fail["probe"] = ProbeFailed("no token within 30 s")
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, "ProbeFailed")
    assert not [event for event in bench.events if isinstance(event, WorkerRefitted)]


@pytest.mark.parametrize("broken", [False, True])
async def test_an_engine_that_its_user_paused_stays_so(
    bench: Bench, broken: bool
) -> None:
    bench.engine.paused_by_user = True
    if broken:
        bench.engine.fail["pause"] = TimeoutError("scheduler busy")
    await bench.staged(5)
    reply = await bench.agent.answer(commit(5))
    if broken:
        refusal(reply)
        assert bench.engine.steps == ["pause"]
    else:
        assert isinstance(reply, Committed)
        assert bench.engine.steps == ["pause", "install", "epoch", "verify"]
        assert bench.engine.live() == [5, 5]
    assert bench.engine.paused
    assert (bench.agent.status().phase, bench.fences) == ("serving", 0)


async def test_a_pause_of_the_user_s_during_a_commit_fences_nothing(
    bench: Bench,
) -> None:
    """It waits for the lock and has it before the probe makes its token."""

    async def pause_route() -> None:
        async with bench.engine.admin_lock:
            bench.engine.paused_by_user = True

    task = await bench.committing(5)
    user = asyncio.create_task(pause_route())
    await asyncio.sleep(0)
    bench.engine.may_install.set()
    reply = await task
    await user
    assert bench.fences == 0
    assert isinstance(reply, Committed)


# --- the proof ----------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [1, 2**63, 2**64 - 1])
async def test_parts_that_do_not_add_up_are_refused(
    bench: Bench, rank: int, error: int
) -> None:
    await bench.committed(5)
    bench.engine.steps.clear()
    bench.events.clear()
    bench.engine.ranks[rank].wrong = {0: error}

    failure = refusal(await bench.agent.answer(bench.prepare(6)))
    assert (failure.kind, failure.stage) == ("FingerprintMismatch", "stage")
    assert (failure.tensor, failure.rank) == ("w", None)
    assert (failure.worker, failure.version) == (WORKER, 6)
    assert "read by ranks [0, 1]" in failure.message
    assert bench.engine.jobs() == [None, None]
    assert bench.engine.steps == []
    assert bench.events == []
    bench.assert_serving(5)
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(6))

    bench.engine.ranks[rank].wrong = {}
    await bench.committed(7)
    bench.assert_serving(7)


async def test_errors_that_cancel_out_within_one_tensor_do_so_by_definition(
    bench: Bench,
) -> None:
    """A fingerprint is a sum: what it is of is the parts' business."""
    bench.engine.ranks[0].wrong = {0: 1}
    bench.engine.ranks[1].wrong = {0: 2**64 - 1}
    await bench.staged(5)


async def test_a_tensor_that_both_ranks_hold_wrong_is_refused(bench: Bench) -> None:
    for rank in bench.engine.ranks:
        rank.wrong = {1: 3}
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert (failure.kind, failure.tensor) == ("FingerprintMismatch", "norm")
    assert failure.rank is None


async def test_a_replica_that_differs_is_refused_with_its_rank(bench: Bench) -> None:
    bench.engine.ranks[0].wrong = {1: 1}
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert (failure.kind, failure.tensor) == ("FingerprintMismatch", "norm")
    assert failure.rank == 0
    bench.assert_serving(None)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (fingerprints_of(6).tobytes(), "not the ones it announced"),
        (fingerprints_of(5)[::-1].tobytes(), "not the ones it announced"),
        (fingerprints_of(5).tobytes()[:-1], "15 bytes of fingerprints, 2 tensors"),
        (fingerprints_of(5).tobytes() + bytes(8), "24 bytes of fingerprints"),
        (b"", "0 bytes of fingerprints, 2 tensors have 16"),
    ],
    ids=["of another version", "swapped", "short", "long", "none"],
)
async def test_other_fingerprints_than_announced_are_refused(
    bench: Bench, sent: bytes, why: str
) -> None:
    await bench.committed(4)
    bench.events.clear()
    bench.trainer.fingerprints["a5"] = sent
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert failure.kind == "FingerprintMismatch"
    assert why in failure.message
    assert (failure.worker, failure.version) == (WORKER, 5)
    assert bench.engine.jobs() == [None, None]
    assert bench.events == []
    bench.assert_serving(4)

    del bench.trainer.fingerprints["a5"]
    await bench.committed(5)
    bench.assert_serving(5)


async def test_a_vote_is_for_the_announced_weights_only(bench: Bench) -> None:
    """The trainer is consistent, but what was announced was something else."""
    request = bench.prepare(5, weights=weights_of(6))
    assert refusal(await bench.agent.answer(request)).kind == "FingerprintMismatch"
    bench.assert_serving(None)


async def test_a_trainer_without_the_fingerprints_gives_its_reason(
    bench: Bench,
) -> None:
    why = SourceLost("announcement a5 was released")
    bench.trainer.fingerprints["a5"] = failure_from(why, stage="trainer")
    failure = refusal(await bench.agent.answer(bench.prepare(5)))
    assert (failure.kind, failure.stage) == ("SourceLost", "trainer")
    assert (failure.message, failure.worker) == ("announcement a5 was released", WORKER)
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(None)


async def test_fingerprints_are_fetched_beside_the_pull(bench: Bench) -> None:
    task = await bench.staging(5)
    await until(lambda: bench.trainer.asked(GetFingerprints) != [])
    assert bench.trainer.asked(GetFingerprints) == [GetFingerprints(announcement="a5")]
    bench.engine.let("stage")
    assert isinstance(await task, Vote)


async def test_ranks_say_what_they_read_once_per_layout(bench: Bench) -> None:
    await bench.committed(5)
    await bench.committed(6)
    # A trainer that restarted: other addresses, the same layout.
    await bench.committed(7, manifest=bench.other_manifest.fingerprint())
    stages = bench.engine.asked(Stage)
    assert [stage.want_reads for stage in stages] == [True, False, False]

    # Another layout, with the tensors in another order.
    swapped = msgspec.structs.replace(
        bench.manifest, tensors=bench.manifest.tensors[::-1]
    )
    bench.trainer.payloads[swapped.fingerprint()] = msgspec.msgpack.encode(swapped)
    request = bench.prepare(8, manifest=swapped.fingerprint())
    assert refusal(await bench.agent.answer(request)).kind == "LayoutRefused"
    # What is known of the other layout still holds.
    await bench.committed(9)
    stages = bench.engine.asked(Stage)[3:]
    assert [stage.want_reads for stage in stages] == [True, False]


async def test_what_ranks_read_is_asked_again_after_a_refused_layout(
    bench: Bench,
) -> None:
    bench.engine.ranks[1].rank = 0
    refusal(await bench.agent.answer(bench.prepare(5)))
    bench.engine.ranks[1].rank = 1
    await bench.committed(6)
    assert [stage.want_reads for stage in bench.engine.asked(Stage)] == [True, True]
    bench.assert_serving(6)


async def test_a_rank_that_plans_the_same_layout_anew_may_read_in_another_order(
    bench: Bench,
) -> None:
    await bench.committed(5)
    bench.engine.ranks[1].reordered = True
    await bench.committed(6)
    bench.assert_serving(6)


# --- staging modes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "chosen"),
    [
        (("device", "device"), "device"),
        (("device", "host"), "host"),
        (("direct", "host"), "direct"),
    ],
)
async def test_all_ranks_stage_in_the_mode_that_each_has_room_for(
    modes: tuple[str, str], chosen: str
) -> None:
    bench = Bench("auto")
    for rank, mode in zip(bench.engine.ranks, modes, strict=True):
        rank.mode = mode
    await bench.agent.start()
    await bench.staged(5)
    [describe], [stage] = bench.engine.asked(Describe), bench.engine.asked(Stage)
    assert (describe.staging, stage.staging) == ("auto", chosen)


async def test_a_rank_without_room_fails_the_start_with_its_numbers() -> None:
    bench = Bench("device")
    why = "device takes 9.00 GiB of device and 8.00 GiB of host memory"
    bench.engine.ranks[1].fail[Describe] = [MemoryShort(why)]
    with pytest.raises(RanksFailed, match=why) as caught:
        await bench.agent.start()
    assert (caught.value.failure.kind, caught.value.failure.rank) == ("MemoryShort", 1)


@pytest.mark.parametrize("direct", [(True, True), (False, True), (True, False)])
async def test_an_install_that_takes_time_is_polled_inside_the_pause(
    bench: Bench, direct: tuple[bool, bool]
) -> None:
    for rank, mode in zip(bench.engine.ranks, direct, strict=True):
        rank.direct = mode
    bench.engine.hold("install")
    await bench.staged(5, commit_seconds=60.0)
    polls = len(bench.engine.asked(Poll))
    task = asyncio.create_task(bench.agent.answer(commit(5)))
    await until(lambda: len(bench.engine.asked(Poll)) > polls + 3)
    assert bench.engine.steps == ["pause", "install"]
    assert bench.engine.paused
    assert bench.agent.status().phase == "committing"
    [install] = bench.engine.asked(Install)
    # Half of the time that the coordinator waits, so that there is a second try.
    assert install == Install(version=5, seconds=30.0)

    bench.engine.let("install")
    reply = await task
    assert isinstance(reply, Committed)
    assert reply.timings.install_retries == 0
    assert bench.engine.steps == COMMIT_STEPS
    bench.assert_serving(5)


async def test_a_direct_install_that_fails_once_is_done_again(bench: Bench) -> None:
    """Not before every rank has ended: one that works refuses to start."""
    bench.engine.stage_directly()
    slow, broken = bench.engine.ranks
    slow.held.add("install")
    broken.fail[Install] = [TransferFailed("the source broke off")]
    await bench.staged(5)
    task = asyncio.create_task(bench.agent.answer(commit(5)))
    await until(lambda: broken.started.reply is not None)
    for _ in range(50):
        await asyncio.sleep(0.001)
    assert len(bench.engine.asked(Install)) == 1
    assert bench.engine.paused

    slow.held.clear()
    reply = await task
    assert isinstance(reply, Committed)
    assert reply.timings.install_retries == 1
    assert bench.engine.steps == ["pause", "install", *COMMIT_STEPS[1:]]
    bench.assert_serving(5)


async def test_a_direct_install_that_fails_for_good_fences(bench: Bench) -> None:
    """Some parameters are written, and there is no copy of what they were."""
    await bench.committed(4)
    bench.engine.steps.clear()
    bench.engine.stage_directly()
    bench.engine.ranks[1].fail[Install] = [
        TransferFailed("1st"),
        FingerprintMismatch("2nd"),
    ]
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, "WeightsUnknown")
    assert "FingerprintMismatch: 2nd" in failure.message
    assert "keeps no copy" in failure.message
    assert bench.engine.steps == ["pause", "install", "install", "restore"]
    assert bench.engine.paused
    assert bench.agent.status().version == 4
    refitted = [e.version for e in bench.events if isinstance(e, WorkerRefitted)]
    assert refitted == [4]


async def test_answers_out_of_step_while_an_install_is_polled_fence(
    bench: Bench,
) -> None:
    bench.engine.stage_directly()
    await bench.staged(5)
    bench.engine.fail["Poll"] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, "OutOfStep")
    assert "resume" not in bench.engine.steps


# --- what is live -------------------------------------------------------------


async def test_live_weights_are_checked_while_tokens_flow(bench: Bench) -> None:
    bench.engine.hold("verify")
    await bench.staged(5)
    task = asyncio.create_task(bench.agent.answer(commit(5)))
    await until(lambda: "verify" in bench.engine.steps)
    assert not bench.engine.paused
    assert bench.agent.status().phase == "committing"
    with pytest.raises(RefitError, match="version 5 is being committed"):
        await bench.agent.answer(bench.prepare(6))
    assert not [event for event in bench.events if isinstance(event, WorkerRefitted)]

    bench.engine.let("verify")
    assert isinstance(await task, Committed)
    assert bench.engine.asked(Verify) == [Verify(version=5)]
    bench.assert_serving(5)


async def test_live_weights_that_are_others_fence(bench: Bench) -> None:
    """Found after the resume: the check is no part of the pause. Then no token more."""
    await bench.committed(4)
    bench.engine.steps.clear()
    bench.events.clear()
    wrong = FingerprintMismatch("2 blocks are not what was staged", tensor="norm")
    bench.engine.ranks[1].fail[Verify] = [wrong]
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, "WeightsUnknown")
    assert "are not those of version 5" in failure.message
    assert "rank 1, tensor norm" in failure.message
    assert bench.engine.steps == [*COMMIT_STEPS, "pause"]
    assert [type(event) for event in bench.events] == [WorkerStaged, WorkerFenced]


async def test_a_check_that_cannot_be_made_fences(bench: Bench) -> None:
    bench.engine.fail["verify"] = OSError("engine core died")
    await bench.staged(5)
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, "OSError")


async def test_what_ranks_could_not_compare_adds_up(bench: Bench) -> None:
    for rank, unchecked in zip(bench.engine.ranks, (2, 3), strict=True):
        rank.unchecked = unchecked
    reply = await bench.committed(5)
    assert (reply.unchecked, reply.weights) == (5, weights_of(5))
    assert bench.events[-1].unchecked == 5
    assert await bench.agent.answer(VerifyWeights()) == WeightsVerified(
        version=5, weights=weights_of(5), unchecked=5
    )


async def test_there_is_nothing_to_check_before_the_first_version(
    bench: Bench,
) -> None:
    with pytest.raises(RefitError, match="no version was installed here"):
        await bench.agent.answer(VerifyWeights())
    await bench.staged(5)
    await bench.agent.answer(abort(5))
    with pytest.raises(RefitError, match="no version was installed here"):
        await bench.agent.answer(VerifyWeights())
    assert bench.engine.asked(Verify) == []


async def test_a_check_on_request_disturbs_nothing(bench: Bench) -> None:
    await bench.committed(5)
    bench.engine.steps.clear()
    events = list(bench.events)
    for _ in range(2):
        assert await bench.agent.answer(VerifyWeights()) == WeightsVerified(
            version=5, weights=weights_of(5), unchecked=0
        )
    assert bench.engine.steps == ["verify", "verify"]
    assert bench.events == events
    bench.assert_serving(5)
    await bench.committed(6)
    bench.assert_serving(6)


async def test_checks_that_come_at_once_are_made_one_after_the_other(
    bench: Bench,
) -> None:
    await bench.committed(5)
    checks = [bench.agent.answer(VerifyWeights()) for _ in range(3)]
    replies = await asyncio.gather(*checks)
    expected = WeightsVerified(version=5, weights=weights_of(5), unchecked=0)
    assert replies == [expected] * 3


async def test_a_check_on_request_tells_which_weights_are_others(bench: Bench) -> None:
    await bench.committed(5)
    bench.engine.ranks[1].live = 4
    failure = refusal(await bench.agent.answer(VerifyWeights()))
    assert (failure.kind, failure.tensor) == ("FingerprintMismatch", "w")
    assert (failure.rank, failure.worker, failure.version) == (1, WORKER, 5)
    # To ask changes nothing: whoever asked decides.
    assert (bench.agent.status().phase, bench.fences) == ("serving", 0)


async def test_no_check_on_request_during_a_refit(bench: Bench) -> None:
    await bench.committed(5)
    task = await bench.staging(6)
    with pytest.raises(RefitError, match="a refit is under way"):
        await bench.agent.answer(VerifyWeights())
    bench.engine.let("stage")
    await task
    with pytest.raises(RefitError, match="a refit is under way"):
        await bench.agent.answer(VerifyWeights())
    bench.engine.may_install.clear()
    task = asyncio.create_task(bench.agent.answer(commit(6)))
    await until(lambda: bench.engine.steps[-1] == "install")
    with pytest.raises(RefitError, match="a refit is under way"):
        await bench.agent.answer(VerifyWeights())
    bench.engine.may_install.set()
    assert isinstance(await task, Committed)
    assert bench.engine.asked(Verify) == [Verify(version=5), Verify(version=6)]


async def test_after_a_restore_the_old_version_is_what_is_checked(
    bench: Bench,
) -> None:
    await bench.committed(5)
    bench.engine.ranks[1].fail[Install] = [RefitError("1st"), RefitError("2nd")]
    await bench.staged(6)
    refusal(await bench.agent.answer(commit(6)))
    assert await bench.agent.answer(VerifyWeights()) == WeightsVerified(
        version=5, weights=weights_of(5), unchecked=0
    )


@pytest.mark.parametrize("caller_goes", [False, True])
async def test_a_prepare_waits_for_a_check_on_request(
    bench: Bench, caller_goes: bool
) -> None:
    """The ranks do one thing at a time, whoever still waits for its end."""
    check = await bench.checking(5)
    if caller_goes:
        check.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check
    prepare = asyncio.create_task(bench.agent.answer(bench.prepare(6)))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert [stage.version for stage in bench.engine.asked(Stage)] == [5]
    status = bench.agent.status()
    assert (status.phase, status.pending) == ("staging", 6)

    bench.engine.let("verify")
    assert await prepare == Vote(version=6, weights=weights_of(6), ranks=VOTES)
    if not caller_goes:
        assert isinstance(await check, WeightsVerified)
    assert isinstance(await bench.agent.answer(commit(6)), Committed)
    bench.assert_serving(6)


async def test_a_prepare_that_waits_for_a_check_can_be_aborted(bench: Bench) -> None:
    check = await bench.checking(5)
    prepare = asyncio.create_task(bench.agent.answer(bench.prepare(6)))
    await until(lambda: bench.agent.status().pending == 6)
    assert await bench.agent.answer(abort(6)) == Aborted(version=6)
    assert refusal(await prepare).kind == "StagingCancelled"
    bench.engine.let("verify")
    assert isinstance(await check, WeightsVerified)
    bench.assert_serving(5)


async def test_a_fenced_worker_checks_nothing(bench: Bench) -> None:
    """Its ranks' answers cannot be trusted."""
    await bench.committed(5)
    bench.engine.fail["Poll"] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(bench.prepare(6)))
    bench.engine.fail.clear()
    with pytest.raises(WeightsUnknown, match="fenced: restart it"):
        await bench.agent.answer(VerifyWeights())


async def test_a_check_on_request_whose_answers_are_out_of_step_fences(
    bench: Bench,
) -> None:
    await bench.committed(5)
    bench.engine.fail["Poll"] = OutOfStep("answered call 3 when asked call 4")
    with pytest.raises(OutOfStep):
        await bench.agent.answer(VerifyWeights())
    bench.assert_fenced(5, "OutOfStep")


# --- abort, supersede, expire -------------------------------------------------


async def test_abort_while_staging_cancels_and_discards(bench: Bench) -> None:
    task = await bench.staging(5)
    bench.engine.ranks[1].letting_go = 2
    assert await bench.agent.answer(abort(5)) == Aborted(version=5)
    failure = refusal(await task)
    assert (failure.kind, failure.version) == ("StagingCancelled", 5)
    assert bench.engine.jobs() == [None, None]
    assert bench.events == []
    bench.assert_serving(None)
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))


async def test_abort_of_what_is_staged_discards_it(bench: Bench) -> None:
    await bench.staged(5)
    assert await bench.agent.answer(abort(5)) == Aborted(version=5)
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(None)
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))


async def test_abort_of_another_version_changes_nothing(bench: Bench) -> None:
    await bench.staged(6)
    assert await bench.agent.answer(abort(5)) == Aborted(version=5)
    assert bench.agent.status().pending == 6
    assert isinstance(await bench.agent.answer(commit(6)), Committed)


async def test_abort_of_a_prepare_that_has_not_begun_is_answered(
    bench: Bench,
) -> None:
    """Whoever asked gets a refusal, not a broken stream."""
    prepare, aborted = await asyncio.gather(
        bench.agent.answer(bench.prepare(5)),
        bench.agent.answer(abort(5)),
        return_exceptions=True,
    )
    assert aborted == Aborted(version=5)
    assert refusal(prepare).kind == "StagingCancelled"
    bench.assert_serving(None)


async def test_a_commit_during_an_abort_is_refused_and_harmless(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.ranks[1].letting_go = 20
    aborting = asyncio.create_task(bench.agent.answer(abort(5)))
    await until(lambda: bench.engine.jobs() == [None, 5])
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))
    await aborting
    bench.assert_serving(None)


@pytest.mark.parametrize("finished", [False, True])
async def test_a_newer_prepare_supersedes_an_older_stage(
    bench: Bench, finished: bool
) -> None:
    task = await (bench.staging_on(5) if finished else bench.staging(5))
    if finished:
        assert isinstance(await task, Vote)
    bench.engine.ranks[0].letting_go = 2
    newer = asyncio.create_task(bench.agent.answer(bench.prepare(6)))
    await until(lambda: bench.engine.jobs() == [6, 6])
    if not finished:
        assert refusal(await task).kind == "StagingCancelled"
    bench.engine.let("stage")
    assert (await newer).version == 6
    assert bench.agent.status().pending == 6
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))
    assert isinstance(await bench.agent.answer(commit(6)), Committed)
    bench.assert_serving(6)


async def test_the_expiry_of_a_superseded_stage_does_not_touch_the_newer_one(
    bench: Bench,
) -> None:
    await bench.staged(5, stage_seconds=0.0, commit_seconds=0.03)
    await bench.staged(6)
    await asyncio.sleep(0.06)
    assert bench.agent.status().pending == 6
    assert isinstance(await bench.agent.answer(commit(6)), Committed)


async def test_a_prepare_after_an_abort_waits_until_the_ranks_let_go(
    bench: Bench,
) -> None:
    """What a coordinator sends when a newer version supersedes one that stages."""
    old = await bench.staging(5)
    bench.engine.ranks[1].letting_go = 20
    aborting = asyncio.create_task(bench.agent.answer(abort(5)))
    await until(lambda: len(bench.engine.asked(Discard)) > 0)
    bench.engine.let("stage")
    reply = await bench.agent.answer(bench.prepare(6))

    assert refusal(await old).kind == "StagingCancelled"
    assert await aborting == Aborted(version=5)
    assert reply == Vote(version=6, weights=weights_of(6), ranks=VOTES)
    assert bench.agent.status().pending == 6
    assert isinstance(await bench.agent.answer(commit(6)), Committed)
    bench.assert_serving(6)


async def test_two_newer_prepares_while_the_ranks_let_go(bench: Bench) -> None:
    """5 is slow to end; 6 and then 7 wait for it, and only one of them may stage."""
    oldest = await bench.staging(5)
    for rank in bench.engine.ranks:
        rank.letting_go = 20
    older = asyncio.create_task(bench.agent.answer(bench.prepare(6)))
    await until(lambda: len(bench.engine.asked(Discard)) > 0)
    newest = asyncio.create_task(bench.agent.answer(bench.prepare(7)))
    bench.engine.let("stage")

    replies = await asyncio.gather(oldest, older, newest, return_exceptions=True)
    assert refusal(replies[0]).kind == "StagingCancelled"
    assert isinstance(replies[1], Refused | RefitError | Vote)
    assert replies[2] == Vote(version=7, weights=weights_of(7), ranks=VOTES)
    assert bench.agent.status().pending == 7
    assert isinstance(await bench.agent.answer(commit(7)), Committed)
    bench.assert_serving(7)


async def test_a_version_that_is_announced_anew_while_the_ranks_let_go(
    bench: Bench,
) -> None:
    """Its trainer restarted: other addresses, the same version and epoch."""
    old = await bench.staging(5)
    for rank in bench.engine.ranks:
        rank.letting_go = 20
    aborting = asyncio.create_task(bench.agent.answer(abort(5)))
    await until(lambda: len(bench.engine.asked(Discard)) > 0)
    bench.engine.let("stage")
    fingerprint = bench.other_manifest.fingerprint()
    reply = await bench.agent.answer(bench.prepare(5, manifest=fingerprint))

    assert refusal(await old).kind == "StagingCancelled"
    assert await aborting == Aborted(version=5)
    assert isinstance(reply, Vote)
    assert bench.engine.asked(Stage)[-1].manifest == fingerprint


async def test_no_commit_in_time_gives_the_version_up(bench: Bench) -> None:
    await bench.committed(4)
    bench.events.clear()
    await bench.staged(5, stage_seconds=0.0, commit_seconds=0.02)
    await until(lambda: len(bench.events) == 2)
    assert bench.engine.jobs() == [None, None]
    bench.assert_serving(4)

    staged, failed = bench.events
    assert isinstance(staged, WorkerStaged)
    assert isinstance(failed, RefitFailed)
    assert (failed.version, failed.serving) == (5, ((WORKER, 4),))
    failure = failed.failure
    assert (failure.kind, failure.stage) == ("StagingCancelled", "vote")
    assert (failure.worker, failure.version) == (WORKER, 5)
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))
    bench.assert_serving(4)

    await bench.committed(6)
    bench.assert_serving(6)


async def test_no_commit_comes_between_an_expiry_and_its_end(bench: Bench) -> None:
    await bench.staged(5, stage_seconds=0.0, commit_seconds=0.02)
    bench.engine.ranks[1].letting_go = 20
    await until(lambda: bench.engine.jobs() == [None, 5])
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))
    newer = asyncio.create_task(bench.agent.answer(bench.prepare(6)))
    assert isinstance(await newer, Vote)
    assert Counter(bench.engine.steps) == {}


# --- the engine ---------------------------------------------------------------


class FakeLLM:
    """The parts of ``AsyncLLM`` that an engine uses; ranks answer ``answer``."""

    def __init__(self) -> None:
        self.engine_core = self
        self.model_config = SimpleNamespace(is_multimodal_model=False)
        self.generated: list[Any] = []
        self.calls: list[Any] = []
        self.shift = 0

    async def generate(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes one token."""
        self.generated.append((prompt, args, kwargs))
        yield "token"

    async def collective_rpc(self, method: str, args: tuple) -> list[bytes]:
        call = msgspec.msgpack.decode(args[0], type=RankCall)
        self.calls.append((method, call.request))
        answers = [
            RankAnswer(call.call, Running()),
            RankAnswer(call.call - self.shift, Running()),
        ]
        return [msgspec.msgpack.encode(answer) for answer in answers]

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.calls.append((mode, clear_cache))

    async def reset_encoder_cache(self) -> None:
        self.calls.append("reset_encoder_cache")


def new_engine() -> tuple[RefitEngine, FakeLLM]:
    llm = FakeLLM()
    return RefitEngine(SimpleNamespace(engine_client=llm)), llm


async def test_requests_carry_the_epoch_that_they_were_admitted_in() -> None:
    engine, llm = new_engine()
    for begin in (lambda: "", lambda: engine.begin_epoch(5)):
        assert begin() == engine.kv_epoch
        tokens = llm.generate({"prompt_token_ids": [1, 2]}, "params", "id", priority=1)
        assert [token async for token in tokens] == ["token"]
    before, after = llm.generated
    assert before == ({"prompt_token_ids": [1, 2]}, ("params", "id"), {"priority": 1})
    assert after[0] == {
        "prompt_token_ids": [1, 2],
        "cache_salt": f"refit:{engine.kv_epoch}",
    }
    assert after[1:] == before[1:]


async def test_a_version_that_is_installed_again_has_a_new_epoch() -> None:
    engine, _ = new_engine()
    first, second = engine.begin_epoch(5), engine.begin_epoch(5)
    assert first != second
    assert first.startswith("5-") and second.startswith("5-")


async def test_an_answer_to_another_call_is_out_of_step() -> None:
    engine, llm = new_engine()
    assert await engine.call_ranks(Poll(version=5)) == [Running(), Running()]
    assert llm.calls == [("refit_call", Poll(version=5))]
    llm.shift = 1
    with pytest.raises(OutOfStep, match="call 0 when asked call 1") as caught:
        await engine.call_ranks(Poll(version=5))
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    ("in_flight", "multimodal", "calls"),
    [
        ("continue", False, [("keep", False)]),
        ("recompute", False, [("keep", True)]),
        ("continue", True, [("keep", False), "reset_encoder_cache"]),
        ("recompute", True, [("keep", True)]),
    ],
)
async def test_pause_keeps_requests_and_clears_what_has_no_epoch(
    in_flight: str, multimodal: bool, calls: list[Any]
) -> None:
    engine, llm = new_engine()
    llm.model_config.is_multimodal_model = multimodal
    await engine.pause(in_flight)
    assert llm.calls == calls


@pytest.mark.parametrize("prompt", ["hello", {"prompt_token_ids": [1]}, [1, 2]])
def test_without_an_epoch_a_prompt_stays_as_it_is(prompt: Any) -> None:
    assert with_epoch(prompt, "") is prompt


def test_a_text_prompt_becomes_a_salted_one() -> None:
    assert with_epoch("hello", "5-x") == {"prompt": "hello", "cache_salt": "refit:5-x"}


def test_a_user_s_own_salt_is_kept() -> None:
    salted = with_epoch({"prompt": "hello", "cache_salt": "tenant-1"}, "5-x")
    assert salted == {"prompt": "hello", "cache_salt": "tenant-1|refit:5-x"}


SALTS = st.none() | st.text(max_size=5)
EPOCHS = st.from_regex(r"[0-9]{1,3}-[0-9a-f]{8}", fullmatch=True)


@given(salts=st.tuples(SALTS, SALTS), epochs=st.tuples(EPOCHS, EPOCHS))
def test_only_the_same_salt_and_epoch_share_blocks(
    salts: tuple[str | None, str | None], epochs: tuple[str, str]
) -> None:
    prompts = [{"prompt_token_ids": [1], "cache_salt": salt} for salt in salts]
    before = copy.deepcopy(prompts)
    keys = [
        with_epoch(prompt, epoch)["cache_salt"]
        for prompt, epoch in zip(prompts, epochs, strict=True)
    ]
    assert prompts == before
    same = (salts[0] or "") == (salts[1] or "") and epochs[0] == epochs[1]
    assert (keys[0] == keys[1]) is same


async def test_a_sleeping_engine_is_left_alone(bench: Bench) -> None:
    """Its weights may be gone from memory: nothing is staged, installed or resumed."""
    await bench.staged(5)
    bench.engine.asleep = True
    assert "sleeps" in refusal(await bench.agent.answer(commit(5))).message
    with pytest.raises(RefitError, match="sleeps"):
        await bench.agent.answer(bench.prepare(6))
    bench.engine.asleep = False
    await bench.committed(6)
    bench.engine.asleep = True
    with pytest.raises(RefitError, match="sleeps"):
        await bench.agent.answer(VerifyWeights())
    bench.engine.asleep = False
    await bench.committed(7)
    bench.assert_serving(7)
