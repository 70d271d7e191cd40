# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Plans executed on bytes: whatever the sharding, the slices and the costs, the
arena holds exactly what the engine's loader would have put there.

:class:`FakeTransport` plays the sources and NIXL with numpy; what it must arrive at
is computed element by element from the full tensors, without the planner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import (
    ALIGNMENT,
    ITEMSIZE,
    Box,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
)
from dynamo.refit.rank.plan import (
    COST,
    Parameter,
    Plan,
    ReadSlice,
    Reslice,
    TransferCost,
    Wave,
    check_extents,
    make_plan,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

MEMORIES = ("DRAM", "VRAM")

#: Contiguous pulls cost a fortune, so every run is read exactly.
ALWAYS_EXACT = dict.fromkeys(MEMORIES, TransferCost(0.0, 1e9, 1e-9))

#: Descriptors cost a fortune, so whatever falls into runs is pulled in one piece.
ALWAYS_CONTIGUOUS = dict.fromkeys(MEMORIES, TransferCost(1e9, 1e18, 1e18))

#: What lies in a source's memory between the shards, and in scratch beforehand.
GARBAGE = 0xA5


# The fake of the transport.


class FakeTransport:
    """A test fake of the sources and of NIXL: every region is a numpy buffer.

    ``run`` does what a session's pull does: each wave's reads, then its reslices.
    Reads are refused here as a network card would: a run must lie in one
    registered region and in the buffer it is read into.
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
                    held = full[tensor.name][_slices(shard.box)]
                    data = np.frombuffer(held.tobytes(), dtype=np.uint8)
                    self._at(slot, next(addresses), len(data), shard.source)[:] = data

    def run(self, plan: Plan, slot: int) -> np.ndarray:
        """The arena after every wave; ``slot`` is the version's slot."""
        arena = np.zeros(plan.arena_nbytes, dtype=np.uint8)
        scratch = np.full(plan.scratch_nbytes, GARBAGE, dtype=np.uint8)
        shards = np.array(self._manifest.shard_addresses(slot))
        for wave in plan.waves:
            target = scratch if wave.reslices else arena
            for segments in wave.segments:
                remote = shards[segments.shard] + segments.remote
                rows = zip(remote, segments.local, segments.nbytes, strict=True)
                for address, local, nbytes in rows:
                    data = self._at(slot, address, nbytes, segments.source)
                    _range(target, local, nbytes)[:] = data
            for reslice in wave.reslices:
                _run_reslice(reslice, scratch, arena)
        return arena

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


def _run_reslice(reslice: Reslice, scratch: np.ndarray, arena: np.ndarray) -> None:
    source = _strided(
        scratch, reslice.dtype, reslice.scratch, reslice.shape, reslice.scratch_strides
    )
    target = _strided(
        arena, reslice.dtype, reslice.arena, reslice.shape, reslice.arena_strides
    )
    target[...] = source


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


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in box)


# What must come out: one element at a time.


