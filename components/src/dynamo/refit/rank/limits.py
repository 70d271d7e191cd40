# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What transfers cost, and how large their waves may be: measured, by device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransferCost:
    """What the choice between exact runs and one contiguous span rests on."""

    descriptor_seconds: float
    bytes_per_second: float
    reslice_bytes_per_second: float

    def exact(self, runs: int, nbytes: int) -> float:
        return runs * self.descriptor_seconds + nbytes / self.bytes_per_second

    def contiguous(self, span: int, nbytes: int) -> float:
        wire = self.descriptor_seconds + span / self.bytes_per_second
        return wire + nbytes / self.reslice_bytes_per_second


#: Measured with nixl 1.4.1: shared memory (cma), and CUDA IPC within one H100.
COST = {
    "DRAM": TransferCost(4.5e-6, 6e9, 5e9),
    "VRAM": TransferCost(12e-6, 620e9, 785e9),
}


@dataclass(frozen=True)
class Limits:
    """Bytes that a wave reads at the most.

    ``scratch`` bounds a wave through scratch, of which two are under way at a time;
    ``arena`` one straight into the arena (``None``: no bound). Smaller waves overlap
    better with the local work that follows them, larger ones merge better.
    """

    scratch: int
    arena: int | None = None

    @property
    def block(self) -> int:
        """Bytes that a piece of a shard spans at the most."""
        return self.scratch if self.arena is None else min(self.scratch, self.arena)


#: By device. On a CPU, waves are what overlaps with the work that follows them, and
#: small ones are still in a cache then; on a GPU the wire is the faster the more is in
#: one request.
LIMITS = {
    "cpu": Limits(scratch=8 << 20, arena=16 << 20),
    "cuda": Limits(scratch=256 << 20),
}
