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
escapes with a probability of 2^-32 at the most, which is for two rows of one word that
differ in its highest bit only. It is no defence against an attacker.

Reads the bytes once: with Numba on a CPU, with a Triton kernel on a GPU. Torch is the
reference, and what is left where there is no Triton.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numba
import numpy as np
import torch

from dynamo.refit.manifest import Box

try:
    from dynamo.refit.fingerprint_cuda import CudaFold
except ImportError:
    # Triton comes with a CUDA build of torch; without it torch folds by itself.
    CudaFold = None

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
        copy_to: for :meth:`copy_and_fold`, a view of the same shape; a copy converts.
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
        self.words = start * size // WORD, -(-stop * size // WORD)
        self.row_weights = _row_weights(tuple(box[:-1]), tuple(shape[:-1]))
        self._view = view if view.dim() else view.reshape(1)
        self._copy_to = copy_to
        # Elements by which the first word begins before the box.
        self._before = start - self.words[0] * WORD // size if size < WORD else 0
        #: Where each row begins, if all of them lie there as whole words.
        self.addresses = self._row_addresses(self._view)
        #: On a CPU: the storage as words and each row's first one in it, of the view
        #: and of what it is copied to.
        self.rows = self.target = None
        if self.addresses is not None and view.device.type == "cpu":
            self.rows = self._word_rows(self._view)
            if copy_to is not None and copy_to.dtype == view.dtype:
                target = copy_to if copy_to.dim() else copy_to.reshape(1)
                self.target = self._word_rows(target)

    @property
    def device(self) -> torch.device:
        return self._view.device

    @property
    def column_weights(self) -> np.ndarray:
        """Of this part's words, uint64."""
        return _column_weights(*self.words)

    def fold(self) -> int:
        """The part, from 0 to 2^64 - 1; blocks until it is computed."""
        if self._view.device.type != "cpu":
            return self.fold_by_torch()
        rows = self.rows or self._word_rows(self._padded())
        return int(_fold_rows(*rows, self.row_weights, self.column_weights))

    def copy_and_fold(self) -> int:
        """Copy the elements to ``copy_to``, and :meth:`fold` them in the same pass."""
        if self.rows is None or self.target is None:
            self.copy()
            return self.fold()
        arguments = (*self.rows, *self.target, self.row_weights)
        return int(_copy_and_fold_rows(*arguments, self.column_weights))

    def copy(self) -> None:
        """Copy the elements to ``copy_to``."""
        self._copy_to.copy_(self._view.view(self._copy_to.shape))

    def fold_by_torch(self) -> int:
        """The definition, in torch; 64-bit products wrap as they should."""
        words = self._padded().view(torch.int32)
        device = words.device
        columns = torch.from_numpy(self.column_weights.view(np.int64)).to(device)
        rows = torch.from_numpy(self.row_weights.view(np.int64)).to(device)
        total = torch.zeros((), dtype=torch.int64, device=device)
        step = max(1, REFERENCE_CHUNK // len(columns))
        for chunk, weights in zip(words.split(step), rows.split(step), strict=True):
            wide = chunk.to(torch.int64) & 0xFFFFFFFF
            total += ((wide * columns).sum(dim=1) * weights).sum()
        return int(total.item()) % 2**64

    def _row_addresses(self, view: torch.Tensor) -> np.ndarray | None:
        size, columns = view.element_size(), self.words[1] - self.words[0]
        if view.shape[-1] * size != columns * WORD or (
            view.shape[-1] > 1 and view.stride(-1) != 1
        ):
            return None
        address = view.data_ptr()
        steps = [
            (extent, stride * size)
            for extent, stride in zip(view.shape[:-1], view.stride()[:-1], strict=True)
        ]
        if any(place % WORD for place in (address, *(s for n, s in steps if n > 1))):
            return None
        addresses = np.array([address], dtype=np.int64)
        for extent, step in steps:
            places = np.arange(extent, dtype=np.int64) * step
            addresses = (addresses[:, None] + places[None, :]).reshape(-1)
        return addresses

    def _word_rows(self, view: torch.Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """The storage of ``view`` as words, and each row's first one in it."""
        addresses = self._row_addresses(view)
        if addresses is None:
            return None
        flat = torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage()).numpy()
        words = flat[: len(flat) // WORD * WORD].view(np.uint32)
        rows = (addresses - view.untyped_storage().data_ptr()) // WORD
        inside = rows.max() + self.words[1] - self.words[0] <= len(words)
        return (words, rows) if inside and words.ctypes.data % WORD == 0 else None

    def _padded(self) -> torch.Tensor:
        """The rows in whole words, shape ``[rows, columns * WORD / itemsize]``."""
        view = self._view
        rows = view.reshape(-1, view.shape[-1])
        width = (self.words[1] - self.words[0]) * WORD // view.element_size()
        if width == view.shape[-1]:
            # A copy, even of what is contiguous: it may begin within a word.
            return rows.clone(memory_format=torch.contiguous_format)
        padded = view.new_zeros((len(rows), width))
        padded[:, self._before : self._before + view.shape[-1]] = rows
        return padded


class Batch:
    """Parts that are folded together, on one device; what it needs is made once.

    Args:
        parts: their order is the results'.
        copies: which of them are to be copied when a copy is asked for.
    """

    def __init__(
        self, parts: Sequence[Part], copies: Sequence[bool] | None = None
    ) -> None:
        self._parts = parts
        self._copies = copies or [False] * len(parts)
        self._kernel = None
        self._groups: list[_Group] = []
        if parts and parts[0].device.type == "cuda" and CudaFold is not None:
            self._kernel = CudaFold(parts)
        else:
            self._groups = _group(parts, self._copies)
        grouped = {number for group in self._groups for number in group.numbers}
        self._alone = [n for n in range(len(parts)) if n not in grouped]

    def fold(self, *, copy: bool = False) -> np.ndarray:
        """Every part, as uint64; ``copy``: the chosen ones are copied on the way."""
        if self._kernel is not None:
            for part, chosen in zip(self._parts, self._copies, strict=True):
                if copy and chosen:
                    part.copy()
            return self._kernel.fold()
        values = np.empty(len(self._parts), dtype=np.uint64)
        for group in self._groups:
            values[group.numbers] = group.fold(copy)
        for number in self._alone:
            part, chosen = self._parts[number], self._copies[number]
            values[number] = part.copy_and_fold() if copy and chosen else part.fold()
        return values


class _Group:
    """Parts of a batch with all of their rows in one storage: folded by one call, so
    that the thread that does it needs Python's lock once.

    ``target``: they are to be copied into another storage when a copy is asked for.
    """

    def __init__(
        self, parts: Sequence[Part], numbers: list[int], *, target: bool
    ) -> None:
        self.numbers = numbers
        chosen = [parts[number] for number in numbers]
        self._words = chosen[0].rows[0]
        self._offsets = np.concatenate([part.rows[1] for part in chosen])
        self._target = chosen[0].target[0] if target else None
        if target:
            self._target_offsets = np.concatenate([p.target[1] for p in chosen])
        self._row_weights = np.concatenate([part.row_weights for part in chosen])
        self._ends = np.cumsum([len(part.row_weights) for part in chosen])
        starts: dict[tuple[int, int], int] = {}
        end = 0
        for part in chosen:
            if part.words not in starts:
                starts[part.words] = end
                end += part.words[1] - part.words[0]
        weights = [_column_weights(*words) for words in starts]
        self._column_weights = np.concatenate(weights)
        self._columns = np.array(
            [
                (starts[p.words], starts[p.words] + p.words[1] - p.words[0])
                for p in chosen
            ],
            dtype=np.int64,
        )

    def fold(self, copy: bool) -> np.ndarray:
        weights = (
            self._row_weights,
            self._ends,
            self._column_weights,
            self._columns,
        )
        rows = self._words, self._offsets
        if copy and self._target is not None:
            targets = self._target, self._target_offsets
            return _copy_and_fold_parts(*rows, *targets, *weights)
        return _fold_parts(*rows, *weights)


def _group(parts: Sequence[Part], copies: Sequence[bool]) -> list[_Group]:
    """Parts in whole words by where they lie, and where they are copied to."""
    members: dict[tuple[int, int | None], list[int]] = {}
    for number, (part, copied) in enumerate(zip(parts, copies, strict=True)):
        if part.rows is None or (copied and part.target is None):
            continue
        target = part.target[0].ctypes.data if copied else None
        key = part.rows[0].ctypes.data, target
        members.setdefault(key, []).append(number)
    return [
        _Group(parts, numbers, target=target is not None)
        for (_, target), numbers in members.items()
    ]


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


@numba.njit(nogil=True, cache=True)
def _fold_rows(words, offsets, row_weights, column_weights):
    """Sum of ``row_weights[i] * column_weights . words[offsets[i]:]``.

    One row after the other: processors fetch a single stream ahead, and with two rows
    at a time what is not in a cache takes more than twice as long.
    """
    columns = len(column_weights)
    total = np.uint64(0)
    for row in range(len(offsets)):
        source = words[offsets[row] : offsets[row] + columns]
        row_sum = np.uint64(0)
        for column in range(columns):
            row_sum += np.uint64(source[column]) * column_weights[column]
        total += row_sum * row_weights[row]
    return total


@numba.njit(nogil=True, cache=True)
def _copy_and_fold_rows(
    words, offsets, target, target_offsets, row_weights, column_weights
):
    """As :func:`_fold_rows`, with every row copied to ``target`` on the way."""
    columns = len(column_weights)
    total = np.uint64(0)
    for row in range(len(offsets)):
        source = words[offsets[row] : offsets[row] + columns]
        copy = target[target_offsets[row] : target_offsets[row] + columns]
        row_sum = np.uint64(0)
        for column in range(columns):
            copy[column] = source[column]
            row_sum += np.uint64(source[column]) * column_weights[column]
        total += row_sum * row_weights[row]
    return total


@numba.njit(nogil=True, cache=True)
def _fold_parts(words, offsets, row_weights, ends, column_weights, columns):
    """:func:`_fold_rows` of several parts. Part ``i`` has the rows up to ``ends[i]``,
    and of the column weights those from ``columns[i, 0]`` to ``columns[i, 1]``."""
    parts = np.empty(len(ends), dtype=np.uint64)
    start = 0
    for part in range(len(ends)):
        end = ends[part]
        first, last = columns[part]
        parts[part] = _fold_rows(
            words,
            offsets[start:end],
            row_weights[start:end],
            column_weights[first:last],
        )
        start = end
    return parts


@numba.njit(nogil=True, cache=True)
def _copy_and_fold_parts(
    words, offsets, target, target_offsets, row_weights, ends, column_weights, columns
):
    """:func:`_copy_and_fold_rows` of several parts."""
    parts = np.empty(len(ends), dtype=np.uint64)
    start = 0
    for part in range(len(ends)):
        end = ends[part]
        first, last = columns[part]
        parts[part] = _copy_and_fold_rows(
            words,
            offsets[start:end],
            target,
            target_offsets[start:end],
            row_weights[start:end],
            column_weights[first:last],
        )
        start = end
    return parts


def warm_up(device: torch.device) -> None:
    """Have the kernels for ``device`` and the host compiled before they are needed."""
    for place in {device, torch.device("cpu")}:
        words, copy = torch.zeros(2, 2, 2, device=place)
        batch = Batch([Part(words, ((0, 2), (0, 2)), (2, 2), copy_to=copy)], [True])
        batch.fold()
        batch.fold(copy=True)
