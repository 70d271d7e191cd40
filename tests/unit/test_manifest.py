# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Manifests as data: what is refused and by which words, and what a fingerprint
stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit import manifest as manifest_module
from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.manifest import (
    ITEMSIZE,
    MAX_BOXES,
    MAX_TENSORS,
    Box,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
    tiling_fault,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

NAME = "model.layers.0.mlp.down_proj.weight"


def _source(*slots: Sequence[int], agent: str = "trainer-0") -> Source:
    """A source whose slots have regions of the given sizes."""
    addresses = itertools.count(0x7F00_0000_0000, 1 << 32)
    return Source(
        agent=agent,
        metadata=b"\x00nixl\xff",
        memory="DRAM",
        device=0,
        slots=tuple(tuple(Region(next(addresses), n) for n in slot) for slot in slots),
    )


def _shard(
    offset: Sequence[int],
    shape: Sequence[int],
    *,
    source: int = 0,
    region: int = 0,
    byte_offset: int = 0,
) -> Shard:
    return Shard(
        source=source,
        region=region,
        byte_offset=byte_offset,
        offset=tuple(offset),
        shape=tuple(shape),
    )


def _tensor(
    *shards: Shard,
    name: str = NAME,
    dtype: str = "bfloat16",
    shape: Sequence[int] = (4, 6),
) -> TensorEntry:
    return TensorEntry(name=name, dtype=dtype, shape=tuple(shape), shards=shards)


def _manifest(*tensors: TensorEntry, sources: Sequence[Source] = ()) -> Manifest:
    return Manifest(
        model="tiny",
        tensors=tensors,
        sources=tuple(sources) or (_source([1 << 20]),),
    )


#: Two halves of a 4 x 6 tensor, the second after the first.
UPPER = _shard((0, 0), (2, 6))
LOWER = _shard((2, 0), (2, 6), byte_offset=24)


@pytest.fixture
def manifest() -> Manifest:
    """Two sources of two slots and two regions; one tensor of two shards, one a
    scalar with a replica."""
    sources = [_source([64, 32], [64, 32], agent=f"trainer-{i}") for i in range(2)]
    scalar = _tensor(
        _shard((), (), source=0, region=1, byte_offset=4),
        _shard((), (), source=1, region=1),
        name="model.norm.scale",
        dtype="float32",
        shape=(),
    )
    halves = _tensor(UPPER, msgspec.structs.replace(LOWER, source=1))
    return _manifest(halves, scalar, sources=sources)


def _refusal(manifest: Manifest) -> tuple[str | None, str]:
    with pytest.raises(ManifestInvalid) as caught:
        manifest.validate()
    return caught.value.tensor, str(caught.value)


# What is accepted.


def test_sharded_and_replicated_tensors_are_accepted(manifest: Manifest) -> None:
    manifest.validate()

    assert manifest.slots == 2
    assert manifest.nbytes == 4 * 6 * 2 + 4


def test_replicas_are_counted_once() -> None:
    whole = [_shard((0, 0), (4, 6), byte_offset=48 * i) for i in range(3)]

    _manifest(_tensor(*whole)).validate()


def test_a_replica_of_one_of_two_shards_is_accepted() -> None:
    again = msgspec.structs.replace(UPPER, byte_offset=100)

    _manifest(_tensor(UPPER, LOWER, again)).validate()


def test_the_last_byte_of_a_region_may_be_used() -> None:
    _manifest(_tensor(UPPER, LOWER), sources=[_source([48])]).validate()


def test_a_shard_lies_at_its_offset_of_its_region_in_every_slot(
    manifest: Manifest,
) -> None:
    (a0, b0), (a1, b1) = manifest.sources[0].slots
    (c0, d0), (c1, d1) = manifest.sources[1].slots

    first = [a0.address, c0.address + 24, b0.address + 4, d0.address]
    second = [a1.address, c1.address + 24, b1.address + 4, d1.address]
    assert manifest.shard_addresses(0) == first
    assert manifest.shard_addresses(1) == second


# What is refused.


def test_no_tensors_are_refused() -> None:
    tensor, cause = _refusal(_manifest())

    assert tensor is None
    assert "at least one tensor" in cause


def test_no_sources_are_refused() -> None:
    empty = Manifest(model="tiny", tensors=(_tensor(UPPER, LOWER),), sources=())

    assert _refusal(empty) == (
        None,
        "a manifest needs at least one tensor and one source",
    )


def test_a_name_that_occurs_twice_is_refused() -> None:
    other = _tensor(UPPER, LOWER, name="other")
    tensor, cause = _refusal(
        _manifest(_tensor(UPPER, LOWER), other, _tensor(UPPER, LOWER))
    )

    assert tensor == NAME
    assert cause == "the name occurs twice"


@pytest.mark.parametrize("dtype", ["complex64", "torch.bfloat16", ""])
def test_an_unknown_dtype_is_refused(dtype: str) -> None:
    tensor, cause = _refusal(_manifest(_tensor(UPPER, LOWER, dtype=dtype)))

    assert tensor == NAME
    assert f"dtype {dtype!r} is not one of" in cause
    assert "bfloat16" in cause


def test_shards_that_overlap_are_refused() -> None:
    # Element counts alone would pass: the overlap is as large as the gap.
    left, right = _shard((0, 0), (4, 3)), _shard((0, 2), (4, 3), byte_offset=24)
    tensor, cause = _refusal(_manifest(_tensor(left, right)))

    assert tensor == NAME
    assert cause == (
        "its shards ((0, 4), (0, 3)) and ((0, 4), (2, 5)) overlap"  # the column 2
    )


def test_a_shard_inside_another_is_refused() -> None:
    inner = _shard((1, 1), (2, 2), byte_offset=48)
    tensor, cause = _refusal(_manifest(_tensor(_shard((0, 0), (4, 6)), inner)))

    assert tensor == NAME
    assert "((0, 4), (0, 6)) and ((1, 3), (1, 3)) overlap" in cause


def test_a_gap_between_shards_is_refused() -> None:
    tensor, cause = _refusal(
        _manifest(_tensor(UPPER, _shard((3, 0), (1, 6), byte_offset=24)))
    )

    assert tensor == NAME
    assert cause == "its shards hold 18 of 24 elements"


def test_a_tensor_without_shards_is_refused() -> None:
    tensor, cause = _refusal(_manifest(_tensor()))

    assert tensor == NAME
    assert cause == "its shards hold 0 of 24 elements"


def test_a_scalar_without_shards_is_refused() -> None:
    tensor, cause = _refusal(_manifest(_tensor(shape=())))

    assert tensor == NAME
    assert cause == "its shards hold 0 of 1 elements"


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((2, 0), (3, 6)), ((2, 1), (2, 6)), ((4, 0), (1, 6)), ((-1, 0), (2, 6))],
)
def test_a_shard_that_reaches_out_of_the_tensor_is_refused(
    offset: tuple[int, int], shape: tuple[int, int]
) -> None:
    tensor, cause = _refusal(_manifest(_tensor(UPPER, _shard(offset, shape))))

    assert tensor == NAME
    assert "reaches out of (4, 6)" in cause
    assert f"(({offset[0]}, {offset[0] + shape[0]})" in cause


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (-1, 6)])
def test_an_empty_shard_is_refused(shape: tuple[int, int]) -> None:
    tensor, cause = _refusal(_manifest(_tensor(UPPER, LOWER, _shard((1, 0), shape))))

    assert tensor == NAME
    assert "is empty or reaches out of (4, 6)" in cause


