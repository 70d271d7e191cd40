# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer rank's published memory: its buffers, their registration with NIXL, and
the fingerprints of what is in them. Each is made once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from dynamo.refit.fingerprint import Batch, Part
from dynamo.refit.manifest import Source
from dynamo.refit.publish.merge import RankPart
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.publish.torch_state import (
    InPlaceBuffers,
    NoBuffers,
    SnapshotBuffers,
    local_shards,
)
from dynamo.refit.transport.nixl import NixlAgent, Registration, memory_of

Mode = Literal["snapshot", "in_place"]

SNAPSHOT_SLOTS = 2


class RankMemory:
    """What one rank publishes, under the NIXL agent ``name``.

    :meth:`fold` is for one thread, :meth:`progress` for another.

    Args:
        may_be_empty: whether ``tensors`` may have nothing.

    Raises:
        ManifestInvalid: the tensors cannot be published as they are.
        TransferFailed: NIXL does not register them.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor] | Sequence[LocalShard],
        mode: Mode,
        *,
        may_be_empty: bool,
    ) -> None:
        self.registrations = 0
        self._name = name
        self._mode = mode
        self._buffers = _buffers(tensors, mode, may_be_empty)
        self._agent: NixlAgent | None = None
        self._registration: Registration | None = None
        self._batches: dict[int, Batch] = {}
        self._source = self._register()

    @property
    def slots(self) -> int:
        return self._buffers.slots

    @property
    def batches(self) -> int:
        """Slots whose fingerprints are prepared."""
        return len(self._batches)

    def part(self, model: str, world_size: int = 1) -> RankPart:
        """What this rank holds, and where."""
        return RankPart(
            model=model,
            mode=self._mode,
            slots=self.slots,
            world_size=world_size,
            tensors=tuple(self._buffers.entries),
            source=self._source,
        )

    def write(self, slot: int) -> None:
        """Put the tensors as they are now into ``slot``; returns when it is done.

        Raises:
            ManifestInvalid: a tensor is not what it was when this was made.
        """
        self._buffers.write(slot)

    def fold(self, slot: int) -> np.ndarray:
        """The fingerprint of each block in ``slot``, uint64; blocks."""
        if self._buffers.device.type == "cuda":
            # A thread has a current device of its own.
            torch.cuda.set_device(self._buffers.device)
        if slot not in self._batches:
            views = iter(self._buffers.views(slot))
            parts = [
                Part(next(views), shard.box, entry.shape)
                for entry in self._buffers.entries
                for shard in entry.shards
            ]
            self._batches[slot] = Batch(parts)
        return self._batches[slot].fold()

    def progress(self) -> None:
        """Let UCX answer readers that connect."""
        if self._agent is not None:
            self._agent.progress()

    def close(self) -> None:
        """Give the registration back. Nobody may be reading, nor poll any more."""
        if self._registration is not None:
            self._agent.deregister(self._registration)
            self._registration = None

    def _register(self) -> Source | None:
        regions = [
            (r.address, r.nbytes) for slot in self._buffers.regions for r in slot
        ]
        if not regions:
            return None
        memory, number = memory_of(self._buffers.device)
        self._agent = NixlAgent(self._name)
        self._registration = self._agent.register(regions, memory, number)
        self.registrations += 1
        return Source(
            agent=self._name,
            metadata=self._agent.metadata(),
            memory=memory,
            device=number,
            slots=self._buffers.regions,
        )


def _buffers(
    tensors: Mapping[str, torch.Tensor] | Sequence[LocalShard],
    mode: Mode,
    may_be_empty: bool,
) -> InPlaceBuffers | SnapshotBuffers | NoBuffers:
    shards = local_shards(tensors) if isinstance(tensors, Mapping) else tensors
    in_place = mode == "in_place"
    if not shards and may_be_empty:
        return NoBuffers(InPlaceBuffers.slots if in_place else SNAPSHOT_SLOTS)
    if in_place:
        return InPlaceBuffers(shards)
    return SnapshotBuffers(shards, SNAPSHOT_SLOTS)
