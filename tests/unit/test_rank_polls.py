# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How often ranks that stage are asked whether they are done, as every time costs a
tensor-parallel engine a step's head start; and what ends the wait."""

from __future__ import annotations

import time

import msgspec
import pytest

from dynamo.refit.protocol import Poll, RankReply, Running, SessionUse, Staged
from dynamo.refit.worker.ranks import (
    PROGRESS_SECONDS,
    QUIET_SHARE,
    Ranks,
    RanksFailed,
)
from dynamo.refit.worker.source import SourceWatch
from tests.support.fake_replica import vote_of

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

STAGE_SECONDS = 0.2


class FakeRanks:
    """A test fake of one rank that stages for :data:`STAGE_SECONDS`; ``asked`` has the
    seconds after which it was polled."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.ranks = Ranks(self, trainers=None, staging="auto")

    async def stage(self, session: SessionUse) -> list[float]:
        self._began, self.asked = time.monotonic(), []
        vote = msgspec.structs.replace(vote_of(0), session=session)
        self._staged = Staged(vote=vote, parts=b"", reads=())
        watch = SourceWatch(FakeDiscovery(absent=range(0)), *SOURCE)
        polled = await self.ranks._poll(1, lambda progress: None, watch)
        assert polled == [self._staged]
        return self.asked

    async def call_ranks(self, request: Poll) -> list[RankReply]:
        self.asked.append(time.monotonic() - self._began)
        if self.asked[-1] < STAGE_SECONDS:
            return [Running(nbytes=0, total_nbytes=1)]
        return [self._staged]


async def test_a_warm_stage_is_left_alone_until_it_may_be_done() -> None:
    fake = FakeRanks()
    first = await fake.stage("warm")
    assert first[0] < STAGE_SECONDS / 4
    second = await fake.stage("warm")
    assert second[0] >= QUIET_SHARE * STAGE_SECONDS
    assert len(second) < len(first)


async def test_a_cold_stage_says_nothing_of_the_next_one() -> None:
    fake = FakeRanks()
    await fake.stage("cold")
    assert (await fake.stage("warm"))[0] < STAGE_SECONDS / 4


async def test_nobody_is_left_alone_for_longer_than_between_two_reports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeRanks()
    monkeypatch.setattr("tests.unit.test_rank_polls.STAGE_SECONDS", 0.6)
    await fake.stage("warm")
    assert (await fake.stage("warm"))[0] < PROGRESS_SECONDS + 0.1


# --- a source that is gone ----------------------------------------------------

SOURCE = ("ns.trainer.weights", 7)
GONE_SECONDS = 0.8


class FakeDiscovery:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: the source is in discovery but
    for the looks ``absent``, of which there is one a report."""

    def __init__(self, absent: range) -> None:
        self._absent = absent
        self.looks = 0

    async def instances(self, path: str) -> list[int]:
        assert path == SOURCE[0]
        self.looks += 1
        return [] if self.looks in self._absent else [SOURCE[1]]


class OneIsDone:
    """A test fake of two ranks: the first has staged, the other one reads on until it
    has been polled ``polls`` times."""

    def __init__(self, polls: float) -> None:
        self._left = polls
        vote = msgspec.structs.replace(vote_of(0), session="cold")
        self.staged = Staged(vote=vote, parts=b"", reads=())

    async def call_ranks(self, request: Poll) -> list[RankReply]:
        self._left -= 1
        reads = Running(nbytes=30, total_nbytes=100)
        return [self.staged, reads if self._left > 0 else self.staged]


async def poll(ranks: OneIsDone, discovery: FakeDiscovery) -> list[Staged]:
    watch = SourceWatch(discovery, *SOURCE)
    return await Ranks(ranks, discovery, "auto")._poll(3, lambda progress: None, watch)


async def test_a_source_that_is_gone_ends_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a word of the transport; the rank that still reads is named."""
    monkeypatch.setattr("dynamo.refit.worker.source.GONE_SECONDS", GONE_SECONDS)
    began = time.monotonic()
    with pytest.raises(RanksFailed) as raised:
        await poll(OneIsDone(float("inf")), FakeDiscovery(absent=range(2, 1000)))
    failure = raised.value.failure
    assert (failure.kind, failure.stage) == ("TransferFailed", "stage")
    assert (failure.rank, failure.version) == (1, 3)
    assert failure.message == (
        "instance 7 of ns.trainer.weights, from which 30 of 100 bytes had been read, "
        "is gone from discovery: publish the version again"
    )
    assert time.monotonic() - began >= GONE_SECONDS + PROGRESS_SECONDS


async def test_a_source_that_comes_back_in_time_is_read_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dynamo.refit.worker.source.GONE_SECONDS", GONE_SECONDS)
    discovery = FakeDiscovery(absent=range(1, 3))
    ranks = OneIsDone(polls=80)
    assert await poll(ranks, discovery) == [ranks.staged, ranks.staged]
    assert discovery.looks > 4