def test_an_empty_tensor_with_its_empty_shard_is_refused() -> None:
    tensor, cause = _refusal(_manifest(_tensor(_shard((0,), (0,)), shape=(0,))))

    assert tensor == NAME
    assert "is empty" in cause


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((0,), (24,)), ((0, 0, 0), (1, 4, 6)), ((0, 0), (24,)), ((0,), (4, 6))],
)
def test_a_shard_with_a_wrong_number_of_dimensions_is_refused(
    offset: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    tensor, cause = _refusal(_manifest(_tensor(_shard(offset, shape))))

    assert tensor == NAME
    assert cause == f"a shard of {len(shape)} dimensions in a tensor of 2"


@pytest.mark.parametrize("number", [1, 7, -1])
def test_a_source_number_that_does_not_exist_is_refused(number: int) -> None:
    tensor, cause = _refusal(_manifest(_tensor(_shard((0, 0), (4, 6), source=number))))

    assert tensor == NAME
    assert cause == f"no source number {number}"


@pytest.mark.parametrize("number", [2, -1])
def test_a_region_number_that_does_not_exist_is_refused(number: int) -> None:
    lost = _tensor(_shard((0, 0), (4, 6), region=number))
    tensor, cause = _refusal(_manifest(lost, sources=[_source([48, 48])]))

    assert tensor == NAME
    assert cause == f"no region number {number}"


def test_region_numbers_are_those_of_the_shards_own_source() -> None:
    lost = _tensor(_shard((0, 0), (4, 6), source=1, region=1))
    sources = [_source([48, 48]), _source([48])]
    tensor, cause = _refusal(_manifest(lost, sources=sources))

    assert tensor == NAME
    assert cause == "no region number 1"


@pytest.mark.parametrize("byte_offset", [1, 48, -2])
def test_bytes_outside_the_region_are_refused(byte_offset: int) -> None:
    outside = _tensor(_shard((0, 0), (4, 6), byte_offset=byte_offset))
    tensor, cause = _refusal(_manifest(outside, sources=[_source([48])]))

    assert tensor == NAME
    assert cause == (
        f"the shard's bytes [{byte_offset}, {byte_offset + 48}) are outside its "
        "registered region of 48 bytes"
    )


def test_bytes_are_counted_by_the_dtype() -> None:
    wide = _tensor(_shard((0, 0), (4, 6)), dtype="float32")
    tensor, cause = _refusal(_manifest(wide, sources=[_source([95])]))

    assert tensor == NAME
    assert "[0, 96)" in cause


def test_the_second_tensor_is_named_when_the_first_is_sound() -> None:
    tensor, _ = _refusal(_manifest(_tensor(UPPER, LOWER), _tensor(name="lost")))

    assert tensor == "lost"


@pytest.mark.parametrize("counts", [(1, 2), (2, 1)])
def test_sources_with_unequal_numbers_of_slots_are_refused(
    counts: tuple[int, int],
) -> None:
    sources = [
        _source(*[[64]] * count, agent=f"trainer-{i}") for i, count in enumerate(counts)
    ]
    tensor, cause = _refusal(_manifest(_tensor(UPPER, LOWER), sources=sources))

    assert tensor is None
    assert cause == (
        f"source 'trainer-1' has {counts[1]} slots, the first one {counts[0]}"
    )


def test_a_source_without_slots_is_refused() -> None:
    tensor, cause = _refusal(_manifest(_tensor(UPPER, LOWER), sources=[_source()]))

    assert tensor is None
    assert "'trainer-0' has 0 slots" in cause


@pytest.mark.parametrize("other", [[63], [64, 64], []])
def test_slots_that_differ_in_their_regions_are_refused(other: list[int]) -> None:
    source = _source([64], other)
    tensor, cause = _refusal(_manifest(_tensor(UPPER, LOWER), sources=[source]))

    assert tensor is None
    assert cause == "source 'trainer-0': its slots differ in size"


# What is too much.


def _rows(number: int) -> TensorEntry:
    """A tensor of ``number`` rows of one byte, each one a shard."""
    shards = [_shard((row, 0), (1, 1), byte_offset=row) for row in range(number)]
    return _tensor(*shards, dtype="int8", shape=(number, 1))


def test_too_many_tensors_are_refused_before_they_are_looked_at() -> None:
    unsound = _tensor(dtype="nonsense")
    tensor, cause = _refusal(_manifest(*[unsound] * (MAX_TENSORS + 1)))

    assert tensor is None
    assert cause == "200001 tensors, at most 200000 are read"


def test_as_many_tensors_as_may_be_are_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(manifest_module, "MAX_TENSORS", 2)
    tensors = [_tensor(UPPER, LOWER, name=name) for name in "abc"]

    _manifest(*tensors[:2]).validate()
    assert _refusal(_manifest(*tensors)) == (None, "3 tensors, at most 2 are read")


def test_too_many_shards_of_one_tensor_are_refused() -> None:
    tensor, cause = _refusal(_manifest(_rows(MAX_BOXES + 1)))

    assert tensor == NAME
    assert cause == (
        "it lies in 4097 different shards, at most 4096 are read: publish larger blocks"
    )


@pytest.mark.timeout(20)
def test_as_many_shards_as_may_be_are_accepted_with_replicas() -> None:
    rows = _rows(MAX_BOXES)
    again = msgspec.structs.replace(rows, shards=(*rows.shards, *rows.shards))

    _manifest(again).validate()


@pytest.mark.timeout(20)
def test_one_of_many_shards_that_overlaps_is_named() -> None:
    rows = _rows(MAX_BOXES)
    last = _shard((4094, 0), (2, 1), byte_offset=4094)
    tensor, cause = _refusal(
        _manifest(msgspec.structs.replace(rows, shards=(*rows.shards[:-1], last)))
    )

    assert tensor == NAME
    assert cause == (
        "its shards ((4094, 4095), (0, 1)) and ((4094, 4096), (0, 1)) overlap"
    )


# What a fingerprint stands for.


def _with_tensor(manifest: Manifest, **changes: Any) -> Manifest:
    first, *others = manifest.tensors
    changed = msgspec.structs.replace(first, **changes)
    return msgspec.structs.replace(manifest, tensors=(changed, *others))


def _with_shard(manifest: Manifest, **changes: Any) -> Manifest:
    first, *others = manifest.tensors[0].shards
    changed = msgspec.structs.replace(first, **changes)
    return _with_tensor(manifest, shards=(changed, *others))


def _with_source(manifest: Manifest, **changes: Any) -> Manifest:
    first, *others = manifest.sources
    changed = msgspec.structs.replace(first, **changes)
    return msgspec.structs.replace(manifest, sources=(changed, *others))


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "trainer-9"},
        {"metadata": b"another"},
        {"device": 3},
        {"slots": ((Region(1 << 20, 64), Region(1 << 21, 32)),) * 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_agents_and_addresses_are_no_part_of_the_layout(
    manifest: Manifest, changes: dict[str, Any]
) -> None:
    other = _with_source(manifest, **changes)
    other.validate()

    assert other.layout_fingerprint() == manifest.layout_fingerprint()
    assert other.fingerprint() != manifest.fingerprint()


def test_a_place_in_a_region_is_no_part_of_the_layout(manifest: Manifest) -> None:
    other = _with_shard(manifest, byte_offset=16)
    other.validate()

    assert other.layout_fingerprint() == manifest.layout_fingerprint()
    assert other.fingerprint() != manifest.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"dtype": "float16"}, {"shape": (6, 4)}],
    ids=lambda changes: next(iter(changes)),
)
def test_names_dtypes_and_shapes_are_part_of_the_layout(
    manifest: Manifest, changes: dict[str, Any]
) -> None:
    other = _with_tensor(manifest, **changes)

    assert other.layout_fingerprint() != manifest.layout_fingerprint()
    assert other.fingerprint() != manifest.fingerprint()


