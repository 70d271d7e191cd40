# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Plans executed on bytes: whatever the sharding, the slices and the costs, the
arena holds exactly what the engine's loader would have put there."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.manifest import Manifest, Region, TensorEntry, align
from dynamo.refit.rank.limits import COST, Limits, TransferCost
from dynamo.refit.rank.plan import Scratch
from dynamo.refit.rank.slices import Parameter, ReadSlice
from tests.support.drawn_layouts import layouts
from tests.support.layouts import (
    ALWAYS_CONTIGUOUS,
    ALWAYS_EXACT,
    HEAD,
    HEADS,
    HIDDEN,
    PADDED,
    Layout,
    SourceMemory,
    decoder_layer,
    make_manifest,
    make_tensor,
    one_slice,
    read,
    whole,
)
from tests.support.plans import FakeTransport, arena_of, boxes_of, check_plan

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

COSTS = [ALWAYS_EXACT, ALWAYS_CONTIGUOUS, None]

#: What a live parameter holds before a version comes into it.
OLD = 0x5A


def _some_limits() -> st.SearchStrategy[Limits]:
    return st.builds(
        Limits,
        scratch=st.sampled_from([0, 3, 40, 256, 700, 1 << 30]),
        arena=st.sampled_from([None, 1, 7, 24, 100, 1 << 30]),
    )


@settings(max_examples=300, deadline=None)
@given(
    layout=layouts(),
    rank=st.integers(0, 3),
    limits=_some_limits(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_plan_stages_the_bytes_that_the_loader_would(
    layout: Layout, rank: int, limits: Limits, seed: int
) -> None:
    slots = [layout.random_tensors(seed), layout.random_tensors(seed + 1)]
    transport = FakeTransport(layout.manifest, slots)
    expected = [layout.loaded(tensors) for tensors in slots]
    plans = []
    for costs in COSTS:
        plan = layout.plan(costs=costs, limits=limits, rank=rank)
        check_plan(plan, layout, limits, rank)
        for slot, parameters in enumerate(expected):
            staged = transport.stage(plan, slot)
            np.testing.assert_array_equal(staged, arena_of(plan, parameters))
        plans.append(plan)

    exact, contiguous, _ = plans
    assert all(
        piece.converts
        for wave in exact.waves
        if wave.half in (0, 1)
        for piece in wave.pieces
    )
    assert contiguous.descriptors <= exact.descriptors


@settings(max_examples=100, deadline=None)
@given(layout=layouts(), limits=_some_limits())
def test_ranks_that_read_the_same_boxes_read_the_same_blocks(
    layout: Layout, limits: Limits
) -> None:
    """However they read them: a proof over ranks compares block with block."""
    plans = [
        layout.plan(costs=costs, limits=limits, rank=rank)
        for rank, costs in itertools.product(range(3), COSTS)
    ]

    assert all(boxes_of(plan) == boxes_of(plans[0]) for plan in plans)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), limits=_some_limits(), seed=st.integers(0, 2**32 - 1))
def test_a_plan_holds_for_every_set_of_addresses_of_its_layout(
    layout: Layout, limits: Limits, seed: int
) -> None:
    moved = _moved(layout.manifest)
    assert moved.layout_fingerprint() == layout.manifest.layout_fingerprint()
    slots = [layout.random_tensors(seed + slot) for slot in range(2)]
    transport = FakeTransport(moved, slots)

    for costs in (ALWAYS_EXACT, ALWAYS_CONTIGUOUS):
        plan = layout.plan(costs=costs, limits=limits)
        for slot, tensors in enumerate(slots):
            expected = arena_of(plan, layout.loaded(tensors))
            np.testing.assert_array_equal(transport.stage(plan, slot), expected)


