# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The event bus: typed events over Dynamo's event plane.

Owns the transport: it stamps, encodes and sends, receives and decodes. It never
looks into an event, repeats one or keeps one. Delivery is **at most once**: there
is no replay, a late subscriber sees nothing old, a burst can overrun a subscriber
(1024 are buffered below), and a new publisher's first events are lost to those
that have not discovered it yet. Order holds per publisher only. The state behind
an event is to be had from an endpoint, never from here.

Dynamo 1.6 has no generic publish and subscribe in Python. What carries any bytes
over every event plane is the pair made for forward-pass metrics: ``FpmEventRelay``
republishes what it reads from a local socket, ``FpmEventSubscriber`` receives it.
The topic is fixed, so the endpoint tells streams apart; it need not be served, and
must not be one that planners listen on. Once Dynamo binds its ``EventPublisher``
and ``EventSubscriber`` (ai-dynamo PR #15135), they replace the pair in this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec
import zmq
from dynamo.llm import FpmEventRelay, FpmEventSubscriber
from dynamo.runtime import Endpoint

from dynamo.refit.errors import EventRefused, RefitError
from dynamo.refit.events import MAX_EVENT_BYTES, AnyEvent, Event, decode, encode

logger = logging.getLogger(__name__)

# FpmEventRelay's constructor waits for the runtime's threads without letting go of the
# GIL, and a thread of the runtime waits for the GIL whenever it completes a future of
# Python's. With as many such futures as threads (two cores, a worker that starts) all
# stand still for good. Read when a runtime is made, so to be set before.
os.environ.setdefault("DYN_RUNTIME_NUM_WORKER_THREADS", str(max(8, os.cpu_count())))

#: How long :meth:`EventPublisher.start` waits for the relay's subscription.
RELAY_SECONDS = 10.0

#: How long :meth:`EventPublisher.close` pushes what was published to the relay, and
#: then lets the relay pass it on: its ``shutdown()`` drops what it still holds, and
#: it cannot be asked whether it is done.
FLUSH_SECONDS = 2.0
DRAIN_SECONDS = 0.25

#: How long :meth:`EventSubscriber.close` waits for the receiving thread.
JOIN_SECONDS = 5.0

#: A subscription that ends by itself is made again after so long; not after so many in
#: a row, each shorter than so long: then this process cannot subscribe.
RESUBSCRIBE_SECONDS = 1.0
SHORT_SUBSCRIPTIONS = 5
SHORT_SECONDS = 30.0

#: Events that wait for a consumer; the oldest go when there are more.
QUEUE_EVENTS = 4096

#: Foreign bytes are quoted in a ``detail`` no further than this many characters.
DETAIL_CHARACTERS = 500

E = TypeVar("E", bound=Event)


class EventPlaneUnavailable(RefitError):
    """This end of the bus is not connected: not started, closed, or not answered."""


@dataclass(frozen=True)
class RejectedPayload:
    """A payload that is no event of this release, so that somebody can report it."""

    reason: Literal["malformed_event", "oversized_event"]
    detail: str
    nbytes: int


Item = AnyEvent | RejectedPayload
"""What a subscriber yields."""


class EventPublisher:
    """Publishes events on one endpoint, from the thread of one event loop.

    ``sequence`` starts at 1 with every ``EventPublisher``, so ``sender`` should name
    one life of a process: else receivers take its next life's events for repeats.
    ``async with`` starts and closes it.
    """

    def __init__(
        self, endpoint: Endpoint, sender: str, epoch: int = 0, model: str = ""
    ) -> None:
        self._endpoint = endpoint
        self._sender = sender
        self._model = model
        self._epoch = epoch
        self._sequence = 0
        self._published_at = float("-inf")
        self._connected = False
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None
        self._relay: FpmEventRelay | None = None

    async def start(self) -> None:
        """Connect the relay and wait until it listens.

        Raises:
            EventPlaneUnavailable: the relay does not subscribe within
                :data:`RELAY_SECONDS`, or this publisher was started before.
        """
        if self._context is not None:
            raise EventPlaneUnavailable("an EventPublisher is started once: make anew")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        # libzmq drops at 1000 queued messages; a burst waits here instead.
        self._socket.sndhwm = 0
        try:
            # The path is needed to connect only; removed by then, it does not stay
            # behind even when the process is killed.
            with tempfile.TemporaryDirectory(prefix="refit-") as directory:
                address = f"ipc://{directory}/bus"
                self._socket.bind(address)
                self._relay = FpmEventRelay(self._endpoint, address)
                await self._relay_subscribed(self._socket)
        except BaseException:
            self.close()
            raise
        self._connected = True

    async def _relay_subscribed(self, socket: zmq.Socket) -> None:
        """Wait for the message that tells an XPUB of a subscription.

        What is sent before is lost.
        """
        deadline = time.monotonic() + RELAY_SECONDS
        while not socket.poll(0):
            if time.monotonic() > deadline:
                raise EventPlaneUnavailable(
                    f"the event relay of {self._sender} has not subscribed within "
                    f"{RELAY_SECONDS} s: look for 'FPM relay' in the log"
                )
            await asyncio.sleep(0.002)
        socket.recv()

    def publish(self, event: E) -> E:
        """Stamp ``event`` and send it; does not block. Returns it as sent.

        Raises:
            EventRefused: it is too large; no ``sequence`` is used up.
            EventPlaneUnavailable: the publisher is not started, or is closed.
        """
        if not self._connected:
            raise EventPlaneUnavailable(
                f"publisher {self._sender} is not started, or is closed"
            )
        stamped = msgspec.structs.replace(
            event,
            model=event.model or self._model,
            sender=self._sender,
            sequence=self._sequence + 1,
            epoch=self._epoch,
            at=time.time(),
        )
        payload = encode(stamped)
        # The relay drops everything that has not exactly these three frames.
        self._socket.send_multipart([b"", stamped.sequence.to_bytes(8, "big"), payload])
        self._sequence = stamped.sequence
        self._published_at = time.monotonic()
        return stamped

    def close(self) -> None:
        """Pass on what was published, then leave the event plane. Idempotent.

        Blocks for :data:`DRAIN_SECONDS` if something was published just before,
        and at most for :data:`FLUSH_SECONDS` more.
        """
        self._connected = False
        if self._context is None or self._context.closed:
            return
        fresh = time.monotonic() - self._published_at < DRAIN_SECONDS
        self._socket.close(linger=int(FLUSH_SECONDS * 1000))
        self._context.term()
        if self._relay is not None:
            if fresh:
                time.sleep(DRAIN_SECONDS)
            self._relay.shutdown()
            self._relay = None

    async def __aenter__(self) -> EventPublisher:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()


class EventSubscriber:
    """Iterates over the events of every publisher on one endpoint, for one consumer.

    A thread receives and decodes into a queue of :data:`QUEUE_EVENTS`, of which the
    oldest are dropped, and counted in ``dropped``, when the consumer is behind. A
    subscription that ends by itself is made again; the events between the two are
    lost. The iteration ends with :meth:`close`. ``async with`` starts and closes it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.dropped = 0
        self._endpoint = endpoint
        self._source = FpmEventSubscriber(endpoint)
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue(QUEUE_EVENTS)
        self._behind = False
        self._lost = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Begin to listen on the running loop; publishers are then discovered."""
        if self._thread is not None or self._closed.is_set():
            raise EventPlaneUnavailable("an EventSubscriber is started once: make anew")
        self._thread = threading.Thread(
            target=self._receive,
            args=(asyncio.get_running_loop(),),
            name="refit-event-subscriber",
            daemon=True,
        )
        self._thread.start()

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread: hand over what arrives, and ``None`` at the end."""
        short = 0
        try:
            while True:
                since = time.monotonic()
                while (payload := self._source.recv()) is not None:
                    loop.call_soon_threadsafe(self._offer, _read(payload))
                lasted = time.monotonic() - since
                short = short + 1 if lasted < SHORT_SECONDS else 0
                ended = self._closed.is_set() or short == SHORT_SUBSCRIPTIONS
                if ended or not self._subscribe_again():
                    return
        finally:
            # A loop that is closed has no consumer left to wake.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._offer, None)

    def _subscribe_again(self) -> bool:
        """A new source after a pause; False when this subscriber is closed by then."""
        logger.warning("the subscription to events ended by itself: subscribing again")
        if self._closed.wait(RESUBSCRIBE_SECONDS):
            return False
        self._source = FpmEventSubscriber(self._endpoint)
        if self._closed.is_set():
            # close() may have shut down the source before this one.
            self._source.shutdown()
        return True

    def _offer(self, item: Item | None) -> None:
        if self._queue.full():
            self._queue.get_nowait()
            self.dropped += 1
            if not self._behind:
                self._behind = True
                logger.warning(
                    "event consumer is behind by %d: dropping the oldest, %d so far",
                    self._queue.maxsize,
                    self.dropped,
                )
        self._queue.put_nowait(item)

    def __aiter__(self) -> EventSubscriber:
        return self

    async def __anext__(self) -> Item:
        """
        Raises:
            EventPlaneUnavailable: it is not started, or cannot subscribe any more.
        """
        if self._closed.is_set():
            raise StopAsyncIteration
        if self._thread is None:
            raise EventPlaneUnavailable("the subscriber is not started")
        item = None if self._lost else await self._queue.get()
        if item is None:
            if self._closed.is_set():
                raise StopAsyncIteration
            self._lost = True
            raise EventPlaneUnavailable(
                "the subscription to events ended by itself, "
                f"{SHORT_SUBSCRIPTIONS} times in a row: see that the servers behind "
                "DYN_EVENT_PLANE and DYN_DISCOVERY_BACKEND answer, and start this "
                "process again"
            )
        if self._queue.empty():
            self._behind = False
        return item

    def close(self) -> None:
        """End the iteration and join the thread. Idempotent."""
        self._closed.set()
        self._source.shutdown()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                logger.warning("the event subscriber's thread has not ended")

    async def __aenter__(self) -> EventSubscriber:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()


def _read(payload: bytes) -> Item:
    """The event in ``payload``, or why there is none. Any bytes can arrive here."""
    try:
        return decode(payload)
    # Besides what decode() refuses, msgspec lets two errors of foreign bytes pass:
    # text that is not UTF-8, and nesting deeper than the interpreter's stack.
    except EventRefused as error:
        oversized = len(payload) > MAX_EVENT_BYTES
        return RejectedPayload(
            reason="oversized_event" if oversized else "malformed_event",
            detail=str(error)[:DETAIL_CHARACTERS],
            nbytes=len(payload),
        )