@dataclass(frozen=True)
class Layout:
    """A manifest, and what one rank's loader reads of it into which parameters."""

    manifest: Manifest
    parameters: tuple[Parameter, ...]
    slices: tuple[ReadSlice, ...]

    def plan(
        self,
        *,
        costs: dict[str, TransferCost] | None = None,
        scratch_limit: int = 1 << 20,
        rank: int = 0,
    ) -> Plan:
        return make_plan(
            self.manifest,
            self.parameters,
            self.slices,
            rank=rank,
            scratch_limit=scratch_limit,
            costs=costs,
        )

    def random_tensors(self, seed: int) -> dict[str, np.ndarray]:
        """Full tensors of random bytes, as unsigned integers of the same size."""
        generator = np.random.default_rng(seed)
        return {
            tensor.name: np.frombuffer(
                generator.bytes(math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]),
                dtype=f"u{ITEMSIZE[tensor.dtype]}",
            ).reshape(tensor.shape)
            for tensor in self.manifest.tensors
        }

    def expected_parameters(
        self, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Per parameter its bytes; elements that nothing loads are zero."""
        flat = {
            p.name: np.zeros(math.prod(p.shape), dtype=f"u{ITEMSIZE[p.dtype]}")
            for p in self.parameters
        }
        for piece in self.slices:
            for index in itertools.product(*(range(lo, hi) for lo, hi in piece.box)):
                steps = (i - lo for i, (lo, _) in zip(index, piece.box, strict=True))
                strides = zip(steps, piece.strides, strict=True)
                element = piece.offset + sum(step * stride for step, stride in strides)
                flat[piece.parameter][element] = tensors[piece.tensor][index]
        return {name: values.view(np.uint8) for name, values in flat.items()}


def _expected_arena(plan: Plan, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    arena = np.zeros(plan.arena_nbytes, dtype=np.uint8)
    for name, data in parameters.items():
        arena[plan.offsets[name] : plan.offsets[name] + len(data)] = data
    return arena


# What holds for every plan.


def check_plan(plan: Plan, layout: Layout, scratch_limit: int) -> None:
    """The plan's numbers agree with each other and every run is in bounds."""
    _check_arena(plan, layout.parameters)
    sizes = {t.name: ITEMSIZE[t.dtype] for t in layout.manifest.tensors}
    read = sum(_volume(p.box) * sizes[p.tensor] for p in layout.slices)
    segments = [s for wave in plan.waves for s in wave.segments]
    assert plan.nbytes == read
    assert plan.reads == _bounding_boxes(layout.slices)
    assert plan.wire_nbytes == sum(int(s.nbytes.sum()) for s in segments)
    assert plan.wire_nbytes >= plan.nbytes
    assert plan.descriptors == sum(len(s.nbytes) for s in segments)
    shards = [(t, s) for t in layout.manifest.tensors for s in t.shards]
    for wave in plan.waves:
        target = plan.scratch_nbytes if wave.reslices else plan.arena_nbytes
        _check_wave(wave, shards, target)
        if wave.reslices:
            spans = [_aligned(int(n)) for s in wave.segments for n in s.nbytes]
            assert len(spans) == len(wave.reslices)
            assert sum(spans) <= scratch_limit or len(spans) == 1
            assert sum(spans) <= plan.scratch_nbytes
    if not any(wave.reslices for wave in plan.waves):
        assert plan.scratch_nbytes == 0
        assert plan.wire_nbytes == plan.nbytes


def _bounding_boxes(slices: Iterable[ReadSlice]) -> dict[str, Box]:
    boxes: dict[str, list[Box]] = {}
    for piece in slices:
        boxes.setdefault(piece.tensor, []).append(piece.box)
    return {
        name: tuple(
            (min(lo for lo, _ in sides), max(hi for _, hi in sides))
            for sides in zip(*read, strict=True)
        )
        for name, read in boxes.items()
    }


def _check_arena(plan: Plan, parameters: Sequence[Parameter]) -> None:
    assert plan.parameters == tuple(parameters)
    assert list(plan.offsets) == [p.name for p in parameters]
    places = [(plan.offsets[p.name], p.nbytes) for p in parameters]
    assert all(start % ALIGNMENT == 0 for start, _ in places)
    _check_disjoint(places, plan.arena_nbytes)


def _check_wave(
    wave: Wave, shards: Sequence[tuple[TensorEntry, Shard]], target: int
) -> None:
    sources = [s.source for s in wave.segments]
    assert sources == sorted(set(sources))
    written: list[tuple[int, int]] = []
    for segments in wave.segments:
        columns = (segments.shard, segments.remote, segments.local, segments.nbytes)
        assert all(column.dtype == np.int64 for column in columns)
        for number, remote, local, nbytes in zip(*columns, strict=True):
            tensor, shard = shards[number]
            held = math.prod(shard.shape) * ITEMSIZE[tensor.dtype]
            assert shard.source == segments.source
            assert 0 <= remote < remote + nbytes <= held
            written.append((int(local), int(nbytes)))
    # NIXL promises no order within a wave.
    _check_disjoint(written, target)


def _check_disjoint(ranges: Iterable[tuple[int, int]], size: int) -> None:
    end = 0
    for start, nbytes in sorted(ranges):
        assert start >= end
        end = start + nbytes
    assert end <= size


def _volume(box: Box) -> int:
    return math.prod(hi - lo for lo, hi in box)


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / ALIGNMENT) * ALIGNMENT


# Layouts by hand.


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


class SourceMemory:
    """Lays shards out in the regions of some sources, one after another.

    ``place`` leaves ``gap`` bytes before each shard, so shards are not aligned.
    """

    def __init__(self, sources: int = 1, regions: int = 1, memory: str = "DRAM"):
        self._ends = [[0] * regions for _ in range(sources)]
        self._memory = memory

    def place(
        self, box: Box, dtype: str, source: int = 0, region: int = 0, gap: int = 0
    ) -> Shard:
        source %= len(self._ends)
        region %= len(self._ends[source])
        start = self._ends[source][region] + gap
        self._ends[source][region] = start + _volume(box) * ITEMSIZE[dtype]
        return Shard(
            source=source,
            region=region,
            byte_offset=start,
            offset=tuple(lo for lo, _ in box),
            shape=tuple(hi - lo for lo, hi in box),
        )

    def sources(self, slots: int = 1) -> tuple[Source, ...]:
        """The sources, with every region of every slot at an address of its own."""
        addresses = itertools.count(0x7F00_0000_0000, 1 << 36)
        return tuple(
            Source(
                agent=f"trainer-{number}",
                metadata=b"",
                memory=self._memory,
                device=0,
                slots=tuple(
                    tuple(Region(next(addresses), end) for end in ends)
                    for _ in range(slots)
                ),
            )
            for number, ends in enumerate(self._ends)
        )


