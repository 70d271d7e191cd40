# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's shadows as a source: nothing is overwritten while somebody may be reading
it, and what was found in a shadow holds until it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynamo.refit.errors import (
    FingerprintMismatch,
    LeaseHeld,
    PeerUnsuitable,
    StagingCancelled,
    TransferFailed,
)
from dynamo.refit.rank import offer
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.offer import Offers

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class FakeArena:
    """A test fake of an arena with two shadows, of which ``live`` is."""

    def __init__(self, live: int | None) -> None:
        self.expendable = frozenset({0, 1}) - {live}
        self.shadows = [_shadow(), _shadow()]


def _shadow() -> SimpleNamespace:
    return SimpleNamespace(buffer=SimpleNamespace(bytes=torch.zeros(8)))


class FakeAgent:
    """A test fake of a NIXL agent that counts polls, and may fail at them."""

    name = "rank"

    def __init__(self) -> None:
        self.polls = 0
        self.error: Exception | None = None

    def metadata(self) -> bytes:
        return b"metadata"

    def progress(self) -> None:
        self.polls += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


@pytest.fixture
def offers(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Offers, FakeArena]]:
    monkeypatch.setattr(offer, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(offer, "FAILURE_SECONDS", 0.01)
    with ThreadPoolExecutor(1) as pool:
        offers, arena = Offers(agent, pool.submit), FakeArena(live=0)
        offers.know(arena)
        yield offers, arena
        for version in range(10):
            offers.end(version)


def limit(seconds: float, cancelled=lambda: False) -> Limit:
    return Limit(time.monotonic() + seconds, cancelled)


def overwrite(offers: Offers, arena: FakeArena, seconds: float = 0.2) -> None:
    with offers.overwriting(arena, limit(seconds)):
        pass


def test_every_shadow_is_a_slot(offers: tuple[Offers, FakeArena]) -> None:
    there, arena = offers
    source = there.add(1, arena, 0, 5.0)
    addresses = [s.buffer.bytes.data_ptr() for s in arena.shadows]
    assert [[r.address for r in slot] for slot in source.slots] == [
        [address] for address in addresses
    ]
    assert (source.agent, source.metadata) == ("rank", b"metadata")


def test_only_what_is_read_is_waited_for(offers: tuple[Offers, FakeArena]) -> None:
    there, arena = offers
    there.add(1, arena, 0, 60.0)
    overwrite(there, arena)
    there.add(2, arena, 1, 60.0)
    with pytest.raises(LeaseHeld, match=r"version 2 .* prepare again in 60 s"):
        overwrite(there, arena)
    overwrite(there, FakeArena(live=0))
    there.end(1)
    with pytest.raises(LeaseHeld):
        overwrite(there, arena)
    there.end(2)
    overwrite(there, arena)


def test_a_stage_goes_on_when_the_last_reader_is_gone(
    offers: tuple[Offers, FakeArena],
) -> None:
    there, arena = offers
    there.add(2, arena, 1, 60.0)
    timer = threading.Timer(0.2, there.end, [2])
    timer.start()
    began = time.monotonic()
    overwrite(there, arena, seconds=30.0)
    assert 0.1 < time.monotonic() - began < 20.0


def test_an_offer_expires_and_is_never_shortened(
    offers: tuple[Offers, FakeArena],
) -> None:
    there, arena = offers
    there.add(2, arena, 1, 0.6)
    there.add(2, arena, 1, 0.1)
    with pytest.raises(LeaseHeld):
        overwrite(there, arena, seconds=0.3)
    assert there.holds(arena)
    overwrite(there, arena, seconds=30.0)
    assert not there.holds(arena)


def test_a_wait_for_readers_can_be_cancelled(offers: tuple[Offers, FakeArena]) -> None:
    there, arena = offers
    there.add(2, arena, 1, 60.0)
    with (
        pytest.raises(StagingCancelled, match="the readers of version 2"),
        there.overwriting(arena, limit(60.0, cancelled=lambda: True)),
    ):
        raise AssertionError("it is being read")


def test_what_is_being_overwritten_is_not_offered(
    offers: tuple[Offers, FakeArena],
) -> None:
    there, arena = offers
    with there.overwriting(arena, limit(1.0)):
        there.add(1, arena, 0, 60.0)
        with pytest.raises(PeerUnsuitable, match="making room for the next one"):
            there.add(2, arena, 1, 60.0)
    there.add(2, arena, 1, 60.0)


def found(offers: Offers, version: int, shadow: int, find) -> np.ndarray:
    deadline = time.monotonic() + 20
    while (parts := offers.parts(version, shadow, find)) is None:
        assert time.monotonic() < deadline
    return parts


def test_a_shadow_is_looked_at_once_until_it_is_overwritten(
    offers: tuple[Offers, FakeArena],
) -> None:
    """The live one is not overwritten; what is found in another arena is its own."""
    there, arena = offers
    looked = []

    def look(version: int) -> np.ndarray:
        looked.append(version)
        return np.array([version], dtype=np.uint64)

    for version, shadow in ((1, 0), (2, 1), (1, 0), (2, 1)):
        find = lambda version=version: look(version)  # noqa: E731
        assert found(there, version, shadow, find) == [version]
    assert looked == [1, 2]
    overwrite(there, arena)
    found(there, 1, 0, lambda: look(1))
    assert looked == [1, 2]
    found(there, 2, 1, lambda: look(2))
    assert looked == [1, 2, 2]
    there.know(FakeArena(live=0))
    found(there, 1, 0, lambda: look(1))
    assert looked == [1, 2, 2, 1]


def test_a_shadow_with_other_bytes_is_not_looked_at_again(
    offers: tuple[Offers, FakeArena],
) -> None:
    there, _ = offers

    def find() -> np.ndarray:
        raise FingerprintMismatch("1 block is not what was staged", tensor="w")

    for _ in range(2):
        with pytest.raises(FingerprintMismatch, match="1 block"):
            found(there, 1, 0, find)


def test_what_is_given_up_but_live_is_read_on(offers: tuple[Offers, FakeArena]) -> None:
    there, arena = offers
    there.add(1, arena, 0, 60.0)
    there.add(1, arena, 1, 60.0)
    there.end(1, besides=(arena, 0))
    overwrite(there, arena)
    assert there.holds(arena)
    there.end(1, besides=(arena, None))
    assert not there.holds(arena)


def test_nixl_is_polled_while_there_is_something_to_read(
    offers: tuple[Offers, FakeArena], agent: FakeAgent
) -> None:
    """Not while somebody else uses the agent, and whatever becomes of one reader."""
    there, arena = offers
    agent.error = TransferFailed("a reader is gone")
    for _ in range(2):
        there.add(1, arena, 0, 60.0)
        seen = agent.polls
        _until(lambda seen=seen: agent.polls > seen + 2)
        with there.agent_use:
            seen = agent.polls
            time.sleep(0.05)
            assert agent.polls == seen
        there.end(1)
        _until(lambda: there._thread is None)
        seen = agent.polls
        time.sleep(0.05)
        assert agent.polls == seen


def _until(true) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
