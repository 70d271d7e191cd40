# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's own arithmetic, and how it ends when a part of it dies."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import resource_tracker
from types import SimpleNamespace

import pytest

from dynamo.refit.protocol import (
    CacheCounters,
    CommitTimings,
    RankVote,
    StageTimings,
)
from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

stand_in_if_missing()

from tests.benchmarks import shapes  # noqa: E402
from tests.benchmarks.gpu import measure, source  # noqa: E402
from tests.benchmarks.gpu.report import print_table  # noqa: E402
from tests.benchmarks.gpu.source import Publishers, TrainerDied  # noqa: E402
from tests.benchmarks.gpu.streams import Span, Streams  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: Of what one cycle takes in the fakes, seconds.
STAGE, COMMIT = 0.2, 0.03


def zeros(kind: type, **values: object) -> object:
    """A struct of numbers, all of them 0 but ``values``."""
    return kind(**{**dict.fromkeys(kind.__struct_fields__, 0), **values})


class Clock:
    """Simulated time in which streams decode, each step longer than the one before."""

    def __init__(self, streams: Streams, first: float, growth: float) -> None:
        self.now = 1000.0
        self._streams = streams
        self._next = self.now
        self._step, self._growth = first, growth
        self.held = False

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while self._next <= until:
            if not self.held:
                for times in self._streams.times:
                    times.append(self._next)
            self._next += self._step
            self._step += self._growth
        self.now = until


