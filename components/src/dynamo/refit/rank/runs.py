# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Runs of bytes that are copied from one place to another: joined, and cut.

Pure numpy. A set of runs is three arrays of int64: where each begins on either side,
and its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def merge(
    remote: np.ndarray,
    local: np.ndarray,
    nbytes: np.ndarray,
    regions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs that follow each other on both sides, in one of ``regions``, as one.

    NIXL takes them one by one otherwise, about a microsecond each.
    """
    follows = (remote[1:] == remote[:-1] + nbytes[:-1]) & (
        local[1:] == local[:-1] + nbytes[:-1]
    )
    if regions is not None:
        follows &= regions[1:] == regions[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    return remote[starts], local[starts], np.add.reduceat(nbytes, starts)


def cut(
    nbytes: np.ndarray, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Runs of ``nbytes``, one after the other, in slices of ``limit`` bytes in all;
    the last one may have less.

    Yields for each slice the numbers of its runs, the bytes of each run that are in
    slices before, and those that are in this one.
    """
    ends = np.cumsum(nbytes)
    starts = ends - nbytes
    total = int(ends[-1])
    edges = np.union1d(np.append(starts, total), np.arange(0, total, limit))
    sizes = np.diff(edges)
    runs = np.searchsorted(starts, edges[:-1], side="right") - 1
    skipped = edges[:-1] - starts[runs]
    slices = edges[:-1] // limit
    for number in range(-(-total // limit)):
        here = slices == number
        yield runs[here], skipped[here], sizes[here]
