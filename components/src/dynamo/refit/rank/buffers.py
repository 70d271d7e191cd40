# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The memory that staging takes: each buffer one allocation and one registration."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dynamo.refit.protocol import MemoryUse
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.install import synchronize
from dynamo.refit.rank.slices import ArenaLayout
from dynamo.refit.transport.nixl import NixlAgent, memory_of


class RegisteredBuffer:
    """Bytes that NIXL may write into, from the allocation to :meth:`close`."""

    def __init__(
        self, agent: NixlAgent, nbytes: int, device: torch.device, cycle: Cycle
    ) -> None:
        with cycle.time("allocate"):
            self.bytes = _allocate(nbytes, device)
            cycle.built["allocations"] += 1
        with cycle.time("register"):
            region = (self.bytes.data_ptr(), nbytes)
            self._registration = agent.register([region], *memory_of(device))
            cycle.built["registrations"] += 1
        self._agent = agent

    def close(self) -> None:
        self._agent.deregister(self._registration)


class Arena:
    """The shadow of a rank's parameters, and a copy of those that are live.

    It depends on the parameters alone, so it outlives the layouts of trainers.

    Args:
        layout: what lies where in it.
        memory: says whether the shadow is on ``device`` or on the host.
        device: the model's.
    """

    def __init__(
        self,
        agent: NixlAgent,
        layout: ArenaLayout,
        memory: MemoryUse,
        device: torch.device,
        cycle: Cycle,
    ) -> None:
        where = device if memory.mode == "device" else torch.device("cpu")
        self.layout = layout
        self.memory = memory
        with cycle.time("allocate"):
            pin = torch.cuda.is_available()
            backup = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pin)
            cycle.built["allocations"] += 1
        self._buffer = RegisteredBuffer(agent, layout.nbytes, where, cycle)
        self.staged = _views(self.bytes, layout)
        self.backup = _views(backup, layout)
        names = [parameter.name for parameter in layout.parameters]
        self.by_name = dict(zip(names, self.staged, strict=True))
        self._kept = dict(zip(names, self.backup, strict=True))
        #: The shadow is what is live, byte for byte.
        self.is_live = False
        #: ``backup`` has the live version of the parameters that cannot be read back.
        self.keeps_processed = False

    @property
    def bytes(self) -> torch.Tensor:
        """All of the shadow, uint8."""
        return self._buffer.bytes

    def keep(self, processed: Iterable[str]) -> None:
        """Copy the shadow of ``processed`` parameters to the backup, before another
        version comes into it: the engine cannot give their loaded bytes back."""
        for name in processed:
            self._kept[name].copy_(self.by_name[name])
            self.keeps_processed = True
        self.is_live = False

    def close(self) -> None:
        self._buffer.close()


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Zeros: padding of the arena is never written, and stays zero."""
    pin = device.type == "cpu" and torch.cuda.is_available()
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device, pin_memory=pin)
    # NIXL writes outside of CUDA's streams: the zeros must be there before.
    synchronize(device)
    return buffer


def _views(buffer: torch.Tensor, layout: ArenaLayout) -> list[torch.Tensor]:
    """The parameters of ``layout`` as views of ``buffer``, in order."""
    views = []
    for parameter in layout.parameters:
        start = layout.offsets[parameter.name]
        flat = buffer[start : start + parameter.nbytes]
        views.append(flat.view(getattr(torch, parameter.dtype)).view(parameter.shape))
    return views
