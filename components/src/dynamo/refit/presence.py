# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A process's records in discovery, kept there: its endpoints and its event channel.

A process that stalls for longer than its lease (10 s with files and etcd) loses every
record it had. Dynamo puts none of them back, and nobody finds the process although it
lives. This file notices and says when to put them back; what they are, and what a
worker's model card has to do with it, is for others to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable

from dynamo.runtime import Client, Endpoint

from dynamo.refit.bus import RELAY_SECONDS, EventPublisher
from dynamo.refit.events import Event

logger = logging.getLogger(__name__)

#: The bound on one call of discovery.
CALL_SECONDS = 3.0

#: How often discovery is compared with what should be there, for how long a record must
#: be missing to be put back, and for how long to make it a matter for a person.
WATCH_SECONDS = 0.5
MISSING_SECONDS = 2.0
LOST_SECONDS = 15.0


class LastingPublisher:
    """One process's events, through one publisher after the other: one whose record in
    discovery is lost reaches no new subscriber, and cannot be put back.

    ``async with`` starts and closes it.

    Args:
        topic: the endpoint to publish on.
        sender: names this life of the process; later ones are ``<sender>.1``...
        epoch: on every event.
        model: on every event that does not name one.
    """

    def __init__(
        self, topic: Endpoint, sender: str, epoch: int = 0, model: str = ""
    ) -> None:
        self._topic = topic
        self._epoch = epoch
        self._model = model
        self._names = (
            sender + (f".{life}" if life else "") for life in itertools.count()
        )
        self._current = self._next()

    def _next(self) -> EventPublisher:
        return EventPublisher(self._topic, next(self._names), self._epoch, self._model)

    async def start(self) -> None:
        """See :meth:`EventPublisher.start`."""
        await self._current.start()

    def publish(self, event: Event) -> Event:
        """See :meth:`EventPublisher.publish`."""
        return self._current.publish(event)

    async def renew(self) -> bool:
        """Publish through a new record; False, and through the old one, if there is
        none to be had now."""
        fresh = self._next()
        seconds = RELAY_SECONDS + CALL_SECONDS
        if not await attempt(fresh.start(), "renew the event channel", seconds):
            return False
        self._current.close()
        self._current = fresh
        return True

    def close(self) -> None:
        """See :meth:`EventPublisher.close`."""
        self._current.close()

    async def __aenter__(self) -> LastingPublisher:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()


class Seen:
    """Whether this process's instance of an endpoint is in discovery, as others find
    it there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._client: Client | None = None

    async def look(self) -> bool:
        if self._client is None:
            self._client = await self._endpoint.client()
        return self._endpoint.connection_id() in self._client.instance_ids()


async def keep_present(endpoint: Endpoint, events: LastingPublisher) -> None:
    """Put ``endpoint``, which is being served, and ``events`` back whenever a stall has
    lost them; until cancelled."""
    seen, renewed = Seen(endpoint), True

    async def missing() -> bool:
        return not renewed or not await seen.look()

    async def put_back() -> None:
        nonlocal renewed
        await attempt(endpoint.register_endpoint_instance(), "register")
        renewed = await events.renew()

    await put_back_what_is_missing(missing, put_back, _report_lost, asyncio.Event())


def _report_lost(seconds: float) -> None:
    logger.error(
        "this process has been missing in discovery for %.0f s and cannot be put back: "
        "nobody finds it. Check the discovery service; it goes on trying",
        seconds,
    )


async def put_back_what_is_missing(
    missing: Callable[[], Awaitable[bool]],
    put_back: Callable[[], Awaitable[None]],
    report_lost: Callable[[float], None],
    stopping: asyncio.Event,
) -> None:
    """Compare what is in discovery with what should be there, until ``stopping``.

    Args:
        missing: whether something is not there.
        put_back: registers all that should be there; awaited when something has been
            missing for :data:`MISSING_SECONDS`, since or since the last try.
        report_lost: called before each try once that is :data:`LOST_SECONDS` ago.
        stopping: set when the process is told to end: nothing is put back any more.
    """
    loop = asyncio.get_running_loop()
    complete = tried = loop.time()
    while not await _is_set_within(stopping, WATCH_SECONDS):
        is_missing = await missing()
        now = loop.time()
        if not is_missing:
            complete = now
        elif now - max(complete, tried) >= MISSING_SECONDS:
            if now - complete >= LOST_SECONDS:
                report_lost(now - complete)
            logger.warning("missing in discovery (stalled?): registering again")
            await put_back()
            tried = loop.time()


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


async def attempt(
    call: Awaitable[None], purpose: str, seconds: float = CALL_SECONDS
) -> bool:
    """Whether discovery did it, within ``seconds``; whoever watches tries again."""
    try:
        async with asyncio.timeout(seconds):
            await call
    # Dynamo raises plain Exceptions for a record that is not there, a service that
    # does not answer, and all else.
    except Exception as error:
        logger.warning("cannot %s: %s", purpose, str(error) or repr(error))
        return False
    return True
