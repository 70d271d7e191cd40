# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What one trainer rank holds: blocks of full tensors under their checkpoint names.

Every kind of trainer state (plain, DTensor, Megatron-Core, a checkpoint on disk) is
turned into these, and everything after that treats them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from dynamo.refit.manifest import Box


@dataclass(frozen=True)
class LocalShard:
    """A block of the tensor ``name``: the elements from ``offset`` on.

    ``tensor`` holds the block (any strides; its dtype is the tensor's), ``shape``
    is the full tensor's. One rank may hold several blocks of a name; other ranks
    may hold the same block. ``owner`` is the DTensor that ``tensor`` is the local
    part of, if any.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor
    owner: DTensor | None = None

    @property
    def box(self) -> Box:
        """Per dimension ``(start, stop)`` in the full tensor's coordinates."""
        pairs = zip(self.offset, self.tensor.shape, strict=True)
        return tuple((start, start + size) for start, size in pairs)

    @torch.no_grad()
    def current(self) -> torch.Tensor:
        """The block as it is now: a trainer may put new storage behind a parameter
        (FSDP2 does so at the first forward pass after a load)."""
        return self.tensor if self.owner is None else self.owner.to_local()
