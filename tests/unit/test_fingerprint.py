# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints against a slow definition of their own, byte by byte in Python's
integers; what they add up over, and what they tell apart."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dynamo.refit import fingerprint
from dynamo.refit.fingerprint import Batch, Part, add_up, version_fingerprint
from dynamo.refit.manifest import ITEMSIZE, Box

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

DTYPES = sorted(ITEMSIZE)

ROW_SEED = 0x9E3779B97F4A7C15
COLUMN_SEED = 0xD1B54A32D192ED03


# --- the definition -----------------------------------------------------------


@functools.cache
def weight(place: int, seed: int) -> int:
    """The odd weight of a row, or of a column of 32-bit words."""
    x = (place + 1) * seed % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31 | 1


def defined(full: torch.Tensor, box: Box) -> int:
    """What the elements in ``box`` contribute to the fingerprint of ``full``.

    The last dimension makes a row of bytes, and four of them a word, the first one
    the lowest; the last word of a row may have fewer.
    """
    if full.dim() == 0:
        full, box = full.reshape(1), ((0, 1),)
    size = full.element_size()
    data = bytes_of(full)
    total = 0
    for place in itertools.product(*(range(*side) for side in box)):
        row, column = 0, place[-1]
        for index, extent in zip(place[:-1], full.shape[:-1], strict=True):
            row = row * extent + index
        first = (row * full.shape[-1] + column) * size
        for number, byte in enumerate(data[first : first + size]):
            word, low = divmod(column * size + number, 4)
            value = byte << 8 * low
            total += weight(row, ROW_SEED) * weight(word, COLUMN_SEED) * value
    return total % 2**64


def whole(full: torch.Tensor) -> Box:
    return tuple((0, size) for size in full.shape)


def fold(view: torch.Tensor, box: Box, shape: Sequence[int]) -> int:
    """The part by the fast way and by the reference; they must agree."""
    part = Part(view, box, tuple(shape))
    value = part.fold()
    assert type(value) is int
    assert 0 <= value < 2**64
    assert part.fold_by_torch() == value
    return value


def fold_whole(full: torch.Tensor) -> int:
    return fold(full, whole(full), full.shape)


# --- tensors of all kinds -----------------------------------------------------


