# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer's memory without a trainer: random bytes behind NIXL agents, in processes
of their own, laid out as a checkpoint's tensors, whole or cut into columns.

    with Sources(2, logs) as sources:
        held = sources.hold(tensors(config), cut_columns=True)
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dynamo.refit.fingerprint import Batch, Part
from dynamo.refit.host_memory import host_zeros
from dynamo.refit.manifest import (
    Box,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
    align,
)
from dynamo.refit.transport.nixl import NixlAgent
from tests.benchmarks.shapes import ITEMSIZE, Tensor
from tests.support.child import Child, answer_requests

PROGRESS_SECONDS = 0.002


@dataclass(frozen=True)
class Block:
    """A part of a tensor as it lies in a source's memory."""

    byte_offset: int
    box: Box
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Held:
    """What the sources serve: a manifest of one slot, and a fingerprint per tensor."""

    manifest: Manifest
    fingerprints: np.ndarray


class Sources:
    """``count`` source processes."""

    def __init__(self, count: int, logs: Path) -> None:
        self._children = [
            Child("tests.benchmarks.sources", [], logs / f"memory-{number}.log")
            for number in range(count)
        ]

    def hold(
        self,
        tensors: Sequence[Tensor],
        *,
        cut_columns: bool = False,
        snapshot: bool = False,
    ) -> Held:
        """New agents with new memory, full of random numbers: torch's, as of tensors
        that are published in place, or what a publisher has for a ``snapshot``.

        Matrices are cut into as many column blocks as there are sources if
        ``cut_columns``; anything else lies on the first source as a whole.
        """
        ends = [0] * len(self._children)
        blocks: list[list[Block]] = [[] for _ in self._children]
        owners: list[list[int]] = [[] for _ in self._children]
        entries = []
        for number, (name, shape) in enumerate(tensors):
            parts = len(self._children) if cut_columns and len(shape) > 1 else 1
            shards = []
            for source in range(parts):
                box = _columns(shape, source, parts)
                block = Block(ends[source], box, shape)
                extent = tuple(stop - start for start, stop in box)
                shards.append(
                    Shard(
                        source=source,
                        region=0,
                        byte_offset=block.byte_offset,
                        offset=tuple(start for start, _ in box),
                        shape=extent,
                    )
                )
                ends[source] += align(math.prod(extent) * ITEMSIZE)
                blocks[source].append(block)
                owners[source].append(number)
            entries.append(
                TensorEntry(
                    name=name, dtype="bfloat16", shape=shape, shards=tuple(shards)
                )
            )
        for child, held, end in zip(self._children, blocks, ends, strict=True):
            name = f"memory-{uuid.uuid4().hex[:12]}"
            child.send("hold", name, end, held, snapshot)
        fingerprints = np.zeros(len(entries), dtype=np.uint64)
        sources = []
        for child, end, owned in zip(self._children, ends, owners, strict=True):
            agent, metadata, address, parts = child.receive()
            region = Region(address, end)
            sources.append(
                Source(
                    agent=agent,
                    metadata=metadata,
                    memory="DRAM",
                    device=0,
                    slots=((region,),),
                )
            )
            np.add.at(fingerprints, owned, parts)
        manifest = Manifest(
            model="bench", tensors=tuple(entries), sources=tuple(sources)
        )
        return Held(manifest, fingerprints)

    def close(self) -> None:
        for child in self._children:
            child.close()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _columns(shape: tuple[int, ...], part: int, parts: int) -> Box:
    whole = [(0, size) for size in shape]
    if parts > 1:
        bounds = [shape[-1] * number // parts for number in (part, part + 1)]
        whole[-1] = bounds[0], bounds[1]
    return tuple(whole)


class SourceProcess:
    """The inside of a source; each public method is a request."""

    def __init__(self) -> None:
        self._agent: NixlAgent | None = None
        self._memory: torch.Tensor | None = None

    def hold(
        self, name: str, nbytes: int, blocks: list[Block], snapshot: bool
    ) -> tuple[str, bytes, int, np.ndarray]:
        """A new agent with one region; its name, its metadata, the region's address
        and the fingerprints of the blocks. What was held before is gone."""
        self._agent = self._memory = None
        allocate = host_zeros if snapshot else _torch_bytes
        memory = allocate(nbytes)
        fill(memory)
        agent = NixlAgent(name)
        agent.register([(memory.data_ptr(), nbytes)], "DRAM", 0)
        self._agent, self._memory = agent, memory
        parts = Batch([_part(memory, block) for block in blocks]).fold()
        return name, agent.metadata(), memory.data_ptr(), parts

    def progress(self) -> None:
        if self._agent is not None:
            self._agent.progress()


def _torch_bytes(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def fill(memory: torch.Tensor) -> None:
    """Random bfloat16 numbers with which a model neither dies nor explodes: of either
    sign, from 1/128 to 1/64."""
    words = memory.view(torch.int32).random_()
    words.bitwise_and_(_words(0x807F)).bitwise_or_(_words(0x3C00))


def _words(pattern: int) -> int:
    """Two 16-bit patterns in an int32."""
    return int(np.uint32(pattern << 16 | pattern).view(np.int32))


def _part(memory: torch.Tensor, block: Block) -> Part:
    extent = [stop - start for start, stop in block.box]
    nbytes = math.prod(extent) * ITEMSIZE
    flat = memory[block.byte_offset : block.byte_offset + nbytes]
    return Part(flat.view(torch.bfloat16).view(extent), block.box, block.shape)


def main() -> None:
    process = SourceProcess()
    descriptor = int(sys.argv[1])
    answer_requests(descriptor, process, process.progress, PROGRESS_SECONDS)


if __name__ == "__main__":
    main()