def _moved(manifest: Manifest) -> Manifest:
    """The same layout in other memory: a trainer that has started again."""
    tensors = tuple(
        msgspec.structs.replace(
            tensor,
            shards=tuple(
                msgspec.structs.replace(shard, byte_offset=shard.byte_offset + 13)
                for shard in tensor.shards
            ),
        )
        for tensor in manifest.tensors
    )
    sources = tuple(
        msgspec.structs.replace(
            source,
            slots=tuple(
                tuple(Region(r.address + (1 << 33), r.nbytes + 13) for r in regions)
                for regions in reversed(source.slots)
            ),
        )
        for source in manifest.sources
    )
    moved = msgspec.structs.replace(manifest, tensors=tensors, sources=sources)
    moved.validate()
    return moved


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("costs", COSTS, ids=["exact", "contiguous", "default"])
@pytest.mark.parametrize(
    "limits",
    [Limits(1, 1), Limits(4096), Limits(4096, 512), Limits(1 << 20)],
    ids=["rows", "small", "smaller", "roomy"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_decoder_layer_arrives_on_either_rank(
    rank: int, costs: dict[str, TransferCost] | None, limits: Limits, dtype: str
) -> None:
    layout = decoder_layer(rank, dtype=dtype)
    plan = layout.plan(costs=costs, limits=limits, rank=rank)
    check_plan(plan, layout, limits, rank)

    tensors = layout.random_tensors(seed=rank)
    staged = FakeTransport(layout.manifest, [tensors]).stage(plan, 0)
    expected = layout.loaded(tensors)
    np.testing.assert_array_equal(staged, arena_of(plan, expected))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_expected_decoder_layer_in_the_words_of_the_model(rank: int) -> None:
    """So that what plans are compared with is not wrong itself."""
    layout = decoder_layer(rank)
    tensors = layout.random_tensors(seed=rank)
    expected = layout.loaded(tensors)

    half = HEADS * HEAD // 2
    embedding = np.zeros((PADDED // 2, HIDDEN), dtype=np.uint16)
    rows = tensors["embed"][rank * PADDED // 2 :][: PADDED // 2]
    embedding[: len(rows)] = rows
    by_hand = {
        "qkv": np.concatenate([np.split(tensors[n], 2)[rank] for n in "qkv"]),
        "o": tensors["o"][:, rank * half : (rank + 1) * half],
        "embed": embedding,
    }
    for name, values in by_hand.items():
        assert expected[name].tobytes() == values.tobytes(), name


# What the cost rule picks.


def test_short_rows_of_a_row_parallel_weight_are_pulled_as_one_span() -> None:
    """A 4096 x 4096 o_proj on the second of two ranks: 4096 rows of 4 KB."""
    layout = one_slice((4096, 4096), ((0, 4096), (2048, 4096)))
    limits = Limits(scratch=64 << 20)
    plan = layout.plan(limits=limits)

    nbytes, span = 4096 * 2048 * 2, (4095 * 4096 + 2048) * 2
    assert COST["DRAM"].contiguous(span, nbytes) < COST["DRAM"].exact(4096, nbytes)
    assert (plan.nbytes, plan.wire_nbytes, plan.descriptors) == (nbytes, span, 1)
    assert plan.scratch_nbytes == align(span)
    (wave,) = plan.waves
    (piece,) = wave.pieces
    assert (wave.half, piece.box) == (0, ((0, 4096), (2048, 4096)))
    assert piece.scratch == Scratch(start=0, strides=(4096, 1))
    assert (piece.parameter, piece.offset, piece.strides) == ("w", 0, (2048, 1))
    assert not piece.converts
    assert wave.segments[0].remote.tolist() == [4096]
    check_plan(plan, layout, limits)


def test_a_column_slice_of_few_long_rows_is_read_exactly() -> None:
    """8 rows of 2 MB: the other half of each would cost more than 7 descriptors."""
    layout = one_slice((8, 1 << 21), ((0, 8), (1 << 20, 1 << 21)))
    plan = layout.plan()

    nbytes, span = 8 << 21, (7 << 22) + (1 << 21)
    assert COST["DRAM"].exact(8, nbytes) < COST["DRAM"].contiguous(span, nbytes)
    assert (plan.nbytes, plan.wire_nbytes, plan.descriptors) == (nbytes, nbytes, 8)
    assert plan.scratch_nbytes == 0
    (wave,) = plan.waves
    assert (wave.half, [piece.scratch for piece in wave.pieces]) == (None, [None])
    (segments,) = wave.segments
    assert segments.remote.tolist() == [(1 << 21) + (row << 22) for row in range(8)]
    assert segments.local.tolist() == [row << 21 for row in range(8)]
    assert segments.nbytes.tolist() == [1 << 21] * 8


def test_the_memory_of_the_source_decides_by_its_own_cost() -> None:
    """The same slice out of VRAM: there a descriptor costs as much as 7 MB."""
    box = ((0, 8), (1 << 20, 1 << 21))
    plan = one_slice((8, 1 << 21), box, memory="VRAM").plan()

    assert plan.descriptors == 1
    assert plan.wire_nbytes == (7 << 22) + (1 << 21)


def test_the_rule_decides_for_every_shard() -> None:
    """Four FSDP shards of a row-parallel weight are four spans."""
    layout = one_slice((4096, 4096), ((0, 4096), (0, 2048)), parts=4)
    plan = layout.plan()

    (wave,) = plan.waves
    assert [s.source for s in wave.segments] == [0, 1, 2, 3]
    assert plan.descriptors == len(wave.pieces) == 4
    assert [piece.box[0] for piece in wave.pieces] == [
        (0, 1024),
        (1024, 2048),
        (2048, 3072),
        (3072, 4096),
    ]


@pytest.mark.parametrize(("reslice_seconds", "descriptors"), [(2.9, 1), (3.1, 4)])
def test_the_local_copy_is_part_of_the_cost(
    reslice_seconds: float, descriptors: int
) -> None:
    """Four descriptors of a second each, or one and a local copy."""
    layout = one_slice((4, 8), ((0, 4), (0, 4)))
    cost = TransferCost(1.0, 1e18, 4 * 4 * 2 / reslice_seconds)

    assert layout.plan(costs={"DRAM": cost}).descriptors == descriptors


def test_dimensions_of_one_index_do_not_cut_a_run() -> None:
    """What ``select`` drops has no stride in the destination: ``w[0, 2]`` is one run,
    and so are rows on both sides of a dimension of one, as in ``w[:, 0]``."""
    memory = SourceMemory()
    tensor = make_tensor(memory, "w", (1, 3, 8))
    piece = ReadSlice("w", ((0, 1), (2, 3), (0, 8)), "w", 0, (0, 0, 1))
    manifest = make_manifest(tensor, memory=memory)
    layout = Layout(manifest, (Parameter("w", (8,), "bfloat16"),), (piece,))
    flat = make_tensor(memory, "w", (4, 1, 8))
    squeezed = ReadSlice("w", ((0, 4), (0, 1), (0, 8)), "w", 0, (8, 0, 1))
    stack = Layout(
        make_manifest(flat, memory=memory),
        (Parameter("w", (4, 8), "bfloat16"),),
        (squeezed,),
    )

    for made in (layout, stack):
        plan = made.plan(costs=ALWAYS_EXACT)
        assert plan.descriptors == 1
        check_plan(plan, made, Limits(scratch=0))


@pytest.mark.parametrize("costs", [ALWAYS_EXACT, ALWAYS_CONTIGUOUS])
def test_a_slice_that_is_one_run_is_never_cut_out_locally(
    costs: dict[str, TransferCost],
) -> None:
    plan = one_slice((64, 16), ((16, 48), (0, 16))).plan(costs=costs)

    assert (plan.descriptors, plan.scratch_nbytes) == (1, 0)
    assert plan.wire_nbytes == plan.nbytes == 32 * 16 * 2


# Conversions.


def test_what_is_converted_comes_through_scratch_however_it_lies() -> None:
    layout = one_slice((4, 8), whole((4, 8)), dtype="float32", held="bfloat16")
    plan = layout.plan(costs=ALWAYS_EXACT)

    (wave,) = plan.waves
    (piece,) = wave.pieces
    assert wave.half == 0
    assert (piece.dtype, piece.converts) == ("float32", True)
    assert (plan.nbytes, plan.wire_nbytes) == (4 * 8 * 4, 4 * 8 * 4)
    assert plan.arena.nbytes == align(4 * 8 * 2)


def test_exact_runs_of_what_is_converted_are_packed() -> None:
    """Four runs of 16 bytes, of rows of 32."""
    layout = one_slice((4, 8), ((0, 4), (4, 8)), dtype="float32", held="bfloat16")
    plan = layout.plan(costs=ALWAYS_EXACT)

    (wave,) = plan.waves
    (piece,) = wave.pieces
    assert piece.scratch == Scratch(start=0, strides=(4, 1))
    assert wave.segments[0].local.tolist() == [0, 16, 32, 48]
    assert plan.wire_nbytes == plan.nbytes == 64


# Waves and their limits.


def _five_spans() -> Layout:
    """Five spans of 84 bytes, which take 256 of scratch each."""
    memory = SourceMemory()
    tensors = [make_tensor(memory, f"w{i}", (4, 12)) for i in range(5)]
    return Layout(
        make_manifest(*tensors, memory=memory),
        tuple(Parameter(t.name, (4, 6), "bfloat16") for t in tensors),
        tuple(read(t, t.name, ((0, 4), (0, 6))) for t in tensors),
    )


@pytest.mark.parametrize(
    ("scratch", "pieces"),
    [
        (84, [1] * 5),
        (511, [1] * 5),
        (512, [2, 2, 1]),
        (1280, [5]),
        (1 << 30, [5]),
        # Two rows and what is between them: 24 + 12 bytes.
        (83, [1] * 10),
        (0, [1] * 20),
    ],
)
def test_scratch_limits_what_is_in_flight(scratch: int, pieces: list[int]) -> None:
    layout, limits = _five_spans(), Limits(scratch)
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, limits=limits)

    assert [len(wave.pieces) for wave in plan.waves] == pieces
    assert plan.scratch_nbytes == 256 * max(pieces) * min(2, len(pieces))
    check_plan(plan, layout, limits)


def test_a_limit_counts_the_gaps_between_rows() -> None:
    """The last of eight ranks of a row-parallel weight reads 16 bytes of each row of
    128: a span is eight times what is wanted of it."""
    layout = one_slice((64, 64), ((0, 64), (56, 64)))
    limits = Limits(scratch=1024)
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, limits=limits)

    # 7 rows and the part of the eighth: 7 * 128 + 16 bytes.
    assert [wave.segments[0].nbytes.tolist() for wave in plan.waves] == [[912]] * 8
    assert plan.scratch_nbytes == 2 * 1024
    check_plan(plan, layout, limits)


def test_a_single_row_may_exceed_the_limit() -> None:
    layout = one_slice((3, 64), whole((3, 64)), dtype="float32", held="bfloat16")
    plan = layout.plan(limits=Limits(scratch=100, arena=100))

    assert [piece.box[0] for piece in plan.pieces] == [(0, 1), (1, 2), (2, 3)]
    assert plan.scratch_nbytes == 2 * 256


@pytest.mark.parametrize(
    ("arena", "nbytes"),
    [
        (None, [512]),
        (512, [512]),
        (511, [496, 16]),
        (128, [128] * 4),
        (100, [96, 96, 96, 96, 96, 32]),
        (1, [16] * 32),
    ],
)
def test_the_arena_limits_waves_straight_into_it(
    arena: int | None, nbytes: list[int]
) -> None:
    """32 rows of 16 bytes."""
    layout = one_slice((32, 8), whole((32, 8)))
    limits = Limits(1 << 20, arena)
    plan = layout.plan(limits=limits)

    read = [sum(int(s.nbytes.sum()) for s in wave.segments) for wave in plan.waves]
    assert read == nbytes
    assert plan.scratch_nbytes == 0
    check_plan(plan, layout, limits)


def test_straight_waves_come_first_and_without_a_limit_as_one() -> None:
    layout = decoder_layer(0)
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, limits=Limits(scratch=4096))

    # o (2 shards of 16 rows of 32) and down (2 of 16 rows of 48), in bfloat16.
    assert [wave.half for wave in plan.waves] == [None, 0, 1]
    assert {p.parameter for p in plan.waves[0].pieces} == {
        "qkv",
        "gate_up",
        "norm",
        "embed",
    }


# Replicas.


def test_ranks_take_turns_at_replicas() -> None:
    memory = SourceMemory(sources=3)
    box = whole((4, 4))
    shards = tuple(memory.place(box, "bfloat16", source=i) for i in (2, 0, 1))
    tensor = TensorEntry(name="w", dtype="bfloat16", shape=(4, 4), shards=shards)
    layout = Layout(
        make_manifest(tensor, memory=memory),
        (Parameter("w", (4, 4), "bfloat16"),),
        (read(tensor, "w"),),
    )
    plans = [layout.plan(rank=rank) for rank in range(4)]

    assert [plan.waves[0].segments[0].source for plan in plans] == [2, 0, 1, 2]
    assert [plan.descriptors for plan in plans] == [1] * 4
    assert [plan.wire_nbytes for plan in plans] == [32] * 4
