# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Boxes, strides and runs: the arithmetic under a plan.

Offsets, strides and extents count elements, and dimensions are in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from dynamo.refit.manifest import Box


def volume(box: Box) -> int:
    return math.prod(hi - lo for lo, hi in box)


def extent(box: Box) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in box)


def intersect(a: Box, b: Box) -> Box | None:
    pairs = zip(a, b, strict=True)
    box = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in pairs)
    return None if any(lo >= hi for lo, hi in box) else box


def split(box: Box, strides: Sequence[int], elements: int) -> Iterator[Box]:
    """``box`` in blocks that reach over at most ``elements`` of a block with
    ``strides``, gaps included.

    It is cut along its first dimension of more than one; a single row of that may
    still be larger.
    """
    dim = next((d for d, (lo, hi) in enumerate(box) if hi - lo > 1), None)
    if dim is None:
        yield box
        return
    lo, hi = box[dim]
    row = last_element(extent(box[dim + 1 :]), strides[dim + 1 :]) + 1
    step = max(1, (elements - row) // strides[dim] + 1)
    for start in range(lo, hi, step):
        yield (*box[:dim], (start, min(start + step, hi)), *box[dim + 1 :])


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def first_element(box: Box, origin: Sequence[int], strides: Sequence[int]) -> int:
    """Where the first corner of ``box`` is, from the element at ``origin``."""
    rows = zip(box, origin, strides, strict=True)
    return sum((lo - start) * stride for (lo, _), start, stride in rows)


def last_element(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Where the last corner is, from the first one."""
    return sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))


def run_length(
    sizes: Sequence[int], source: Sequence[int], target: Sequence[int]
) -> tuple[int, int]:
    """Elements that are contiguous on both sides, and how many leading dimensions
    are left to iterate over."""
    run, outer = 1, len(sizes)
    while outer:
        dim = outer - 1
        packed = source[dim] == run and target[dim] == run
        if not packed and sizes[dim] != 1:
            break
        run *= sizes[dim]
        outer = dim
    return run, outer


def offsets(sizes: Sequence[int], strides: Sequence[int], start: int) -> np.ndarray:
    """Every element offset of the leading dimensions ``sizes``, in row-major order."""
    result = np.array([start], dtype=np.int64)
    for n, stride in zip(sizes, strides, strict=False):
        steps = np.arange(n, dtype=np.int64) * stride
        result = (result[:, None] + steps[None, :]).reshape(-1)
    return result
