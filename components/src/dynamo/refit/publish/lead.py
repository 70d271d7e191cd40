# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Rank 0 of a trainer job: the endpoint that workers and other ranks ask, and the
announcements. All decisions are :class:`~dynamo.refit.publish.group.Group`'s."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from dynamo.runtime import DistributedRuntime

from dynamo.refit import tracing
from dynamo.refit.errors import SourceLost, error_from
from dynamo.refit.events import WEIGHT_VERSIONS, WeightVersionReady
from dynamo.refit.presence import LastingPublisher, keep_present
from dynamo.refit.protocol import (
    AcquireLease,
    AwaitGroup,
    AwaitRelease,
    Done,
    FindGroup,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    GroupRequest,
    Join,
    Joined,
    Leave,
    ManifestReply,
    OtherGroup,
    Released,
    ReleaseLease,
    TakeSlot,
    TrainerReply,
    TrainerRequest,
    Waiting,
    WriteFailed,
    Written,
)
from dynamo.refit.publish.group import Group
from dynamo.refit.publish.merge import Merged, RankPart
from dynamo.refit.publish.publication import Publication
from dynamo.refit.publish.telemetry import PublishTelemetry
from dynamo.refit.rpc import serve, unary

logger = logging.getLogger(__name__)

#: A version that nobody has finished with is announced again this often: an event
#: may be lost, and a coordinator may be new.
REANNOUNCE_SECONDS = 1.0

#: How often deadlines and leases are looked at.
TICK_SECONDS = 0.1

#: Nobody is kept waiting for an answer for longer.
MAX_WAIT_SECONDS = 30.0

#: How long this endpoint may take to show up in discovery.
REGISTER_SECONDS = 60.0

#: How long the end waits until the other ranks know how their versions ended.
LINGER_SECONDS = 5.0

T = TypeVar("T")


