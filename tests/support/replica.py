# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A refit agent over a real vLLM engine, without Dynamo around it."""

from __future__ import annotations

import asyncio
import ctypes
import math
from collections.abc import AsyncIterator
from types import SimpleNamespace

import msgspec
import numpy as np
import torch
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.events import Event
from dynamo.refit.fingerprint import Part, add_up, version_fingerprint
from dynamo.refit.manifest import ITEMSIZE, Manifest, TensorEntry
from dynamo.refit.protocol import (
    Commit,
    Committed,
    FingerprintsReply,
    GetFingerprints,
    InFlightPolicy,
    ManifestReply,
    Message,
    Prepare,
    RankVote,
    StagingChoice,
    Vote,
)
from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.agent import RefitAgent
from dynamo.refit.worker.engine import RefitEngine
from tests.support.fake_routing import FakeRouting

WORKER = 1


class FakeHandler:
    """What the refit engine uses of a Dynamo handler, around a real engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.engine_client = llm
        self._pause_lock = asyncio.Lock()
        self._paused = False
        self._pause_controller = SimpleNamespace(is_paused=False)
        self.declared: list[dict] = []

    async def generate(self, request: object, context: object) -> AsyncIterator:
        raise NotImplementedError
        yield

    async def set_weight_version(self, body: dict) -> dict:
        self.declared.append(body)
        return {"status": "ok"}


class SlotInMemory:
    """The fingerprints of what lies in a slot of a manifest's sources, which are all
    of this process and in its host memory."""

    def __init__(self, manifest: Manifest, slot: int) -> None:
        addresses = iter(manifest.shard_addresses(slot))
        self._tensors = [
            # Replicas of a block count once.
            {
                shard.box: _part_at(next(addresses), tensor, shard.box)
                for shard in tensor.shards
            }
            for tensor in manifest.tensors
        ]

    def fold(self) -> np.ndarray:
        """One uint64 per tensor; reads what is there now."""
        sums = [
            add_up([part.fold() for part in parts.values()]) for parts in self._tensors
        ]
        return np.array(sums, dtype="<u8")


def _part_at(address: int, tensor: TensorEntry, box: tuple) -> Part:
    shape = [stop - start for start, stop in box]
    nbytes = math.prod(shape) * ITEMSIZE[tensor.dtype]
    data = (ctypes.c_ubyte * nbytes).from_address(address)
    flat = torch.frombuffer(data, dtype=getattr(torch, tensor.dtype))
    return Part(flat.view(shape), box, tensor.shape)


class FakeTrainers:
    """Hands out a manifest without a trip over Dynamo, and counts how often; and the
    fingerprints of one announcement."""

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.asked = 0
        self.fingerprints: dict[str, np.ndarray] = {}

    async def instances(self, path: str) -> list[int]:
        return [0]

    async def call(
        self, path: str, instance: int, request: Message, *_: object
    ) -> Message:
        if isinstance(request, GetFingerprints):
            published = self.fingerprints[request.announcement_id]
            return FingerprintsReply(payload=published.astype("<u8").tobytes())
        self.asked += 1
        return ManifestReply(payload=msgspec.msgpack.encode(self.manifest))


class Replica:
    """An agent over a real engine, and the events it publishes.

    The engine was started after :func:`worker.engine_process.mark_changes`.
    """

    def __init__(self, llm: AsyncLLM, staging: StagingChoice = "auto") -> None:
        self.llm = llm
        self.events: list[Event] = []
        self.fenced = False
        self.trainers = FakeTrainers()
        self.handler = FakeHandler(llm)
        self.engine = RefitEngine(self.handler, WORKER, Tracer())
        self.agent = RefitAgent(
            self.engine,
            self.trainers,
            self.events.append,
            FakeRouting(),
            self._fence,
            model="tiny",
            worker=WORKER,
            staging=staging,
        )
        self.version = 0
        self._slots: dict[tuple[str, int], SlotInMemory] = {}

    async def stage(
        self, manifest: Manifest, slot: int, fingerprints: np.ndarray | None = None
    ) -> tuple[RankVote, ...]:
        """Prepare the next version from ``slot``; each rank's vote.

        ``fingerprints`` are those of the tensors that are published there; without
        them they are taken from the slot, which must be in this process's memory.
        """
        self.version += 1
        announcement_id = f"a{self.version}"
        published = fingerprints
        if published is None:
            published = await asyncio.to_thread(self._slot(manifest, slot).fold)
        self.trainers.manifest = manifest
        self.trainers.fingerprints = {announcement_id: published}
        prepare = Prepare(
            model="tiny",
            version=self.version,
            epoch=1,
            announcement_id=announcement_id,
            endpoint="-",
            instance=0,
            manifest_digest=manifest.fingerprint(),
            slot=slot,
            fingerprint=version_fingerprint(published),
            stage_seconds=60,
            keep_seconds=60,
        )
        vote = await self.agent.answer(prepare)
        assert isinstance(vote, Vote), vote
        assert vote.fingerprint == prepare.fingerprint
        return vote.ranks

    def _slot(self, manifest: Manifest, slot: int) -> SlotInMemory:
        """Its views are made once per manifest."""
        key = manifest.fingerprint(), slot
        if key not in self._slots:
            self._slots = {k: v for k, v in self._slots.items() if k[0] == key[0]}
            self._slots[key] = SlotInMemory(manifest, slot)
        return self._slots[key]

    async def commit(self, in_flight: InFlightPolicy = "continue") -> Committed:
        commit = Commit(
            model="tiny", version=self.version, epoch=1, in_flight=in_flight
        )
        committed = await self.agent.answer(commit)
        assert isinstance(committed, Committed), committed
        return committed

    async def refit(
        self, manifest: Manifest, slot: int, fingerprints: np.ndarray | None = None
    ) -> tuple[RankVote, ...]:
        votes = await self.stage(manifest, slot, fingerprints)
        await self.commit()
        return votes

    def _fence(self) -> None:
        self.fenced = True