@pytest.mark.parametrize(
    "changes",
    [{"source": 1}, {"offset": (1, 0)}, {"shape": (1, 6)}],
    ids=lambda changes: next(iter(changes)),
)
def test_boxes_and_who_serves_them_are_part_of_the_layout(
    manifest: Manifest, changes: dict[str, Any]
) -> None:
    other = _with_shard(manifest, **changes)

    assert other.layout_fingerprint() != manifest.layout_fingerprint()


def test_the_order_of_shards_is_part_of_the_layout(manifest: Manifest) -> None:
    """A plan numbers the shards: another order is another plan."""
    other = _with_tensor(manifest, shards=manifest.tensors[0].shards[::-1])

    assert other.layout_fingerprint() != manifest.layout_fingerprint()


def test_a_fingerprint_holds_across_msgpack(manifest: Manifest) -> None:
    payload = msgspec.msgpack.encode(manifest)
    decoded = msgspec.msgpack.decode(payload, type=Manifest)

    assert decoded == manifest
    assert decoded.sources[0].metadata == b"\x00nixl\xff"
    assert decoded.fingerprint() == manifest.fingerprint()
    assert decoded.layout_fingerprint() == manifest.layout_fingerprint()
    decoded.validate()


# The same for manifests that nobody wrote by hand.


