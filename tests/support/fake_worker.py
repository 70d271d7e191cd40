# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a worker, without an engine: real endpoints, real NIXL reads.

It answers the coordinator as a worker with one rank does, reads every shard of the
announced version from wherever the manifest says, checks the version's fingerprint,
and keeps the bytes by tensor name, as "live" ones from the commit on; ``served`` has
those of every version that was committed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import torch
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventPublisher
from dynamo.refit.errors import (
    FingerprintMismatch,
    RefitError,
    TransferFailed,
)
from dynamo.refit.events import (
    REFIT_EVENTS,
    SCHEMA,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.fingerprint import Part, version_fingerprint
from dynamo.refit.manifest import ITEMSIZE, Manifest
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    CacheCounters,
    Commit,
    Committed,
    CommitTimings,
    GetManifest,
    GetStatus,
    InFlightPolicy,
    ManifestReply,
    MemoryUse,
    Message,
    Prepare,
    RankVote,
    Refused,
    StageTimings,
    Vote,
    WorkerRequest,
    WorkerStatus,
)
from dynamo.refit.release import RELEASE
from dynamo.refit.rpc import Caller, serve, unary
from dynamo.refit.transport.nixl import NixlAgent

READ_SECONDS = 20.0

Bytes = dict[str, torch.Tensor]


class FakeWorker:
    """See the module. ``gate`` holds a prepare back while it is clear; ``refuse`` is
    raised in place of staging."""

    def __init__(self, runtime: DistributedRuntime, namespace: str, model: str) -> None:
        self.model = model
        self.release = RELEASE
        self.version: int | None = None
        self.fingerprint = ""
        self.live: Bytes = {}
        self.served: dict[int, Bytes] = {}
        self.in_flight: list[InFlightPolicy] = []
        self.prepares = 0
        self.aborted: list[int] = []
        self.regions: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuse: RefitError | None = None
        self._staged: dict[int, tuple[str, Bytes]] = {}
        self._epoch = 0
        self._caller = Caller(runtime)
        self._agent = NixlAgent(f"fake-worker-{time.monotonic_ns()}")
        self.endpoint = runtime.endpoint(f"{namespace}.backend.refit")
        topic = runtime.endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
        self.events = EventPublisher(topic, f"worker-{self.worker}")

    @property
    def worker(self) -> int:
        return self.endpoint.connection_id()

    async def answer(self, request: WorkerRequest) -> Message:
        match request:
            case GetStatus():
                return self._status()
            case Prepare():
                return await self._prepare(request)
            case Commit():
                return self._commit(request)
            case Abort(version=version):
                self.aborted.append(version)
                self._staged.pop(version, None)
                return Aborted(version=version)
        raise RefitError(f"{type(request).__name__} is not for a fake worker")

    def _status(self) -> WorkerStatus:
        return WorkerStatus(
            model=self.model,
            phase="serving",
            version=self.version,
            fingerprint=self.fingerprint,
            pending=None,
            epoch=self._epoch,
            kv_epoch="",
            ranks=1,
            release=self.release,
            schema=SCHEMA,
        )

    async def _prepare(self, request: Prepare) -> Message:
        self.prepares += 1
        self._epoch = request.epoch
        await self.gate.wait()
        if self.refuse is not None:
            raise self.refuse
        began = time.time()
        reply = await self._caller.call(
            request.endpoint,
            request.instance,
            GetManifest(manifest_digest=request.manifest_digest),
            ManifestReply | Refused,
            10,
        )
        if isinstance(reply, Refused):
            return reply
        manifest = msgspec.msgpack.decode(reply.payload, type=Manifest)
        manifest.validate()
        self.regions = [len(source.slots[0]) for source in manifest.sources]
        held = await asyncio.to_thread(self._read, manifest, request.slot)
        weights = _fingerprint(manifest, held)
        if weights != request.fingerprint:
            raise FingerprintMismatch(f"{weights} was read, not {request.fingerprint}")
        self._staged[request.version] = (weights, held)
        votes = (_vote(manifest.nbytes, began),)
        self.events.publish(
            WorkerStaged(worker=self.worker, version=request.version, ranks=votes)
        )
        return Vote(version=request.version, fingerprint=weights, ranks=votes)

    def _commit(self, request: Commit) -> Message:
        weights, held = self._staged.pop(request.version)
        self.version, self.fingerprint, self.live = request.version, weights, held
        self.served[request.version] = held
        self.in_flight.append(request.in_flight)
        timings = CommitTimings(
            pause_ms=0.0,
            install_ms=1.5,
            copy_ms=1.0,
            resume_ms=0.0,
            stall_ms=1.5,
            probe_ms=0.0,
            verify_ms=0.0,
        )
        committed = Committed(
            version=request.version,
            fingerprint=weights,
            kv_epoch=f"v{request.version}",
            timings=timings,
        )
        self.events.publish(
            WorkerRefitted(
                worker=self.worker,
                version=request.version,
                fingerprint=weights,
                kv_epoch=committed.kv_epoch,
                in_flight=request.in_flight,
                timings=timings,
            )
        )
        return committed

    def _read(self, manifest: Manifest, slot: int) -> Bytes:
        """Every tensor's bytes, each source by one READ."""
        blocks = [
            torch.zeros(_nbytes(tensor.dtype, shard.shape), dtype=torch.uint8)
            for tensor in manifest.tensors
            for shard in tensor.shards
        ]
        remote: list[list[tuple[int, int]]] = [[] for _ in manifest.sources]
        local: list[list[tuple[int, int]]] = [[] for _ in manifest.sources]
        shards = (shard for tensor in manifest.tensors for shard in tensor.shards)
        places = zip(shards, manifest.shard_addresses(slot), blocks, strict=True)
        for shard, address, block in places:
            remote[shard.source].append((address, block.numel()))
            local[shard.source].append((block.data_ptr(), block.numel()))
        registration = self._agent.register(
            [(block.data_ptr(), block.numel()) for block in blocks], "DRAM", 0
        )
        for number, source in enumerate(manifest.sources):
            peer = self._agent.connect(source.metadata)
            read = self._agent.prepare_read(
                peer,
                (np.array(local[number], dtype=np.uint64), "DRAM", 0),
                (np.array(remote[number], dtype=np.uint64), source.memory, 0),
            )
            deadline = time.monotonic() + READ_SECONDS
            read.post()
            while not read.done():
                if time.monotonic() > deadline:
                    raise TransferFailed(f"no end of the read from {peer}")
                time.sleep(0.001)
            read.release()
            self._agent.disconnect(peer)
        self._agent.deregister(registration)
        return _whole_tensors(manifest, blocks)


