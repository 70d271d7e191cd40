# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The memory that staging takes: each buffer one allocation and one registration."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from dynamo.refit.host_memory import host_zeros, pinned_zeros
from dynamo.refit.protocol import MemoryUse
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.install import LiveModel, copy_out, synchronize
from dynamo.refit.rank.slices import ArenaLayout, IntakeLayout
from dynamo.refit.transport.nixl import NixlAgent, memory_of

#: Bytes of a copy at leisure between two looks at whether somebody waits for its end.
KEPT_AT_ONCE = 128 << 20


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


class Shadow:
    """An image of what the engine computes with, in one registered buffer: its tensors
    ``by_name``."""

    def __init__(self, buffer: RegisteredBuffer, layout: ArenaLayout) -> None:
        self.buffer = buffer
        self.by_name = views_of(buffer.bytes, layout)


class Arena:
    """Where a version waits for its commit, and where the one before it is kept.

    In host memory two shadows take turns: while a version comes into one, the live one
    is still in the other, and nothing has to be copied for the way back. On a device
    there is one shadow, and once a version is live for good it is copied from there to
    host memory, at leisure: the next version waits for nothing, and where the copy is
    not whole there is no way back. Where memory is short there is one shadow in host
    memory, and no way back.

    It depends on the model alone, so it outlives the layouts of trainers.

    Args:
        layout: what lies where in it.
        memory: says whether shadows are on ``device`` or on the host.
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
        self.memory = memory
        self.layout = layout
        self.shadows: list[Shadow] = []
        #: The shadow that the next version comes into.
        self.target = 0
        self._padded = [p.name for p in layout.parameters if p.unloaded]
        #: What was live before the first version, as long as a shadow has it.
        self._start_copy: dict[str, torch.Tensor] | None = None
        #: A version has come into it, or may have in part.
        self.is_used = False
        self._live: int | None = None
        self._old: int | None = None
        self._backup: dict[str, torch.Tensor] | None = None
        #: The backup as it will be laid out by :meth:`keep`.
        self._kept: dict[str, torch.Tensor] | None = None
        self._backup_bytes: torch.Tensor | None = None
        self._is_kept = self._backup_is_whole = False
        on_host = memory.mode != "device" or device.type == "cpu"
        #: Where the shadows are.
        self.device = torch.device("cpu") if on_host else device
        # What is short of memory gives back what it has registered: torch would hand
        # out memory that NIXL still knows.
        with ExitStack() as undo:
            for _ in range(2 if on_host and memory.can_undo else 1):
                buffer = RegisteredBuffer(agent, layout.nbytes, self.device, cycle)
                undo.callback(buffer.close)
                self.shadows.append(Shadow(buffer, layout))
            if not on_host:
                with cycle.time("allocate"):
                    pinned = _allocate(layout.nbytes, torch.device("cpu"))
                    cycle.built["allocations"] += 1
                self._backup, self._backup_bytes = views_of(pinned, layout), pinned
                self._kept = self._backup
            undo.pop_all()

    @property
    def staged(self) -> dict[str, torch.Tensor]:
        """The tensors of the version that came last."""
        return self.shadows[self.target].by_name

    @property
    def live(self) -> int | None:
        """The shadow that has what is live; ``None``: none has."""
        return self._live

    @property
    def expendable(self) -> frozenset[int]:
        """The shadows that the next version may overwrite."""
        every = frozenset(range(len(self.shadows)))
        return every - {self._live} if len(every) > 1 else every

    @property
    def old(self) -> dict[str, torch.Tensor] | None:
        """What was live when the last version came; ``None``: there is no way back."""
        if self._backup is not None:
            return self._backup if self._backup_is_whole else None
        if self._old is None:
            return None
        return self._start_copy or self.shadows[self._old].by_name

    def arrange(self, layout: ArenaLayout) -> None:
        """Before the first version comes: lay shadows out by ``layout``, which has the
        same parameters in another order. What is live may have been copied out."""
        if not self.is_used:
            self.layout = layout
            for shadow in self.shadows:
                shadow.by_name = views_of(shadow.buffer.bytes, layout)
            if self._backup_bytes is not None:
                self._kept = views_of(self._backup_bytes, layout)

    def begin(self) -> None:
        """Before a version comes: choose its shadow."""
        self.is_used = True
        if len(self.shadows) > 1:
            self._old = self._live
            self.target = 0 if self._live is None else 1 - self._live
            if self.target == 1 and self._start_copy is not None:
                # No version fills the padding: what was live there must not stay.
                for name in self._padded:
                    self.staged[name].zero_()
                self._start_copy = None
            return
        self._live = None

    def preserve(self, live: LiveModel) -> None:
        """Before the first one comes: see to it that what is live can be put back;
        blocks."""
        if self._backup is not None:
            live.copy_to(self._backup)
            self._backup_is_whole = True
        elif len(self.shadows) > 1:
            self._start_copy = self.shadows[1].by_name
            live.copy_to(self._start_copy)
            self._live = self._old = 1

    def installed(self) -> None:
        """The target is live."""
        self._live = self.target
        self._is_kept = False

    def keep(self, in_a_hurry: Callable[[], bool]) -> None:
        """The target is live for good: on a device, copy it out for the time when the
        next version has overwritten it; blocks, until ``in_a_hurry``."""
        # A version that was given up may have overwritten it already.
        if self._backup_bytes is None or self._live is None or self._is_kept:
            return
        self._backup_is_whole = False
        shadow = self.shadows[self.target].buffer.bytes
        pairs = zip(
            shadow.split(KEPT_AT_ONCE),
            self._backup_bytes.split(KEPT_AT_ONCE),
            strict=True,
        )
        for source, target in pairs:
            if in_a_hurry():
                return
            copy_out([source], [target])
        self._backup = self._kept
        self._backup_is_whole = self._is_kept = True

    def restored(self) -> None:
        """:attr:`old` is live again."""
        self._live = self._old

    def close(self) -> None:
        for shadow in self.shadows:
            shadow.buffer.close()


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Zeros: padding of the arena is never written, and stays zero."""
    if device.type == "cpu":
        return pinned_zeros(nbytes) if torch.cuda.is_available() else host_zeros(nbytes)
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    # NIXL writes outside of CUDA's streams: the zeros must be there before.
    synchronize(device)
    return buffer


def views_of(
    buffer: torch.Tensor, layout: ArenaLayout | IntakeLayout
) -> dict[str, torch.Tensor]:
    """The parameters of ``layout`` as views of ``buffer``, by name."""
    views = {}
    for parameter in layout.parameters:
        start = layout.offsets[parameter.name]
        flat = buffer[start : start + parameter.nbytes]
        dtype = getattr(torch, parameter.dtype)
        views[parameter.name] = flat.view(dtype).view(parameter.shape)
    return views
