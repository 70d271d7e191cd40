# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The prepared NIXL reads of one manifest: built once, posted every cycle."""

from __future__ import annotations

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.plan import Plan, Segments, Wave
from dynamo.refit.transport.nixl import NixlAgent, Read, memory_of


class Requests:
    """Prepared reads: ``waves[slot][wave]`` has one read per source.

    Args:
        agent: makes the reads.
        manifest: has the sources and their addresses.
        fingerprint: the manifest's.
        plan: what goes where.
        arena: where straight waves land; ``None`` in ``direct`` staging.
        scratch: where the others do.

    Raises:
        TransferFailed: a source's metadata or addresses are refused; nothing is
            left behind then.
    """

    def __init__(
        self,
        agent: NixlAgent,
        manifest: Manifest,
        fingerprint: str,
        plan: Plan,
        arena: torch.Tensor | None,
        scratch: torch.Tensor,
        cycle: Cycle,
    ) -> None:
        self.manifest = fingerprint
        self.waves: list[list[list[Read]]] = []
        self._agent = agent
        self._peers: dict[int, str] = {}
        try:
            used = {s.source for wave in plan.waves for s in wave.segments}
            for number in sorted(used):
                metadata = manifest.sources[number].metadata
                self._peers[number] = agent.connect(metadata)
            for slot in range(manifest.slots):
                shards = np.array(manifest.shard_addresses(slot), dtype=np.int64)
                self.waves.append([])
                for wave in plan.waves:
                    target = scratch if wave.half is not None else arena
                    reads = self._prepare(manifest, shards, wave, target, cycle)
                    self.waves[-1].append(reads)
        except BaseException:
            self.close()
            raise

    def poll_active(self) -> bool:
        """Is a read still under way? Drives the progress of all."""
        return any([_still_active(read) for read in self._reads()])

    def close(self) -> None:
        """Release the reads and forget the peers. Only when no read is active."""
        for read in self._reads():
            read.release()
        for peer in self._peers.values():
            self._agent.disconnect(peer)
        self.waves, self._peers = [], {}

    def _prepare(
        self,
        manifest: Manifest,
        shards: np.ndarray,
        wave: Wave,
        target: torch.Tensor,
        cycle: Cycle,
    ) -> list[Read]:
        reads = []
        for segments in wave.segments:
            source = manifest.sources[segments.source]
            peer = self._peers[segments.source]
            reads.append(self._read(source, peer, shards, segments, target))
            cycle.built["descriptor_builds"] += 1
        return reads

    def _read(
        self,
        source: Source,
        peer: str,
        shards: np.ndarray,
        segments: Segments,
        target: torch.Tensor,
    ) -> Read:
        remote = shards[segments.shard] + segments.remote
        local = segments.local + target.data_ptr()
        return self._agent.prepare_read(
            peer,
            (np.stack([local, segments.nbytes], axis=1), *memory_of(target.device)),
            (
                np.stack([remote, segments.nbytes], axis=1),
                source.memory,
                source.device,
            ),
        )

    def _reads(self) -> list[Read]:
        return [read for slot in self.waves for wave in slot for read in wave]


def _still_active(read: Read) -> bool:
    try:
        return not read.done()
    except TransferFailed:
        return False