def _manifest(*tensors: TensorEntry, memory: SourceMemory, slots: int = 1) -> Manifest:
    manifest = Manifest(model="tiny", tensors=tensors, sources=memory.sources(slots))
    manifest.validate()
    return manifest


def _tensor(
    memory: SourceMemory,
    name: str,
    shape: Sequence[int],
    *,
    dtype: str = "bfloat16",
    parts: int = 1,
    axis: int = 0,
) -> TensorEntry:
    """A tensor cut into even ``parts`` along ``axis``, one on each source."""
    boxes = []
    for part in range(parts):
        box = list(_whole(shape))
        if parts > 1:
            step = shape[axis] // parts
            box[axis] = (part * step, (part + 1) * step)
        boxes.append(tuple(box))
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        shards=tuple(memory.place(b, dtype, source=i) for i, b in enumerate(boxes)),
    )


def _read(
    tensor: TensorEntry, parameter: str, box: Box | None = None, offset: int = 0
) -> ReadSlice:
    """A slice that the destination holds in row-major order from ``offset`` on."""
    box = box or _whole(tensor.shape)
    strides = _row_major([hi - lo for lo, hi in box])
    return ReadSlice(tensor.name, box, parameter, offset, strides)


def _one_slice(
    shape: Sequence[int],
    box: Box,
    *,
    dtype: str = "bfloat16",
    parts: int = 1,
    memory: str = "DRAM",
) -> Layout:
    """A parameter that is one box of one tensor."""
    sources = SourceMemory(sources=parts, memory=memory)
    tensor = _tensor(sources, "w", shape, dtype=dtype, parts=parts)
    parameter = Parameter("w", tuple(hi - lo for lo, hi in box), dtype)
    return Layout(
        _manifest(tensor, memory=sources), (parameter,), (_read(tensor, "w", box),)
    )


# Layouts that nobody wrote by hand.


