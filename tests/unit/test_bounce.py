# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Sessions that read through pinned memory. NIXL, the trainers and the GPU are faked:
the target is host memory, and every read goes through slots of a few bytes."""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import StagingCancelled, TransferFailed
from dynamo.refit.rank import bounce, session
from dynamo.refit.rank.bounce import Bounce
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.limits import Limits, TransferCost
from dynamo.refit.rank.pipeline import Submit
from tests.support.drawn_layouts import layouts
from tests.support.fake_nixl import NEVER, FakeTrainers
from tests.support.layouts import (
    ALWAYS_CONTIGUOUS,
    ALWAYS_EXACT,
    ROOMY,
    Layout,
    decoder_layer,
)
from tests.support.rank import SMALL, Rank, bytes_of, layer

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

SLOTS, SLOT_NBYTES = 3, 200


@pytest.fixture(scope="module", autouse=True)
def bounced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounce, "is_needed", lambda memory, device: memory == "DRAM")
        small = functools.partial(Bounce, slots=SLOTS, slot_nbytes=SLOT_NBYTES)
        patch.setattr(session, "Bounce", small)
        yield


@pytest.fixture(scope="module")
def follower() -> Iterator[Submit]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_only_host_memory_into_a_gpu_goes_through_pinned_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    needed = {
        (memory, device): _is_needed(memory, device)
        for memory in ("DRAM", "VRAM")
        for device in (cuda, cpu)
    }
    assert [pair for pair, is_so in needed.items() if is_so] == [("DRAM", cuda)]


_is_needed = bounce.is_needed


@pytest.mark.parametrize("costs", [ALWAYS_EXACT, ALWAYS_CONTIGUOUS, None])
@pytest.mark.parametrize("limits", [SMALL, ROOMY], ids=["small", "roomy"])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_versions_arrive_in_turns_through_few_slots(
    costs: dict[str, TransferCost] | None,
    limits: Limits,
    late: int,
    follower: Submit,
) -> None:
    layout = decoder_layer(0, slots=2)
    trainers = FakeTrainers(layout)
    rank = Rank(layout, trainers, 0, limits, costs)
    for version, slot in enumerate([0, 1, 0, 1, 1]):
        full = layout.random_tensors(seed=version)
        trainers.write(slot, full)
        rank.agent.late = late
        rank.pull(slot, follower)
        assert bytes_of(rank.staged) == rank.loaded(full)
        assert not rank.session.poll_active()
        rank.install()
    assert 1 <= rank.agent.peak <= SLOTS
    # No run came around the slots.
    assert all(
        sum(nbytes for *_, nbytes in read._copies) <= SLOT_NBYTES
        for read in rank.agent.prepared
    )


@settings(deadline=None, max_examples=40)
@given(layouts().filter(lambda layout: layout.slices), st.integers(0, 2))
def test_whatever_the_layout_every_byte_arrives(layout: Layout, late: int) -> None:
    trainers = FakeTrainers(layout)
    full = layout.random_tensors(seed=1)
    trainers.write(0, full)
    with ThreadPoolExecutor(1) as pool:
        rank = Rank(layout, trainers, 0, SMALL)
        rank.agent.late = late
        rank.pull(0, pool.submit)
    assert bytes_of(rank.staged) == rank.loaded(full)


@pytest.mark.parametrize("late", [0, 2])
def test_a_slice_that_breaks_off_ends_the_pull_and_the_next_one_is_whole(
    late: int, follower: Submit
) -> None:
    rank = layer()
    full = rank.layout.random_tensors(seed=10)
    rank.trainers.write(0, full)
    rank.agent.late = late
    rank.agent.broken.add("trainer-1")
    with pytest.raises(TransferFailed, match="the read from 'trainer-1' broke off"):
        rank.pull(0, follower)
    posted = sum(read.polls > 0 or read.active for read in rank.agent.prepared)

    deadline = time.monotonic() + 10
    while rank.session.poll_active():
        assert time.monotonic() < deadline
    assert rank.agent.active == 0
    # What waited was not posted any more.
    assert posted == sum(read.polls > 0 or read.active for read in rank.agent.prepared)
    rank.agent.broken.clear()
    rank.pull(0, follower)
    assert bytes_of(rank.staged) == rank.loaded(full)


def test_a_pull_that_is_given_up_is_active_until_its_slices_have_landed(
    follower: Submit,
) -> None:
    rank = layer()
    rank.agent.late = NEVER
    with pytest.raises(StagingCancelled, match="out of time while pulling from"):
        rank.pull(0, follower, limit=Limit(time.monotonic() + 0.02, lambda: False))
    assert rank.agent.active == SLOTS
    assert rank.session.poll_active()
    with pytest.raises(TransferFailed, match="is still active"):
        rank.session.close()

    rank.agent.late = 0
    assert not rank.session.poll_active()
    rank.session.close()
    assert rank.agent.held == []


def test_a_warm_pull_makes_no_read_and_registers_nothing(follower: Submit) -> None:
    rank = layer()
    rank.trainers.write(0, rank.layout.random_tensors(seed=1))
    rank.pull(0, follower)
    made, registered = len(rank.agent.prepared), dict(rank.agent.registered)
    rank.pull(0, follower)
    assert (len(rank.agent.prepared), rank.agent.registered) == (made, registered)


def test_a_closed_session_gives_its_slots_back(follower: Submit) -> None:
    """At once: what is frozen, as after a cold stage, no collection looks at."""
    rank = layer()
    rank.pull(0, follower)
    before = len(rank.agent.registered)
    slots = weakref.ref(rank.session._bounced)
    arrived = weakref.ref(rank.arena.shadows[rank.arena.target].buffer)
    gc.collect()
    gc.disable()
    try:
        rank.session.close()
        # Scratch, and the slots.
        assert len(rank.agent.registered) == before - 2
        assert rank.agent.held == []
        rank.session = rank.handover = None
        rank.arena.shadows.clear()
        assert (slots(), arrived()) == (None, None)
    finally:
        gc.enable()


def test_small_reads_are_under_way_together(follower: Submit) -> None:
    """Each begins in the slot after the last one's."""
    rank = layer(limits=ROOMY)
    agent, target = rank.agent, rank.arena.shadows[0].buffer.bytes
    held = Bounce(agent, Cycle(), slots=SLOTS, slot_nbytes=SLOT_NBYTES)
    (source, *_) = rank.trainers.manifest.sources
    peer, address = agent.connect(source.metadata), source.slots[0][0].address
    one = np.array([8], dtype=np.int64)
    reads = [
        held.prepare_read(peer, 0, one * 0 + address, one * 0, target, one * n, one)
        for n in range(SLOTS + 1)
    ]
    agent.late = NEVER
    for read in reads:
        read.post()
    assert agent.active == SLOTS
    agent.late = 0
    while not all([read.done() for read in reads]):
        pass
    assert target[: 8 * SLOTS].any()
