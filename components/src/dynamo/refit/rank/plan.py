# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""From "which slices does this rank read" to "which bytes move where".

Pure: numpy and data. A rank's parameters are laid out one after another in a
staging arena; every slice that the engine's loader reads is intersected with the
published shards and becomes byte runs from a source region into the arena. A
slice that falls into many short runs (row-parallel weights) is pulled as one
contiguous span into scratch and cut out locally, where that is cheaper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import ITEMSIZE, Box, Manifest, Shard, TensorEntry, align


@dataclass(frozen=True)
class ReadSlice:
    """One copy of the engine's loader: a box of a source tensor into a parameter.

    ``strides`` are the destination's, in elements, one per dimension of the
    *source*; ``offset`` is the destination's first element in the parameter.
    """

    tensor: str
    box: Box
    parameter: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A live parameter as the plan needs it. ``unloaded`` elements (vocabulary
    padding) are covered by no source and stay zero."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    unloaded: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class TransferCost:
    """What the choice between exact runs and one contiguous pull rests on."""

    descriptor_seconds: float
    bytes_per_second: float
    reslice_bytes_per_second: float

    def exact(self, runs: int, nbytes: int) -> float:
        return runs * self.descriptor_seconds + nbytes / self.bytes_per_second

    def contiguous(self, span: int, nbytes: int) -> float:
        wire = self.descriptor_seconds + span / self.bytes_per_second
        return wire + nbytes / self.reslice_bytes_per_second


#: Measured with nixl 1.4.1: shared memory (cma), and CUDA IPC within one H100.
COST = {
    "DRAM": TransferCost(4.5e-6, 6e9, 5e9),
    "VRAM": TransferCost(12e-6, 620e9, 785e9),
}


@dataclass(frozen=True)
class Segments:
    """Byte runs from one source. Arrays of int64, one row per run.

    ``shard`` numbers the manifest's shards as ``Manifest.shard_addresses`` does, and
    ``remote`` is an offset in that shard, so that a plan holds for every set of
    addresses of its layout. ``local`` is an offset in the arena, or in scratch for
    a wave that reslices.
    """

    source: int
    shard: np.ndarray
    remote: np.ndarray
    local: np.ndarray
    nbytes: np.ndarray


@dataclass(frozen=True)
class Reslice:
    """A strided copy from scratch into the arena, after its wave has arrived.

    Offsets are bytes, strides elements of ``dtype``.
    """

    dtype: str
    shape: tuple[int, ...]
    scratch: int
    scratch_strides: tuple[int, ...]
    arena: int
    arena_strides: tuple[int, ...]


