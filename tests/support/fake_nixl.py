# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A fake of NIXL and of the trainers behind it, in one process, on real memory.

Reads copy from address to address, when they are posted or some polls later, or
break off. What NIXL refuses is refused: memory that is not registered, peers that are
not known, reads that are released while they are active.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.manifest import Manifest
from tests.support.layouts import Layout, housed, index

#: What lies in a trainer's memory between its shards.
GARBAGE = 0xA5

#: A read that is this late arrives when :attr:`FakeNixlAgent.late` is set lower.
NEVER = 1 << 60


class FakeTrainers:
    """A test fake of trainers: memory for every region of every slot of a layout."""

    def __init__(self, layout: Layout) -> None:
        self._buffers: list[torch.Tensor] = []
        self.manifest = housed(layout.manifest, self._allocate)

    def write(self, slot: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Put the full ``tensors`` (unsigned integers) into the shards of ``slot``."""
        addresses = iter(self.manifest.shard_addresses(slot))
        for tensor in self.manifest.tensors:
            for shard in tensor.shards:
                data = tensors[tensor.name][index(shard.box)].tobytes()
                ctypes.memmove(next(addresses), data, len(data))

    def _allocate(self, nbytes: int) -> int:
        buffer = torch.full((max(nbytes, 1),), GARBAGE, dtype=torch.uint8)
        self._buffers.append(buffer)
        return buffer.data_ptr()


class FakeNixlAgent:
    """A test fake of :class:`dynamo.refit.transport.nixl.NixlAgent`.

    Peers are those of ``manifest``, and any that :meth:`meet` adds.

    Attributes:
        late: polls that a read takes after it was posted; 0: the post does it all.
        broken: peers whose reads break off instead.
        refused: peers whose addresses are refused.
        prepared: every read that was ever made.
        peak: the most reads that were under way at a time.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.registered: dict[int, list[tuple[int, int]]] = {}
        self.connected: Counter[str] = Counter()
        self.prepared: list[FakeRead] = []
        self.late = 0
        self.broken: set[str] = set()
        self.refused: set[str] = set()
        self.peak = 0
        self._numbers = itertools.count()
        self._regions: dict[str, list[tuple[int, int]]] = {}
        self.meet(manifest)

    def meet(self, manifest: Manifest) -> None:
        """Have the sources of ``manifest`` as peers, at its addresses alone."""
        for source in manifest.sources:
            regions = itertools.chain.from_iterable(source.slots)
            self._regions[source.agent] = [(r.address, r.nbytes) for r in regions]

    @property
    def active(self) -> int:
        return sum(read.active for read in self.prepared)

    @property
    def held(self) -> list[FakeRead]:
        """The reads that were not released."""
        return [read for read in self.prepared if not read.released]

    def register(self, regions: list[tuple[int, int]], memory: str, device: int) -> int:
        assert (memory, device) == ("DRAM", 0)
        assert all(nbytes > 0 for _, nbytes in regions)
        number = next(self._numbers)
        self.registered[number] = regions
        return number

    def deregister(self, registration: int) -> None:
        del self.registered[registration]

    def connect(self, metadata: bytes) -> str:
        peer = metadata.decode()
        assert peer in self._regions
        self.connected[peer] += 1
        return peer

    def disconnect(self, peer: str) -> None:
        assert self.connected[peer] > 0
        self.connected[peer] -= 1
        self.connected += Counter()

    def prepare_read(
        self,
        peer: str,
        local: tuple[np.ndarray, str, int],
        remote: tuple[np.ndarray, str, int],
    ) -> FakeRead:
        if peer in self.refused:
            raise TransferFailed(f"cannot prepare a read from {peer!r}")
        assert self.connected[peer] > 0
        assert local[1:] == ("DRAM", 0)
        mine = list(itertools.chain.from_iterable(self.registered.values()))
        assert local[0][:, 1].tolist() == remote[0][:, 1].tolist()
        for rows, regions in ((local[0], mine), (remote[0], self._regions[peer])):
            assert all(_within(regions, *row) for row in rows.tolist())
        copies = zip(local[0][:, 0].tolist(), *remote[0].T.tolist(), strict=True)
        read = FakeRead(self, peer, list(copies))
        self.prepared.append(read)
        return read


class FakeRead:
    """A test fake of :class:`dynamo.refit.transport.nixl.Read`."""

    def __init__(
        self, agent: FakeNixlAgent, peer: str, copies: list[tuple[int, int, int]]
    ) -> None:
        self._agent = agent
        self._copies = copies
        self.polls = 0
        self.peer = peer
        self.active = False
        self.stale = False
        self.released = False

    def post(self) -> bool:
        assert not self.released
        assert not self.active
        self.polls, self.active = 0, True
        self._agent.peak = max(self._agent.peak, self._agent.active)
        return self._advance()

    def done(self) -> bool:
        if not self.active:
            return True
        self.polls += 1
        return self._advance()

    def release(self) -> None:
        assert not self.released
        if self.active:
            raise TransferFailed(f"a read from {self.peer!r} is still active")
        self.released = True

    def _advance(self) -> bool:
        if self.polls < self._agent.late:
            return False
        self.active = False
        if self.peer in self._agent.broken:
            raise TransferFailed(f"the read from {self.peer!r} broke off")
        for local, remote, nbytes in self._copies:
            ctypes.memmove(local, remote, nbytes)
        return True


def _within(regions: list[tuple[int, int]], address: int, nbytes: int) -> bool:
    return any(
        start <= address and address + nbytes <= start + size for start, size in regions
    )
