# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A refit agent over a real vLLM engine, without Dynamo around it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import msgspec
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.events import Event
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    Commit,
    Committed,
    InFlightPolicy,
    ManifestReply,
    Message,
    Prepare,
    RankVote,
    Vote,
)
from dynamo.refit.worker.agent import RefitAgent
from dynamo.refit.worker.engine import RefitEngine


class FakeHandler:
    """What the refit engine uses of a Dynamo handler, around a real engine."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.engine_client = llm
        self._pause_lock = asyncio.Lock()
        self._paused = False
        self._pause_controller = SimpleNamespace(is_paused=False)
        self.declared: list[dict] = []

    async def set_weight_version(self, body: dict) -> dict:
        self.declared.append(body)
        return {"status": "ok"}


class FakeTrainers:
    """Hands out a manifest without a trip over Dynamo, and counts."""

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.asked = 0

    async def call(self, *_: object) -> Message:
        self.asked += 1
        return ManifestReply(payload=msgspec.msgpack.encode(self.manifest))


class Replica:
    """An agent over a real engine, and the events it publishes."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self.events: list[Event] = []
        self.fenced = False
        self.trainers = FakeTrainers()
        self.handler = FakeHandler(llm)
        self.engine = RefitEngine(self.handler)
        self.agent = RefitAgent(
            self.engine,
            self.trainers,
            self.events.append,
            self._fence,
            model="model",
            worker=1,
        )
        self.version = 0

    async def stage(self, manifest: Manifest, slot: int) -> tuple[RankVote, ...]:
        """Prepare the next version from ``slot``; each rank's vote."""
        self.version += 1
        self.trainers.manifest = manifest
        prepare = Prepare(
            version=self.version,
            epoch=1,
            endpoint="-",
            instance=0,
            manifest=manifest.fingerprint(),
            slot=slot,
            stage_seconds=60,
            commit_seconds=60,
        )
        vote = await self.agent.answer(prepare)
        assert isinstance(vote, Vote), vote
        return vote.ranks

    async def commit(self, in_flight: InFlightPolicy = "continue") -> Committed:
        commit = Commit(version=self.version, epoch=1, in_flight=in_flight)
        committed = await self.agent.answer(commit)
        assert isinstance(committed, Committed), committed
        return committed

    async def refit(self, manifest: Manifest, slot: int) -> tuple[RankVote, ...]:
        votes = await self.stage(manifest, slot)
        await self.commit()
        return votes

    def _fence(self) -> None:
        self.fenced = True
