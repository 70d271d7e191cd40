# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The arena of a rank's model: how large it is, when it is made, how it is laid out.

Also has what is live copied out at leisure, for the way back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait

import torch

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.protocol import MemoryUse, StagingChoice, StagingMode
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.install import LiveModel
from dynamo.refit.rank.limits import LIMITS
from dynamo.refit.rank.loads import Loads
from dynamo.refit.rank.memory import choose, free_memory
from dynamo.refit.rank.slices import ArenaLayout, IntakeLayout, Parameter
from dynamo.refit.rank.streams import one_thread
from dynamo.refit.transport.nixl import NixlAgent


class ModelArena:
    """Memory for versions of one rank's model.

    Args:
        agent: registers it.
        loads: what a version fills.
        live: the model.
        device: the model's.
        ranks: how many ranks share the host.
        know: is told of each new arena.
    """

    def __init__(
        self,
        agent: NixlAgent,
        loads: Loads,
        live: LiveModel,
        device: torch.device,
        ranks: int,
        know: Callable[[Arena], object],
    ) -> None:
        self._agent = agent
        self._loads = loads
        self._live = live
        self._device = device
        self._ranks = ranks
        self._know = know
        #: ``None`` before it is made, and after bytes of a pull that was given up may
        #: still arrive in it.
        self.arena: Arena | None = None
        # Not the thread that follows reads: who wants to read what is live would wait
        # for the copy.
        self._backup = one_thread("refit-backup", device)
        #: A copy of what is live, made at leisure, and whether it is waited for.
        self._keeping: Future | None = None
        self._in_a_hurry = threading.Event()

    @property
    def nbytes(self) -> int:
        """Bytes of what the rank computes with."""
        return self.layout(self._loads.filled).nbytes

    def plan_memory(self, staging: StagingChoice) -> MemoryUse:
        """Where a version would be staged, as things are now.

        Raises:
            MemoryShort: nowhere.
        """
        held = self.arena.memory if self.arena is not None else None
        if held is not None and staging == "auto":
            staging = held.mode
        scratch = LIMITS[self._device.type].scratch
        intake = IntakeLayout(self._loads.taken_in, scratch)
        return choose(
            staging,
            arena=self.nbytes,
            scratch=2 * scratch + intake.working_nbytes,
            free=free_memory(self._device, self._ranks),
            held=held,
        )

    def reserve(self, staging: StagingMode) -> None:
        """Have the memory for versions ready, with a copy of what is live, before the
        first one comes, since that takes a second for some GB. Where the start
        checkpoint does not say what a version fills, its first one has to.

        Raises:
            MemoryShort: there is none.
        """
        if self._loads.known and self.arena is None:
            live, memory = self._loads.filled, self.plan_memory(staging)
            self.make(live, self.layout(live), memory, Cycle())

    def layout(
        self, live: Mapping[str, torch.Tensor], first: Sequence[str] = ()
    ) -> ArenaLayout:
        """Of an arena for images of ``live``, with the tensors ``first`` in front."""
        unloaded = {p.name: p.unloaded for p in self._loads.form.parameters.values()}
        return ArenaLayout(
            [
                Parameter.of(name, tensor, unloaded.get(name, 0))
                for name, tensor in live.items()
            ],
            first,
        )

    def arrange(self, layout: ArenaLayout) -> ArenaLayout:
        """How the arena is laid out: by ``layout``, if no version has come before.

        Raises:
            LayoutRefused: it was for other tensors.
        """
        arena = self.arena
        if arena is None:
            return layout
        there, wanted = (
            {parameter.name for parameter in each.parameters}
            for each in (arena.layout, layout)
        )
        if there == wanted:
            arena.arrange(layout)
            return arena.layout
        if arena.is_used:
            raise LayoutRefused(
                "earlier versions, or this one, did not fill it: restart this worker",
                tensor=min(there ^ wanted),
            )
        arena.close()
        self.arena = None
        return layout

    def make(
        self,
        live: Mapping[str, torch.Tensor],
        layout: ArenaLayout,
        memory: MemoryUse,
        cycle: Cycle,
    ) -> None:
        """Memory for versions that fill ``live``, and a copy of it as it is now."""
        self._live.filled = dict(live)
        arena = Arena(self._agent, layout, memory, self._device, cycle)
        try:
            with cycle.time("backup"):
                arena.preserve(self._live)
        except BaseException:
            arena.close()
            raise
        self.arena = arena
        self._know(arena)

    def begin(self) -> None:
        """Before a version comes; ends the copy at leisure, and waits for its end."""
        self._in_a_hurry.set()
        if self._keeping is not None:
            wait([self._keeping])
        self.arena.begin()

    def keep(self) -> None:
        """The target is live for good: begin to copy it out, until :meth:`begin`."""
        if self.arena is None:
            return
        self._in_a_hurry.clear()
        self._keeping = self._backup.submit(self.arena.keep, self._in_a_hurry.is_set)
