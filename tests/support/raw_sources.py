# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainer ranks reduced to what a reader sees: NIXL agents in processes of their own,
and a manifest that this helper builds itself. No publisher is involved.

    with RawSources(3, logs) as sources:
        held = sources.hold(checkpoint, shards=3)
        group.refit(held.write(0, checkpoint))

Every way to cut a tensor occurs for every kind of tensor; see :func:`cut`.
"""

from __future__ import annotations

import functools
import re
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dynamo.refit.fingerprint import Batch, Part
from dynamo.refit.manifest import (
    ITEMSIZE,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
    align,
)
from dynamo.refit.transport.nixl import NixlAgent
from tests.support.child import Child, answer_requests

#: Versions that a source can hold at a time.
SLOTS = 2

PROGRESS_SECONDS = 0.002


@dataclass(frozen=True)
class Block:
    """A part of a tensor that source number ``source`` holds."""

    source: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A block as it lies in a source's memory: ``tensor`` from ``offset`` on."""

    tensor: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    byte_offset: int


@dataclass(frozen=True)
class RawVersion:
    """A version that can be read: where it lies, and a fingerprint per tensor
    (uint64, in the manifest's order)."""

    manifest: Manifest
    slot: int
    fingerprints: np.ndarray


CUTS = ("rows", "columns", "replicated", "one source")


