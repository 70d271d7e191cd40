# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What is kept from one cycle to the next, and the pull itself.

A session is a plan, its buffers, their registration and the prepared NIXL
requests. It is built aside and put in place whole; a warm cycle only posts its
requests again. Runs on one background thread of the rank and never writes live
weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from dynamo.refit.errors import StagingCancelled, TransferFailed
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.protocol import CacheCounters
from dynamo.refit.rank.install import (
    LiveParameters,
    parameter_views,
    synchronize,
)
from dynamo.refit.rank.plan import Plan, Reslice, Segments
from dynamo.refit.transport.nixl import NixlAgent, Read, memory_of

#: Between two polls of reads that are under way.
POLL_SECONDS = 0.0005

#: Buffers of pulls that were given up but may still be written to.
MAX_ABANDONED = 2


@dataclass
class CycleCounters:
    """Counts what one cycle builds; see :class:`CacheCounters`."""

    allocations: int = 0
    registrations: int = 0
    descriptor_builds: int = 0
    hits: int = 0

    def frozen(self) -> CacheCounters:
        return CacheCounters(
            allocations=self.allocations,
            registrations=self.registrations,
            descriptor_builds=self.descriptor_builds,
            hits=self.hits,
        )


@dataclass
class Stopwatch:
    """Milliseconds by step of one cycle."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = (time.perf_counter() - began) * 1e3
            self.ms[step] = self.ms.get(step, 0.0) + elapsed


@dataclass(frozen=True)
class Limit:
    """When a pull must stop: a deadline (monotonic seconds) or a cancel."""

    deadline: float
    cancelled: Callable[[], bool]

    def check(self, doing: str) -> None:
        if self.cancelled():
            raise StagingCancelled(f"cancelled while {doing}")
        if time.monotonic() > self.deadline:
            raise StagingCancelled(
                f"out of time while {doing}: the source does not answer, or the "
                "stage deadline is too short for the size of the model"
            )


class Session:
    """The buffers and requests of one layout on one rank.

    Args:
        agent: registers the buffers and makes the requests.
        plan: what goes where.
        live: the parameters that the arena is an image of.
        device: where arena and scratch are; the backup is in host memory.
    """

    def __init__(
        self,
        agent: NixlAgent,
        layout: str,
        plan: Plan,
        live: LiveParameters,
        device: torch.device,
        counters: CycleCounters,
        watch: Stopwatch,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.live = live
        self._agent = agent
        self._requests: Requests | None = None
        with watch.time("allocate"):
            self._arena = _buffer(plan.arena_nbytes, device)
            self._scratch = _buffer(plan.scratch_nbytes, device)
            self._backup = torch.empty(
                plan.arena_nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda"
            )
            counters.allocations += 2 + (plan.scratch_nbytes > 0)
            # NIXL writes outside of CUDA's streams: the zeros must be there before.
            synchronize(device)
        self.staged = parameter_views(self._arena, plan)
        self.backup = parameter_views(self._backup, plan)
        self._reslices = [
            [_ResliceCopy(r, self._scratch, self._arena) for r in wave.reslices]
            for wave in plan.waves
        ]
        regions = [(b.data_ptr(), b.numel()) for b in self._buffers if b.numel()]
        with watch.time("register"):
            self._registration = agent.register(regions, *memory_of(device))
            counters.registrations += len(regions)

    @property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._arena, self._scratch

    @property
    def addressed_to(self) -> str | None:
        """Fingerprint of the manifest that the prepared requests read from."""
        return self._requests.manifest if self._requests else None

    def address(
        self, manifest: Manifest, fingerprint: str, counters: CycleCounters
    ) -> None:
        """Prepare the requests for every slot of ``manifest``."""
        self.forget_requests()
        requests = Requests(self._agent, fingerprint)
        try:
            requests.build(manifest, self.plan, self._arena, self._scratch, counters)
        except BaseException:
            requests.close()
            raise
        self._requests = requests

    def pull(self, slot: int, limit: Limit) -> None:
        """Read every byte of ``slot`` and put it in its place in the arena.

        Raises:
            TransferFailed: a source broke off. StagingCancelled: see ``limit``.
            After either, :meth:`poll_active` says whether bytes may still arrive.
        """
        if self._requests is None:
            raise TransferFailed("the session has no prepared requests")
        waves = zip(self._requests.waves[slot], self._reslices, strict=True)
        for reads, reslices in waves:
            limit.check("pulling")
            for read in reads:
                read.post()
            while not all([read.done() for read in reads]):
                limit.check(f"pulling from {', '.join(r.peer for r in reads)}")
                time.sleep(POLL_SECONDS)
            for reslice in reslices:
                reslice.run()
            # The next wave overwrites scratch, again outside of any stream.
            synchronize(self._arena.device)

    def poll_active(self) -> bool:
        """May bytes still arrive in these buffers?"""
        return self._requests is not None and self._requests.poll_active()

    def forget_requests(self) -> None:
        """Release the prepared requests and their peers; the buffers stay."""
        if self._requests is not None:
            self._requests.close()
            self._requests = None

    def close(self) -> None:
        """Give everything back. Only when no read is active."""
        self.forget_requests()
        self._agent.deregister(self._registration)


class Requests:
    """Prepared reads of one manifest: ``waves[slot][wave]`` is a list of reads."""

    def __init__(self, agent: NixlAgent, manifest: str) -> None:
        self.manifest = manifest
        self.waves: list[list[list[Read]]] = []
        self._agent = agent
        self._peers: list[str] = []

    def build(
        self,
        manifest: Manifest,
        plan: Plan,
        arena: torch.Tensor,
        scratch: torch.Tensor,
        counters: CycleCounters,
    ) -> None:
        used = {s.source for wave in plan.waves for s in wave.segments}
        peers = {}
        for number in sorted(used):
            peers[number] = self._agent.connect(manifest.sources[number].metadata)
            self._peers.append(peers[number])
        for slot in range(manifest.slots):
            shards = np.array(manifest.shard_addresses(slot), dtype=np.int64)
            self.waves.append([])
            for wave in plan.waves:
                self.waves[slot].append([])
                target = scratch if wave.reslices else arena
                for segments in wave.segments:
                    source = manifest.sources[segments.source]
                    peer = peers[segments.source]
                    read = self._prepare(source, peer, shards, segments, target)
                    self.waves[slot][-1].append(read)
                    counters.descriptor_builds += 1

    def _prepare(
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

    def poll_active(self) -> bool:
        return any([_still_active(read) for read in self._reads()])

    def close(self) -> None:
        for read in self._reads():
            read.release()
        for peer in self._peers:
            self._agent.disconnect(peer)
        self.waves, self._peers = [], []

    def _reads(self) -> list[Read]:
        return [read for slot in self.waves for wave in slot for read in wave]


class AbandonedSessions:
    """Sessions whose reads were given up while bytes were on their way.

    NIXL cannot call such a read back: the bytes may land at any later poll. Their
    buffers are kept, out of use, until the reads have ended.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session) -> None:
        self._sessions.append(session)

    def sweep(self) -> None:
        """Give back those that have ended.

        Raises:
            TransferFailed: too many are still waiting for a source.
        """
        for session in [s for s in self._sessions if not s.poll_active()]:
            self._sessions.remove(session)
            session.close()
        if len(self._sessions) > MAX_ABANDONED:
            raise TransferFailed(
                f"{len(self._sessions)} earlier pulls were given up and their sources "
                "neither answer nor go away: stop the stuck trainer process"
            )


class _ResliceCopy:
    """A strided local copy with its views made once."""

    def __init__(
        self, reslice: Reslice, scratch: torch.Tensor, arena: torch.Tensor
    ) -> None:
        dtype = getattr(torch, reslice.dtype)
        size = dtype.itemsize
        self._source = scratch.view(dtype).as_strided(
            reslice.shape, reslice.scratch_strides, reslice.scratch // size
        )
        self._target = arena.view(dtype).as_strided(
            reslice.shape, reslice.arena_strides, reslice.arena // size
        )

    def run(self) -> None:
        self._target.copy_(self._source)


def _still_active(read: Read) -> bool:
    try:
        return not read.done()
    except TransferFailed:
        return False


def _buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Zeros: padding of the arena is never written, and stays zero."""
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)