@dataclass
class LayoutBuilder:
    """Draws tensors, shards and slices for one parameter after the other."""

    draw: st.DrawFn
    memory: SourceMemory
    tensors: list[TensorEntry]
    parameters: list[Parameter]
    slices: list[ReadSlice]

    def add_parameter(self) -> None:
        """A parameter that is cut along one axis into parts.

        Each part is loaded from a box of a tensor (row and column slices, heads
        of a fused checkpoint tensor), or is not loaded at all. Parts along the
        first axis are what QKV and gate/up look like, those along others have
        rows that are not contiguous in the parameter.
        """
        shape = tuple(self.draw(st.lists(st.integers(1, 6), max_size=3)))
        dtype = self.draw(st.sampled_from(sorted(ITEMSIZE)))
        name = f"p{len(self.parameters)}"
        axis = self.draw(st.integers(0, len(shape) - 1)) if shape else 0
        order = self.draw(st.permutations(range(len(shape))))
        strides = _row_major(shape)
        together = self.draw(st.booleans())
        unloaded, boxes = 0, []
        for lo, hi in self._cut(shape[axis]) if shape else [(0, 1)]:
            box = list(_whole(shape))
            if shape:
                box[axis] = (lo, hi)
            if self.draw(st.integers(0, 5)) == 0:
                unloaded += _volume(tuple(box))
            else:
                boxes.append(tuple(box))
        self.parameters.append(Parameter(name, shape, dtype, unloaded))
        if together:
            margins = self._add_tensor(shape, order, dtype)
        for box in boxes:
            extent = tuple(hi - lo for lo, hi in box)
            start = [lo for lo, _ in box] if together else [0] * len(shape)
            if not together:
                margins = self._add_tensor(extent, order, dtype)
            offset = sum(lo * s for (lo, _), s in zip(box, strides, strict=True))
            self._add_slice(name, offset, start, extent, strides, order, margins)

    def _add_tensor(
        self, extent: Sequence[int], order: Sequence[int], dtype: str
    ) -> list[int]:
        """A sharded tensor around a transposed block; where the block begins.

        It may have one dimension more, of which a slice reads one index.
        """
        sizes = [extent[dim] for dim in order]
        if len(sizes) < 3 and self.draw(st.integers(0, 3)) == 0:
            sizes.append(1)
        margin, region_number = st.integers(0, 2), st.integers(0, 1)
        before = [self.draw(margin) for _ in sizes]
        rows = zip(sizes, before, strict=True)
        shape = tuple(n + b + self.draw(margin) for n, b in rows)
        shards = []
        for box in self._shard_boxes(shape):
            for _ in range(self.draw(st.sampled_from([1, 1, 1, 2, 3]))):
                source, region = self.draw(st.integers(0, 2)), self.draw(region_number)
                gap = self.draw(st.integers(0, 9))
                shards.append(self.memory.place(box, dtype, source, region, gap))
        self.tensors.append(
            TensorEntry(
                name=f"t{len(self.tensors)}",
                dtype=dtype,
                shape=shape,
                shards=tuple(self.draw(st.permutations(shards))),
            )
        )
        return before

    def _add_slice(
        self,
        parameter: str,
        offset: int,
        start: Sequence[int],
        extent: Sequence[int],
        strides: Sequence[int],
        order: Sequence[int],
        margins: Sequence[int],
    ) -> None:
        box = [
            (margin + start[dim], margin + start[dim] + extent[dim])
            for margin, dim in zip(margins, order, strict=False)
        ]
        target = [strides[dim] for dim in order]
        if len(margins) > len(order):
            # What ModelExpress says for a dimension that a select drops.
            box.append((margins[-1], margins[-1] + 1))
            target.append(0)
        self.slices.append(
            ReadSlice(
                self.tensors[-1].name, tuple(box), parameter, offset, tuple(target)
            )
        )

    def _cut(self, size: int) -> list[tuple[int, int]]:
        """Up to three uneven parts."""
        inner = st.sets(st.integers(1, max(size - 1, 1)), max_size=2)
        cuts = sorted(cut for cut in self.draw(inner) if cut < size)
        return list(itertools.pairwise([0, *cuts, size]))

    def _shard_boxes(self, shape: Sequence[int]) -> list[Box]:
        """Cut along one axis, and now and then along all of them."""
        grid = self.draw(st.integers(0, 4)) == 0
        axis = self.draw(st.integers(0, len(shape) - 1)) if shape else 0
        pieces = [
            self._cut(size) if grid or dim == axis else [(0, size)]
            for dim, size in enumerate(shape)
        ]
        return list(itertools.product(*pieces))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to four parameters from up to three sources, in two slots."""
    memory = SourceMemory(
        sources=draw(st.integers(1, 3)),
        regions=draw(st.integers(1, 2)),
        memory=draw(st.sampled_from(MEMORIES)),
    )
    builder = LayoutBuilder(draw, memory, [], [], [])
    for _ in range(draw(st.integers(1, 4))):
        builder.add_parameter()
    if not builder.tensors:
        builder.tensors.append(_tensor(memory, "unread", ()))
    manifest = _manifest(*builder.tensors, memory=memory, slots=2)
    slices = draw(st.permutations(builder.slices))
    return Layout(manifest, tuple(builder.parameters), tuple(slices))


@settings(max_examples=400, deadline=None)
@given(
    layout=layouts(),
    rank=st.integers(0, 3),
    scratch_limit=st.sampled_from([0, 256, 700, 1 << 30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_plan_stages_the_bytes_that_the_loader_would(
    layout: Layout, rank: int, scratch_limit: int, seed: int
) -> None:
    slots = [layout.random_tensors(seed), layout.random_tensors(seed + 1)]
    transport = FakeTransport(layout.manifest, slots)
    expected = [layout.expected_parameters(tensors) for tensors in slots]
    plans = {}
    for costs in (ALWAYS_EXACT, ALWAYS_CONTIGUOUS, None):
        plan = layout.plan(costs=costs, scratch_limit=scratch_limit, rank=rank)
        check_plan(plan, layout, scratch_limit)
        for slot, parameters in enumerate(expected):
            staged = transport.run(plan, slot)
            np.testing.assert_array_equal(staged, _expected_arena(plan, parameters))
        plans[id(costs)] = plan

    exact, contiguous = plans[id(ALWAYS_EXACT)], plans[id(ALWAYS_CONTIGUOUS)]
    assert exact.scratch_nbytes == 0
    assert exact.wire_nbytes == exact.nbytes
    assert contiguous.descriptors <= exact.descriptors
    assert contiguous.reads == exact.reads == plans[id(None)].reads


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**32 - 1))
def test_a_plan_holds_for_every_set_of_addresses_of_its_layout(
    layout: Layout, seed: int
) -> None:
    moved = _moved(layout.manifest)
    assert moved.layout_fingerprint() == layout.manifest.layout_fingerprint()
    slots = [layout.random_tensors(seed + slot) for slot in range(2)]
    transport = FakeTransport(moved, slots)

    for costs in (ALWAYS_EXACT, ALWAYS_CONTIGUOUS):
        plan = layout.plan(costs=costs)
        for slot, tensors in enumerate(slots):
            expected = _expected_arena(plan, layout.expected_parameters(tensors))
            np.testing.assert_array_equal(transport.run(plan, slot), expected)


def _moved(manifest: Manifest) -> Manifest:
    """The same layout in other memory: a trainer that has started again."""
    tensors = tuple(
        msgspec.structs.replace(
            tensor,
            shards=tuple(
                msgspec.structs.replace(shard, byte_offset=shard.byte_offset + 13)
                for shard in tensor.shards
            ),
        )
        for tensor in manifest.tensors
    )
    sources = tuple(
        msgspec.structs.replace(
            source,
            slots=tuple(
                tuple(Region(r.address + (1 << 33), r.nbytes + 13) for r in regions)
                for regions in reversed(source.slots)
            ),
        )
        for source in manifest.sources
    )
    moved = msgspec.structs.replace(manifest, tensors=tensors, sources=sources)
    moved.validate()
    return moved


# A decoder layer as vLLM holds it on one of two ranks, as FSDP publishes it.

HIDDEN, HEADS, KV_HEADS, HEAD, MLP, VOCAB, PADDED = 32, 4, 2, 8, 48, 50, 64


def _decoder_layer(rank: int) -> Layout:
    """Fused QKV and gate/up, row-parallel o_proj and down_proj, a padded embedding;
    every tensor cut by rows over two trainers."""
    memory = SourceMemory(sources=2)
    shapes = {
        "embed": (VOCAB, HIDDEN),
        "q": (HEADS * HEAD, HIDDEN),
        "k": (KV_HEADS * HEAD, HIDDEN),
        "v": (KV_HEADS * HEAD, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD),
        "gate": (MLP, HIDDEN),
        "up": (MLP, HIDDEN),
        "down": (HIDDEN, MLP),
        "norm": (HIDDEN,),
    }
    tensors = {n: _tensor(memory, n, shape, parts=2) for n, shape in shapes.items()}
    fused = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
    parameters, slices = [], []
    for name, parts in fused.items():
        rows = 0
        for part in parts:
            height, width = shapes[part]
            half = height // 2
            box = ((rank * half, (rank + 1) * half), (0, width))
            slices.append(_read(tensors[part], name, box, rows * width))
            rows += half
        parameters.append(Parameter(name, (rows, HIDDEN), "bfloat16"))
    for name in ("o", "down"):
        height, width = shapes[name]
        half = width // 2
        box = ((0, height), (rank * half, (rank + 1) * half))
        slices.append(_read(tensors[name], name, box))
        parameters.append(Parameter(name, (height, half), "bfloat16"))
    slices.append(_read(tensors["norm"], "norm"))
    parameters.append(Parameter("norm", (HIDDEN,), "bfloat16"))
    first = rank * PADDED // 2
    last = min(first + PADDED // 2, VOCAB)
    slices.append(_read(tensors["embed"], "embed", ((first, last), (0, HIDDEN))))
    padding = (PADDED // 2 - (last - first)) * HIDDEN
    parameters.append(Parameter("embed", (PADDED // 2, HIDDEN), "bfloat16", padding))
    manifest = _manifest(*tensors.values(), memory=memory)
    return Layout(manifest, tuple(parameters), tuple(slices))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "costs",
    [ALWAYS_EXACT, ALWAYS_CONTIGUOUS, COST],
    ids=["exact", "contiguous", "default"],
)
@pytest.mark.parametrize("scratch_limit", [1, 4096, 1 << 20])
def test_a_decoder_layer_arrives_on_either_rank(
    rank: int, costs: dict[str, TransferCost], scratch_limit: int
) -> None:
    layout = _decoder_layer(rank)
    plan = layout.plan(costs=costs, scratch_limit=scratch_limit, rank=rank)
    check_plan(plan, layout, scratch_limit)

    tensors = layout.random_tensors(seed=rank)
    staged = FakeTransport(layout.manifest, [tensors]).run(plan, 0)
    expected = layout.expected_parameters(tensors)
    np.testing.assert_array_equal(staged, _expected_arena(plan, expected))

    # The same by the words of the model, to check the expectation itself.
    half = HEADS * HEAD // 2
    embedding = np.zeros((PADDED // 2, HIDDEN), dtype=np.uint16)
    rows = tensors["embed"][rank * PADDED // 2 :][: PADDED // 2]
    embedding[: len(rows)] = rows
    by_hand = {
        "qkv": np.concatenate([np.split(tensors[n], 2)[rank] for n in "qkv"]),
        "o": tensors["o"][:, rank * half : (rank + 1) * half],
        "embed": embedding,
    }
    for name, values in by_hand.items():
        assert expected[name].tobytes() == values.tobytes(), name


def test_extents_are_complete_over_all_ranks_and_not_over_one() -> None:
    layers = [_decoder_layer(rank) for rank in range(2)]
    reads = [layer.plan(rank=rank).reads for rank, layer in enumerate(layers)]

    check_extents(layers[0].manifest, reads)
    with pytest.raises(LayoutRefused) as caught:
        check_extents(layers[0].manifest, reads[:1])
    assert caught.value.tensor == "embed"
    assert str(caught.value) == (
        "published with shape (50, 32), but all ranks together read only "
        "((0, 32), (0, 32)): it has another shape in the served model"
    )


# What the cost rule picks.


def test_short_rows_of_a_row_parallel_weight_are_pulled_as_one_span() -> None:
    """A 4096 x 4096 o_proj on the second of two ranks: 4096 rows of 4 KB."""
    layout = _one_slice((4096, 4096), ((0, 4096), (2048, 4096)))
    plan = layout.plan(scratch_limit=64 << 20)

    nbytes, span = 4096 * 2048 * 2, (4095 * 4096 + 2048) * 2
    assert COST["DRAM"].contiguous(span, nbytes) < COST["DRAM"].exact(4096, nbytes)
    assert (plan.nbytes, plan.wire_nbytes, plan.descriptors) == (nbytes, span, 1)
    assert plan.scratch_nbytes == _aligned(span)
    (wave,) = plan.waves
    assert wave.reslices == (
        Reslice(
            dtype="bfloat16",
            shape=(4096, 2048),
            scratch=0,
            scratch_strides=(4096, 1),
            arena=0,
            arena_strides=(2048, 1),
        ),
    )
    assert wave.segments[0].remote.tolist() == [4096]
    check_plan(plan, layout, 64 << 20)


def test_a_column_slice_of_few_long_rows_is_read_exactly() -> None:
    """8 rows of 2 MB: the other half of each would cost more than 7 descriptors."""
    layout = _one_slice((8, 1 << 21), ((0, 8), (1 << 20, 1 << 21)))
    plan = layout.plan(scratch_limit=64 << 20)

    nbytes, span = 8 << 21, (7 << 22) + (1 << 21)
    assert COST["DRAM"].exact(8, nbytes) < COST["DRAM"].contiguous(span, nbytes)
    assert (plan.nbytes, plan.wire_nbytes, plan.descriptors) == (nbytes, nbytes, 8)
    assert plan.scratch_nbytes == 0
    (wave,) = plan.waves
    assert wave.reslices == ()
    (segments,) = wave.segments
    assert segments.remote.tolist() == [(1 << 21) + (row << 22) for row in range(8)]
    assert segments.local.tolist() == [row << 21 for row in range(8)]
    assert segments.nbytes.tolist() == [1 << 21] * 8
    check_plan(plan, layout, 64 << 20)


def test_the_memory_of_the_source_decides_by_its_own_cost() -> None:
    """The same slice out of VRAM: there a descriptor costs as much as 7 MB."""
    layout = _one_slice((8, 1 << 21), ((0, 8), (1 << 20, 1 << 21)), memory="VRAM")
    plan = layout.plan(scratch_limit=64 << 20)

    assert plan.descriptors == 1
    assert plan.wire_nbytes == (7 << 22) + (1 << 21)


def test_the_rule_decides_for_every_shard() -> None:
    """Four FSDP shards of a row-parallel weight are four spans."""
    layout = _one_slice((4096, 4096), ((0, 4096), (0, 2048)), parts=4)
    plan = layout.plan(scratch_limit=64 << 20)

    (wave,) = plan.waves
    assert [s.source for s in wave.segments] == [0, 1, 2, 3]
    assert plan.descriptors == len(wave.reslices) == 4
    check_plan(plan, layout, 64 << 20)


@pytest.mark.parametrize(("reslice_seconds", "descriptors"), [(2.9, 1), (3.1, 4)])
def test_the_local_copy_is_part_of_the_cost(
    reslice_seconds: float, descriptors: int
) -> None:
    """Four descriptors of a second each, or one and a local copy."""
    layout = _one_slice((4, 8), ((0, 4), (0, 4)))
    cost = TransferCost(1.0, 1e18, 4 * 4 * 2 / reslice_seconds)

    assert layout.plan(costs={"DRAM": cost}).descriptors == descriptors


def test_dimensions_of_one_index_do_not_cut_a_run() -> None:
    """What ``select`` drops has no stride in the destination: ``w[0, 2]`` is one run,
    and so are rows on both sides of a dimension of one, as in ``w[:, 0]``."""
    memory = SourceMemory()
    tensor = _tensor(memory, "w", (1, 3, 8))
    piece = ReadSlice("w", ((0, 1), (2, 3), (0, 8)), "w", 0, (0, 0, 1))
    layout = Layout(
        _manifest(tensor, memory=memory), (Parameter("w", (8,), "bfloat16"),), (piece,)
    )
    flat = _tensor(memory, "w", (4, 1, 8))
    squeezed = ReadSlice("w", ((0, 4), (0, 1), (0, 8)), "w", 0, (8, 0, 1))
    stack = Layout(
        _manifest(flat, memory=memory),
        (Parameter("w", (4, 8), "bfloat16"),),
        (squeezed,),
    )

    for made in (layout, stack):
        plan = made.plan(costs=ALWAYS_EXACT)
        assert plan.descriptors == 1
        check_plan(plan, made, 0)


@pytest.mark.parametrize("costs", [ALWAYS_EXACT, ALWAYS_CONTIGUOUS])
def test_a_slice_that_is_one_run_is_never_cut_out_locally(
    costs: dict[str, TransferCost],
) -> None:
    layout = _one_slice((64, 16), ((16, 48), (0, 16)))
    plan = layout.plan(costs=costs)

    assert (plan.descriptors, plan.scratch_nbytes) == (1, 0)
    assert plan.wire_nbytes == plan.nbytes == 32 * 16 * 2


# Scratch and waves.


@pytest.mark.parametrize(
    ("scratch_limit", "spans_per_wave"),
    [(0, [1] * 5), (511, [1] * 5), (512, [2, 2, 1]), (1280, [5]), (1 << 30, [5])],
)
def test_scratch_limits_what_is_in_flight(
    scratch_limit: int, spans_per_wave: list[int]
) -> None:
    """Five spans of 84 bytes, which take 256 of scratch each."""
    memory = SourceMemory()
    tensors = [_tensor(memory, f"w{i}", (4, 12)) for i in range(5)]
    box = ((0, 4), (0, 6))
    layout = Layout(
        _manifest(*tensors, memory=memory),
        tuple(Parameter(t.name, (4, 6), "bfloat16") for t in tensors),
        tuple(_read(t, t.name, box) for t in tensors),
    )
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, scratch_limit=scratch_limit)

    assert [len(wave.reslices) for wave in plan.waves] == spans_per_wave
    assert plan.scratch_nbytes == 256 * max(spans_per_wave)
    check_plan(plan, layout, scratch_limit)


def test_one_span_may_exceed_the_limit() -> None:
    layout = _one_slice((64, 64), ((0, 64), (0, 32)))
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, scratch_limit=1024)

    assert plan.scratch_nbytes == _aligned((63 * 64 + 32) * 2) > 1024
    assert plan.descriptors == 1


def test_exact_runs_come_first_and_in_one_wave() -> None:
    layout = _decoder_layer(0)
    plan = layout.plan(costs=ALWAYS_CONTIGUOUS, scratch_limit=1)

    assert [bool(wave.reslices) for wave in plan.waves] == [False] + [True] * 4


# Replicas.


def test_ranks_take_turns_at_replicas() -> None:
    memory = SourceMemory(sources=3)
    box = _whole((4, 4))
    shards = tuple(memory.place(box, "bfloat16", source=i) for i in (2, 0, 1))
    tensor = TensorEntry(name="w", dtype="bfloat16", shape=(4, 4), shards=shards)
    layout = Layout(
        _manifest(tensor, memory=memory),
        (Parameter("w", (4, 4), "bfloat16"),),
        (_read(tensor, "w"),),
    )
    plans = [layout.plan(rank=rank) for rank in range(4)]

    assert [plan.waves[0].segments[0].source for plan in plans] == [2, 0, 1, 2]
    assert [plan.descriptors for plan in plans] == [1] * 4
    assert [plan.wire_nbytes for plan in plans] == [32] * 4


# Refusals.


def _refusal(layout: Layout) -> tuple[str | None, str]:
    with pytest.raises(LayoutRefused) as caught:
        layout.plan()
    return caught.value.tensor, str(caught.value)


def _gate_up(
    slices: Sequence[tuple[str, Box, int]],
    *,
    dtype: str = "bfloat16",
    parameter: str = "gate_up",
    unloaded: int = 0,
) -> Layout:
    """``gate`` and ``up`` of 4 x 8, fused into a parameter of 8 x 8."""
    memory = SourceMemory()
    tensors = {name: _tensor(memory, name, (4, 8)) for name in ("gate", "up")}
    return Layout(
        _manifest(*tensors.values(), memory=memory),
        (
            Parameter("before", (), dtype, unloaded=1),
            Parameter("gate_up", (8, 8), dtype, unloaded),
            Parameter("after", (8, 8), dtype, unloaded=64),
        ),
        tuple(_read(tensors[n], parameter, box, start) for n, box, start in slices),
    )


GATE_UP = [("gate", _whole((4, 8)), 0), ("up", _whole((4, 8)), 32)]


def test_the_fused_parameter_of_the_refusals_is_sound() -> None:
    _gate_up(GATE_UP).plan()


def test_a_parameter_with_a_missing_tensor_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP[:1]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 32 of its 64 elements")


def test_a_parameter_that_nothing_fills_is_refused() -> None:
    tensor, cause = _refusal(_gate_up([]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 0 of its 64 elements")


def test_a_parameter_that_is_filled_twice_is_refused() -> None:
    tensor, cause = _refusal(_gate_up([*GATE_UP, GATE_UP[0]]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 96 of its 64 elements")


def test_padding_that_is_filled_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, unloaded=8))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 64 of its 56 elements")


def test_another_dtype_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, dtype="float32"))

    assert tensor == "gate"
    assert cause == (
        "published as bfloat16, the engine holds gate_up as float32: publish it as "
        "float32"
    )


def test_another_dtype_of_the_same_size_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, dtype="float16"))

    assert tensor == "gate"
    assert "published as bfloat16" in cause


def test_a_slice_into_an_unknown_parameter_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, parameter="gate_up_proj"))

    assert tensor == "gate"
    assert cause == (
        "the loader writes 'gate_up_proj', which is not a parameter of the live model"
    )


def test_a_slice_that_reaches_past_its_tensor_is_refused() -> None:
    """The element counts add up, and the last rows would stay as they were."""
    past = [("gate", ((0, 5), (0, 8)), 0), ("up", ((0, 3), (0, 8)), 40)]
    tensor, _ = _refusal(_gate_up(past))

    assert tensor == "gate"


def test_slices_that_overlap_and_leave_a_gap_are_refused() -> None:
    """The element counts add up, and 8 elements would stay as they were."""
    tensor, _ = _refusal(_gate_up([GATE_UP[0], ("up", _whole((4, 8)), 24)]))

    assert tensor in ("gate_up", "up")


def test_a_slice_that_reaches_past_its_parameter_is_refused() -> None:
    """The element counts add up, and the next parameter would be written."""
    tensor, _ = _refusal(_gate_up([GATE_UP[0], ("up", _whole((4, 8)), 128)]))

    assert tensor in ("gate_up", "up")


def _published(*shapes: tuple[int, ...]) -> Manifest:
    memory = SourceMemory()
    tensors = [_tensor(memory, f"w{i}", shape) for i, shape in enumerate(shapes)]
    return _manifest(*tensors, memory=memory)


def test_a_tensor_that_no_rank_reads_is_refused() -> None:
    manifest = _published((4, 8), (6,))

    with pytest.raises(LayoutRefused, match="does not read this tensor") as caught:
        check_extents(manifest, [{"w0": ((0, 4), (0, 8))}, {}])
    assert caught.value.tensor == "w1"


@pytest.mark.parametrize("read", [((0, 3), (0, 8)), ((0, 4), (0, 7)), ((1, 4), (0, 8))])
def test_a_tensor_that_is_read_in_part_is_refused(read: Box) -> None:
    manifest = _published((4, 8))

    with pytest.raises(LayoutRefused) as caught:
        check_extents(manifest, [{"w0": read}, {"w0": read}])
    assert caught.value.tensor == "w0"
    assert f"read only {read}" in str(caught.value)
    assert "published with shape (4, 8)" in str(caught.value)


def test_what_ranks_read_together_suffices() -> None:
    """By rows, by columns, and a scalar on one rank only."""
    manifest = _published((4, 8), (6, 2), ())
    first = {"w0": ((0, 2), (0, 8)), "w1": ((0, 6), (1, 2)), "w2": ()}
    second = {"w0": ((2, 4), (0, 8)), "w1": ((0, 6), (0, 1))}

    check_extents(manifest, [first, second])
    check_extents(manifest, [second, {}, first])