@dataclass(frozen=True)
class Wave:
    """Reads that are in flight together, then the local copies they allow."""

    segments: tuple[Segments, ...]
    reslices: tuple[Reslice, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a rank does to stage a version of one layout.

    ``offsets`` maps a parameter to its byte offset in the arena; ``reads`` maps
    a source tensor to the bounding box of what this rank reads of it.
    """

    parameters: tuple[Parameter, ...]
    offsets: dict[str, int]
    arena_nbytes: int
    scratch_nbytes: int
    waves: tuple[Wave, ...]
    nbytes: int
    wire_nbytes: int
    reads: dict[str, Box]

    @property
    def descriptors(self) -> int:
        return sum(len(s.remote) for wave in self.waves for s in wave.segments)


def make_plan(
    manifest: Manifest,
    parameters: Sequence[Parameter],
    slices: Iterable[ReadSlice],
    *,
    rank: int,
    scratch_limit: int,
    costs: dict[str, TransferCost] | None = None,
) -> Plan:
    """Plan how ``rank`` stages ``manifest`` for ``parameters``.

    Replicated shards are spread over the ranks. ``scratch_limit`` (bytes) bounds
    one wave of contiguous pulls; a single span may exceed it.

    Raises:
        LayoutRefused: a parameter is not covered exactly, a slice reaches past
            its tensor, or the dtypes differ. Nothing has been built then.
    """
    slices = list(slices)
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    shards = _number_shards(manifest)
    _check_slices(tensors, parameters, slices)
    offsets, arena_nbytes = _lay_out(parameters)
    builder = _WaveBuilder(manifest, scratch_limit, costs or COST)
    for piece in slices:
        tensor = tensors[piece.tensor]
        start = offsets[piece.parameter] + piece.offset * ITEMSIZE[tensor.dtype]
        for number, shard in _pick_replicas(shards[tensor.name], rank):
            builder.add(tensor, number, shard, piece, start)
    waves, scratch_nbytes, wire = builder.finish()
    loaded = sum(_volume(p.box) * ITEMSIZE[tensors[p.tensor].dtype] for p in slices)
    return Plan(
        parameters=tuple(parameters),
        offsets=offsets,
        arena_nbytes=arena_nbytes,
        scratch_nbytes=scratch_nbytes,
        waves=waves,
        nbytes=loaded,
        wire_nbytes=wire,
        reads=_bounding_boxes(slices),
    )


def check_extents(manifest: Manifest, reads: Iterable[dict[str, Box]]) -> None:
    """Refuse a tensor of which no rank reads the far end: it has another shape.

    A loader that narrows its source takes the front of a tensor that is too
    large without a word. ``reads`` has the bounding boxes of every rank.

    Raises:
        LayoutRefused: names the tensor, its shape, and what is read of it.
    """
    union: dict[str, Box] = {}
    for boxes in reads:
        for name, box in boxes.items():
            union[name] = _hull(union[name], box) if name in union else box
    for tensor in manifest.tensors:
        whole = tuple((0, size) for size in tensor.shape)
        read = union.get(tensor.name)
        if read is None:
            raise LayoutRefused(
                "the engine's loader does not read this tensor: it is not part of "
                "the served model",
                tensor=tensor.name,
            )
        if read != whole:
            raise LayoutRefused(
                f"published with shape {tensor.shape}, but all ranks together read "
                f"only {read}: it has another shape in the served model",
                tensor=tensor.name,
            )


class _WaveBuilder:
    """Collects runs: exact ones into wave 0, contiguous spans into bounded waves."""

    def __init__(
        self, manifest: Manifest, scratch_limit: int, costs: dict[str, TransferCost]
    ) -> None:
        self._manifest = manifest
        self._limit = scratch_limit
        self._costs = costs
        self._waves: list[tuple[dict[int, list[np.ndarray]], list[Reslice]]] = [
            ({}, [])
        ]
        self._used = 0
        self._scratch = 0
        self._wire = 0

    def add(
        self,
        tensor: TensorEntry,
        number: int,
        shard: Shard,
        piece: ReadSlice,
        start: int,
    ) -> None:
        """Plan what ``piece`` needs of shard ``number``; ``start`` is where the
        piece's first element lies in the arena (bytes)."""
        overlap = _intersect(piece.box, shard.box)
        if overlap is None:
            return
        size = ITEMSIZE[tensor.dtype]
        strides = _row_major(shard.shape)
        remote = _element(overlap, shard.offset, strides)
        local = _element(overlap, [lo for lo, _ in piece.box], piece.strides)
        extent = [hi - lo for lo, hi in overlap]
        run, outer = _run_length(extent, strides, piece.strides)
        runs = math.prod(extent[:outer])
        nbytes = runs * run * size
        span = (_last(extent, strides) + 1) * size
        cost = self._costs[self._manifest.sources[shard.source].memory]
        if cost.contiguous(span, nbytes) < cost.exact(runs, nbytes):
            self._add_span(
                shard.source,
                number,
                remote * size,
                span,
                Reslice(
                    dtype=tensor.dtype,
                    shape=tuple(extent),
                    scratch=0,
                    scratch_strides=tuple(strides),
                    arena=start + local * size,
                    arena_strides=piece.strides,
                ),
            )
            return
        rows = np.empty((runs, 4), dtype=np.int64)
        rows[:, 0] = number
        rows[:, 1] = _offsets(extent[:outer], strides, remote) * size
        rows[:, 2] = _offsets(extent[:outer], piece.strides, local) * size + start
        rows[:, 3] = run * size
        self._waves[0][0].setdefault(shard.source, []).append(rows)
        self._wire += nbytes

    def _add_span(
        self, source: int, number: int, remote: int, span: int, reslice: Reslice
    ) -> None:
        padded = align(span)
        if len(self._waves) == 1 or self._used + padded > self._limit:
            self._waves.append(({}, []))
            self._used = 0
        runs, reslices = self._waves[-1]
        row = np.array([[number, remote, self._used, span]], dtype=np.int64)
        runs.setdefault(source, []).append(row)
        reslices.append(replace(reslice, scratch=self._used))
        self._used += padded
        self._scratch = max(self._scratch, self._used)
        self._wire += span

    def finish(self) -> tuple[tuple[Wave, ...], int, int]:
        waves = []
        for runs, reslices in self._waves:
            if not runs:
                continue
            segments = []
            for source, blocks in sorted(runs.items()):
                rows = np.concatenate(blocks)
                rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
                columns = (np.ascontiguousarray(rows[:, i]) for i in range(4))
                segments.append(Segments(source, *columns))
            waves.append(Wave(tuple(segments), tuple(reslices)))
        return tuple(waves), self._scratch, self._wire


def _check_slices(
    tensors: dict[str, TensorEntry],
    parameters: Sequence[Parameter],
    slices: Sequence[ReadSlice],
) -> None:
    """Every slice lies in its tensor and in its parameter, every parameter is filled
    element by element, and the dtypes agree."""
    pieces: dict[str, list[ReadSlice]] = {p.name: [] for p in parameters}
    by_name = {parameter.name: parameter for parameter in parameters}
    for piece in slices:
        tensor = tensors.get(piece.tensor)
        if tensor is None:
            raise LayoutRefused("this tensor is not published", tensor=piece.tensor)
        whole = tuple((0, size) for size in tensor.shape)
        if _intersect(piece.box, whole) != piece.box:
            raise LayoutRefused(
                f"the loader reads {piece.box} of shape {tensor.shape}",
                tensor=tensor.name,
            )
        parameter = by_name.get(piece.parameter)
        if parameter is None:
            raise LayoutRefused(
                f"the loader writes {piece.parameter!r}, which is not a parameter of "
                "the live model",
                tensor=tensor.name,
            )
        if tensor.dtype != parameter.dtype:
            raise LayoutRefused(
                f"published as {tensor.dtype}, the engine holds {parameter.name} as "
                f"{parameter.dtype}: publish it as {parameter.dtype}",
                tensor=tensor.name,
            )
        pieces[parameter.name].append(piece)
    for parameter in parameters:
        _check_filled(parameter, pieces[parameter.name])


def _check_filled(parameter: Parameter, pieces: Sequence[ReadSlice]) -> None:
    filled = sum(_volume(piece.box) for piece in pieces)
    wanted = parameter.elements - parameter.unloaded
    if filled != wanted:
        raise LayoutRefused(
            f"the published tensors fill {filled} of its {wanted} elements: a tensor "
            "of this parameter is missing or has another shape",
            tensor=parameter.name,
        )
    spans = sorted(_destination_span(piece) for piece in pieces)
    if spans and not 0 <= spans[0][0] <= max(end for _, end in spans) <= (
        parameter.elements
    ):
        raise LayoutRefused("a slice is written outside it", tensor=parameter.name)
    apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    if not apart and _written_elements(parameter, pieces) != wanted:
        raise LayoutRefused(
            "slices overlap in it, and leave other elements out", tensor=parameter.name
        )


def _destination_span(piece: ReadSlice) -> tuple[int, int]:
    """First element of the parameter that a slice writes, and one past the last."""
    extent = [hi - lo for lo, hi in piece.box]
    return piece.offset, piece.offset + _last(extent, piece.strides) + 1


def _written_elements(parameter: Parameter, pieces: Sequence[ReadSlice]) -> int:
    """How many elements are written at all: for slices that interleave."""
    written = np.zeros(parameter.elements, dtype=bool)
    for piece in pieces:
        extent = [hi - lo for lo, hi in piece.box]
        steps = [stride * written.itemsize for stride in piece.strides]
        np.lib.stride_tricks.as_strided(
            written[piece.offset :], shape=extent, strides=steps
        )[...] = True
    return int(written.sum())


def _lay_out(parameters: Sequence[Parameter]) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for parameter in parameters:
        offsets[parameter.name] = end
        end += align(parameter.nbytes)
    return offsets, end


def _number_shards(manifest: Manifest) -> dict[str, list[tuple[int, Shard]]]:
    numbers = itertools.count()
    return {t.name: [(next(numbers), s) for s in t.shards] for t in manifest.tensors}


def _pick_replicas(
    shards: Sequence[tuple[int, Shard]], rank: int
) -> list[tuple[int, Shard]]:
    """One shard per box; of equal ones, each rank takes the next."""
    replicas: dict[Box, list[tuple[int, Shard]]] = {}
    for number, shard in shards:
        replicas.setdefault(shard.box, []).append((number, shard))
    return [equal[rank % len(equal)] for equal in replicas.values()]


def _bounding_boxes(slices: Iterable[ReadSlice]) -> dict[str, Box]:
    boxes: dict[str, Box] = {}
    for piece in slices:
        known = boxes.get(piece.tensor)
        boxes[piece.tensor] = _hull(known, piece.box) if known else piece.box
    return boxes


def _volume(box: Box) -> int:
    return math.prod(hi - lo for lo, hi in box)


def _hull(a: Box, b: Box) -> Box:
    pairs = zip(a, b, strict=True)
    return tuple((min(a0, b0), max(a1, b1)) for (a0, a1), (b0, b1) in pairs)


def _intersect(a: Box, b: Box) -> Box | None:
    pairs = zip(a, b, strict=True)
    box = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in pairs)
    return None if any(lo >= hi for lo, hi in box) else box


