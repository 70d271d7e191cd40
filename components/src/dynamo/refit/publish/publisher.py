# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's side: make versions readable, announce them, know when they are free.

    publisher = WeightPublisher("my-model", dict(model.named_parameters()))
    handle = publisher.publish(version=step)
    handle.wait()                       # or: await handle.released()

The publisher owns the NIXL registration of the weights, the manifest and the
leases; it knows nothing about workers. It runs on two threads of its own, so a
trainer that computes for seconds still answers: an event loop with the Dynamo
runtime, and a thread that lets UCX answer readers that connect.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch
import uvloop

from dynamo.refit.bus import EventPublisher
from dynamo.refit.errors import LeaseHeld, SourceLost
from dynamo.refit.events import WEIGHT_VERSIONS, WeightVersionReady
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.protocol import (
    AcquireLease,
    Done,
    GetManifest,
    InFlightPolicy,
    ManifestReply,
    ReleaseLease,
    ReleaseOutcome,
    TrainerReply,
    TrainerRequest,
)
from dynamo.refit.publish.torch_state import InPlaceBuffers, SnapshotBuffers
from dynamo.refit.rpc import runtime_from_environment, serve, unary
from dynamo.refit.transport.nixl import NixlAgent, memory_of

logger = logging.getLogger(__name__)

#: UCX answers a connecting reader only when this process polls.
PROGRESS_SECONDS = 0.002

#: A version that nobody has finished with is announced again this often: an event
#: may be lost, and a coordinator may be new.
REANNOUNCE_SECONDS = 1.0

#: How long start and stop of the publisher's threads may take.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Release:
    """How a version's publication ended, as the coordinator says it."""

    outcome: ReleaseOutcome
    detail: str


@dataclass
class PublishedVersion:
    """One call of :meth:`WeightPublisher.publish`."""

    version: int
    announcement: str
    slot: int
    _released: concurrent.futures.Future = field(
        default_factory=concurrent.futures.Future
    )
    _leased_until: float = 0.0

    async def released(self) -> Release:
        """Wait until nobody reads this version's bytes any more.

        With ``in_place`` the tensors may be written again after this.
        """
        return await asyncio.wrap_future(self._released)

    def wait(self, timeout: float | None = None) -> Release:
        """As :meth:`released`, blocking; raises TimeoutError after ``timeout`` s."""
        return self._released.result(timeout)

    @property
    def leased(self) -> bool:
        """Somebody may be reading the bytes."""
        return time.monotonic() < self._leased_until


