# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How often ranks that stage are asked whether they are done: every time costs a
tensor-parallel engine a step's head start."""

from __future__ import annotations

import time

import msgspec
import pytest

from dynamo.refit.protocol import Poll, RankReply, Running, SessionUse, Staged
from dynamo.refit.worker.ranks import PROGRESS_SECONDS, QUIET_SHARE, Ranks
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
        assert await self.ranks._poll(1, lambda progress: None) == [self._staged]
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
