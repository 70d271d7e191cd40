# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One replica's refit against ranks that hold a version number for weights."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import EngineCoreRequest

from dynamo.refit.errors import (
    Fenced,
    FingerprintMismatch,
    MemoryShort,
    NothingStaged,
    OutOfStep,
    RefitError,
    SourceLost,
    StaleEpoch,
    TransferFailed,
    failure_from,
)
from dynamo.refit.events import (
    SCHEMA,
    RefitFailed,
    StageProgress,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    Aborted,
    CacheCounters,
    CacheUse,
    Committed,
    Describe,
    Discard,
    GetFingerprints,
    GetManifest,
    GetStatus,
    Install,
    Installed,
    Poll,
    RankAnswer,
    RankCall,
    RankProgress,
    Refused,
    Restore,
    Running,
    Stage,
    Verify,
    VerifyWeights,
    Vote,
    WeightsVerified,
    WorkerStatus,
)
from dynamo.refit.release import RELEASE
from dynamo.refit.rpc import PeerLost
from dynamo.refit.worker import engine as engine_module
from dynamo.refit.worker import ranks as ranks_module
from dynamo.refit.worker.engine import RefitEngine
from dynamo.refit.worker.kv_epoch import with_epoch
from dynamo.refit.worker.last import LastRefit
from dynamo.refit.worker.ranks import RanksFailed
from tests.support.engine_parts import (
    FakeContext,
    FakeOutputProcessor,
    engine_request,
    refit_engine,
)
from tests.support.fake_replica import (
    COMMIT_STEPS,
    EPOCH,
    VOTES,
    WORKER,
    Bench,
    FakeTrainer,
    abort,
    commit,
    fingerprints_of,
    manifest,
    refusal,
    until,
    vote_of,
    weights_of,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(30),
]


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(ranks_module, "POLL_SECONDS", 0.001)
    bench = Bench()
    await bench.agent.start()
    return bench


# --- prepare ------------------------------------------------------------------


async def test_before_the_first_refit(bench: Bench) -> None:
    assert await bench.agent.answer(GetStatus()) == WorkerStatus(
        model="tiny",
        phase="serving",
        version=None,
        fingerprint="",
        pending=None,
        epoch=0,
        kv_epoch="",
        ranks=2,
        staging="device",
        release=RELEASE,
        schema=SCHEMA,
        # Of what both ranks say of theirs.
        layout=hashlib.sha256(b"form of rank 0,form of rank 1").hexdigest(),
    )


async def test_the_status_tells_what_the_last_refit_was_like(bench: Bench) -> None:
    before = time.time()
    committed = await bench.committed(5)
    status = bench.agent.status()
    assert before <= status.since <= time.time()
    assert status.stall_ms == committed.timings.stall_ms
    counters = CacheCounters(allocations=2)
    assert status.cache == CacheUse(session="cold", counters=counters)


def test_the_rank_that_had_to_build_most_counts() -> None:
    last = LastRefit()
    votes = tuple(
        msgspec.structs.replace(
            vote_of(rank, "host"),
            session=session,
            counters=CacheCounters(descriptor_builds=rank, hits=1),
        )
        for rank, session in enumerate(("warm", "re-addressed", "warm"))
    )
    last.staged(votes)
    counters = CacheCounters(descriptor_builds=3, hits=3)
    assert last.cache == CacheUse(session="re-addressed", counters=counters)
    assert (last.staging, last.since, last.stall_ms) == ("host", None, None)


async def test_a_rank_that_cannot_be_refitted_fails_the_start(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Describe] = [RefitError("packed")]
    with pytest.raises(RanksFailed, match="packed") as caught:
        await bench.agent.start()
    assert caught.value.failure.rank == 1


async def test_a_stage_that_takes_long_tells_how_far_each_rank_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_module, "PROGRESS_SECONDS", 0.02)
    slow, quick = bench.engine.ranks
    slow.held.add("stage")
    slow.progress = (8, 24)
    staging = asyncio.create_task(bench.agent.answer(bench.prepare(5)))
    await until(lambda: len(bench.events) >= 2)
    slow.progress = (16, 24)
    seen = len(bench.events)
    await until(lambda: len(bench.events) > seen)
    slow.held.clear()
    assert isinstance(await staging, Vote)

    told = [event for event in bench.events if isinstance(event, StageProgress)]
    assert bench.events == [*told, WorkerStaged(worker=WORKER, version=5, ranks=VOTES)]
    done = RankProgress(rank=quick.rank, nbytes=24, total_nbytes=24)
    for event, nbytes in ((told[0], 8), (told[-1], 16)):
        so_far = RankProgress(rank=slow.rank, nbytes=nbytes, total_nbytes=24)
        assert event == StageProgress(worker=WORKER, version=5, ranks=(so_far, done))


