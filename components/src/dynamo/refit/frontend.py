# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``GET /refit`` on the Dynamo frontend: what the coordinator knows of its fleet.

    python -m dynamo.frontend --frontend-route-extension refit ...

Dynamo's extensions are static ``GET`` routes with handlers that are not coroutines, so
this shows and changes nothing. The answer is
:class:`dynamo.refit.protocol.FleetStatus` as JSON; 503 with an ``error`` where no
coordinator answers.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import os
import threading
import time

from dynamo.frontend.frontend_args import FrontendArgGroup, FrontendConfig
from dynamo.llm import FrontendExtensionContext, FrontendResponse, FrontendRoute
from dynamo.runtime import DistributedRuntime

from dynamo.refit.protocol import FleetStatus, GetStatus, Refused, to_wire
from dynamo.refit.rpc import Caller, PeerLost

PATH = "/refit"

#: How long a client waits at most, and how old the answer may be that it shares with
#: others: the frontend runs the handlers of an extension one after the other.
ANSWER_SECONDS = 2.0
SHARED_SECONDS = 0.5


def routes() -> FrontendRoute:
    """The route; called once by the frontend, on its running event loop."""
    page = FleetPage(asyncio.get_running_loop(), _frontend_config())
    return FrontendRoute("GET", PATH, page.answer)


class FleetPage:
    """Asks the coordinator of the frontend's namespace.

    Args:
        loop: the frontend's; handlers run on other threads.
        config: as the frontend was started, so that both look into one discovery.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, config: FrontendConfig) -> None:
        self._loop = loop
        self._config = config
        namespace = config.namespace or os.environ.get("DYN_NAMESPACE", "dynamo")
        self._path = f"{namespace}.refit.status"
        self._caller: Caller | None = None
        self._lock = threading.Lock()
        self._asked: concurrent.futures.Future[dict] | None = None
        self._answered_at = 0.0

    def answer(self, context: FrontendExtensionContext) -> object:
        """The fleet's status as JSON. Blocks its thread for at most
        :data:`ANSWER_SECONDS`."""
        try:
            return self._ask().result()
        except PeerLost as error:
            return FrontendResponse(503, {"error": str(error)})

    def _ask(self) -> concurrent.futures.Future[dict]:
        """A question that is under way, or was a moment ago, serves all."""
        with self._lock:
            if self._asked is None or self._is_old(self._asked):
                self._asked = asyncio.run_coroutine_threadsafe(
                    self._bounded_status(), self._loop
                )
            return self._asked

    def _is_old(self, asked: concurrent.futures.Future[dict]) -> bool:
        age = time.monotonic() - self._answered_at
        return asked.done() and age > SHARED_SECONDS

    async def _bounded_status(self) -> dict:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return to_wire(await self._status())
        except TimeoutError as error:
            raise PeerLost(
                f"no coordinator at {self._path} answers within {ANSWER_SECONDS:g} s: "
                "start `python -m dynamo.refit`, and check that its DYN_NAMESPACE and "
                "discovery variables are the frontend's"
            ) from error
        finally:
            self._answered_at = time.monotonic()

    async def _status(self) -> FleetStatus:
        """The newest coordinator's: one that was killed is in discovery for a while."""
        if self._caller is None:
            self._caller = Caller(self._runtime())
        while not (found := await self._caller.instances(self._path)):
            await asyncio.sleep(0.05)
        replies = await asyncio.gather(
            *(self._ask_one(instance) for instance in found), return_exceptions=True
        )
        answered = [reply for reply in replies if isinstance(reply, FleetStatus)]
        if not answered:
            raise PeerLost(f"the coordinator does not answer: {replies[0]}")
        return max(answered, key=lambda status: status.epoch)

    async def _ask_one(self, instance: int) -> FleetStatus | Refused:
        return await self._caller.call(
            self._path, instance, GetStatus(), FleetStatus | Refused, ANSWER_SECONDS / 2
        )

    def _runtime(self) -> DistributedRuntime:
        config = self._config
        return DistributedRuntime(
            self._loop,
            config.discovery_backend,
            config.request_plane,
            event_plane=config.event_plane,
        )


def _frontend_config() -> FrontendConfig:
    """What the frontend's command line and environment say."""
    parser = argparse.ArgumentParser(add_help=False)
    FrontendArgGroup().add_arguments(parser)
    known, _ = parser.parse_known_args()
    return FrontendConfig.from_cli_args(known)
