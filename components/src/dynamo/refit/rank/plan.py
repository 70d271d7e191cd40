# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""From "which slices does this rank read" to "which bytes move where".

Pure: numpy and data. A rank's parameters lie one after another in a staging arena;
every slice that the engine's loader reads is intersected with the published shards.
What comes of it is a *piece*: read as exact byte runs straight into the arena, or,
where it falls into many short runs (row-parallel weights) or has another dtype, as
one contiguous span into scratch, from where it is copied locally.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dynamo.refit.manifest import ITEMSIZE, Box, Manifest, Shard, TensorEntry, align
from dynamo.refit.rank import boxes
from dynamo.refit.rank.limits import COST, Limits, TransferCost
from dynamo.refit.rank.slices import (
    ArenaLayout,
    IntakeLayout,
    Parameter,
    ReadSlice,
    check_slices,
    read_whole,
    whole,
)


@dataclass(frozen=True)
class Segments:
    """Byte runs from one source. Arrays of int64, one row per run.

    ``shard`` numbers the manifest's shards as ``Manifest.shard_addresses`` does, and
    ``remote`` is an offset in that shard, so that a plan holds for every set of
    addresses of its layout. ``local`` is an offset in the arena, or in scratch for a
    wave that goes there.
    """

    source: int
    shard: np.ndarray
    remote: np.ndarray
    local: np.ndarray
    nbytes: np.ndarray


@dataclass(frozen=True)
class Scratch:
    """Where a piece lies in scratch: from byte ``start`` on, strides in elements."""

    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A box of a published tensor, and where this rank puts it.

    ``tensor`` is its number in the manifest, ``shape`` and ``dtype`` are the full
    tensor's. In parameter ``parameter`` it begins at element ``offset`` and has
    ``strides``. With ``scratch`` it is copied there from scratch, and converted if
    the parameter's dtype is another.
    """

    tensor: int
    shape: tuple[int, ...]
    dtype: str
    box: Box
    parameter: str
    offset: int
    strides: tuple[int, ...]
    converts: bool = False
    scratch: Scratch | None = None


@dataclass(frozen=True)
class Wave:
    """Reads that are in flight together, and the pieces they complete.

    ``half`` is the half of scratch they land in; ``None``: in the arena. Its pieces may
    be copied on when the first ``after`` conversions are done; what those take in that
    it ``begins`` is zero before that. Then the first ``ready`` ones have all of theirs.
    """

    segments: tuple[Segments, ...]
    pieces: tuple[Piece, ...]
    half: int | None
    after: int = 0
    begins: tuple[int, ...] = ()
    ready: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(int(segments.nbytes.sum()) for segments in self.segments)


@dataclass(frozen=True)
class Plan:
    """What a rank reads to stage a version of one layout, and where that goes: to the
    arena, or to the intake of its conversions.

    ``nbytes`` are the bytes that the loader takes, ``wire_nbytes`` those that are
    read for it.
    """

    arena: ArenaLayout
    intake: IntakeLayout
    scratch_nbytes: int
    waves: tuple[Wave, ...]
    nbytes: int
    wire_nbytes: int

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for wave in self.waves for piece in wave.pieces)

    @property
    def reads(self) -> tuple[tuple[int, Box], ...]:
        """Tensor numbers and boxes of the pieces: what a version's parts are of."""
        return tuple((piece.tensor, piece.box) for piece in self.pieces)

    @property
    def sources(self) -> list[int]:
        """Numbers of the manifest's sources that are read from."""
        return sorted({s.source for wave in self.waves for s in wave.segments})

    @property
    def descriptors(self) -> int:
        return sum(len(s.remote) for wave in self.waves for s in wave.segments)