async def test_progress_is_told_a_few_times_a_second(bench: Bench) -> None:
    """And first after that long: this bench's other stages tell nothing."""
    bench.engine.hold("stage")
    began = time.monotonic()
    staging = asyncio.create_task(bench.agent.answer(bench.prepare(5)))
    async with asyncio.timeout(10):
        while len(bench.events) < 3:
            await asyncio.sleep(0.01)
    assert time.monotonic() - began >= 3 * ranks_module.PROGRESS_SECONDS >= 0.6
    bench.engine.let("stage")
    await staging


async def test_prepare_gives_the_votes_of_all_ranks(bench: Bench) -> None:
    vote = await bench.agent.answer(bench.prepare(5, slot=1))
    assert vote == Vote(version=5, fingerprint=weights_of(5), ranks=VOTES)
    assert bench.events == [WorkerStaged(worker=WORKER, version=5, ranks=VOTES)]

    fingerprint = bench.manifest.fingerprint()
    assert bench.trainer.requests == [
        ("ns.trainer.weights", 99, GetManifest(manifest_digest=fingerprint)),
        ("ns.trainer.weights", 99, GetFingerprints(announcement_id="a5")),
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
    await bench.committed(7, manifest_digest=other)
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
        (
            lambda t: t.payloads.update(dict.fromkeys(t.payloads, b"\xc1")),
            "ManifestInvalid",
        ),
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
    reply = await bench.agent.answer(bench.prepare(5))
    assert reply == Refused(failure=reply.failure, fenced=True)
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
        timings.pause_ms + max(timings.install_ms, timings.copy_ms) + timings.resume_ms
    )
    # The slower of the two fake ranks.
    assert timings.copy_ms == pytest.approx(1.1)
    assert min(timings.pause_ms, timings.install_ms, timings.resume_ms) > 0
    assert min(timings.probe_ms, timings.verify_ms) > 0
    assert bench.events[1:] == [
        WorkerRefitted(
            worker=WORKER,
            version=5,
            fingerprint=weights_of(5),
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
    reply = await bench.agent.answer(commit(5))
    assert reply == Refused(
        failure=bench.assert_fenced(5, "WeightsUnknown"), fenced=True
    )
    failure = reply.failure
    assert failure.message == (
        "version 5 was installed in part (install: RefitError: 2nd (version 5, rank "
        "1)) and could not be undone (restore: RefitError: 3rd (version 5, rank 0))"
    )
    assert failure.worker == WORKER
    assert "resume" not in bench.engine.steps
    assert bench.engine.paused

    for request in (bench.prepare(6), commit(5), abort(5)):
        with pytest.raises(Fenced, match="fenced: restart it"):
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
    bench.engine.fail["probe"] = OSError("engine core died")
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, "OSError")
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
    request = bench.prepare(5, fingerprint=weights_of(6))
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
    assert bench.trainer.asked(GetFingerprints) == [
        GetFingerprints(announcement_id="a5")
    ]
    bench.engine.let("stage")
    assert isinstance(await task, Vote)


async def test_ranks_say_what_they_read_once_per_layout(bench: Bench) -> None:
    await bench.committed(5)
    await bench.committed(6)
    # A trainer that restarted: other addresses, the same layout.
    await bench.committed(7, manifest_digest=bench.other_manifest.fingerprint())
    stages = bench.engine.asked(Stage)
    assert [stage.want_reads for stage in stages] == [True, False, False]

    # Another layout, with the tensors in another order.
    swapped = msgspec.structs.replace(
        bench.manifest, tensors=bench.manifest.tensors[::-1]
    )
    bench.trainer.payloads[swapped.fingerprint()] = msgspec.msgpack.encode(swapped)
    request = bench.prepare(8, manifest_digest=swapped.fingerprint())
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


@pytest.mark.parametrize("lost", ["a rank", "the fingerprints"])
async def test_what_a_new_plan_reads_is_not_lost_with_a_stage_that_fails_elsewhere(
    bench: Bench, lost: str
) -> None:
    await bench.committed(5)
    bench.engine.ranks[0].reordered = True
    if lost == "a rank":
        bench.engine.ranks[1].fail[Poll] = [TransferFailed("the source broke off")]
    else:
        why = failure_from(SourceLost("no announcement a6"), stage="trainer")
        bench.trainer.fingerprints["a6"] = why
    refusal(await bench.agent.answer(bench.prepare(6)))
    await bench.committed(7)
    bench.assert_serving(7)
    # And it is known again.
    await bench.committed(8)
    stages = bench.engine.asked(Stage)
    assert [stage.want_reads for stage in stages] == [True, False, True, False]


# --- staging modes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "chosen"),
    [
        (("device", "device"), "device"),
        (("device", "host"), "host"),
        (("host-no-undo", "host"), "host-no-undo"),
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


async def test_an_install_that_fails_for_good_without_a_way_back_fences(
    bench: Bench,
) -> None:
    """Some parameters are written, and there is no copy of what they were."""
    bench.engine.keep_no_way_back()
    await bench.committed(4)
    bench.engine.steps.clear()
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


async def test_answers_out_of_step_while_the_check_is_polled_fence(
    bench: Bench,
) -> None:
    await bench.staged(5)
    bench.engine.fail["Poll"] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, "OutOfStep")
    assert bench.engine.paused
    assert bench.engine.steps[-2:] == ["verify", "pause"]


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
            version=5, fingerprint=weights_of(5)
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
    expected = WeightsVerified(version=5, fingerprint=weights_of(5))
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
        version=5, fingerprint=weights_of(5)
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
    assert await prepare == Vote(version=6, fingerprint=weights_of(6), ranks=VOTES)
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
    with pytest.raises(Fenced, match="fenced: restart it"):
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
    await bench.staged(5, stage_seconds=0.0, keep_seconds=0.03)
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
    assert reply == Vote(version=6, fingerprint=weights_of(6), ranks=VOTES)
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
    assert replies[2] == Vote(version=7, fingerprint=weights_of(7), ranks=VOTES)
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
    reply = await bench.agent.answer(bench.prepare(5, manifest_digest=fingerprint))

    assert refusal(await old).kind == "StagingCancelled"
    assert await aborting == Aborted(version=5)
    assert isinstance(reply, Vote)
    assert bench.engine.asked(Stage)[-1].manifest == fingerprint


async def test_no_commit_in_time_gives_the_version_up(bench: Bench) -> None:
    await bench.committed(4)
    bench.events.clear()
    await bench.staged(5, stage_seconds=0.0, keep_seconds=0.02)
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
    await bench.staged(5, stage_seconds=0.0, keep_seconds=0.02)
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
        self.sent: list[EngineCoreRequest] = []
        self.inputs_ready = asyncio.Event()
        self.inputs_ready.set()
        self.client_index = 0
        self.output_processor = FakeOutputProcessor()
        self.calls: list[Any] = []
        self.shift = 0
        self.room = asyncio.Event()
        self.room.set()
        self.cancelled = 0

    async def generate(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes one token, where there is room for a request."""
        self.generated.append((prompt, args, kwargs))
        await self.inputs_ready.wait()
        await self.engine_core.add_request_async(engine_request(prompt, *args))
        try:
            await self.room.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        yield "token"

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.sent.append(request)

    async def collective_rpc(self, method: str, args: tuple) -> list[bytes]:
        call = msgspec.msgpack.decode(args[0], type=RankCall)
        self.calls.append((method, call.request))
        answers = [
            RankAnswer(call.call, Running()),
            RankAnswer(call.call - self.shift, Running()),
        ]
        return [msgspec.msgpack.encode(answer) for answer in answers]

    async def call_utility_async(
        self, method: str, payload: bytes, client_index: int, version: int | None
    ) -> list[bytes]:
        assert (method, client_index) == ("refit_change", self.client_index)
        call = msgspec.msgpack.decode(payload, type=RankCall)
        self.calls.append((call.request, version))
        return [msgspec.msgpack.encode(RankAnswer(call.call, Installed(rank=0)))]

    async def pause_scheduler_async(self, mode: str, clear_cache: bool) -> None:
        self.calls.append((mode, clear_cache))

    async def reset_encoder_cache(self) -> None:
        self.calls.append("reset_encoder_cache")


def new_engine() -> tuple[RefitEngine, FakeLLM]:
    llm = FakeLLM()
    return refit_engine(llm), llm


async def test_requests_carry_the_epoch_that_they_were_admitted_in() -> None:
    engine, llm = new_engine()
    for begin in (lambda: "", lambda: engine.begin_epoch(5)):
        assert begin() == engine.kv_epoch
        tokens = llm.generate({"prompt_token_ids": [1, 2]}, None, "id", priority=1)
        assert [token async for token in tokens] == ["token"]
    call = ({"prompt_token_ids": [1, 2]}, (None, "id"), {"priority": 1})
    assert llm.generated == [call, call]
    salts = [request.cache_salt for request in llm.sent]
    assert salts == [None, f"refit:{engine.kv_epoch}"]


async def test_a_request_held_across_an_install_carries_the_epoch_after_it() -> None:
    """vLLM prepares the inputs, of media for seconds, before it sends a request."""
    engine, llm = new_engine()
    engine.begin_epoch(5)
    llm.inputs_ready.clear()
    tokens = llm.generate({"prompt_token_ids": [1], "cache_salt": "own"}, None, "id")
    asked = asyncio.ensure_future(anext(tokens))
    await until(lambda: len(llm.generated) == 1)
    engine.begin_epoch(6)
    llm.inputs_ready.set()
    await asked
    assert [request.cache_salt for request in llm.sent] == [
        f"own|refit:{engine.kv_epoch}"
    ]


@pytest.mark.parametrize("given_up", [False, True])
async def test_a_request_runs_from_the_handler_s_call_to_the_end_of_its_stream(
    given_up: bool,
) -> None:
    """Also while nobody but the handler knows of it: media are loaded there."""
    engine, llm = new_engine()
    llm.inputs_ready.clear()
    generate = engine._handler.generate
    request = {"call": ({"prompt_token_ids": [1]}, None, "id")}
    stream = generate(request, FakeContext("id"))
    asked = asyncio.ensure_future(anext(stream))
    await until(lambda: len(llm.generated) == 1)
    assert await engine.drain(0.2) == 1
    draining = asyncio.create_task(engine.drain(5.0))
    if given_up:
        asked.cancel()
        await asyncio.wait([asked])
    else:
        llm.inputs_ready.set()
        assert await asked == "token"
        assert not draining.done()
    await stream.aclose()
    assert await draining == 0


@pytest.mark.parametrize("full", [False, True])
async def test_a_probe_is_taken_back_where_the_engine_is_full(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endless streams in every seat are no reason to doubt an engine."""
    monkeypatch.setattr(engine_module, "PROBE_SECONDS", 0.02)
    engine, llm = new_engine()
    if full:
        llm.room.clear()
    await engine.probe()
    assert (len(llm.generated), llm.cancelled) == (1, int(full))


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


async def test_the_engine_is_told_what_a_change_of_weights_leads_to() -> None:
    """An install to its version; an undo to what was served, at first to no version."""
    engine, llm = new_engine()
    assert await engine.call_ranks(Restore(version=5)) == [Installed(rank=0)]
    await engine.call_ranks(Install(version=6, in_step=True))
    engine.begin_epoch(6)
    await engine.call_ranks(Install(version=7))
    await engine.call_ranks(Restore(version=7))
    assert llm.calls == [
        (Restore(version=5), None),
        (Install(version=6, in_step=True), 6),
        (Install(version=7), 7),
        (Restore(version=7), 6),
    ]


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


@pytest.mark.parametrize("salt", [None, "tenant-1"])
def test_without_an_epoch_a_salt_stays_as_it_is(salt: str | None) -> None:
    assert with_epoch(salt, "") is salt


def test_a_request_without_a_salt_gets_one() -> None:
    assert with_epoch(None, "5-x") == "refit:5-x"


def test_a_user_s_own_salt_is_kept() -> None:
    assert with_epoch("tenant-1", "5-x") == "tenant-1|refit:5-x"


SALTS = st.none() | st.text(max_size=5)
EPOCHS = st.from_regex(r"[0-9]{1,3}-[0-9a-f]{8}", fullmatch=True)


@given(salts=st.tuples(SALTS, SALTS), epochs=st.tuples(EPOCHS, EPOCHS))
def test_only_the_same_salt_and_epoch_share_blocks(
    salts: tuple[str | None, str | None], epochs: tuple[str, str]
) -> None:
    keys = [with_epoch(salt, epoch) for salt, epoch in zip(salts, epochs, strict=True)]
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
