# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""An arena whose shadow is on a device and whose copies are on the host, and what a
rank's stager does with it: on a GPU, or on the CPU with memory that counts as one's."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dynamo.refit.protocol import MemoryUse
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.slices import ArenaLayout, Parameter

#: In place of a device: the CPU, where a test allocates the buffers.
DISGUISED = SimpleNamespace(type="disguised")


class AnyMemory:
    """A test fake of :class:`dynamo.refit.transport.nixl.NixlAgent` that takes buffers
    of any kind."""

    def register(self, regions: list[tuple[int, int]], memory: str, device: int) -> int:
        return regions[0][0]


LAYOUT = ArenaLayout(
    [
        Parameter("plain", (1000, 3), "float32"),
        Parameter("packed", (17, 129), "bfloat16"),
    ]
)
SHAPES = [parameter.shape for parameter in LAYOUT.parameters]
DTYPES = [getattr(torch, parameter.dtype) for parameter in LAYOUT.parameters]


def version(seed: int) -> list[torch.Tensor]:
    """The parameters of a version, random but for their seed."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.rand(shape, generator=draw).to(dtype)
        for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ]


class DeviceEngine:
    """What a rank's stager does with an arena, without a transfer; ``processed``
    parameters cannot be read from what is live."""

    def __init__(self, device: torch.device, *processed: str) -> None:
        self.processed = frozenset(processed)
        self.can_copy_out = not processed
        self.live = version(0)
        if device is not DISGUISED:
            self.live = [tensor.to(device) for tensor in self.live]
        memory = MemoryUse(mode="device", device_nbytes=0, host_nbytes=0)
        self.arena = Arena(AnyMemory(), LAYOUT, memory, device, Cycle())

    def copy_to(self, backup: list[torch.Tensor]) -> None:
        names = [parameter.name for parameter in LAYOUT.parameters]
        for name, kept, live in zip(names, backup, self.live, strict=True):
            if name not in self.processed:
                kept.copy_(live)

    def stage(self, seed: int) -> None:
        self.arena.begin(self.processed)
        self.arena.preserve(self)
        for place, tensor in zip(self.arena.staged, version(seed), strict=True):
            place.copy_(tensor)

    def install(self) -> None:
        self._take(self.arena.staged)
        self.arena.installed()

    def restore(self) -> None:
        self._take(self.arena.old)
        self.arena.restored()

    def _take(self, tensors: list[torch.Tensor]) -> None:
        for live, tensor in zip(self.live, tensors, strict=True):
            live.copy_(tensor)


def assert_is(tensors: list[torch.Tensor], seed: int) -> None:
    for tensor, expected in zip(tensors, version(seed), strict=True):
        assert torch.equal(tensor.cpu(), expected)