def make_plan(
    manifest: Manifest,
    parameters: Sequence[Parameter],
    slices: Iterable[ReadSlice],
    *,
    rank: int,
    limits: Limits,
    arena: ArenaLayout | None = None,
    intake: IntakeLayout | None = None,
    costs: dict[str, TransferCost] | None = None,
) -> Plan:
    """Plan how ``rank`` stages ``manifest`` for ``parameters``.

    Replicated shards are spread over the ranks. ``arena`` says where they are staged;
    by default in their own order. What is in ``intake`` goes there: those of
    ``parameters`` that are named there, and whole tensors under :func:`whole` names.

    Raises:
        LayoutRefused: a parameter is not covered exactly, a slice reaches past its
            tensor, or the dtypes do not go together. Nothing has been built then.
    """
    slices = list(slices)
    check_slices(manifest.tensors, parameters, slices)
    tensors = {tensor.name: (i, tensor) for i, tensor in enumerate(manifest.tensors)}
    shards = _number_shards(manifest)
    arena = arena or ArenaLayout(parameters)
    intake = intake or IntakeLayout((), 0)
    planner = _Planner(manifest, arena, intake, limits, costs or COST)

    def add(piece: ReadSlice) -> None:
        index, tensor = tensors[piece.tensor]
        for number, shard in _pick_replicas(shards[tensor.name], rank):
            planner.add(index, tensor, number, shard, piece)

    taken_in: dict[str, list[ReadSlice]] = {}
    for piece in slices:
        if piece.parameter in intake.offsets:
            taken_in.setdefault(piece.parameter, []).append(piece)
        else:
            add(piece)
    complete = {whole(name): entry for name, (_, entry) in tensors.items()}
    for number, group in enumerate(intake.groups):
        planner.begin(number)
        for parameter in group:
            if entry := complete.get(parameter.name):
                add(read_whole(entry))
            for piece in taken_in.get(parameter.name, ()):
                add(piece)
        planner.end(number)
    return planner.finish()


@dataclass
class _OpenWave:
    """A wave under construction; ``used`` bytes of it are taken."""

    after: int = 0
    begins: list[int] = field(default_factory=list)
    ready: int = 0
    runs: dict[int, list[np.ndarray]] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    used: int = 0

    def close(self, half: int | None, base: int) -> Wave:
        """The wave, with ``base`` added to what lies in scratch."""
        segments = []
        for source, blocks in sorted(self.runs.items()):
            rows = np.concatenate(blocks)
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            rows[:, 2] += base
            columns = (np.ascontiguousarray(rows[:, i]) for i in range(4))
            segments.append(Segments(source, *columns))
        pieces = [
            replace(p, scratch=replace(p.scratch, start=p.scratch.start + base))
            if p.scratch is not None
            else p
            for p in self.pieces
        ]
        return Wave(
            segments=tuple(segments),
            pieces=tuple(pieces),
            half=half,
            after=self.after,
            begins=tuple(self.begins),
            ready=self.ready,
        )


