# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What workers and the coordinator have of a trainer job: the endpoint that they ask,
and the announcements. Rank 0 serves it; all decisions are
:class:`~dynamo.refit.publish.group.Group`'s."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from dynamo.runtime import DistributedRuntime

from dynamo.refit import tracing
from dynamo.refit.errors import SourceLost
from dynamo.refit.events import WEIGHT_VERSIONS, WeightVersionReady
from dynamo.refit.presence import LastingPublisher, Seen, keep_present
from dynamo.refit.protocol import (
    AcquireLease,
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    ReleaseLease,
    TrainerReply,
    TrainerRequest,
)
from dynamo.refit.publish.group import Group
from dynamo.refit.publish.merge import Merged
from dynamo.refit.publish.publication import Publication
from dynamo.refit.publish.telemetry import PublishTelemetry
from dynamo.refit.rpc import serve, unary

#: A version that nobody has finished with is announced again this often: an event
#: may be lost, and a coordinator may be new.
REANNOUNCE_SECONDS = 1.0

#: How long this endpoint may take to show up in discovery.
REGISTER_SECONDS = 60.0


class WeightsEndpoint:
    """For one event loop.

    Args:
        namespace: Dynamo namespace of the graph.
        component: Dynamo component the trainer shows up as.
        member: rank 0's own name.
        group: all decisions.

    Attributes:
        tasks: what goes on until the endpoint stops.
    """

    def __init__(
        self, namespace: str, component: str, member: str, group: Group
    ) -> None:
        self.member = member
        self.group = group
        self.tasks: list[asyncio.Task] = []
        self.manifests_built = 0
        self.manifests_sent = 0
        self.telemetry = PublishTelemetry(tracing.from_environment())
        self._path = f"{namespace}.{component}.weights"
        self._topic = f"{namespace}.refit.{WEIGHT_VERSIONS}"
        self._merged: Merged | None = None
        self._manifest_digest = ""

    async def start(
        self, runtime: DistributedRuntime, changed: Callable[[], None]
    ) -> None:
        """Serve, and return when others can find this process.

        Args:
            runtime: of this endpoint; it is shut down with it.
            changed: called after a request that may have ended a version.

        Raises:
            SourceLost: it does not show up in discovery.
        """
        self._runtime = runtime
        self._changed = changed
        self._endpoint = runtime.endpoint(self._path)
        self._events = LastingPublisher(runtime.endpoint(self._topic), self.member)
        handler = unary(TrainerRequest, self._answer, "trainer")
        self.tasks = [asyncio.create_task(serve(self._endpoint, handler))]
        await self._events.start()
        await self._registered()
        self.tasks += [
            asyncio.create_task(self._repeat()),
            asyncio.create_task(keep_present(self._endpoint, self._events)),
        ]

    async def stop(self) -> None:
        """Stop serving."""
        if not self.tasks:
            # It never began.
            self._runtime.shutdown()
            return
        serving, *others = self.tasks
        for task in others:
            task.cancel()
        self._events.close()
        await self.telemetry.close()
        self._runtime.shutdown()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await asyncio.wait_for(serving, 5)

    def announce_ready(self) -> None:
        """Announce what has become ready."""
        if self.group.merged is not self._merged:
            self._merged = self.group.merged
            self._manifest_digest = self._merged.manifest.fingerprint()
            self.manifests_built += 1
        for publication in self.group.log.to_announce():
            self._announce(publication)

    async def _answer(self, request: TrainerRequest) -> TrainerReply:
        """Answer a worker or the coordinator.

        Raises:
            RefitError: the request is refused.
        """
        log, now = self.group.log, time.monotonic()
        match request:
            case GetManifest(manifest_digest=digest):
                if not digest or digest != self._manifest_digest:
                    raise SourceLost(f"no manifest {digest[:12]} is served here")
                self.manifests_sent += 1
                return ManifestReply(payload=self._merged.encoded)
            case GetFingerprints(announcement_id=name):
                return FingerprintsReply(payload=log.readable(name).fingerprints)
            case AcquireLease(announcement_id=name, epoch=epoch, seconds=seconds):
                log.acquire(name, epoch, seconds, now)
            case ReleaseLease(announcement_id=name, epoch=epoch):
                log.release(name, epoch, request.outcome, request.detail, now)
        self._changed()
        return Done()

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
            traceparent=self.telemetry.announced(publication.announcement_id),
        )
        self._events.publish(event)

    async def _registered(self) -> None:
        """Until readers can find this process: discovery lags behind the start."""
        seen = Seen(self._endpoint)
        deadline = time.monotonic() + REGISTER_SECONDS
        while not await seen.look():
            if self.tasks[0].done():
                self.tasks[0].result()
            if time.monotonic() > deadline:
                raise SourceLost("the weights endpoint does not show up in discovery")
            await asyncio.sleep(0.01)
