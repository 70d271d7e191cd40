# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The prepared NIXL reads of one manifest: built once, posted every cycle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.rank import bounce
from dynamo.refit.rank.bounce import Bounce, BouncedRead
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.plan import Plan, Segments
from dynamo.refit.rank.runs import merge
from dynamo.refit.transport.nixl import NixlAgent, Read, memory_of


class Requests:
    """Prepared reads: ``waves[shadow][slot][wave]`` has one read per source.

    Args:
        agent: makes the reads.
        manifest: has the sources and their addresses.
        fingerprint: the manifest's.
        plan: what goes where.
        shadows: where straight waves land.
        scratch: where the others do.
        bounced: what reads from host memory into a GPU go through.

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
        shadows: Sequence[torch.Tensor],
        scratch: torch.Tensor,
        cycle: Cycle,
        bounced: Bounce | None = None,
    ) -> None:
        self.manifest = fingerprint
        self.waves: list[list[list[list[Read | BouncedRead]]]] = []
        self._agent = agent
        self._bounced = bounced
        self._peers: dict[int, str] = {}
        try:
            for number in plan.sources:
                self._peers[number] = _connect(agent, manifest.sources[number])
            slots = [
                np.array(manifest.shard_addresses(slot), dtype=np.int64)
                for slot in range(manifest.slots)
            ]
            self._regions = np.array(
                [shard.region for t in manifest.tensors for shard in t.shards]
            )
            for shadow in shadows:
                self.waves.append([[] for _ in slots])
                for shards, waves in zip(slots, self.waves[-1], strict=True):
                    for wave in plan.waves:
                        target = scratch if wave.half is not None else shadow
                        # Known before they are made, so that all are released if one
                        # of them is refused.
                        reads: list[Read | BouncedRead] = []
                        waves.append(reads)
                        for segments in wave.segments:
                            reads.append(self._read(manifest, shards, segments, target))
                            cycle.built["descriptor_builds"] += 1
        except BaseException:
            self.close()
            raise

    @property
    def stale(self) -> bool:
        """Can a read not be posted any more, see :attr:`Read.stale`?"""
        return any(read.stale for read in self._reads())

    def poll_active(self) -> bool:
        """Is a read still under way? Drives the progress of all."""
        return any([_still_active(read) for read in self._reads()])

    def give_up(self) -> None:
        """After a pull that failed: post nothing more of it."""
        if self._bounced is not None:
            self._bounced.give_up()

    def close(self) -> None:
        """Release the reads and forget the peers. Only when no read is active."""
        for read in self._reads():
            read.release()
        for peer in self._peers.values():
            self._agent.disconnect(peer)
        self.waves, self._peers = [], {}

    def _read(
        self,
        manifest: Manifest,
        shards: np.ndarray,
        segments: Segments,
        target: torch.Tensor,
    ) -> Read | BouncedRead:
        source = manifest.sources[segments.source]
        peer = self._peers[segments.source]
        remote = shards[segments.shard] + segments.remote
        regions = self._regions[segments.shard]
        if bounce.is_needed(source.memory, target.device):
            return self._bounced.prepare_read(
                peer,
                source.device,
                remote,
                regions,
                target,
                segments.local,
                segments.nbytes,
            )
        remote, local, nbytes = merge(
            remote, segments.local + target.data_ptr(), segments.nbytes, regions
        )
        return self._agent.prepare_read(
            peer,
            (np.stack([local, nbytes], axis=1), *memory_of(target.device)),
            (np.stack([remote, nbytes], axis=1), source.memory, source.device),
        )

    def _reads(self) -> list[Read | BouncedRead]:
        waves = (w for shadow in self.waves for slot in shadow for w in slot)
        return [read for wave in waves for read in wave]


def _connect(agent: NixlAgent, source: Source) -> str:
    try:
        return agent.connect(source.metadata)
    except TransferFailed as error:
        raise TransferFailed(
            f"source {source.agent!r} cannot be reached ({error}): is that trainer "
            "process alive?"
        ) from error


def _still_active(read: Read | BouncedRead) -> bool:
    try:
        return not read.done()
    except TransferFailed:
        # Other slices of it may be under way.
        return read.active
