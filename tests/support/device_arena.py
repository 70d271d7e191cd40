# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""An arena whose shadow is on a device and whose copies are on the host, and what a
rank's stager does with it: on a GPU, or on the CPU with memory that counts as one's."""

from __future__ import annotations

from collections.abc import Callable
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


def version(seed: int) -> dict[str, torch.Tensor]:
    """The parameters of a version, random but for their seed."""
    draw = torch.Generator().manual_seed(seed)
    return {
        parameter.name: torch.rand(parameter.shape, generator=draw).to(
            getattr(torch, parameter.dtype)
        )
        for parameter in LAYOUT.parameters
    }


class DeviceEngine:
    """What a rank's stager does with an arena, without a transfer."""

    def __init__(self, device: torch.device) -> None:
        self.live = version(0)
        if device is not DISGUISED:
            self.live = {name: t.to(device) for name, t in self.live.items()}
        memory = MemoryUse(mode="device", device_nbytes=0, host_nbytes=0)
        self.arena = Arena(AnyMemory(), LAYOUT, memory, device, Cycle())
        self.arena.preserve(self)

    def copy_to(self, backup: dict[str, torch.Tensor]) -> None:
        for name, kept in backup.items():
            kept.copy_(self.live[name])

    def stage(self, seed: int) -> None:
        self.arena.begin()
        for name, tensor in version(seed).items():
            self.arena.staged[name].copy_(tensor)

    def install(self) -> None:
        self._take(self.arena.staged)
        self.arena.installed()

    def keep(self, in_a_hurry: Callable[[], bool] = lambda: False) -> None:
        self.arena.keep(in_a_hurry)

    def restore(self) -> None:
        self._take(self.arena.old)
        self.arena.restored()

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, live in self.live.items():
            live.copy_(tensors[name])


def assert_is(tensors: dict[str, torch.Tensor], seed: int) -> None:
    for name, expected in version(seed).items():
        assert torch.equal(tensors[name].cpu(), expected)
