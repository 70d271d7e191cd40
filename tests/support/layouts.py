# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Layouts to plan for, by hand, and what a loader would make of each.

The expectation is computed from the full tensors, element by element, with nothing
of the planner.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from dynamo.refit.manifest import (
    ITEMSIZE,
    Box,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
)
from dynamo.refit.rank.limits import Limits, TransferCost
from dynamo.refit.rank.plan import Plan, make_plan
from dynamo.refit.rank.slices import (
    CONVERTIBLE,
    IntakeLayout,
    Parameter,
    ReadSlice,
)

MEMORIES = ("DRAM", "VRAM")

#: Contiguous pulls cost a fortune, so every run is read exactly.
ALWAYS_EXACT = dict.fromkeys(MEMORIES, TransferCost(0.0, 1e9, 1e-9))

#: Descriptors cost a fortune, so whatever falls into runs is pulled in one piece.
ALWAYS_CONTIGUOUS = dict.fromkeys(MEMORIES, TransferCost(1e9, 1e18, 1e18))

#: More than any of these layouts.
ROOMY = Limits(scratch=1 << 30)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    return math.prod(hi - lo for lo, hi in box)


def extent(box: Box) -> tuple[int, ...]:
    return tuple(hi - lo for lo, hi in box)


def index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in box)


class SourceMemory:
    """Lays shards out in the regions of some sources, one after another.

    ``place`` leaves ``gap`` bytes before each shard, so shards are not aligned.
    """

    def __init__(
        self, sources: int = 1, regions: int = 1, memory: Sequence[str] = ("DRAM",)
    ) -> None:
        self._ends = [[0] * regions for _ in range(sources)]
        self._memory = memory

    def place(
        self, box: Box, dtype: str, source: int = 0, region: int = 0, gap: int = 0
    ) -> Shard:
        source %= len(self._ends)
        region %= len(self._ends[source])
        start = self._ends[source][region] + gap
        self._ends[source][region] = start + volume(box) * ITEMSIZE[dtype]
        return Shard(
            source=source,
            region=region,
            byte_offset=start,
            offset=tuple(lo for lo, _ in box),
            shape=extent(box),
        )

    def sources(self, slots: int) -> tuple[Source, ...]:
        """The sources, with every region of every slot at an address of its own that
        nobody may touch."""
        addresses = itertools.count(0x7F00_0000_0000, 1 << 36)
        return tuple(
            Source(
                agent=f"trainer-{number}",
                metadata=f"trainer-{number}".encode(),
                memory=self._memory[number % len(self._memory)],
                device=0,
                slots=tuple(
                    tuple(Region(next(addresses), end) for end in ends)
                    for _ in range(slots)
                ),
            )
            for number, ends in enumerate(self._ends)
        )


def make_manifest(
    *tensors: TensorEntry, memory: SourceMemory, slots: int = 1
) -> Manifest:
    manifest = Manifest(model="tiny", tensors=tensors, sources=memory.sources(slots))
    manifest.validate()
    return manifest


def housed(manifest: Manifest, address: Callable[[int], int]) -> Manifest:
    """The same layout in real memory: ``address`` gives so many bytes of it."""
    sources = tuple(
        msgspec.structs.replace(
            source,
            slots=tuple(
                tuple(Region(address(r.nbytes), r.nbytes) for r in regions)
                for regions in source.slots
            ),
        )
        for source in manifest.sources
    )
    return msgspec.structs.replace(manifest, sources=sources)


