# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's shadows as a source: which published boxes lie in them and where, and that
nothing is overwritten while somebody may be reading it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import (
    LeaseHeld,
    PeerUnsuitable,
    StagingCancelled,
    TransferFailed,
)
from dynamo.refit.manifest import ITEMSIZE, Box, Manifest
from dynamo.refit.protocol import HeldBlock
from dynamo.refit.rank import offer
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.offer import Offers, find_blocks, join
from dynamo.refit.rank.plan import Limits
from dynamo.refit.rank.slices import Parameter
from tests.support.drawn_layouts import layouts
from tests.support.fake_nixl import FakeTrainers
from tests.support.layouts import (
    ALWAYS_CONTIGUOUS,
    ALWAYS_EXACT,
    ROOMY,
    Layout,
    SourceMemory,
    decoder_layer,
    index,
    make_manifest,
    make_tensor,
    read,
    volume,
    whole,
)
from tests.support.peers import composed
from tests.support.rank import SMALL, Rank

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


# --- what is held -------------------------------------------------------------


def pulled(layout: Layout, number: int, trainers: FakeTrainers, **options) -> Rank:
    """A rank that has staged what ``trainers`` have in slot 0."""
    rank = Rank(layout, trainers, number, **options)
    with ThreadPoolExecutor(1) as pool:
        rank.pull(0, pool.submit)
    return rank


def blocks_of(rank: Rank) -> tuple[HeldBlock, ...]:
    return find_blocks(rank.session.plan, rank.arena.layout)


def held_bytes(rank: Rank, block: HeldBlock, dtype: str) -> bytes:
    """What a reader finds where ``block`` is said to be."""
    shadow = rank.arena.shadows[rank.arena.target].buffer.bytes
    end = block.byte_offset + volume(block.box) * ITEMSIZE[dtype]
    assert 0 <= block.byte_offset <= end <= shadow.numel()
    return shadow[block.byte_offset : end].numpy().tobytes()


def coverage(manifest: Manifest, boxes: Sequence[tuple[int, Box]]) -> list[np.ndarray]:
    """Per tensor, how often each element is in one of the different ``boxes``."""
    counts = [np.zeros(tensor.shape, dtype=int) for tensor in manifest.tensors]
    for tensor, box in set(boxes):
        counts[tensor][index(box)] += 1
    return counts


def share(layout: Layout, owners: Sequence[set[int]], rank: int) -> Layout:
    """What ``rank`` has of ``layout``: the parameters that it owns, whole."""
    mine = [p for p, own in zip(layout.parameters, owners, strict=True) if rank in own]
    names = {parameter.name for parameter in mine}
    slices = tuple(piece for piece in layout.slices if piece.parameter in names)
    return Layout(layout.manifest, tuple(mine), slices)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    layout=layouts().filter(lambda layout: layout.slices),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_ranks_hold_is_found_where_they_say_and_makes_up_what_they_read(
    data: st.DataObject, layout: Layout, seed: int
) -> None:
    """Any layout, its parameters spread and replicated over up to three ranks."""
    count = data.draw(st.integers(1, 3))
    some_ranks = st.sets(st.integers(0, count - 1), min_size=1)
    owners = [data.draw(some_ranks) for _ in layout.parameters]
    limits = data.draw(st.sampled_from([ROOMY, SMALL, Limits(0, 1), Limits(300, 24)]))
    costs = data.draw(st.sampled_from([ALWAYS_EXACT, ALWAYS_CONTIGUOUS]))
    runs = data.draw(st.sampled_from([1, 4, 512]))
    trainers = FakeTrainers(layout)
    full = layout.random_tensors(seed)
    trainers.write(0, full)
    tensors = layout.manifest.tensors
    ranks, held, was_read = [], [], []
    for number in range(count):
        mine = share(layout, owners, number)
        if not mine.slices:
            continue
        rank = pulled(mine, number, trainers, limits=limits, costs=costs)
        reads = rank.session.reads
        with mock.patch.object(offer, "MAX_RUNS", runs):
            try:
                blocks = blocks_of(rank)
            except PeerUnsuitable as error:
                # None of these tensors has more runs than that.
                assert runs < 512 or _converts_all_of_a_tensor(rank)
                assert error.tensor in {p.name for p in layout.parameters}
                return
        for block in blocks:
            expected = full[tensors[block.tensor].name][index(block.box)].tobytes()
            assert held_bytes(rank, block, tensors[block.tensor].dtype) == expected
        mine = [(block.tensor, block.box) for block in blocks]
        for found, wanted in zip(
            coverage(layout.manifest, mine),
            coverage(layout.manifest, reads),
            strict=True,
        ):
            assert (found == wanted).all()
        ranks.append(rank)
        held.append(blocks)
        was_read += mine

    counts = coverage(layout.manifest, was_read)
    complete = all((count == 1).all() for count in counts)
    if not complete:
        with pytest.raises(PeerUnsuitable) as refused:
            composed(layout.manifest, ranks, held)
        assert refused.value.tensor in {
            tensor.name
            for tensor, count in zip(tensors, counts, strict=True)
            if not (count == 1).all()
        }
        return
    manifest = composed(layout.manifest, ranks, held)
    assert [(t.name, t.dtype, t.shape) for t in manifest.tensors] == [
        (t.name, t.dtype, t.shape) for t in tensors
    ]


