# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A commit between two steps, without a pause: what it does, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dynamo.refit.errors import (
    FingerprintMismatch,
    OutOfStep,
    PointerMoved,
    RefitError,
)
from dynamo.refit.events import WorkerFenced, WorkerRefitted
from dynamo.refit.protocol import Abort, Committed, Install, Restore, Verify
from dynamo.refit.worker import ranks as ranks_module
from dynamo.refit.worker import switch as switch_module
from tests.support.fake_replica import (
    COMMIT_STEPS,
    EPOCH,
    WORKER,
    Bench,
    commit,
    refusal,
    until,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(30),
]

#: What a good commit between two steps asks of the engine, in this order.
IN_STEP = ["install", "epoch", "forget_media", "declare", "probe", "verify"]


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """An engine that serves version 4 and installs between two steps."""
    monkeypatch.setattr(ranks_module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(switch_module, "SILENCE_SECONDS", 0.05)
    bench = Bench()
    engine = bench.engine
    engine.installs_in_step = True
    declare = engine.declare_version

    async def declare_version(version: int) -> None:
        engine._step("declare", locked=True)
        await declare(version)

    engine.declare_version = declare_version
    await bench.agent.start()
    await bench.committed(4)
    engine.steps.clear()
    engine.requests.clear()
    bench.events.clear()
    return bench


async def fails(bench: Bench, kind: str) -> str:
    """Commit version 5, which fences the worker; the reason."""
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert failure == bench.assert_fenced(5, kind)
    return failure.message


def silent_when_fenced(bench: Bench) -> Callable[[], list[bool]]:
    """Whether the engine was paused at each fence event."""
    seen: list[bool] = []
    publish = bench.agent._publish

    def note(event: object) -> None:
        if isinstance(event, WorkerFenced):
            seen.append(bench.engine.paused)
        publish(event)

    bench.agent._publish = note
    return lambda: seen


# --- a good one ---------------------------------------------------------------


async def test_no_pause_and_no_resume(bench: Bench) -> None:
    before = bench.engine.kv_epoch
    reply = await bench.committed(5)
    assert bench.engine.steps == IN_STEP
    assert bench.engine.asked(Install) == [Install(version=5, in_step=True)]
    assert bench.engine.declared == 5
    assert reply.kv_epoch == bench.engine.kv_epoch != before
    bench.assert_serving(5)


async def test_its_stall_is_the_install(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.may_install.clear()
    task = asyncio.create_task(bench.agent.answer(commit(5)))
    await until(lambda: bench.engine.steps == ["install"])
    await asyncio.sleep(0.02)
    bench.engine.may_install.set()
    timings = (await task).timings
    assert timings.pause_ms == 0.0
    assert timings.install_ms >= 19
    # To forget media, and no more than that.
    assert 0 <= timings.resume_ms < timings.install_ms
    assert timings.stall_ms == timings.install_ms + timings.resume_ms
    assert timings.install_retries == 0
    assert bench.events[-1].timings == timings


async def test_the_agent_serves_the_version_before_its_epoch_begins(
    bench: Bench,
) -> None:
    seen = []
    bench.engine.on_step = lambda name: seen.append(
        (name, bench.agent.status().version)
    )
    await bench.committed(5)
    assert seen[:2] == [("install", 4), ("epoch", 5)]


async def test_one_after_another(bench: Bench) -> None:
    for version in (5, 6, 7):
        await bench.committed(version)
        bench.assert_serving(version)
    assert bench.engine.steps == IN_STEP * 3


# --- when it does not pause, and when it must -----------------------------------


async def test_recompute_pauses(bench: Bench) -> None:
    await bench.staged(5)
    reply = await bench.agent.answer(commit(5, in_flight="recompute"))
    assert isinstance(reply, Committed)
    assert bench.engine.steps == [*COMMIT_STEPS[:4], "declare", *COMMIT_STEPS[4:]]
    assert bench.engine.in_flight == "recompute"
    assert not bench.engine.asked(Install)[0].in_step
    bench.assert_serving(5)


async def test_an_install_that_cannot_be_undone_pauses() -> None:
    """Between two steps, all ranks have the new weights or all the old ones."""
    bench = Bench()
    bench.engine.keep_no_way_back()
    await bench.agent.start()
    await bench.staged(5)
    assert isinstance(await bench.agent.answer(commit(5)), Committed)
    assert bench.engine.steps[:2] == ["pause", "install"]
    bench.assert_serving(5)


async def test_an_engine_paused_by_its_user_stays_paused(bench: Bench) -> None:
    bench.engine.paused = bench.engine.paused_by_user = True
    await bench.staged(5)
    assert isinstance(await bench.agent.answer(commit(5)), Committed)
    assert bench.engine.steps == ["pause", "install", "epoch", "declare", "verify"]
    assert bench.engine.paused
    assert bench.engine.live() == [5, 5]


async def test_ranks_that_are_not_reached_in_one_order_are_paused(
    bench: Bench,
) -> None:
    bench.engine.installs_in_step = False
    await bench.committed(5)
    assert bench.engine.steps == [*COMMIT_STEPS[:4], "declare", *COMMIT_STEPS[4:]]
    bench.assert_serving(5)


# --- undone: the old version serves -----------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
async def test_it_is_repeated_once(bench: Bench, rank: int) -> None:
    bench.engine.ranks[rank].fail[Install] = [RefitError("hiccup")]
    reply = await bench.committed(5)
    assert reply.timings.install_retries == 1
    assert bench.engine.steps == ["install", *IN_STEP]
    bench.assert_serving(5)


async def test_ranks_that_cannot_install_go_on_with_the_old_weights(
    bench: Bench,
) -> None:
    before = bench.engine.kv_epoch
    errors = [PointerMoved("1st"), PointerMoved("2nd", tensor="w")]
    bench.engine.ranks[0].fail[Install] = errors
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert (failure.kind, failure.message) == ("PointerMoved", "2nd")
    assert (failure.rank, failure.worker, failure.version) == (0, WORKER, 5)
    assert failure.tensor == "w"
    # The ranks have undone it by themselves, and nothing else has happened.
    assert bench.engine.steps == ["install", "install"]
    assert bench.engine.asked(Restore) == bench.engine.asked(Verify) == []
    assert bench.engine.kv_epoch == before
    assert bench.engine.declared == 4
    assert not [e for e in bench.events if isinstance(e, WorkerRefitted)]
    bench.assert_serving(4)

    await bench.committed(6)
    bench.assert_serving(6)


async def test_the_rank_that_failed_is_named_and_not_one_that_undid(
    bench: Bench,
) -> None:
    bench.engine.ranks[1].fail[Install] = [RefitError("1st"), RefitError("2nd")]
    await bench.staged(5)
    failure = refusal(await bench.agent.answer(commit(5)))
    assert (failure.rank, failure.message) == (1, "2nd")


async def test_an_engine_that_fell_asleep_is_not_fenced(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.asleep = True
    failure = refusal(await bench.agent.answer(commit(5)))
    assert (failure.kind, failure.stage) == ("RefitError", "install")
    assert "sleeps" in failure.message
    assert bench.engine.steps == []
    bench.assert_serving(4)

    bench.engine.asleep = False
    await bench.committed(6)
    bench.assert_serving(6)


# --- unknown: no token more ---------------------------------------------------------


@pytest.mark.parametrize("step", ["install", "epoch", "forget_media", "declare"])
async def test_an_unknown_error_silences_the_engine_and_then_fences(
    bench: Bench, step: str
) -> None:
    seen = silent_when_fenced(bench)
    bench.engine.fail[step] = OSError("engine core died")
    assert "engine core died" in await fails(bench, "OSError")
    assert bench.engine.steps == [*IN_STEP[: IN_STEP.index(step) + 1], "pause"]
    assert seen() == [True]


@pytest.mark.parametrize("step", ["probe", "verify"])
async def test_one_that_shows_after_the_install_does_so_too(
    bench: Bench, step: str
) -> None:
    seen = silent_when_fenced(bench)
    bench.engine.fail[step] = OSError("engine core died")
    await fails(bench, "OSError")
    assert bench.engine.steps == [*IN_STEP[: IN_STEP.index(step) + 1], "pause"]
    assert seen() == [True]


@pytest.mark.parametrize("request_kind", ["Install", "Verify"])
async def test_answers_out_of_step_silence_the_engine(
    bench: Bench, request_kind: str
) -> None:
    await bench.staged(5)
    bench.engine.fail[request_kind] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(commit(5)))
    bench.assert_fenced(5, "OutOfStep")
    assert bench.engine.steps[-1] == "pause"
    assert bench.engine.paused


@pytest.mark.parametrize("request_kind", ["Install", "Verify"])
async def test_the_engine_is_silent_before_answers_out_of_step_are_told(
    bench: Bench, request_kind: str
) -> None:
    seen = silent_when_fenced(bench)
    await bench.staged(5)
    bench.engine.fail[request_kind] = OutOfStep("answered call 3 when asked call 4")
    refusal(await bench.agent.answer(commit(5)))
    assert seen() == [True]


async def test_live_weights_that_are_others_silence_the_engine(bench: Bench) -> None:
    seen = silent_when_fenced(bench)
    wrong = FingerprintMismatch("2 blocks are not what was staged", tensor="norm")
    bench.engine.ranks[1].fail[Verify] = [wrong]
    message = await fails(bench, "WeightsUnknown")
    assert "are not those of version 5" in message
    assert "rank 1, tensor norm" in message
    assert bench.engine.steps == [*IN_STEP, "pause"]
    assert seen() == [True]


async def test_a_pause_that_hangs_does_not_hold_up_the_fence(bench: Bench) -> None:
    bench.engine.may_pause.clear()
    bench.engine.fail["install"] = OSError("engine core hangs")
    async with asyncio.timeout(5):
        await fails(bench, "OSError")
    assert bench.engine.steps == ["install", "pause"]
    assert not bench.engine.paused


async def test_a_pause_that_fails_hides_no_cause(bench: Bench) -> None:
    bench.engine.fail["install"] = OSError("engine core died")
    bench.engine.fail["pause"] = ConnectionError("engine core died")
    await fails(bench, "OSError")
    assert bench.engine.steps == ["install", "pause"]


async def test_a_commit_between_steps_cannot_be_aborted(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.may_install.clear()
    task = asyncio.create_task(bench.agent.answer(commit(5)))
    await until(lambda: bench.engine.steps == ["install"])
    with pytest.raises(RefitError, match="is being committed"):
        await bench.agent.answer(
            Abort(model="tiny", version=5, epoch=EPOCH, reason="late")
        )
    task.cancel()
    bench.engine.may_install.set()
    await until(lambda: bench.engine.steps == IN_STEP)
    await until(lambda: bench.agent.status().phase == "serving")
    bench.assert_serving(5)