class HarmlessReplica:
    """Stages beside the streams without slowing them, and holds them at a commit."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def stage(self, *_: object) -> tuple[RankVote, ...]:
        await self._clock.sleep(STAGE)
        timings = zeros(StageTimings, wire_ms=1.0)
        counters = zeros(CacheCounters)
        return (zeros(RankVote, timings=timings, counters=counters),)

    async def commit(self, *_: object) -> SimpleNamespace:
        self._clock.held = True
        await self._clock.sleep(COMMIT)
        self._clock.held = False
        return SimpleNamespace(timings=zeros(CommitTimings))


@pytest.fixture
def published() -> SimpleNamespace:
    return SimpleNamespace(manifest=SimpleNamespace(slots=2), fingerprints=[None, None])


async def test_growing_context_is_no_cost_of_staging(
    published: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    streams = Streams(None, 4)
    # From 4 ms a step to about twice that.
    clock = Clock(streams, first=0.004, growth=1.5e-6)
    fake = SimpleNamespace(time=clock.time, sleep=clock.sleep)
    monkeypatch.setattr(measure, "time", fake)
    monkeypatch.setattr(measure, "asyncio", fake)
    monkeypatch.setattr("tests.benchmarks.gpu.streams.asyncio", fake)
    await clock.sleep(0.5)

    run = await measure.measure(HarmlessReplica(clock), published, streams, 20, "-")

    cycles = run["cycles"]
    assert cycles[-1]["median_gap_ms"] > 1.5 * cycles[0]["median_gap_ms"]
    assert cycles[-1]["tokens_per_s"] < 0.7 * cycles[0]["tokens_per_s"]
    assert 0.97 < run["staging_share"] < 1.03
    for seen in cycles:
        assert 0.9 < seen["tokens_per_s_staging"] / seen["tokens_per_s"] < 1.1
        assert seen["quiet_gap_ms"] == pytest.approx(seen["median_gap_ms"], rel=0.03)
        # What is held is the commit, and at most a step on either side of it.
        over = seen["stall_ms"] - seen["median_gap_ms"]
        assert COMMIT * 1e3 - 2 * seen["median_gap_ms"] < over
        assert over < COMMIT * 1e3 + seen["median_gap_ms"]
    assert run["stall_ms"]["max"] == max(seen["stall_ms"] for seen in cycles)
    assert run["stall_over_median_ms"]["max"] == max(
        seen["stall_ms"] - seen["median_gap_ms"] for seen in cycles
    )

    run |= {"trainer": "cuda:0", "cycle": "continue"}
    about = {"gpus": 1, "device": "-", "model": "4b", "tensor_parallel": 1}
    print_table({**about, "nbytes": 0, "trainers": {}, "runs": [run]})
    assert f"{run['staging_share']:.0%} [0, 0, 0]" in capsys.readouterr().out


def test_a_cycle_is_what_lies_in_its_intervals() -> None:
    streams = Streams(None, 1)
    # 10 ms a token, 20 while staging, none for 50 over the commit.
    streams.times[0].extend(number * 0.01 + 0.005 for number in range(100))
    streams.times[0].extend(number * 0.02 + 1.005 for number in range(50))
    streams.times[0].extend(number * 0.01 + 2.035 for number in range(100))

    seen = streams.see(Span(quiet=0.0, began=1.0, staged=2.0, done=2.03))

    assert seen.median_gap_ms == pytest.approx(10)
    assert seen.quiet_gap_ms == pytest.approx(10)
    assert seen.stall_ms == pytest.approx(50)
    assert seen.tokens_per_s == pytest.approx(100)
    assert seen.tokens_per_s_staging == pytest.approx(50)


def test_gaps_that_touch_an_interval_reach_out_of_it() -> None:
    streams = Streams(None, 1)
    streams.times[0].extend([0.0, 1.0, 3.0, 3.5, 7.0])

    assert streams.longest_gap_ms(3.1, 3.2) == pytest.approx(500)
    assert streams.longest_gap_ms(3.1, 3.6) == pytest.approx(3500)
    assert streams.longest_gap_ms(2.0, 3.2) == pytest.approx(2000)
    assert streams.longest_gap_ms(8.0, 9.0) == 0.0
    assert streams.tokens(1.0, 7.0) == 2
    assert streams.median_gap_ms(0.5, 3.2) == pytest.approx(2000)


class EngineDead(Exception):
    """What the fake engine raises."""


class DyingEngine:
    """Gives each request so many tokens, then fails; endless where that is None."""

    def __init__(self, *tokens: int | None) -> None:
        self._tokens = iter(tokens)

    async def generate(self, *_: object) -> AsyncIterator[None]:
        tokens = next(self._tokens)
        for _ in itertools.count() if tokens is None else range(tokens):
            await asyncio.sleep(0)
            yield None
        raise EngineDead


async def finish(streams: Streams) -> None:
    with pytest.raises(EngineDead):
        await streams.stop()


async def test_a_stream_that_dies_is_raised_at_the_start() -> None:
    streams = Streams(DyingEngine(None, 3), 2)

    async with asyncio.timeout(5):
        with pytest.raises(EngineDead):
            await streams.start()
        await finish(streams)


async def test_a_stream_that_dies_is_raised_when_its_next_token_is_awaited() -> None:
    streams = Streams(DyingEngine(None, 30), 2)

    async with asyncio.timeout(5):
        await streams.start()
        with pytest.raises(EngineDead):
            await streams.go_on(float("inf"))
        await finish(streams)


@pytest.fixture
def no_tracker() -> Iterator[None]:
    """A process that was spawned leaves a tracker behind, which others would count."""
    yield
    resource_tracker._resource_tracker._stop()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_tracker")
def test_a_trainer_that_dies_at_its_start_is_named() -> None:
    config = shapes.dense(1 << 20)

    with pytest.raises(TrainerDied, match=r"rank 0 of 1 on nonsense .* exit code 1 "):
        Publishers(config, ["nonsense"])


class FakeProcess:
    """A rank that offers something and lives, or dies of a signal at its start."""

    def __init__(self, *, target: Callable, args: tuple, daemon: bool) -> None:
        _, self.device, *_, self._pipe = args
        self.exitcode = None
        self.killed = self.joined = False

    def start(self) -> None:
        if self.device == "dies":
            self.exitcode = -9
        else:
            self._pipe.send("an offer")

    def kill(self) -> None:
        self.killed = True

    def join(self, timeout: float | None = None) -> None:
        self.joined = True


def test_the_other_ranks_of_a_trainer_that_dies_are_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes = []

    def process(**arguments: object) -> FakeProcess:
        processes.append(FakeProcess(**arguments))
        return processes[-1]

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=process)
    monkeypatch.setattr(
        source, "multiprocessing", SimpleNamespace(get_context=lambda _: context)
    )

    with pytest.raises(TrainerDied, match=r"rank 1 of 3 on dies .* exit code -9 "):
        Publishers({}, ["lives", "dies", "lives"])

    assert [p.device for p in processes] == ["lives", "dies", "lives"]
    assert all(p.killed and p.joined for p in processes)