def _row_major(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return strides


def _element(box: Box, origin: Sequence[int], strides: Sequence[int]) -> int:
    """The element offset of the first corner of ``box``."""
    rows = zip(box, origin, strides, strict=True)
    return sum((lo - start) * stride for (lo, _), start, stride in rows)


def _last(extent: Sequence[int], strides: Sequence[int]) -> int:
    """The element offset of the last corner, from the first one."""
    return sum((n - 1) * stride for n, stride in zip(extent, strides, strict=True))


def _run_length(
    extent: Sequence[int], source: Sequence[int], target: Sequence[int]
) -> tuple[int, int]:
    """Elements that are contiguous on both sides, and how many leading dimensions
    are left to iterate over."""
    run, outer = 1, len(extent)
    while outer:
        dim = outer - 1
        packed = source[dim] == run and target[dim] == run
        if not packed and extent[dim] != 1:
            break
        run *= extent[dim]
        outer = dim
    return run, outer


def _offsets(extent: Sequence[int], strides: Sequence[int], start: int) -> np.ndarray:
    """All element offsets of the leading dimensions, in row-major order."""
    offsets = np.array([start], dtype=np.int64)
    for n, stride in zip(extent, strides, strict=False):
        steps = np.arange(n, dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps[None, :]).reshape(-1)
    return offsets