class WeightPublisher:
    """Publishes the versions of one model from one trainer rank.

    Args:
        model: the served model's name, as clients send it.
        tensors: checkpoint (Hugging Face) name to tensor, all on one device. The
            same tensors hold every version.
        mode: ``snapshot`` copies each version into one of two registered buffers,
            and the trainer goes on at once; ``in_place`` publishes the tensors
            themselves, which must not change until the handle is released.
        namespace: Dynamo namespace of the graph.
        component: Dynamo component this trainer shows up as.

    The discovery backend and the planes come from Dynamo's environment
    (``DYN_DISCOVERY_BACKEND``, ``DYN_REQUEST_PLANE``, ``DYN_EVENT_PLANE``, ...).

    Raises:
        ManifestInvalid: the tensors cannot be published as they are.
        TransferFailed: NIXL does not register them.
    """

    def __init__(
        self,
        model: str,
        tensors: Mapping[str, torch.Tensor],
        *,
        mode: Literal["snapshot", "in_place"] = "snapshot",
        namespace: str | None = None,
        component: str = "trainer",
    ) -> None:
        self.model = model
        self._namespace = namespace or os.environ.get("DYN_NAMESPACE", "dynamo")
        self._component = component
        self._in_place = mode == "in_place"
        self._buffers = (
            InPlaceBuffers(tensors) if self._in_place else SnapshotBuffers(tensors)
        )
        self._name = f"{component}-{uuid.uuid4().hex[:12]}"
        self.manifest = self._register()
        self._fingerprint = self.manifest.fingerprint()
        self._payload = msgspec.msgpack.encode(self.manifest)
        self._versions: dict[str, PublishedVersion] = {}
        self._latest: tuple[PublishedVersion, WeightVersionReady] | None = None
        self._slots = itertools.cycle(range(self._buffers.slots))
        self._stopped = threading.Event()
        self._started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._threads = [
            threading.Thread(target=self._progress, name="refit-nixl", daemon=True),
            threading.Thread(target=self._serve, name="refit-publisher", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._instance = self._started.result(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def publish(
        self, version: int, *, in_flight: InFlightPolicy | None = None
    ) -> PublishedVersion:
        """Make the tensors as they are now readable as ``version`` and announce it.

        Blocks for the copy only (``snapshot``), never for a reader.

        Args:
            version: grows from publication to publication.
            in_flight: overrides the coordinator's in-flight policy.

        Raises:
            LeaseHeld: the buffer that is due is still being read: wait for the
                handle of the version before the last.
        """
        slot = next(self._slots)
        self._on_loop(self._take_slot(slot, version)).result(START_SECONDS)
        self._buffers.write(slot)
        published = PublishedVersion(version, uuid.uuid4().hex, slot)
        event = WeightVersionReady(
            model=self.model,
            version=version,
            announcement=published.announcement,
            endpoint=f"{self._namespace}.{self._component}.weights",
            instance=self._instance,
            manifest=self._fingerprint,
            slot=slot,
            in_flight=in_flight,
        )
        self._on_loop(self._announce(published, event)).result(START_SECONDS)
        return published

    def close(self) -> None:
        """Stop serving and give the registration back. Open handles get an error."""
        self._stopped.set()
        if self._started.done() and not self._started.exception():
            self._loop.call_soon_threadsafe(self._closing.set)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(START_SECONDS)
        for published in self._versions.values():
            if not published._released.done():
                error = SourceLost("the publisher was closed before the release")
                published._released.set_exception(error)
        if self._registration is not None:
            self._agent.deregister(self._registration)
            self._registration = None

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- set-up ---------------------------------------------------------------

    def _register(self) -> Manifest:
        memory, number = memory_of(self._buffers.device)
        self._agent = NixlAgent(self._name)
        regions = [
            (r.address, r.nbytes) for slot in self._buffers.regions for r in slot
        ]
        self._registration = self._agent.register(regions, memory, number)
        source = Source(
            agent=self._name,
            metadata=self._agent.metadata(),
            memory=memory,
            device=number,
            slots=self._buffers.regions,
        )
        manifest = Manifest(
            model=self.model, tensors=tuple(self._buffers.entries), sources=(source,)
        )
        manifest.validate()
        return manifest

    def _progress(self) -> None:
        while not self._stopped.wait(PROGRESS_SECONDS):
            self._agent.progress()

    # --- the event loop's side ------------------------------------------------

    def _on_loop(self, coroutine: Any) -> concurrent.futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _serve(self) -> None:
        try:
            uvloop.run(self._main())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            else:
                logger.exception("the publisher's event loop ended")

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        runtime = runtime_from_environment()
        weights = runtime.endpoint(f"{self._namespace}.{self._component}.weights")
        topic = runtime.endpoint(f"{self._namespace}.refit.{WEIGHT_VERSIONS}")
        handler = unary(TrainerRequest, self._answer, "trainer")
        serving = asyncio.create_task(serve(weights, handler))
        try:
            async with EventPublisher(topic, self._name) as self._events:
                await _wait_registered(weights, serving)
                self._started.set_result(weights.connection_id())
                await self._reannounce_until_closed()
        finally:
            runtime.shutdown()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.wait_for(serving, 5)

    async def _take_slot(self, slot: int, version: int) -> None:
        """From here on nobody can lease what the slot held: its bytes will change.

        On the loop's thread, like every lease, so that none comes in between.
        """
        there = [p for p in self._versions.values() if p.slot == slot]
        for published in there:
            if published.leased:
                raise LeaseHeld(
                    f"version {published.version} is still being read from slot "
                    f"{slot}: await its handle's released() before publishing again"
                )
        for published in there:
            del self._versions[published.announcement]
            if not published._released.done():
                detail = f"its buffer was taken for version {version}"
                published._released.set_result(Release("superseded", detail))

    async def _announce(
        self, published: PublishedVersion, event: WeightVersionReady
    ) -> None:
        # Only the newest is announced again; an older one waits for its end.
        self._versions[published.announcement] = published
        self._latest = (published, event)
        self._events.publish(event)

    async def _reannounce_until_closed(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._closing.wait(), REANNOUNCE_SECONDS)
                return
            if self._latest is not None:
                published, event = self._latest
                if not published._released.done():
                    self._events.publish(event)

    async def _answer(self, request: TrainerRequest) -> TrainerReply:
        match request:
            case GetManifest(manifest=fingerprint):
                if fingerprint != self._fingerprint:
                    raise SourceLost(f"no manifest {fingerprint[:12]} is served here")
                return ManifestReply(payload=self._payload)
            case AcquireLease():
                published = self._published(request.announcement)
                if published._released.done() and self._in_place:
                    raise SourceLost(
                        f"version {published.version} was released, so the trainer "
                        "may be writing it"
                    )
                published._leased_until = time.monotonic() + request.seconds
                return Done()
            case ReleaseLease():
                published = self._published(request.announcement)
                published._leased_until = 0.0
                if not published._released.done():
                    release = Release(request.outcome, request.detail)
                    published._released.set_result(release)
                return Done()

    def _published(self, announcement: str) -> PublishedVersion:
        published = self._versions.get(announcement)
        if published is None:
            raise SourceLost(f"announcement {announcement} is not held here any more")
        return published


async def _wait_registered(endpoint: Any, serving: asyncio.Task) -> None:
    """Until readers can find this process: discovery lags behind the start."""
    client = await endpoint.client()
    deadline = time.monotonic() + START_SECONDS
    while endpoint.connection_id() not in client.instance_ids():
        if serving.done():
            serving.result()
        if time.monotonic() > deadline:
            raise SourceLost("the weights endpoint does not show up in discovery")
        await asyncio.sleep(0.01)