class Lead:
    """Rank 0's seat: it answers from what it decides itself.

    Args:
        runtime: of this seat; it is shut down with it.
        namespace: Dynamo namespace of the graph.
        component: Dynamo component the trainer shows up as.
        member: rank 0's own name.
        group: all decisions.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        namespace: str,
        component: str,
        member: str,
        group: Group,
    ) -> None:
        self.group = group
        self.manifests_built = 0
        self.manifests_sent = 0
        self._runtime = runtime
        self._member = member
        self._path = f"{namespace}.{component}.weights"
        self._endpoint = runtime.endpoint(self._path)
        topic = runtime.endpoint(f"{namespace}.refit.{WEIGHT_VERSIONS}")
        self._events = LastingPublisher(topic, member)
        self._telemetry = PublishTelemetry(tracing.from_environment())
        self._changed = asyncio.Event()
        self._state = group.state()
        self._serving: asyncio.Task | None = None
        self._tasks: list[asyncio.Task] = []
        self._merged: Merged | None = None
        self._manifest_digest = ""

    async def start(self) -> None:
        """Serve, and return when others can find this process.

        Raises:
            SourceLost: it does not show up in discovery.
        """
        handler = unary(TrainerRequest, self.ask, "trainer")
        self._serving = asyncio.create_task(serve(self._endpoint, handler))
        await self._events.start()
        await self._registered()
        self._tasks = [
            asyncio.create_task(self._tick()),
            asyncio.create_task(self._repeat()),
            asyncio.create_task(keep_present(self._endpoint, self._events)),
        ]

    async def run(self) -> None:
        """Until a part of this seat fails; everything that is out ends with its error.

        Raises:
            Exception: the one that the part failed with.
            SourceLost: the endpoint is served no more.
        """
        parts = [self._serving, *self._tasks]
        ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        try:
            for part in ended:
                part.result()
            raise SourceLost("the endpoint of the weights is served no more")
        except Exception as error:
            self.group.close(
                f"the publisher of rank 0 failed: {type(error).__name__}: {error}; "
                "make the publishers of all ranks anew"
            )
            raise

    async def stop(self) -> None:
        """Tell the other ranks that this is the end, and stop serving."""
        self.group.close("the publisher of rank 0 was closed before the release")
        self._notify()
        deadline = time.monotonic() + LINGER_SECONDS
        while not self.group.all_told(self._member) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for task in self._tasks:
            task.cancel()
        self._events.close()
        await self._telemetry.close()
        self._runtime.shutdown()
        if self._serving is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(self._serving, 5)

    async def join(self, request: Join, seconds: float) -> None:
        """Take rank 0 itself in. ``seconds`` is for ranks that have to find it."""
        await self.ask(request)

    async def ask(self, request: TrainerRequest) -> TrainerReply:
        """Answer a worker, the coordinator or a rank.

        Raises:
            RefitError: the request is refused.
        """
        match request:
            case GetManifest(manifest_digest=digest):
                if not digest or digest != self._manifest_digest:
                    raise SourceLost(f"no manifest {digest[:12]} is served here")
                self.manifests_sent += 1
                return ManifestReply(payload=self._merged.encoded)
            case GetFingerprints(announcement_id=announcement_id):
                publication = self.group.log.readable(announcement_id)
                return FingerprintsReply(payload=publication.fingerprints)
            case AcquireLease():
                self.group.log.acquire(
                    request.announcement_id,
                    request.epoch,
                    request.seconds,
                    time.monotonic(),
                )
            case ReleaseLease():
                self.group.log.release(
                    request.announcement_id,
                    request.epoch,
                    request.outcome,
                    request.detail,
                    time.monotonic(),
                )
            case _:
                return await self._answer_rank(request)
        self._notify()
        return Done()

    async def _answer_rank(self, request: GroupRequest) -> TrainerReply:
        group, now = self.group, time.monotonic()
        reply: TrainerReply = Done()
        match request:
            case FindGroup(group=name) | Join(group=name) if name != group.name:
                return OtherGroup()
            case Join():
                self._join(request, now)
                reply = Joined(missing=group.missing(request.member))
            case AwaitGroup(member=member, seconds=seconds):
                await self._until(lambda: not group.missing(member) or None, seconds)
                return Joined(missing=group.missing(member))
            case AwaitRelease(member=member, announcement_id=name, seconds=seconds):
                ended: Released | None = await self._until(
                    lambda: group.end_of(member, name), seconds
                )
                return ended or Waiting()
            case TakeSlot():
                reply = group.take_slot(request, now)
                if request.member == self._member:
                    self._telemetry.taken(reply.announcement_id, request)
            case Written():
                group.written(request, now)
            case WriteFailed():
                group.write_failed(request, error_from(request.failure), now)
            case Leave(member=member):
                group.leave(member, now)
        self._notify()
        return reply

    def _join(self, request: Join, now: float) -> None:
        part = msgspec.msgpack.decode(request.part, type=RankPart)
        try:
            self.group.join(request, part, now)
        finally:
            self._notify()
        if self.group.merged is not self._merged:
            self._merged = self.group.merged
            self._manifest_digest = self._merged.manifest.fingerprint()
            self.manifests_built += 1

    # --- what the time and others bring ---------------------------------------

    async def _until(self, look: Callable[[], T | None], seconds: float) -> T | None:
        """What ``look`` finds, as soon as it does, or ``None`` after ``seconds``."""
        deadline = time.monotonic() + min(seconds, MAX_WAIT_SECONDS)
        while (found := look()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return found

    def _notify(self) -> None:
        """Announce what has become ready, and wake those who wait if they should look.

        Every rank waits for the end of every version, and each of their requests comes
        through here.
        """
        for publication in self.group.log.to_announce():
            self._announce(publication)
        state = self.group.state()
        if state != self._state:
            self._state = state
            self._changed.set()
            self._changed = asyncio.Event()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self.group.expire(time.monotonic()):
                self._notify()

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(REANNOUNCE_SECONDS)
            for publication in self.group.log.to_repeat(time.monotonic()):
                self._announce(publication)

    def _announce(self, publication: Publication) -> None:
        event = WeightVersionReady(
            model=self._merged.manifest.model,
            version=publication.version,
            announcement_id=publication.announcement_id,
            endpoint=self._path,
            instance=self._endpoint.connection_id(),
            manifest_digest=self._manifest_digest,
            slot=publication.slot,
            fingerprint=publication.fingerprint,
            in_flight=publication.in_flight,
            traceparent=self._telemetry.announced(publication.announcement_id),
        )
        self._events.publish(event)

    async def _registered(self) -> None:
        """Until readers can find this process: discovery lags behind the start."""
        client: Any = await self._endpoint.client()
        deadline = time.monotonic() + REGISTER_SECONDS
        while self._endpoint.connection_id() not in client.instance_ids():
            if self._serving.done():
                self._serving.result()
            if time.monotonic() > deadline:
                raise SourceLost("the weights endpoint does not show up in discovery")
            await asyncio.sleep(0.01)