@asynccontextmanager
async def fake_worker(
    runtime: DistributedRuntime, namespace: str, model: str
) -> AsyncIterator[FakeWorker]:
    """A fake worker that is served until the end of the block."""
    worker = FakeWorker(runtime, namespace, model)
    serving = asyncio.create_task(
        serve(worker.endpoint, unary(WorkerRequest, worker.answer, "worker"))
    )
    async with worker.events:
        try:
            yield worker
        finally:
            serving.cancel()


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEMSIZE[dtype]


def _whole_tensors(manifest: Manifest, blocks: list[torch.Tensor]) -> Bytes:
    """The bytes of each tensor, its shards put where they belong."""
    remaining = iter(blocks)
    held = {}
    for tensor in manifest.tensors:
        dtype = getattr(torch, tensor.dtype)
        whole = torch.zeros(tensor.shape, dtype=dtype)
        for shard in tensor.shards:
            box = tuple(slice(start, stop) for start, stop in shard.box)
            whole[box] = next(remaining).view(dtype).view(shard.shape)
        held[tensor.name] = whole.view(-1).view(torch.uint8)
    return held


def _fingerprint(manifest: Manifest, held: Bytes) -> str:
    folded = []
    for tensor in manifest.tensors:
        dtype = getattr(torch, tensor.dtype)
        view = held[tensor.name].view(dtype).view(tensor.shape)
        box = tuple((0, size) for size in tensor.shape)
        folded.append(Part(view, box, tensor.shape).fold())
    return version_fingerprint(np.array(folded, dtype=np.uint64))


def _vote(nbytes: int, began: float) -> RankVote:
    steps = "lead plan allocate register prepare pull wire fingerprint backup".split()
    timings = StageTimings(
        started_at=began,
        finished_at=time.time(),
        **{f"{step}_ms": 0.0 for step in steps},
    )
    return RankVote(
        rank=0,
        nbytes=nbytes,
        memory=MemoryUse(mode="host", device_nbytes=0, host_nbytes=nbytes),
        session="cold",
        counters=CacheCounters(allocations=1, registrations=1, descriptor_builds=1),
        timings=timings,
    )