def random_tensor(dtype: str, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Any bytes, so any NaN too; only booleans are 0 or 1."""
    generator = np.random.default_rng(seed)
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    data = generator.integers(0, 2 if dtype == "bool" else 256, nbytes, np.uint8)
    return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(tuple(shape))


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in its storage: its dimensions from the innermost, what is
    left free after and between their elements, and around them all."""

    order: tuple[int, ...]
    free: tuple[int, ...]
    steps: tuple[int, ...]
    before: int
    after_bytes: int


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    def numbers(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[st.integers(low, high)] * dims)

    row_major = tuple(reversed(range(dims)))
    return Layout(
        order=draw(st.just(row_major) | st.permutations(row_major).map(tuple)),
        free=draw(st.just((0,) * dims) | numbers(0, 3)),
        steps=draw(st.just((1,) * dims) | numbers(1, 2)),
        before=draw(st.integers(0, 5)),
        after_bytes=draw(st.integers(0, 5)),
    )


def laid_out(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view that equals ``values``, in a storage of which the rest is garbage."""
    strides = [0] * values.dim()
    elements = 1
    for dim in layout.order:
        strides[dim] = elements * layout.steps[dim]
        elements *= values.shape[dim] * layout.steps[dim] + layout.free[dim]
    elements += layout.before
    nbytes = elements * values.element_size()
    storage = torch.full((nbytes + layout.after_bytes,), 0xA5, dtype=torch.uint8)
    flat = storage[:nbytes].view(values.dtype)
    view = flat.as_strided(values.shape, strides, layout.before)
    view.copy_(values)
    assert view.untyped_storage().nbytes() == nbytes + layout.after_bytes
    return view


@st.composite
def tensors(
    draw: st.DrawFn, *, min_dims: int = 0, max_side: int = 7, dtypes: list[str] = DTYPES
) -> torch.Tensor:
    dtype = draw(st.sampled_from(dtypes))
    sides = st.integers(1, max_side)
    shape = draw(st.lists(sides, min_size=min_dims, max_size=4))
    return random_tensor(dtype, shape, draw(st.integers(0, 2**32)))


def cut(draw: st.DrawFn, shape: Sequence[int], cuts: int) -> list[Box]:
    """``shape`` in blocks, by up to ``cuts`` cuts through a block each."""
    boxes = [tuple((0, size) for size in shape)]
    for _ in range(cuts):
        ways = [
            (number, dim)
            for number, box in enumerate(boxes)
            for dim, (start, stop) in enumerate(box)
            if stop - start > 1
        ]
        if not ways:
            break
        number, dim = draw(st.sampled_from(ways))
        box = boxes.pop(number)
        start, stop = box[dim]
        middle = draw(st.integers(start + 1, stop - 1))
        for side in ((start, middle), (middle, stop)):
            boxes.append((*box[:dim], side, *box[dim + 1 :]))
    return boxes


def block(full: torch.Tensor, box: Box) -> torch.Tensor:
    return full[tuple(slice(*side) for side in box)]


# --- the definition holds -----------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(full=tensors(), data=st.data())
def test_a_fold_is_what_the_definition_says(
    full: torch.Tensor, data: st.DataObject
) -> None:
    view = laid_out(full, data.draw(layouts(full.dim())))
    assert fold(view, whole(full), full.shape) == defined(full, whole(full))


@settings(max_examples=300, deadline=None)
@given(full=tensors(min_dims=1), data=st.data())
def test_a_part_is_what_the_definition_says(
    full: torch.Tensor, data: st.DataObject
) -> None:
    """As a view of the full tensor, and copied to anywhere."""
    box = data.draw(st.sampled_from(cut(data.draw, full.shape, 3)))
    expected = defined(full, box)
    around = laid_out(full, data.draw(layouts(full.dim())))
    assert fold(block(around, box), box, full.shape) == expected
    alone = laid_out(block(full, box), data.draw(layouts(full.dim())))
    assert fold(alone, box, full.shape) == expected


@settings(max_examples=150, deadline=None)
@given(full=tensors(min_dims=1, max_side=9), cuts=st.integers(1, 8), data=st.data())
def test_parts_of_any_partition_add_up(
    full: torch.Tensor, cuts: int, data: st.DataObject
) -> None:
    parts = []
    for box in data.draw(st.permutations(cut(data.draw, full.shape, cuts))):
        view = laid_out(block(full, box), data.draw(layouts(full.dim())))
        parts.append(Part(view, box, tuple(full.shape)))
    values = Batch(parts).fold()
    assert values.dtype == np.uint64
    assert add_up(values.tolist()) == fold_whole(full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_one_element_add_up(dtype: str) -> None:
    """Down to parts of a word, for dtypes that are narrower."""
    full = random_tensor(dtype, (3, 11), seed=4)
    parts = [
        fold(full[:, i : i + 1], ((0, 3), (i, i + 1)), full.shape) for i in range(11)
    ]
    assert add_up(parts) == fold_whole(full) == defined(full, whole(full))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_rows_are_folded_alone_and_in_pairs(dtype: str, rows: int) -> None:
    full = random_tensor(dtype, (rows, 8), seed=rows)
    assert fold_whole(full) == defined(full, whole(full))
    assert fold_whole(full) == add_up(
        [fold(full[i : i + 1], ((i, i + 1), (0, 8)), full.shape) for i in range(rows)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_scalars_and_vectors_of_one_are_alike(dtype: str) -> None:
    scalar = random_tensor(dtype, (), seed=1)
    expected = defined(scalar, ())
    assert fold(scalar, (), ()) == expected
    assert fold(scalar.reshape(1), ((0, 1),), (1,)) == expected


def test_known_values_hold() -> None:
    """A publisher and a rank of different releases must agree: these never change."""
    words = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    halves = torch.arange(15, dtype=torch.int16).reshape(3, 5)
    assert fold_whole(torch.ones(1, dtype=torch.int32)) == (
        weight(0, ROW_SEED) * weight(0, COLUMN_SEED) % 2**64
    )
    assert weight(0, ROW_SEED) == 16294208416658607535
    assert weight(0, COLUMN_SEED) == 9370218965779684113
    assert fold_whole(words) == 14543736304795252658
    assert fold_whole(halves) == 10837234462315865069


def test_the_last_dimension_makes_the_columns() -> None:
    flat = random_tensor("int32", (24,), seed=2)
    folds = {
        fold_whole(flat.reshape(shape))
        for shape in [(24,), (24, 1), (4, 6), (6, 4), (2, 12)]
    }
    assert len(folds) == 5
    # How the rows are counted, in one dimension or in several, makes no difference.
    assert fold_whole(flat.reshape(2, 3, 4)) == fold_whole(flat.reshape(6, 4))
    assert fold_whole(flat.reshape(1, 4, 1, 6)) == fold_whole(flat.reshape(4, 6))


def test_a_part_reads_what_is_there_then() -> None:
    for shape in [(4, 8), (4, 7)]:
        full = random_tensor("bfloat16", shape, seed=3)
        part = Part(full, whole(full), full.shape)
        before = part.fold()
        full[1, 2] = 0
        assert part.fold() == defined(full, whole(full)) != before


@settings(max_examples=300, deadline=None)
@given(full=tensors(), data=st.data())
def test_a_copy_is_the_bytes_and_their_fold(
    full: torch.Tensor, data: st.DataObject
) -> None:
    """From anywhere to anywhere, and not a byte beside it."""
    box = data.draw(st.sampled_from(cut(data.draw, full.shape, 2)))
    values = block(full, box)
    source = laid_out(values, data.draw(layouts(full.dim())))
    target = laid_out(torch.zeros_like(values), data.draw(layouts(full.dim())))
    around = storage_of(target)
    part = Part(source, box, tuple(full.shape), copy_to=target)
    assert part.copy_and_fold() == defined(full, box)
    assert same_bytes(target, values)
    after = storage_of(target)
    target.zero_()
    assert torch.equal(storage_of(target), around)
    assert same_bytes(source, values)
    # Again, and only the copy.
    part.copy()
    assert torch.equal(storage_of(target), after)
    assert part.fold() == defined(full, box)


@pytest.mark.parametrize("shape", [(), (5,), (3, 8), (3, 7)])
def test_a_copy_converts_and_the_fold_is_of_the_source(shape: tuple[int, ...]) -> None:
    source = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) / 3
    target = torch.zeros(shape, dtype=torch.bfloat16)
    part = Part(source, whole(source), shape, copy_to=target)
    assert part.copy_and_fold() == defined(source, whole(source))
    assert torch.equal(target, source.bfloat16())


@pytest.mark.parametrize("copy", [False, True])
def test_a_batch_copies_what_was_chosen_and_only_when_asked(copy: bool) -> None:
    sources = [random_tensor("bfloat16", (4, 6), seed) for seed in range(3)]
    targets = [torch.zeros_like(source) for source in sources]
    box = whole(sources[0])
    parts = [
        Part(source, box, (4, 6), copy_to=target)
        for source, target in zip(sources, targets, strict=True)
    ]
    batch = Batch(parts, [True, False, True])
    values = batch.fold(copy=copy)
    assert values.dtype == np.uint64
    assert values.tolist() == [defined(source, box) for source in sources]
    copied = [bool(target.any()) for target in targets]
    assert copied == [copy, False, copy]
    for source, target in zip(sources[::2], targets[::2], strict=True):
        assert same_bytes(source, target) is copy


def test_a_batch_of_nothing_is_nothing() -> None:
    values = Batch([]).fold(copy=True)
    assert (values.dtype, values.shape) == (np.uint64, (0,))


@pytest.mark.parametrize("tail", range(8))
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32"])
def test_a_storage_may_end_within_a_word(dtype: str, tail: int) -> None:
    """The last row, and so the last whole word, ends just before its last bytes."""
    full = random_tensor(dtype, (3, 8), seed=5)
    layout = Layout((1, 0), (0, 0), (1, 1), before=0, after_bytes=tail)
    view = laid_out(full, layout)
    assert fold(view, whole(full), full.shape) == defined(full, whole(full))


@pytest.mark.parametrize("begin", range(1, 8))
@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_a_storage_may_begin_anywhere(dtype: str, begin: int) -> None:
    """Tensors in a mapped file lie where its header ends."""
    full = random_tensor(dtype, (3, 8), seed=9)
    file = bytearray(begin) + bytearray(full.view(torch.uint8).numpy().tobytes())
    view = torch.frombuffer(file, dtype=torch.uint8, offset=begin).view(full.dtype)
    view = view.reshape(3, 8)
    assert fold(view, whole(full), full.shape) == defined(full, whole(full))


@pytest.mark.parametrize("nbytes", range(1, 10))
def test_bytes_of_any_number(nbytes: int) -> None:
    full = random_tensor("uint8", (nbytes,), seed=nbytes)
    assert full.untyped_storage().nbytes() == nbytes
    assert fold_whole(full) == defined(full, whole(full))


@pytest.mark.parametrize("size", [(1 << 20, 1), (300_001, 3), (3, 300_001)])
def test_one_word_among_many_counts_by_its_place(size: tuple[int, int]) -> None:
    full = torch.zeros(size, dtype=torch.int32)
    assert fold(full, whole(full), size) == 0
    for row, column in [(0, 0), (size[0] - 1, 0), (size[0] - 2, size[1] - 1)]:
        full.zero_()
        full[row, column] = -2  # 2^32 - 2 as a word
        product = weight(row, ROW_SEED) * weight(column, COLUMN_SEED)
        assert fold(full, whole(full), size) == product * (2**32 - 2) % 2**64


def test_the_largest_words_wrap_as_integers_do() -> None:
    full = torch.full((5, 1000), -1, dtype=torch.int32)
    rows = sum(weight(row, ROW_SEED) for row in range(5))
    columns = sum(weight(column, COLUMN_SEED) for column in range(1000))
    assert fold_whole(full) == rows * columns * (2**32 - 1) % 2**64


@pytest.mark.parametrize("words", [1, 7, 16, 1 << 24])
def test_the_reference_gives_the_same_in_chunks(
    words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "REFERENCE_CHUNK", words)
    full = random_tensor("bfloat16", (9, 7), seed=6)
    assert fold_whole(full) == defined(full, whole(full))


def test_a_transposed_view_is_the_transposed_tensor() -> None:
    """Column-parallel shards are rows of the transposed weight."""
    stored = random_tensor("bfloat16", (6, 10), seed=7)
    turned = stored.t()
    assert fold_whole(turned) == fold_whole(turned.contiguous())
    assert fold_whole(turned) == defined(turned.contiguous(), whole(turned))
    assert fold_whole(turned) != fold_whole(stored)


def test_an_expanded_row_is_read_as_often_as_it_is_seen() -> None:
    row = random_tensor("float32", (1, 6), seed=8)
    assert fold_whole(row.expand(4, 6)) == fold_whole(row.expand(4, 6).contiguous())


# --- what it tells apart ------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(full=tensors(), data=st.data())
def test_any_flipped_bit_changes_it(full: torch.Tensor, data: st.DataObject) -> None:
    size = full.element_size()
    changed = full.clone()
    data_bytes = changed.reshape(-1).view(torch.uint8)
    place = data.draw(st.integers(0, full.numel() * size - 1))
    bit = data.draw(st.integers(0, 0 if full.dtype == torch.bool else 7))
    data_bytes[place] ^= 1 << bit
    assert fold_whole(changed) != fold_whole(full)


@settings(max_examples=200, deadline=None)
@given(full=tensors(min_dims=1), dim=st.integers(0, 3), data=st.data())
def test_swapped_rows_or_columns_change_it(
    full: torch.Tensor, dim: int, data: st.DataObject
) -> None:
    """Along any dimension; two columns may be of the same word."""
    dim %= full.dim()
    assume(full.shape[dim] > 1)
    index = list(range(full.shape[dim]))
    one, other = data.draw(st.lists(st.sampled_from(index), min_size=2, unique=True))[
        :2
    ]
    index[one], index[other] = index[other], index[one]
    changed = full.index_select(dim, torch.tensor(index))
    assume(not same_bytes(changed, full))
    assert fold_whole(changed) != fold_whole(full)


@settings(max_examples=200, deadline=None)
@given(full=tensors(min_dims=1, max_side=9), dim=st.integers(0, 3), data=st.data())
def test_a_shifted_slice_changes_its_part(
    full: torch.Tensor, dim: int, data: st.DataObject
) -> None:
    """The bytes of a neighbour, for instance of the next rank."""
    dim %= full.dim()
    assume(full.shape[dim] > 1)
    width = data.draw(st.integers(1, full.shape[dim] - 1))
    starts = list(range(full.shape[dim] - width + 1))
    right, wrong = data.draw(
        st.lists(st.sampled_from(starts), min_size=2, max_size=2, unique=True)
    )
    box = tuple(
        (right, right + width) if d == dim else side
        for d, side in enumerate(whole(full))
    )
    bytes_of_it = full.narrow(dim, right, width)
    bytes_beside = full.narrow(dim, wrong, width)
    assume(not same_bytes(bytes_of_it, bytes_beside))
    assert fold(bytes_beside, box, full.shape) != fold(bytes_of_it, box, full.shape)


@settings(max_examples=200, deadline=None)
@given(full=tensors(min_dims=1), cuts=st.integers(1, 6), data=st.data())
def test_a_missing_or_doubled_shard_changes_the_sum(
    full: torch.Tensor, cuts: int, data: st.DataObject
) -> None:
    boxes = cut(data.draw, full.shape, cuts)
    parts = [fold(block(full, box), box, full.shape) for box in boxes]
    number = data.draw(st.integers(0, len(parts) - 1))
    lost = block(full, boxes[number])
    assume(any(bytes_of(lost)))
    expected = fold_whole(full)
    assert add_up(parts[:number] + parts[number + 1 :]) != expected
    assert add_up([*parts, parts[number]]) != expected


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from([d for d in DTYPES if d != "bool"]),
    ranks=st.sampled_from([2, 4]),
    dim=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
@example(dtype="bfloat16", ranks=2, dim=0, seed=0)
@example(dtype="bfloat16", ranks=2, dim=1, seed=0)
def test_a_shard_of_another_rank_changes_the_sum(
    dtype: str, ranks: int, dim: int, seed: int
) -> None:
    """Two ranks hold each other's bytes; one holds the other's twice."""
    full = random_tensor(dtype, (8, 8), seed)
    width = 8 // ranks
    shards = full.split(width, dim)
    boxes = [
        tuple(
            (rank * width, rank * width + width) if d == dim else (0, 8)
            for d in range(2)
        )
        for rank in range(ranks)
    ]

    def together(order: list[int]) -> int:
        parts = [
            fold(shards[held], box, full.shape)
            for held, box in zip(order, boxes, strict=True)
        ]
        return add_up(parts)

    order = list(range(ranks))
    assert together(order) == fold_whole(full)
    assert together([1, 0, *order[2:]]) != fold_whole(full)
    assert together([0, 0, *order[2:]]) != fold_whole(full)


def test_zeros_at_another_place_change_nothing_and_any_value_does() -> None:
    """A sum cannot see what is zero; it is not asked to."""
    assert fold_whole(torch.zeros(4, 8)) == fold_whole(torch.zeros(8, 4)) == 0
    assert fold_whole(-torch.zeros(4, 8)) != 0


def storage_of(view: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes of the storage that ``view`` lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).clone()


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(full: torch.Tensor) -> bytes:
    """Row by row; torch takes one element of any stride for contiguous."""
    packed = torch.empty(full.shape, dtype=full.dtype).copy_(full)
    return packed.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- versions -----------------------------------------------------------------


def test_a_version_s_fingerprint_is_over_its_tensors_in_order() -> None:
    tensors = np.array([1, 2**64 - 1, 7], dtype=np.uint64)
    data = b"".join(int(value).to_bytes(8, "little") for value in tensors)
    assert version_fingerprint(tensors) == hashlib.sha256(data).hexdigest()
    assert version_fingerprint(tensors.astype(">u8")) == version_fingerprint(tensors)
    assert version_fingerprint(tensors[::-1]) != version_fingerprint(tensors)
    assert version_fingerprint(tensors[:2]) != version_fingerprint(tensors)


def test_parts_add_up_modulo_two_to_the_64() -> None:
    assert add_up([]) == 0
    assert add_up([2**64 - 1, 2]) == 1
    assert add_up([2**63] * 4) == 0


# --- speed --------------------------------------------------------------------


@pytest.mark.parametrize("columns", [4096, 128])
@pytest.mark.parametrize("copy", [False, True])
def test_folding_is_as_fast_as_reading(columns: int, copy: bool) -> None:
    """It runs beside a pull; a fold in Python or through a copy takes 10 times it."""
    nbytes = 64 << 20
    full = torch.ones(nbytes // (2 * columns), columns, dtype=torch.bfloat16)
    target = torch.zeros_like(full)
    part = Part(full, whole(full), full.shape, copy_to=target)
    work = part.copy_and_fold if copy else part.fold
    work()
    best = math.inf
    for _ in range(20):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    rate = nbytes / best / 1e9
    print(f"rows of {columns}, copied: {copy}: {rate:.1f} GB/s")
    assert rate >= (1 if copy else 3)