class _Planner:
    """Sorts pieces into waves: straight ones first, then those through scratch."""

    def __init__(
        self,
        manifest: Manifest,
        arena: ArenaLayout,
        intake: IntakeLayout,
        limits: Limits,
        costs: dict[str, TransferCost],
    ) -> None:
        self._manifest = manifest
        self._arena = arena
        self._intake = intake
        targets = (*arena.parameters, *intake.parameters)
        # The intake's come last: a tensor may have one name and two forms.
        self._dtypes = {p.name: p.dtype for p in targets}
        self._limits = limits
        self._costs = costs
        self._straight: list[_OpenWave] = []
        self._through: list[_OpenWave] = []
        self._after = 0
        self._nbytes = 0

    def begin(self, number: int) -> None:
        """What is added from now on is for conversion ``number``."""
        after = self._intake.after[number]
        if after != self._after or not self._through:
            self._through.append(_OpenWave(after))
        self._after = after
        self._through[-1].begins.append(number)

    def end(self, number: int) -> None:
        """Conversion ``number`` has all that it takes in."""
        self._through[-1].ready = number + 1

    def add(
        self,
        index: int,
        tensor: TensorEntry,
        number: int,
        shard: Shard,
        piece: ReadSlice,
    ) -> None:
        """Plan what ``piece`` needs of shard ``number``."""
        overlap = boxes.intersect(piece.box, shard.box)
        if overlap is None:
            return
        size = ITEMSIZE[tensor.dtype]
        converts = tensor.dtype != self._dtypes[piece.parameter]
        exact = self._is_exact(overlap, shard, piece, size)
        straight = (
            exact and not converts and piece.parameter not in self._intake.offsets
        )
        # The same blocks whichever way they come, since ranks that read the same box
        # must come to the same parts of its fingerprint.
        room = self._limits.block // size
        for box in boxes.split(overlap, boxes.row_major(shard.shape), room):
            origin = [lo for lo, _ in piece.box]
            block = Piece(
                tensor=index,
                shape=tensor.shape,
                dtype=tensor.dtype,
                box=box,
                parameter=piece.parameter,
                offset=piece.offset + boxes.first_element(box, origin, piece.strides),
                strides=piece.strides,
                converts=converts,
            )
            self._nbytes += boxes.volume(box) * size
            if straight:
                self._add_straight(block, number, shard)
            else:
                self._add_through(block, number, shard, exact)

    def _is_exact(
        self, overlap: Box, shard: Shard, piece: ReadSlice, size: int
    ) -> bool:
        sizes, strides = boxes.extent(overlap), boxes.row_major(shard.shape)
        _, outer = boxes.run_length(sizes, strides, piece.strides)
        nbytes = boxes.volume(overlap) * size
        span = (boxes.last_element(sizes, strides) + 1) * size
        cost = self._costs[self._manifest.sources[shard.source].memory]
        exact = cost.exact(math.prod(sizes[:outer]), nbytes)
        return exact <= cost.contiguous(span, nbytes)

    def _add_straight(self, piece: Piece, number: int, shard: Shard) -> None:
        """Every run to its place in the arena."""
        size = ITEMSIZE[piece.dtype]
        start = self._arena.offsets[piece.parameter] + piece.offset * size
        rows = _runs(piece.box, number, shard, piece.strides, size, start)
        wave = _room(self._straight, rows[:, 3].sum(), self._limits.arena, 0)
        wave.runs.setdefault(shard.source, []).append(rows)
        wave.pieces.append(piece)

    def _add_through(
        self, piece: Piece, number: int, shard: Shard, exact: bool
    ) -> None:
        """The runs packed into scratch, or the span around them in one run."""
        size, sizes = ITEMSIZE[piece.dtype], boxes.extent(piece.box)
        strides = boxes.row_major(sizes if exact else shard.shape)
        span = (boxes.last_element(sizes, strides) + 1) * size
        wave = _room(self._through, align(span), self._limits.scratch, self._after)
        start = wave.used - align(span)
        if exact:
            rows = _runs(piece.box, number, shard, strides, size, start)
        else:
            first = boxes.first_element(
                piece.box, shard.offset, boxes.row_major(shard.shape)
            )
            rows = np.array([[number, first * size, start, span]], dtype=np.int64)
        wave.runs.setdefault(shard.source, []).append(rows)
        wave.pieces.append(replace(piece, scratch=Scratch(start, strides)))

    def finish(self) -> Plan:
        half = max((wave.used for wave in self._through), default=0)
        waves = [wave.close(None, 0) for wave in self._straight]
        for number, wave in enumerate(self._through):
            waves.append(wave.close(number % 2, number % 2 * half))
        return Plan(
            arena=self._arena,
            intake=self._intake,
            scratch_nbytes=half * min(2, len(self._through)),
            waves=tuple(waves),
            nbytes=self._nbytes,
            wire_nbytes=sum(int(s.nbytes.sum()) for w in waves for s in w.segments),
        )


def _room(
    waves: list[_OpenWave], nbytes: int, limit: int | None, after: int
) -> _OpenWave:
    """The last wave, or a new one if ``nbytes`` more would pass ``limit``."""
    if not waves or (limit is not None and waves[-1].used + nbytes > limit):
        waves.append(_OpenWave(after))
    waves[-1].used += int(nbytes)
    return waves[-1]


def _runs(
    box: Box,
    number: int,
    shard: Shard,
    target: Sequence[int],
    size: int,
    start: int,
) -> np.ndarray:
    """Rows ``(shard, remote, local, nbytes)`` of ``box``, landing from byte ``start``
    on with strides ``target``."""
    sizes, source = boxes.extent(box), boxes.row_major(shard.shape)
    run, outer = boxes.run_length(sizes, source, target)
    first = boxes.first_element(box, shard.offset, source)
    rows = np.empty((math.prod(sizes[:outer]), 4), dtype=np.int64)
    rows[:, 0] = number
    rows[:, 1] = boxes.offsets(sizes[:outer], source, first) * size
    rows[:, 2] = boxes.offsets(sizes[:outer], target, 0) * size + start
    rows[:, 3] = run * size
    return rows


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
