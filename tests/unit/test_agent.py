# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One replica's refit against ranks that hold a version number for weights."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.errors import (
    Failure,
    NothingStaged,
    OutOfStep,
    RefitError,
    SourceLost,
    StaleEpoch,
    failure_from,
)
from dynamo.refit.events import (
    Event,
    RefitFailed,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.manifest import Manifest, Region, Shard, Source, TensorEntry
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
    GetManifest,
    GetStatus,
    Install,
    Installed,
    ManifestReply,
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
    Vote,
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
COMMIT_STEPS = ["pause", "install", "epoch", "resume", "probe"]


def manifest(address: int = 0x1000) -> Manifest:
    """A model of one float32 tensor; ``address`` tells one trainer from another."""
    shard = Shard(source=0, region=0, byte_offset=0, offset=(0, 0), shape=(4, 2))
    return Manifest(
        model="tiny",
        tensors=(
            TensorEntry(name="w", dtype="float32", shape=(4, 2), shards=(shard,)),
        ),
        sources=(
            Source(
                agent="trainer",
                metadata=b"\0meta",
                memory="DRAM",
                device=0,
                slots=((Region(address, 32),),),
            ),
        ),
    )


class FakeRank:
    """A rank whose weights are the number of their version.

    ``fail`` maps a kind of request to the errors that its next ones are answered
    with; ``letting_go`` is how often it answers Running before a discard is done.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.live: int | None = None
        self.backup: int | None = None
        self.job: int | None = None
        self.staged: int | None = None
        self.may_finish = True
        self.letting_go = 0
        self.manifest: str | None = None
        self.fail: dict[type, list[Exception]] = {}

    def answer(self, request: RankRequest) -> RankReply:
        try:
            if errors := self.fail.get(type(request)):
                raise errors.pop(0)
            return self._carry_out(request)
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
            case Describe():
                return Described(rank=self.rank, ranks=2, parameters=1, nbytes=16)
            case Stage(version=version):
                return self._stage(request)
            case Poll(version=version):
                return self._poll(version)
            case Install(version=version):
                self._require(version)
                self.live = version
                return Installed(rank=self.rank, copy_ms=0.1)
            case Restore(version=version):
                self._require(version)
                self.live = self.backup
                return Installed(rank=self.rank, copy_ms=0.1)
            case Discard(version=version):
                return self._discard(version)

    def _stage(self, request: Stage) -> RankReply:
        if self.job is not None and self.staged != self.job:
            raise RefitError(f"version {self.job} is still being staged here")
        if request.payload is not None:
            self.manifest = request.manifest
        if self.manifest != request.manifest:
            raise RefitError(f"this rank has no manifest {request.manifest}")
        self.job, self.staged = request.version, None
        return Running()

    def _poll(self, version: int) -> RankReply:
        if self.job != version:
            raise NothingStaged(f"no stage of version {version} was started here")
        if not self.may_finish:
            return Running()
        self.staged, self.backup = version, self.live
        # Row-parallel: each of two ranks reads its half.
        rows = (2 * self.rank, 2 * self.rank + 2)
        return Staged(vote=vote_of(self.rank), reads={"w": (rows, (0, 2))})

    def _discard(self, version: int) -> RankReply:
        if self.job == version:
            if self.letting_go:
                self.letting_go -= 1
                return Running()
            self.job = self.staged = None
        return Done()

    def _require(self, version: int) -> None:
        if self.staged != version:
            raise NothingStaged(f"version {version} is not staged here")


def vote_of(rank: int) -> RankVote:
    timings = dict.fromkeys(StageTimings.__struct_fields__, 1.0)
    return RankVote(
        rank=rank,
        nbytes=16,
        session="cold",
        counters=CacheCounters(allocations=1),
        timings=StageTimings(**timings),
    )


class FakeEngine:
    """Implements :class:`agent.Engine` with two fake ranks, and notes every step."""

    def __init__(self) -> None:
        self.kv_epoch = ""
        self.admin_lock = asyncio.Lock()
        self.paused_by_user = False
        self.asleep = False
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
        await asyncio.sleep(0)
        if error := self.fail.get(type(request).__name__):
            raise error
        return [rank.answer(request) for rank in self.ranks]

    async def pause(self, in_flight: str) -> None:
        self.in_flight = in_flight
        self.paused = True
        self._step("pause", locked=True)

    async def resume(self) -> None:
        self._step("resume", locked=True)
        self.paused = False

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

    def hold_stage(self) -> None:
        for rank in self.ranks:
            rank.may_finish = False

    def finish_stage(self) -> None:
        for rank in self.ranks:
            rank.may_finish = True


class FakeTrainer:
    """A caller that reaches a trainer with ``manifests``, or fails with ``error``."""

    def __init__(self, *manifests: Manifest) -> None:
        self.payloads = {m.fingerprint(): msgspec.msgpack.encode(m) for m in manifests}
        self.error: Exception | None = None
        self.asked: list[tuple[str, int, Message]] = []

    async def call(
        self, path: str, instance: int, request: Any, expected: Any, seconds: float
    ) -> Any:
        self.asked.append((path, instance, request))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if request.manifest not in self.payloads:
            why = SourceLost(f"no manifest {request.manifest[:12]} is served here")
            return Refused(failure=failure_from(why, stage="trainer"))
        return ManifestReply(payload=self.payloads[request.manifest])


class Bench:
    """An agent with everything around it faked."""

    def __init__(self) -> None:
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
        )

    def _fence(self) -> None:
        self.fences += 1

    def prepare(self, version: int, **changes: Any) -> Prepare:
        fields = {
            "version": version,
            "epoch": EPOCH,
            "endpoint": "ns.trainer.weights",
            "instance": 99,
            "manifest": self.manifest.fingerprint(),
            "slot": 0,
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
        self.engine.hold_stage()
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
    votes = (vote_of(0), vote_of(1))
    assert vote == Vote(version=5, ranks=votes)
    assert bench.events == [WorkerStaged(worker=WORKER, version=5, ranks=votes)]

    fingerprint = bench.manifest.fingerprint()
    assert bench.trainer.asked == [
        ("ns.trainer.weights", 99, GetManifest(manifest=fingerprint))
    ]
    [stage] = bench.engine.asked(Stage)
    assert (stage.version, stage.manifest, stage.slot) == (5, fingerprint, 1)
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
    bench.engine.finish_stage()
    assert isinstance(await task, Vote)


async def test_a_repeated_prepare_stages_once(bench: Bench) -> None:
    first = await bench.staging(5)
    second = asyncio.create_task(bench.agent.answer(bench.prepare(5)))
    await asyncio.sleep(0)
    bench.engine.finish_stage()
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
    assert len(bench.trainer.asked) == 1
    assert [stage.payload is None for stage in bench.engine.asked(Stage)] == [
        False,
        True,
    ]
    other = bench.other_manifest.fingerprint()
    await bench.committed(7, manifest=other)
    assert len(bench.trainer.asked) == 2
    assert bench.engine.asked(Stage)[-1].payload is not None


async def test_a_manifest_is_sent_again_to_ranks_that_refused_it(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Stage] = [RefitError("busy")]
    assert refusal(await bench.agent.answer(bench.prepare(5))).message == "busy"
    await bench.staged(6)
    assert bench.engine.asked(Stage)[-1].payload is not None
    assert len(bench.trainer.asked) == 1


@pytest.mark.parametrize("request_kind", [Stage, Poll])
async def test_a_rank_that_refuses_is_a_refusal_of_all(
    bench: Bench, request_kind: type
) -> None:
    error = SourceLost("the trainer is gone")
    error.tensor = "w"
    bench.engine.ranks[0].may_finish = False
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

    bench.engine.finish_stage()
    await bench.staged(5)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda t: setattr(t, "error", PeerLost("no instance 99")), "PeerLost"),
        (lambda t: t.payloads.clear(), "SourceLost"),
        (lambda t: t.payloads.update(dict.fromkeys(t.payloads, b"\xc1")), "Decode"),
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
    bench.engine.finish_stage()
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
    assert timings.probe_ms > 0
    assert bench.events[1:] == [
        WorkerRefitted(
            worker=WORKER,
            version=5,
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
    bench.engine.finish_stage()
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
    assert bench.engine.steps == [
        "pause",
        "install",
        "install",
        "epoch",
        "resume",
        "probe",
    ]
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
        assert bench.engine.steps == ["pause", "install", "epoch"]
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
    bench.engine.finish_stage()
    assert (await newer).version == 6
    assert bench.agent.status().pending == 6
    with pytest.raises(NothingStaged):
        await bench.agent.answer(commit(5))
    assert isinstance(await bench.agent.answer(commit(6)), Committed)
    bench.assert_serving(6)


async def test_the_expiry_of_a_superseded_stage_does_not_touch_the_newer_one(
    bench: Bench,
) -> None:
    await bench.staged(5, commit_seconds=0.03)
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
    bench.engine.finish_stage()
    reply = await bench.agent.answer(bench.prepare(6))

    assert refusal(await old).kind == "StagingCancelled"
    assert await aborting == Aborted(version=5)
    assert reply == Vote(version=6, ranks=(vote_of(0), vote_of(1)))
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
    bench.engine.finish_stage()

    replies = await asyncio.gather(oldest, older, newest, return_exceptions=True)
    assert refusal(replies[0]).kind == "StagingCancelled"
    assert isinstance(replies[1], Refused | RefitError | Vote)
    assert replies[2] == Vote(version=7, ranks=(vote_of(0), vote_of(1)))
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
    bench.engine.finish_stage()
    fingerprint = bench.other_manifest.fingerprint()
    reply = await bench.agent.answer(bench.prepare(5, manifest=fingerprint))

    assert refusal(await old).kind == "StagingCancelled"
    assert await aborting == Aborted(version=5)
    assert isinstance(reply, Vote)
    assert bench.engine.asked(Stage)[-1].manifest == fingerprint


async def test_no_commit_in_time_gives_the_version_up(bench: Bench) -> None:
    await bench.committed(4)
    bench.events.clear()
    await bench.staged(5, commit_seconds=0.02)
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
    await bench.staged(5, commit_seconds=0.02)
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
    await bench.committed(7)
    bench.assert_serving(7)