def _converts_all_of_a_tensor(rank: Rank) -> bool:
    """There is a tensor of which not all is held in a parameter of its dtype."""
    counts = coverage(
        rank.layout.manifest,
        [(p.tensor, p.box) for p in rank.session.plan.pieces if not p.converts],
    )
    reads = coverage(rank.layout.manifest, rank.session.reads)
    return any((a < b).any() for a, b in zip(counts, reads, strict=True))


@pytest.mark.parametrize("limits", [SMALL, ROOMY], ids=["small", "roomy"])
def test_two_ranks_of_a_decoder_layer_hold_it_all_in_few_boxes(limits: Limits) -> None:
    """Whatever a trainer's cuts and the waves were: a box per rank and tensor."""
    both = [decoder_layer(number) for number in range(2)]
    trainers = FakeTrainers(both[0])
    full = both[0].random_tensors(seed=1)
    trainers.write(0, full)
    ranks = [
        pulled(layout, number, trainers, limits=limits)
        for number, layout in enumerate(both)
    ]
    manifest = composed(trainers.manifest, ranks, [blocks_of(rank) for rank in ranks])

    assert all(len(tensor.shards) == 2 for tensor in manifest.tensors)
    (norm,) = (tensor for tensor in manifest.tensors if tensor.name == "norm")
    assert {shard.box for shard in norm.shards} == {((0, 32),)}
    assert [shard.source for shard in norm.shards] == [0, 1]


def one_parameter(dtype: str, held: str, transposed: bool = False) -> Rank:
    memory = SourceMemory()
    tensor = make_tensor(memory, "w", (12, 8), dtype=dtype)
    piece = read(tensor, "p")
    shape = (12, 8)
    if transposed:
        piece, shape = replace(piece, strides=(1, 12)), (8, 12)
    layout = Layout(
        make_manifest(tensor, memory=memory), (Parameter("p", shape, held),), (piece,)
    )
    return pulled(layout, 0, FakeTrainers(layout))


def test_a_parameter_of_another_dtype_is_refused_by_name() -> None:
    rank = one_parameter("float32", "bfloat16")
    with pytest.raises(PeerUnsuitable, match="published as float32") as refused:
        blocks_of(rank)
    assert refused.value.tensor == "p"


def test_a_transposed_parameter_is_served_in_few_runs_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = one_parameter("bfloat16", "bfloat16", transposed=True)
    assert len(blocks_of(rank)) == 96
    monkeypatch.setattr(offer, "MAX_RUNS", 95)
    with pytest.raises(PeerUnsuitable, match="over more than 95 places") as refused:
        blocks_of(rank)
    assert refused.value.tensor == "p"


def test_a_tensor_that_is_held_twice_is_served_from_where_it_is_as_published() -> None:
    memory = SourceMemory()
    tensor = make_tensor(memory, "embed", (12, 8), dtype="float32")
    layout = Layout(
        make_manifest(tensor, memory=memory),
        (
            Parameter("embed", (12, 8), "bfloat16"),
            Parameter("head", (12, 8), "float32"),
        ),
        (read(tensor, "embed"), read(tensor, "head")),
    )
    rank = pulled(layout, 0, FakeTrainers(layout))
    start = rank.arena.layout.offsets["head"]
    assert blocks_of(rank) == (HeldBlock(0, whole((12, 8)), start),)


@given(
    cuts=st.lists(st.sets(st.integers(1, 9), max_size=3), min_size=1, max_size=3),
    rows=st.sets(st.integers(1, 9), max_size=3),
)
def test_joined_boxes_are_one_again(cuts: list[set[int]], rows: set[int]) -> None:
    """Columns, each cut into other rows."""

    def spans(inner: set[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *sorted(inner), 10]))

    columns = list(itertools.pairwise([0, *range(2, 2 * len(cuts), 2), 10]))
    parts = {
        (row, column)
        for column, inner in zip(columns, cuts, strict=False)
        for row in spans(inner)
    }
    assert join(parts) == [((0, 10), (0, 10))]
    assert join({(span,) for span in spans(rows)}) == [((0, 10),)]
    assert join({((0, 1),), ((2, 3),)}) == [((0, 1),), ((2, 3),)]
    assert join({()}) == [()]


# --- who reads ----------------------------------------------------------------


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
