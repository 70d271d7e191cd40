# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Boxes cut into blocks, and the runs that two orders of one box have in common."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.manifest import Box
from dynamo.refit.rank import boxes

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.mark.parametrize(
    ("elements", "rows"),
    [
        (1000, [6]),
        (54, [6]),
        (53, [5, 1]),
        # Two rows reach over 10 + 4 elements, the gap between them included.
        (14, [2, 2, 2]),
        (13, [1] * 6),
        (4, [1] * 6),
        (3, [1] * 6),
        (0, [1] * 6),
    ],
)
def test_a_box_is_cut_into_blocks_of_as_many_rows_as_fit(
    elements: int, rows: list[int]
) -> None:
    """Rows of 4 elements in a shard of rows of 10."""
    blocks = list(boxes.split(((2, 8), (3, 7)), (10, 1), elements))

    assert [hi - lo for (lo, hi), _ in blocks] == rows
    assert [lo for (lo, _), _ in blocks] == [
        2 + sum(rows[:n]) for n in range(len(rows))
    ]
    assert {columns for _, columns in blocks} == {(3, 7)}


@pytest.mark.parametrize("box", [(), ((5, 6),), ((0, 1), (3, 4), (9, 10))])
def test_a_single_element_is_not_cut(box: Box) -> None:
    assert list(boxes.split(box, (100, 10, 1)[: len(box)], 0)) == [box]


def test_the_first_dimension_of_more_than_one_is_cut() -> None:
    """One expert of a stack, by its rows."""
    blocks = boxes.split(((3, 4), (0, 4), (0, 5)), (20, 5, 1), 10)

    assert list(blocks) == [((3, 4), (0, 2), (0, 5)), ((3, 4), (2, 4), (0, 5))]


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    """A box and the shape of the block that it is a part of, from its origin on."""
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    pairs = zip(starts, shape, strict=True)
    box = tuple((start, draw(st.integers(start + 1, size))) for start, size in pairs)
    return box, shape


@given(drawn=_boxes(), elements=st.integers(0, 400))
def test_blocks_tile_their_box_in_order(
    drawn: tuple[Box, tuple[int, ...]], elements: int
) -> None:
    box, shape = drawn
    strides = boxes.row_major(shape)
    blocks = list(boxes.split(box, strides, elements))

    count = np.zeros(shape, dtype=int)
    for block in blocks:
        count[tuple(slice(lo, hi) for lo, hi in block)] += 1
    inside = np.zeros(shape, dtype=int)
    inside[tuple(slice(lo, hi) for lo, hi in box)] = 1
    np.testing.assert_array_equal(count, inside)
    assert blocks == sorted(blocks)
    for block in blocks:
        sizes = boxes.extent(block)
        row = next(
            (n for n, m in zip(sizes, boxes.extent(box), strict=True) if m > 1), 1
        )
        assert boxes.last_element(sizes, strides) < elements or row == 1


@given(drawn=_boxes(), elements=st.integers(1, 400))
def test_blocks_are_no_smaller_than_they_need_be(
    drawn: tuple[Box, tuple[int, ...]], elements: int
) -> None:
    box, shape = drawn
    strides = boxes.row_major(shape)
    for one, other in itertools.pairwise(boxes.split(box, strides, elements)):
        # With one row more, which the other block has.
        joined = tuple((lo, hi) for (lo, _), (_, hi) in zip(one, other, strict=True))
        dim = next(d for d, (lo, hi) in enumerate(box) if hi - lo > 1)
        more = [hi - lo for lo, hi in joined]
        more[dim] = one[dim][1] - one[dim][0] + 1
        assert boxes.last_element(more, strides) + 1 > elements


@given(drawn=_boxes(), order=st.permutations(range(3)), gap=st.integers(0, 2))
def test_runs_are_contiguous_on_both_sides_and_cover_the_box(
    drawn: tuple[Box, tuple[int, ...]], order: list[int], gap: int
) -> None:
    """Against a walk over every element."""
    box, shape = drawn
    sizes, source = boxes.extent(box), boxes.row_major(shape)
    order = [dim for dim in order if dim < len(sizes)]
    # A destination of transposed dimensions, the last of which may have a gap.
    target, step = [0] * len(sizes), 1
    for dim in reversed(order):
        target[dim] = step
        step = (step + gap) * sizes[dim]
    run, outer = boxes.run_length(sizes, source, target)
    reads = boxes.offsets(sizes[:outer], source, 0)
    writes = boxes.offsets(sizes[:outer], target, 0)

    assert run * len(reads) == run * len(writes) == math.prod(sizes)
    moved = {
        (int(start) + n, int(place) + n)
        for start, place in zip(reads, writes, strict=True)
        for n in range(run)
    }
    assert moved == {
        (
            sum(i * s for i, s in zip(place, source, strict=True)),
            sum(i * s for i, s in zip(place, target, strict=True)),
        )
        for place in itertools.product(*map(range, sizes))
    }
