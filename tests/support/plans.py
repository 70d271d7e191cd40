# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Plans executed on bytes with numpy, and what holds for every plan.

:class:`FakeTransport` plays the sources and NIXL; :func:`check_plan` looks at a plan
without executing it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dynamo.refit.manifest import ALIGNMENT, ITEMSIZE, Box, Manifest, Shard, align
from dynamo.refit.rank.limits import Limits
from dynamo.refit.rank.plan import Piece, Plan, Wave
from tests.support.layouts import Layout, convert, extent, index, volume

#: What lies in a source's memory between the shards, and in scratch beforehand.
GARBAGE = 0xA5


class FakeTransport:
    """A test fake of the sources and of NIXL: every region is a numpy buffer.

    It does what a session's pull does: each wave's reads, then its copies. Reads are
    refused here as a network card would: a run must lie in one registered region and
    in the buffer it is read into.
    """

    def __init__(
        self, manifest: Manifest, slots: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        self._manifest = manifest
        self._memory: list[dict[int, np.ndarray]] = []
        for slot, full in enumerate(slots):
            regions = {
                region.address: np.full(region.nbytes, GARBAGE, dtype=np.uint8)
                for source in manifest.sources
                for region in source.slots[slot]
            }
            self._memory.append(regions)
            addresses = iter(manifest.shard_addresses(slot))
            for tensor in manifest.tensors:
                for shard in tensor.shards:
                    held = full[tensor.name][index(shard.box)]
                    data = np.frombuffer(held.tobytes(), dtype=np.uint8)
                    self._at(slot, next(addresses), len(data), shard.source)[:] = data

    def stage(self, plan: Plan, slot: int) -> np.ndarray:
        """The arena after every wave; ``slot`` is the version's slot."""
        arena = np.zeros(plan.arena.nbytes, dtype=np.uint8)
        places = {
            p.name: _range(arena, plan.arena.offsets[p.name], p.nbytes)
            for p in plan.arena.parameters
        }
        self._run(plan, slot, arena, places)
        return arena

    def _run(
        self,
        plan: Plan,
        slot: int,
        arena: np.ndarray | None,
        parameters: Mapping[str, np.ndarray],
    ) -> None:
        dtypes = {p.name: p.dtype for p in plan.arena.parameters}
        scratch = np.full(plan.scratch_nbytes, GARBAGE, dtype=np.uint8)
        shards = np.array(self._manifest.shard_addresses(slot))
        for wave in plan.waves:
            target = arena if wave.half is None else scratch
            for segments in wave.segments:
                remote = shards[segments.shard] + segments.remote
                rows = zip(remote, segments.local, segments.nbytes, strict=True)
                for address, local, nbytes in rows:
                    data = self._at(slot, address, nbytes, segments.source)
                    _range(target, local, nbytes)[:] = data
            for piece in wave.pieces:
                if piece.scratch is not None:
                    dtype = dtypes[piece.parameter]
                    _land(piece, scratch, parameters[piece.parameter], dtype)
            if wave.half is not None:
                # The wave after the next one may not find this one's bytes.
                half = plan.scratch_nbytes // len({w.half for w in plan.waves} - {None})
                scratch[wave.half * half :][:half] = GARBAGE

    def _at(self, slot: int, address: int, nbytes: int, source: int) -> np.ndarray:
        for region in self._manifest.sources[source].slots[slot]:
            if region.address <= address < region.address + region.nbytes:
                buffer = self._memory[slot][region.address]
                return _range(buffer, address - region.address, nbytes)
        raise AssertionError(f"source {source} has no region at {address:#x}")


def _range(buffer: np.ndarray, start: int, nbytes: int) -> np.ndarray:
    assert nbytes > 0
    assert 0 <= start <= start + nbytes <= len(buffer), "outside the buffer"
    return buffer[start : start + nbytes]


def _land(piece: Piece, scratch: np.ndarray, parameter: np.ndarray, dtype: str) -> None:
    sizes = extent(piece.box)
    place = piece.scratch
    source = _strided(scratch, piece.dtype, place.start, sizes, place.strides)
    start = piece.offset * ITEMSIZE[dtype]
    target = _strided(parameter, dtype, start, sizes, piece.strides)
    assert piece.converts == (piece.dtype != dtype)
    target[...] = convert(source, piece.dtype, dtype)


def _strided(
    buffer: np.ndarray,
    dtype: str,
    start: int,
    shape: Sequence[int],
    strides: Sequence[int],
) -> np.ndarray:
    """A view in elements, as torch's ``view(dtype).as_strided`` makes it."""
    size = ITEMSIZE[dtype]
    assert start % size == 0
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    _range(buffer, start, (last + 1) * size)
    return np.lib.stride_tricks.as_strided(
        buffer.view(f"u{size}")[start // size :],
        shape=tuple(shape),
        strides=[stride * size for stride in strides],
    )


def arena_of(plan: Plan, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """The arena that holds ``parameters`` (bytes), and zeros between them."""
    arena = np.zeros(plan.arena.nbytes, dtype=np.uint8)
    for name, data in parameters.items():
        start = plan.arena.offsets[name]
        arena[start : start + len(data)] = data
    return arena


def check_plan(plan: Plan, layout: Layout, limits: Limits, rank: int = 0) -> None:
    """The plan's numbers agree with each other, and every run is in bounds."""
    sizes = {t.name: ITEMSIZE[t.dtype] for t in layout.manifest.tensors}
    segments = [s for wave in plan.waves for s in wave.segments]
    assert plan.nbytes == sum(volume(p.box) * sizes[p.tensor] for p in layout.slices)
    assert plan.wire_nbytes == sum(int(s.nbytes.sum()) for s in segments)
    assert plan.wire_nbytes >= plan.nbytes
    assert plan.descriptors == sum(len(s.nbytes) for s in segments)
    assert plan.pieces == tuple(p for wave in plan.waves for p in wave.pieces)
    _check_arena(plan, layout)
    _check_pieces(plan, layout)
    _check_halves(plan)
    for wave in plan.waves:
        _check_runs(wave, plan, layout.manifest, rank)
        _check_limit(wave, layout, limits)


def _check_arena(plan: Plan, layout: Layout) -> None:
    arena = plan.arena
    assert arena.parameters == layout.parameters
    assert list(arena.offsets) == [p.name for p in layout.parameters]
    places = [(arena.offsets[p.name], p.nbytes) for p in layout.parameters]
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    _check_disjoint(places, 0, arena.nbytes)


def _check_pieces(plan: Plan, layout: Layout) -> None:
    """Together they are what the slices read, as often as they read it, and two that
    meet are equal: that is what a proof over several ranks adds up."""
    numbers = {t.name: i for i, t in enumerate(layout.manifest.tensors)}
    read = [np.zeros(tensor.shape, dtype=int) for tensor in layout.manifest.tensors]
    for piece in layout.slices:
        read[numbers[piece.tensor]][index(piece.box)] += 1
    for piece in plan.pieces:
        tensor = layout.manifest.tensors[piece.tensor]
        assert (piece.shape, piece.dtype) == (tensor.shape, tensor.dtype)
        read[piece.tensor][index(piece.box)] -= 1
    assert not any(count.any() for count in read)
    for tensor, box in boxes_of(plan):
        read[tensor][index(box)] += 1
    assert all((count <= 1).all() for count in read)


def boxes_of(plan: Plan) -> set[tuple[int, Box]]:
    """Every different block that the plan reads: the tensor's number and the box."""
    return {(piece.tensor, piece.box) for piece in plan.pieces}


def _check_halves(plan: Plan) -> None:
    """Straight waves come first, then those through scratch, in turns."""
    halves = [wave.half for wave in plan.waves]
    through = [half for half in halves if half is not None]
    assert halves == [None] * (len(halves) - len(through)) + through
    assert through == [number % 2 for number in range(len(through))]
    assert plan.scratch_nbytes % (ALIGNMENT * max(1, len(set(through)))) == 0
    assert (plan.scratch_nbytes > 0) == bool(through)
    for wave in plan.waves:
        for piece in wave.pieces:
            assert (piece.scratch is None) == (wave.half is None)
            assert wave.half is not None or not piece.converts


def _check_runs(wave: Wave, plan: Plan, manifest: Manifest, rank: int) -> None:
    """Each in its shard and in its half of scratch or in the arena, and apart."""
    assert [s.source for s in wave.segments] == sorted(
        {s.source for s in wave.segments}
    )
    shards = [(tensor, s) for tensor in manifest.tensors for s in tensor.shards]
    written: list[tuple[int, int]] = []
    for segments in wave.segments:
        columns = (segments.shard, segments.remote, segments.local, segments.nbytes)
        assert all(column.dtype == np.int64 for column in columns)
        for number, remote, local, nbytes in zip(*columns, strict=True):
            tensor, shard = shards[number]
            held = math.prod(shard.shape) * ITEMSIZE[tensor.dtype]
            assert shard.source == segments.source
            assert shard is _turn(tensor.shards, shard, rank)
            assert 0 <= remote < remote + nbytes <= held
            written.append((int(local), int(nbytes)))
    # NIXL promises no order within a wave.
    first, last = 0, plan.arena.nbytes
    if wave.half is not None:
        both = len({w.half for w in plan.waves} - {None})
        half = plan.scratch_nbytes // both
        first, last = wave.half * half, (wave.half + 1) * half
    _check_disjoint(written, first, last)


def _turn(shards: Iterable[Shard], like: Shard, rank: int) -> Shard:
    """The replica of ``like`` that it is ``rank``'s turn to read."""
    equal = [shard for shard in shards if shard.box == like.box]
    return equal[rank % len(equal)]


def _check_limit(wave: Wave, layout: Layout, limits: Limits) -> None:
    """A wave reads no more than its limit, or else a single row."""
    limit = limits.arena if wave.half is None else limits.scratch
    nbytes = sum(int(segments.nbytes.sum()) for segments in wave.segments)
    used = nbytes if wave.half is None else sum(map(_scratch_of, wave.pieces))
    assert used >= nbytes
    if limit is None or used <= limit:
        return
    # One piece alone may need more because it is packed at multiples of ALIGNMENT.
    (piece,) = wave.pieces
    assert nbytes <= limit or _is_row(piece, layout)


def _scratch_of(piece: Piece) -> int:
    strides = zip(extent(piece.box), piece.scratch.strides, strict=True)
    last = sum((n - 1) * stride for n, stride in strides)
    return align((last + 1) * ITEMSIZE[piece.dtype])


def _is_row(piece: Piece, layout: Layout) -> bool:
    """Cannot be cut along the first dimension in which its shard has more."""
    tensor = layout.manifest.tensors[piece.tensor]
    reads = [s.box for s in layout.slices if s.tensor == tensor.name]
    for read, shard in itertools.product(reads, tensor.shards):
        pairs = zip(read, shard.box, piece.box, strict=True)
        sides = [(max(a, c), min(b, d), e, f) for (a, b), (c, d), (e, f) in pairs]
        if all(lo <= start < stop <= hi for lo, hi, start, stop in sides):
            return next((f - e == 1 for lo, hi, e, f in sides if hi - lo > 1), True)
    raise AssertionError(f"{piece.box} is in no slice and shard")


def _check_disjoint(ranges: Iterable[tuple[int, int]], first: int, last: int) -> None:
    end = first
    for start, nbytes in sorted(ranges):
        assert start >= end
        end = start + nbytes
    assert end <= last