def name_cut(name: str) -> str:
    """How the tensor ``name`` is cut: each kind of tensor in each way, by its layer."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    kind = sum(map(ord, re.sub(r"\d+", "", name)))
    return CUTS[(kind + sum(numbers)) % len(CUTS)]


def cut(name: str, shape: tuple[int, ...], shards: int) -> list[Block]:
    """The blocks of a tensor that is spread over ``shards`` sources.

    Rows are cut as FSDP does (equal parts, a shorter last one), columns in the ratio
    1 : 2 : 3, a replica is on every source, and a tensor of a pipeline stage on one.
    """
    origin = (0,) * len(shape)
    match name_cut(name):
        case "replicated":
            return [Block(source, origin, shape) for source in range(shards)]
        case _ if not shape:
            return [Block(len(name) % shards, origin, shape)]
        case "one source":
            return [Block(len(name) % shards, origin, shape)]
        case "columns" if len(shape) > 1:
            axis, parts = (
                1,
                [number * (number + 1) // 2 for number in range(shards + 1)],
            )
            bounds = [shape[1] * part // parts[-1] for part in parts]
        case _:
            axis, step = 0, -(-shape[0] // shards)
            bounds = [min(step * number, shape[0]) for number in range(shards + 1)]
    blocks = []
    for source in range(shards):
        start, stop = bounds[source], bounds[source + 1]
        offset, extent = list(origin), list(shape)
        offset[axis], extent[axis] = start, stop - start
        if stop > start:
            blocks.append(Block(source, tuple(offset), tuple(extent)))
    return blocks


class RawSources:
    """``count`` source processes; they can be killed and started again."""

    def __init__(self, count: int, logs: Path) -> None:
        self._logs = logs
        self._children = [self._start(number) for number in range(count)]

    def _start(self, number: int) -> Child:
        log = self._logs / f"source-{number}.log"
        return Child("tests.support.raw_sources", [], log)

    def hold(self, checkpoint: Path, shards: int) -> Held:
        """New agents with new memory for the tensors of ``checkpoint``.

        What was held before stays readable until it is released.
        """
        return Held(checkpoint, self._children[:shards])

    def kill(self, number: int) -> None:
        self._children[number].kill()

    def restart(self, number: int) -> None:
        """Start a killed source again; it holds nothing."""
        self._children[number] = self._start(number)

    def close(self) -> None:
        for child in self._children:
            child.close()

    def __enter__(self) -> RawSources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Held:
    """The memory for one model, cut over some sources, and its manifest."""

    def __init__(self, checkpoint: Path, children: list[Child]) -> None:
        self._children = children
        self._agents = [f"raw-{uuid.uuid4().hex[:12]}" for _ in children]
        self._pieces: list[list[Piece]] = [[] for _ in children]
        self._ends = [0] * len(children)
        entries = tuple(
            self._place(name, dtype, shape) for name, dtype, shape in shapes(checkpoint)
        )
        for child, agent, end in zip(children, self._agents, self._ends, strict=True):
            child.send("hold", agent, end)
        self.manifest = Manifest(
            model="raw",
            tensors=entries,
            sources=tuple(
                _describe(agent, end, *child.receive())
                for child, agent, end in zip(
                    children, self._agents, self._ends, strict=True
                )
            ),
        )
        self.manifest.validate()

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
        shards = []
        for block in cut(name, shape, len(self._children)):
            start = self._ends[block.source]
            piece = Piece(name, block.offset, block.shape, start)
            self._pieces[block.source].append(piece)
            nbytes = torch.Size(block.shape).numel() * ITEMSIZE[dtype]
            self._ends[block.source] += align(nbytes)
            shards.append(
                Shard(
                    source=block.source,
                    region=0,
                    byte_offset=start,
                    offset=block.offset,
                    shape=block.shape,
                )
            )
        return TensorEntry(name=name, dtype=dtype, shape=shape, shards=tuple(shards))

    def write(self, slot: int, checkpoint: Path) -> RawVersion:
        """Put the tensors of ``checkpoint`` into ``slot``."""
        owned = zip(self._children, self._agents, self._pieces, strict=True)
        for child, agent, pieces in owned:
            child.send("write", agent, slot, checkpoint, pieces)
        for child in self._children:
            child.receive()
        return RawVersion(self.manifest, slot, fingerprints(checkpoint))

    def release(self) -> None:
        """Give the memory and the agents back."""
        for child, agent in zip(self._children, self._agents, strict=True):
            child.ask("release", agent)


@functools.cache
def fingerprints(checkpoint: Path) -> np.ndarray:
    """Of the whole tensors, in the order of :func:`shapes`."""
    tensors = load_file(checkpoint / "model.safetensors")
    return Batch(
        [
            Part(tensors[name], tuple((0, size) for size in shape), shape)
            for name, _, shape in shapes(checkpoint)
        ]
    ).fold()


def shapes(checkpoint: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a checkpoint."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return [
            (
                name,
                str(file.get_tensor(name).dtype).removeprefix("torch."),
                tuple(file.get_slice(name).get_shape()),
            )
            for name in sorted(file.keys())
        ]


def _describe(agent: str, nbytes: int, metadata: bytes, addresses: list[int]) -> Source:
    return Source(
        agent=agent,
        metadata=metadata,
        memory="DRAM",
        device=0,
        slots=tuple((Region(address, nbytes),) for address in addresses),
    )


class SourceProcess:
    """The inside of a source; each public method is a request."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[NixlAgent, list[torch.Tensor]]] = {}

    def hold(self, name: str, nbytes: int) -> tuple[bytes, list[int]]:
        """A new agent with ``SLOTS`` regions; its metadata and their addresses."""
        agent = NixlAgent(name)
        slots = [torch.full((nbytes,), 0xA5, dtype=torch.uint8) for _ in range(SLOTS)]
        agent.register([(slot.data_ptr(), nbytes) for slot in slots], "DRAM", 0)
        self._held[name] = agent, slots
        return agent.metadata(), [slot.data_ptr() for slot in slots]

    def write(
        self, name: str, slot: int, checkpoint: Path, pieces: list[Piece]
    ) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        memory = self._held[name][1][slot]
        for piece in pieces:
            index = tuple(
                slice(start, start + size)
                for start, size in zip(piece.offset, piece.shape, strict=True)
            )
            block = tensors[piece.tensor][index].contiguous().view(-1).view(torch.uint8)
            memory[piece.byte_offset : piece.byte_offset + block.numel()] = block

    def release(self, name: str) -> None:
        del self._held[name]

    def progress(self) -> None:
        for agent, _ in self._held.values():
            agent.progress()


def main() -> None:
    process = SourceProcess()
    descriptor = int(sys.argv[1])
    answer_requests(descriptor, process, process.progress, PROGRESS_SECONDS)


if __name__ == "__main__":
    main()
