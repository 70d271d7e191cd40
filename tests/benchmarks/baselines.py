# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a pull is compared with: NIXL at its best, a plain copy, and ModelExpress's
transport over the same descriptors. Each run gives bytes and seconds.
"""

from __future__ import annotations

import gc
import time
import uuid

import numpy as np
import torch
from modelexpress.nixl_transfer import NixlTransferManager
from modelexpress.refit.reshard import NixlReshardTransport, ReadDescriptor

from dynamo.refit.manifest import Manifest
from dynamo.refit.rank.plan import Plan
from dynamo.refit.transport.nixl import NixlAgent, Read

#: What UCX does by itself is over when this function returns; a poll is for wire-up.
POLL_SECONDS = 0.0002


class RawRead:
    """One request of one descriptor per source, ``nbytes`` in all, posted again and
    again into ``buffer``."""

    def __init__(self, manifest: Manifest, nbytes: int, buffer: torch.Tensor) -> None:
        self._agent = NixlAgent(f"raw-{uuid.uuid4().hex[:12]}")
        base = buffer.data_ptr()
        self._registration = self._agent.register([(base, buffer.numel())], "DRAM", 0)
        self._reads: list[Read] = []
        self._nbytes = 0
        for source in manifest.sources:
            (region,) = source.slots[0]
            size = min(region.nbytes, nbytes - self._nbytes)
            peer = self._agent.connect(source.metadata)
            read = self._agent.prepare_read(
                peer,
                (_row(base + self._nbytes, size), "DRAM", 0),
                (_row(region.address, size), "DRAM", 0),
            )
            self._reads.append(read)
            self._nbytes += size
        # A connection is made by the first read.
        self.run()

    def run(self) -> tuple[int, float]:
        began = time.perf_counter()
        for read in self._reads:
            read.post()
        while not all([read.done() for read in self._reads]):
            time.sleep(POLL_SECONDS)
        return self._nbytes, time.perf_counter() - began

    def close(self) -> None:
        for read in self._reads:
            read.release()
        self._agent.deregister(self._registration)


class PlainCopy:
    """One thread, memory that was touched before."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._source, self._target = source, target

    def run(self) -> tuple[int, float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            began = time.perf_counter()
            self._target.copy_(self._source)
            return self._target.numel(), time.perf_counter() - began
        finally:
            torch.set_num_threads(threads)


class HostMemory:
    """The accelerator that ModelExpress's manager asks for, where there is none."""

    name = "cpu"
    nixl_mem_type = "DRAM"

    def set_device(self, device: int) -> None:
        del device

    def synchronize(self, device: int | None = None) -> None:
        del device


class ModelExpressRead:
    """``NixlReshardTransport`` over the descriptors of ``plan``'s first slot.

    Its agent has NIXL's progress thread, which takes a core even when idle: so it lives
    for one run only, which connects with a first read and measures the second.
    """

    def __init__(self, manifest: Manifest, plan: Plan, buffer: torch.Tensor) -> None:
        self._manifest = manifest
        self._buffer = buffer
        shards = np.array(manifest.shard_addresses(0), dtype=np.int64)
        self._descriptors = [
            ReadDescriptor(
                session=manifest.sources[segments.source].agent,
                src_addr=int(shards[shard] + remote),
                dst_addr=int(local + buffer.data_ptr()),
                nbytes=int(nbytes),
            )
            for wave in plan.waves
            for segments in wave.segments
            for shard, remote, local, nbytes in zip(
                segments.shard,
                segments.remote,
                segments.local,
                segments.nbytes,
                strict=True,
            )
        ]

    def run(self) -> tuple[int, float]:
        manager = NixlTransferManager(
            agent_name=f"mx-{uuid.uuid4().hex[:12]}",
            device_id=0,
            accelerator_backend=HostMemory(),
        )
        manager.initialize()
        registered = manager.register_dram_buffer(self._buffer)
        agents = {
            source.agent: manager.add_remote_agent(source.metadata)
            for source in self._manifest.sources
        }
        agents = {
            name: peer.decode() if isinstance(peer, bytes) else peer
            for name, peer in agents.items()
        }
        transport = NixlReshardTransport(
            manager,
            agents,
            dict.fromkeys(agents, 0),
            mem_type="DRAM",
            timeout_seconds=60,
        )
        transport.read(self._descriptors)
        moved = transport.bytes_moved
        began = time.perf_counter()
        transport.read(self._descriptors)
        seconds = time.perf_counter() - began
        manager.deregister_memory(registered)
        manager.shutdown()
        del transport, manager
        gc.collect()
        return moved, seconds


def _row(address: int, nbytes: int) -> np.ndarray:
    return np.array([[address, nbytes]], dtype=np.uint64)
