# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of tensors that add up over any partition into boxes.

A tensor is a matrix of 32-bit words: its last dimension makes the columns, all others
are flattened into rows. With a pseudo-random odd 64-bit weight for every row and one
for every column,

    fingerprint = sum over (row, column) of R[row] * C[column] * word   (mod 2^64)

A weight depends on the word's place in the *full* tensor, so a part that any rank
holds contributes what it contributes to the whole, and disjoint parts add up without
a gather. Weights are odd: one flipped bit always changes the sum; anything else that
goes wrong by accident (swapped rows, a shifted slice, a missing or doubled shard)
escapes with a probability of about 2^-40 or less. It is no defence against an attacker.

Reads the bytes once: with Numba on a CPU, with torch (the reference) elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numba
import numpy as np
import torch

from dynamo.refit.manifest import Box

#: Bytes of a word: what one column weight is multiplied with.
WORD = 4

#: Rows that the torch reference widens to 64 bits at a time (words in all).
REFERENCE_CHUNK = 1 << 24

_ROW_SEED = 0x9E3779B97F4A7C15
_COLUMN_SEED = 0xD1B54A32D192ED03


class Part:
    """The part of a tensor's fingerprint that a box of it contributes.

    Args:
        view: the box's elements, of any strides, on any device. Every call reads
            what is there then.
        box: where they are in the full tensor.
        shape: of the full tensor.
        copy_to: for :meth:`copy_and_fold`, a view of the same shape and dtype.
    """

    def __init__(
        self,
        view: torch.Tensor,
        box: Box,
        shape: Sequence[int],
        copy_to: torch.Tensor | None = None,
    ) -> None:
        size = view.element_size()
        # A scalar is a row of one.
        start, stop = box[-1] if box else (0, 1)
        first, last = start * size // WORD, -(-stop * size // WORD)
        self._view = view if view.dim() else view.reshape(1)
        self._copy_to = copy_to
        self._row_weights = _row_weights(tuple(box[:-1]), tuple(shape[:-1]))
        self._column_weights = _column_weights(first, last)
        # Elements by which the first word begins before the box.
        self._before = start - first * WORD // size if size < WORD else 0
        columns = len(self._column_weights)
        self._rows = _word_rows(self._view, columns)
        self._target = None
        if copy_to is not None and self._rows is not None:
            self._target = _word_rows(
                copy_to if copy_to.dim() else copy_to.reshape(1), columns
            )

    @property
    def nbytes(self) -> int:
        return self._view.numel() * self._view.element_size()

    def fold(self) -> int:
        """The part, from 0 to 2^64 - 1; blocks until it is computed."""
        if self._view.device.type != "cpu":
            return self._fold_by_torch()
        rows = self._rows
        if rows is None:
            rows = _word_rows(self._padded(), len(self._column_weights))
        low, high = _halves(self._column_weights)
        return int(_fold_rows(*rows, self._row_weights, low, high))

    def copy_and_fold(self) -> int:
        """Copy the elements to ``copy_to``, and :meth:`fold` them in the same pass."""
        if self._target is None:
            self._copy_to.copy_(self._view.view(self._copy_to.shape))
            return self.fold()
        low, high = _halves(self._column_weights)
        arguments = (*self._rows, *self._target, self._row_weights, low, high)
        return int(_copy_and_fold_rows(*arguments))

    def _padded(self) -> torch.Tensor:
        """The rows in whole words, shape ``[rows, columns * WORD / itemsize]``."""
        view = self._view
        rows = view.reshape(-1, view.shape[-1])
        width = len(self._column_weights) * WORD // view.element_size()
        if width == view.shape[-1]:
            # A copy, even of what is contiguous: it may begin within a word.
            return rows.clone(memory_format=torch.contiguous_format)
        padded = view.new_zeros((len(rows), width))
        padded[:, self._before : self._before + view.shape[-1]] = rows
        return padded

    def _fold_by_torch(self) -> int:
        """The definition, in torch; 64-bit products wrap as they should."""
        words = self._padded().view(torch.int32)
        device = words.device
        columns = torch.from_numpy(self._column_weights.view(np.int64)).to(device)
        rows = torch.from_numpy(self._row_weights.view(np.int64)).to(device)
        total = torch.zeros((), dtype=torch.int64, device=device)
        step = max(1, REFERENCE_CHUNK // len(columns))
        for chunk, weights in zip(words.split(step), rows.split(step), strict=True):
            wide = chunk.to(torch.int64) & 0xFFFFFFFF
            total += ((wide * columns).sum(dim=1) * weights).sum()
        return int(total.item()) % 2**64


def fold_all(parts: Sequence[Part], copy: Sequence[bool] | None = None) -> np.ndarray:
    """Every part, as uint64; those with ``copy`` are copied on the way."""
    values = [
        part.copy_and_fold() if copy is not None and copy[number] else part.fold()
        for number, part in enumerate(parts)
    ]
    return np.array(values, dtype=np.uint64)


def add_up(parts: Sequence[int]) -> int:
    """The fingerprint of what ``parts`` make up together."""
    return sum(parts) % 2**64


def version_fingerprint(tensors: np.ndarray) -> str:
    """SHA-256 over the tensors' fingerprints (uint64, in the manifest's order)."""
    return hashlib.sha256(tensors.astype("<u8").tobytes()).hexdigest()


@functools.lru_cache(maxsize=4096)
def _column_weights(first: int, last: int) -> np.ndarray:
    """Of words ``first`` to ``last``; cached, since tensors of a model are alike."""
    return _weights(np.arange(first, last), _COLUMN_SEED)


@functools.lru_cache(maxsize=4096)
def _row_weights(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Of the rows that a box's leading dimensions make, in row-major order."""
    rows = np.zeros(1, dtype=np.int64)
    for (start, stop), size in zip(box, shape, strict=True):
        rows = (rows[:, None] * size + np.arange(start, stop)[None, :]).reshape(-1)
    return _weights(rows, _ROW_SEED)


def _weights(places: np.ndarray, seed: int) -> np.ndarray:
    """Odd pseudo-random 64-bit numbers: splitmix64 of each place.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators".
    """
    x = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def _halves(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low = (weights & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return low, (weights >> np.uint64(32)).astype(np.uint32)


def _word_rows(
    view: torch.Tensor, columns: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The storage of ``view`` as words, and where in it each row of ``columns`` words
    begins; ``None`` if some row does not lie there as whole words, or on a device."""
    size = view.element_size()
    if view.device.type != "cpu" or view.shape[-1] * size != columns * WORD:
        return None
    if view.shape[-1] > 1 and view.stride(-1) != 1:
        return None
    offsets = np.array([view.storage_offset()], dtype=np.int64)
    for extent, stride in zip(view.shape[:-1], view.stride()[:-1], strict=True):
        steps = np.arange(extent, dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
    offsets *= size
    flat = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).numpy()
    words = flat[: len(flat) // WORD * WORD].view(np.uint32)
    if (offsets % WORD).any() or offsets.max() // WORD + columns > len(words):
        return None
    return words, offsets // WORD


@numba.njit(nogil=True)
def _fold_rows(words, offsets, row_weights, low, high):
    """Sum of ``row_weights[i] * (low + 2^32 high) . words[offsets[i]:]``.

    Column weights come in halves since processors multiply 32 by 32 bits in vectors,
    and rows go in pairs to load each weight once for both.
    """
    columns = len(low)
    total = np.uint64(0)
    for pair in range(0, len(offsets), 2):
        # The last of an odd number of rows is its own partner, with weight 0.
        other = min(pair + 1, len(offsets) - 1)
        first = words[offsets[pair] : offsets[pair] + columns]
        second = words[offsets[other] : offsets[other] + columns]
        low_1, high_1 = np.uint64(0), np.uint64(0)
        low_2, high_2 = np.uint64(0), np.uint64(0)
        for column in range(columns):
            weight_low = np.uint64(low[column])
            weight_high = np.uint64(high[column])
            word_1 = np.uint64(first[column])
            word_2 = np.uint64(second[column])
            low_1 += word_1 * weight_low
            high_1 += word_1 * weight_high
            low_2 += word_2 * weight_low
            high_2 += word_2 * weight_high
        total += (low_1 + (high_1 << np.uint64(32))) * row_weights[pair]
        if other != pair:
            total += (low_2 + (high_2 << np.uint64(32))) * row_weights[other]
    return total


@numba.njit(nogil=True)
def _copy_and_fold_rows(words, offsets, target, target_offsets, row_weights, low, high):
    """As :func:`_fold_rows`, with every row copied to ``target`` on the way."""
    columns = len(low)
    total = np.uint64(0)
    for row in range(len(offsets)):
        source = words[offsets[row] : offsets[row] + columns]
        copy = target[target_offsets[row] : target_offsets[row] + columns]
        sum_low, sum_high = np.uint64(0), np.uint64(0)
        for column in range(columns):
            copy[column] = source[column]
            word = np.uint64(source[column])
            sum_low += word * np.uint64(low[column])
            sum_high += word * np.uint64(high[column])
        total += (sum_low + (sum_high << np.uint64(32))) * row_weights[row]
    return total