def make_tensor(
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
        box = list(whole(shape))
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


def read(
    tensor: TensorEntry, parameter: str, box: Box | None = None, offset: int = 0
) -> ReadSlice:
    """A slice that the destination holds in row-major order from ``offset`` on."""
    box = box or whole(tensor.shape)
    return ReadSlice(tensor.name, box, parameter, offset, row_major(extent(box)))


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
        limits: Limits = ROOMY,
        rank: int = 0,
        intake: IntakeLayout | None = None,
    ) -> Plan:
        return make_plan(
            self.manifest,
            self.parameters,
            self.slices,
            rank=rank,
            limits=limits,
            costs=costs,
            intake=intake,
        )

    def random_tensors(self, seed: int) -> dict[str, np.ndarray]:
        """Full tensors as unsigned integers of the same size.

        Random bytes, but numbers where the dtype may be converted, since what
        becomes of a NaN's bits then is nobody's promise.
        """
        generator = np.random.default_rng(seed)
        tensors = {}
        for tensor in self.manifest.tensors:
            elements, size = math.prod(tensor.shape), ITEMSIZE[tensor.dtype]
            if tensor.dtype in CONVERTIBLE:
                numbers = torch.from_numpy(generator.standard_normal(elements))
                data = raw(numbers.to(getattr(torch, tensor.dtype)))
            else:
                data = generator.bytes(elements * size)
                if tensor.dtype == "bool":
                    data = bytes(byte & 1 for byte in data)
            flat = np.frombuffer(data, dtype=f"u{size}")
            tensors[tensor.name] = flat.reshape(tensor.shape)
        return tensors

    def loaded(
        self, tensors: Mapping[str, np.ndarray], before: int = 0
    ) -> dict[str, np.ndarray]:
        """Per parameter its bytes after a load; those that nothing loads are
        ``before``."""
        dtypes = {tensor.name: tensor.dtype for tensor in self.manifest.tensors}
        flat = {
            p.name: np.full(p.nbytes, before, np.uint8).view(f"u{ITEMSIZE[p.dtype]}")
            for p in self.parameters
        }
        targets = {p.name: p.dtype for p in self.parameters}
        for piece in self.slices:
            full = tensors[piece.tensor]
            full = convert(full, dtypes[piece.tensor], targets[piece.parameter])
            for place in itertools.product(*(range(lo, hi) for lo, hi in piece.box)):
                steps = (i - lo for i, (lo, _) in zip(place, piece.box, strict=True))
                strides = zip(steps, piece.strides, strict=True)
                element = piece.offset + sum(step * stride for step, stride in strides)
                flat[piece.parameter][element] = full[place]
        return {name: values.view(np.uint8) for name, values in flat.items()}


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of ``tensor``, in row-major order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def convert(values: np.ndarray, dtype: str, to: str) -> np.ndarray:
    """Elements of ``dtype`` as unsigned integers, to those of another dtype."""
    if dtype == to:
        return values
    numbers = torch.frombuffer(bytearray(values.tobytes()), dtype=getattr(torch, dtype))
    converted = np.frombuffer(raw(numbers.to(getattr(torch, to))), f"u{ITEMSIZE[to]}")
    return converted.reshape(values.shape)


def one_slice(
    shape: Sequence[int],
    box: Box,
    *,
    dtype: str = "bfloat16",
    held: str | None = None,
    parts: int = 1,
    memory: str = "DRAM",
) -> Layout:
    """A parameter of dtype ``held`` that is one box of one tensor."""
    sources = SourceMemory(sources=parts, memory=(memory,))
    tensor = make_tensor(sources, "w", shape, dtype=dtype, parts=parts)
    parameter = Parameter("w", extent(box), held or dtype)
    manifest = make_manifest(tensor, memory=sources)
    return Layout(manifest, (parameter,), (read(tensor, "w", box),))


# A decoder layer as vLLM holds it on one of two ranks, as FSDP publishes it.

HIDDEN, HEADS, KV_HEADS, HEAD, MLP, VOCAB, PADDED = 32, 4, 2, 8, 48, 50, 64

_SHAPES = {
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


def decoder_layer(rank: int, *, dtype: str = "bfloat16", slots: int = 1) -> Layout:
    """Fused QKV and gate/up, row-parallel o_proj and down_proj, a padded embedding.

    Every tensor is cut by rows over two trainers. The rank holds all parameters in
    bfloat16.
    """
    memory = SourceMemory(sources=2)
    tensors = {
        name: make_tensor(memory, name, shape, dtype=dtype, parts=2)
        for name, shape in _SHAPES.items()
    }
    parameters, slices = [], []
    for name, parts in {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.items():
        rows = 0
        for part in parts:
            height, width = _SHAPES[part]
            half = height // 2
            box = ((rank * half, (rank + 1) * half), (0, width))
            slices.append(read(tensors[part], name, box, rows * width))
            rows += half
        parameters.append(Parameter(name, (rows, HIDDEN), "bfloat16"))
    for name in ("o", "down"):
        height, width = _SHAPES[name]
        half = width // 2
        box = ((0, height), (rank * half, (rank + 1) * half))
        slices.append(read(tensors[name], name, box))
        parameters.append(Parameter(name, (height, half), "bfloat16"))
    slices.append(read(tensors["norm"], "norm"))
    parameters.append(Parameter("norm", (HIDDEN,), "bfloat16"))
    first = rank * PADDED // 2
    last = min(first + PADDED // 2, VOCAB)
    slices.append(read(tensors["embed"], "embed", ((first, last), (0, HIDDEN))))
    padding = (PADDED // 2 - (last - first)) * HIDDEN
    parameters.append(Parameter("embed", (PADDED // 2, HIDDEN), "bfloat16", padding))
    manifest = make_manifest(*tensors.values(), memory=memory, slots=slots)
    return Layout(manifest, tuple(parameters), tuple(slices))
