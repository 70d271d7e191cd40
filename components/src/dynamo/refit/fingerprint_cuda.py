# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints on a GPU: one Triton kernel over all parts, one read of their bytes.

Rows of the parts are listed once, a few rows of one part to a program, so that a
column weight is loaded once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import triton
import triton.language as tl

# Without a backend the kernel can be written down, but not compiled.
from triton.backends import backends as _backends  # noqa: F401

#: Rows of a program, words of a step, and words of a row that go to one program.
ROWS = 8
BLOCK = 512
CHUNK = 1 << 16


class Rows(Protocol):
    """What the kernel needs of a :class:`dynamo.refit.fingerprint.Part`."""

    addresses: np.ndarray | None
    row_weights: np.ndarray
    words: tuple[int, int]
    device: torch.device

    @property
    def column_weights(self) -> np.ndarray: ...
    def fold_by_torch(self) -> int: ...


class CudaFold:
    """The tables of one batch of parts, in device memory.

    Args:
        parts: all on one device.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._device = parts[0].device
        # Rows that are not whole words (odd widths of 16-bit types) go by torch.
        self._odd = [(n, p) for n, p in enumerate(parts) if p.addresses is None]
        self._out = torch.zeros(len(parts), dtype=torch.int64, device=self._device)
        rows, tasks, weights = _tabulate(parts)
        self._rows = [self._upload(column) for column in rows]
        self._tasks = [self._upload(column) for column in tasks]
        self._weights = self._upload(weights)

    def fold(self) -> np.ndarray:
        """Every part, as uint64; blocks until they are computed."""
        self._out.zero_()
        count = len(self._tasks[0])
        if count:
            _fold_kernel[(count,)](
                *self._rows,
                *self._tasks,
                self._weights,
                self._out,
                ROWS=ROWS,
                BLOCK=BLOCK,
                num_warps=4,
            )
        values = self._out.cpu().numpy().view(np.uint64)
        for number, part in self._odd:
            values[number] = part.fold_by_torch()
        return values

    def _upload(self, column: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(column.view(np.int64)).to(self._device)


def _tabulate(
    parts: Sequence[Rows],
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Rows (address, weight), tasks (first row, rows, words, first weight, part), and
    the column weights of all widths one after another."""
    rows, runs, weights = [], [], []
    starts: dict[tuple[int, int], int] = {}
    weight_count = 0
    for number, part in enumerate(parts):
        if part.addresses is None:
            continue
        if part.words not in starts:
            starts[part.words] = weight_count
            weights.append(part.column_weights)
            weight_count += len(part.column_weights)
        columns, count = part.words[1] - part.words[0], len(part.addresses)
        for chunk in range(0, columns, CHUNK):
            first = part.addresses + 4 * chunk if chunk else part.addresses
            rows.append((first, part.row_weights))
            words = min(CHUNK, columns - chunk)
            runs.append((count, words, starts[part.words] + chunk, number))
    if not runs:
        return [np.zeros(0, np.int64)] * 2, [np.zeros(0, np.int64)] * 5, np.zeros(0)
    counts, *alike = np.array(runs, dtype=np.int64).T
    ends, programs = np.cumsum(counts), -(-counts // ROWS)
    run = np.repeat(np.arange(len(runs)), programs)
    in_run = np.arange(len(run)) - (np.cumsum(programs) - programs)[run]
    first_row = (ends - counts)[run] + ROWS * in_run
    row_count = np.minimum(ROWS, ends[run] - first_row)
    return (
        [np.concatenate([row[i] for row in rows]) for i in range(2)],
        [first_row, row_count, *(column[run] for column in alike)],
        np.concatenate(weights),
    )


@triton.jit
def _fold_kernel(
    addresses,
    row_weights,
    first_row,
    row_count,
    word_count,
    first_weight,
    part,
    column_weights,
    out,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    task = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    there = rows < tl.load(row_count + task)
    first = tl.load(first_row + task)
    words = tl.load(word_count + task)
    weights = column_weights + tl.load(first_weight + task)
    address = tl.load(addresses + first + rows, mask=there, other=0)
    base = address.to(tl.pointer_type(tl.int32))
    total = tl.zeros([ROWS], dtype=tl.int64)
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < words
        weight = tl.load(weights + column, mask=inside, other=0)
        word = tl.load(
            base[:, None] + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=0,
        )
        wide = word.to(tl.int64) & 0xFFFFFFFF
        total += tl.sum(wide * weight[None, :], axis=1)
    row_weight = tl.load(row_weights + first + rows, mask=there, other=0)
    tl.atomic_add(out + tl.load(part + task), tl.sum(total * row_weight, axis=0))