@dataclass(frozen=True)
class Sharding:
    """A manifest of one tensor, each of its boxes in one or more replicas."""

    manifest: Manifest
    boxes: int


@st.composite
def shardings(draw: st.DrawFn) -> Sharding:
    """A tensor cut into a grid; its shards in any order, in one region."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    dtype = draw(st.sampled_from(sorted(ITEMSIZE)))
    pieces = []
    for size in shape:
        cuts = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
        pieces.append(list(itertools.pairwise([0, *sorted(cuts), size])))
    boxes = list(itertools.product(*pieces))
    extra = draw(st.lists(st.sampled_from(boxes), max_size=2))
    shards, end = [], 0
    for box in draw(st.permutations(boxes + extra)):
        extent = [stop - start for start, stop in box]
        shards.append(_shard([lo for lo, _ in box], extent, byte_offset=end))
        end += math.prod(extent) * ITEMSIZE[dtype]
    tensor = _tensor(*shards, dtype=dtype, shape=shape)
    return Sharding(_manifest(tensor, sources=[_source([end])]), len(boxes))


@settings(max_examples=60, deadline=None)
@given(sharding=shardings())
def test_every_grid_of_shards_is_accepted_and_travels(sharding: Sharding) -> None:
    sharding.manifest.validate()

    payload = msgspec.msgpack.encode(sharding.manifest)
    assert msgspec.msgpack.decode(payload, type=Manifest) == sharding.manifest


@settings(max_examples=60, deadline=None)
@given(sharding=shardings(), data=st.data())
def test_a_grid_without_one_of_its_boxes_is_refused(
    sharding: Sharding, data: st.DataObject
) -> None:
    (tensor,) = sharding.manifest.tensors
    lost = data.draw(st.sampled_from(tensor.shards)).box
    left = tuple(shard for shard in tensor.shards if shard.box != lost)

    name, cause = _refusal(_with_tensor(sharding.manifest, shards=left))
    assert name == tensor.name
    assert cause.endswith(f"of {math.prod(tensor.shape)} elements")


@settings(max_examples=60, deadline=None)
@given(sharding=shardings().filter(lambda s: s.boxes > 1))
def test_a_grid_and_the_whole_tensor_are_refused(sharding: Sharding) -> None:
    (tensor,) = sharding.manifest.tensors
    whole = _shard([0] * len(tensor.shape), tensor.shape)
    sources = [_source([tensor.shards[-1].byte_offset + (1 << 16)])]
    both = _manifest(
        msgspec.structs.replace(tensor, shards=(*tensor.shards, whole)),
        sources=sources,
    )

    name, cause = _refusal(both)
    assert name == tensor.name
    assert cause.endswith("overlap")


# What tiles a shape.


@pytest.mark.parametrize(
    ("shape", "boxes", "fault"),
    [
        ((), [()], None),
        ((), [], "hold 0 of 1 elements"),
        ((3,), [((0, 1),), ((1, 3),)], None),
        ((3,), [((1, 3),), ((0, 2),)], "((1, 3),) and ((0, 2),) overlap"),
        ((3,), [((0, 1),), ((2, 3),)], "hold 2 of 3 elements"),
        ((2, 2), [((0, 1), (0, 2)), ((1, 2), (0, 2))], None),
        # They share rows and columns, but no element.
        (
            (2, 2),
            [((0, 1), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (0, 1)), ((1, 2), (1, 2))],
            None,
        ),
        # A pinwheel: no cut goes through all of it.
        (
            (3, 3),
            [
                ((0, 1), (0, 2)),
                ((0, 2), (2, 3)),
                ((2, 3), (1, 3)),
                ((1, 3), (0, 1)),
                ((1, 2), (1, 2)),
            ],
            None,
        ),
        (
            (3, 3),
            [((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1))],
            "hold 8 of 9 elements",
        ),
    ],
)
def test_what_keeps_boxes_from_tiling(
    shape: tuple[int, ...], boxes: list[Box], fault: str | None
) -> None:
    assert tiling_fault(shape, boxes) == fault


@st.composite
def boxes_inside(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and different boxes anywhere in it: mostly no tiling."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    side = [
        st.tuples(st.integers(0, size), st.integers(0, size))
        .filter(lambda ends: ends[0] != ends[1])
        .map(lambda ends: (min(ends), max(ends)))
        for size in shape
    ]
    return shape, draw(st.lists(st.tuples(*side), unique=True, max_size=5))


@settings(max_examples=300, deadline=None)
@given(drawn=boxes_inside())
def test_boxes_tile_if_each_element_is_in_one_of_them(
    drawn: tuple[tuple[int, ...], list[Box]],
) -> None:
    shape, boxes = drawn
    holders = np.zeros(shape, dtype=int)
    for box in boxes:
        holders[tuple(slice(*side) for side in box)] += 1

    fault = tiling_fault(shape, boxes)
    assert (fault is None) == (holders == 1).all()
    if fault is not None:
        assert fault.endswith("overlap") == (holders > 1).any()
