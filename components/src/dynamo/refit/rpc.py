# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Typed unary calls over Dynamo endpoints: one client per endpoint, one deadline
per call, one error type for a peer that is gone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from dynamo.runtime import Client, DistributedRuntime, Endpoint

from dynamo.refit.errors import Fenced, RefitError, failure_from
from dynamo.refit.protocol import Message, Refused, from_wire, to_wire

logger = logging.getLogger(__name__)

#: How long a new instance may take to show up in this process's discovery view.
DISCOVERY_SECONDS = 5.0


class PeerLost(RefitError):
    """The called process is gone, or did not answer in time."""


def runtime_from_environment() -> DistributedRuntime:
    """A runtime on the running loop, configured as Dynamo's own components are by
    ``DYN_DISCOVERY_BACKEND`` and ``DYN_REQUEST_PLANE``."""
    return DistributedRuntime(
        asyncio.get_running_loop(),
        os.environ.get("DYN_DISCOVERY_BACKEND", "etcd"),
        os.environ.get("DYN_REQUEST_PLANE", "tcp"),
    )


class Caller:
    """Calls endpoints of other processes by path and instance."""

    def __init__(self, runtime: DistributedRuntime) -> None:
        self._runtime = runtime
        self._clients: dict[str, Client] = {}

    async def instances(self, path: str) -> list[int]:
        """The live instances of ``<namespace>.<component>.<endpoint>``."""
        return list((await self._client(path)).instance_ids())

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        """Send ``request`` to one instance and return its reply.

        Args:
            expected: the reply type, or a union of them.
            seconds: the bound on the whole call.

        Raises:
            PeerLost: no such instance, no answer in time, or a broken stream.
            msgspec.ValidationError: the answer is none of ``expected``.
        """
        try:
            async with asyncio.timeout(seconds):
                client = await self._known(path, instance)
                stream = await client.direct(
                    to_wire(request), instance, annotated=False
                )
                replies = [reply async for reply in stream]
        except TimeoutError as error:
            raise PeerLost(
                f"instance {instance} of {path} did not answer "
                f"{type(request).__name__} within {seconds:g} s"
            ) from error
        # Dynamo raises a different type for each way a stream can break.
        except Exception as error:
            if isinstance(error, RefitError):
                raise
            raise PeerLost(
                f"instance {instance} of {path}: {type(error).__name__}: {error}"
            ) from error
        if len(replies) != 1:
            raise PeerLost(f"instance {instance} of {path} sent {len(replies)} replies")
        return from_wire(replies[0], expected)

    async def _client(self, path: str) -> Client:
        if path not in self._clients:
            self._clients[path] = await self._runtime.endpoint(path).client()
        return self._clients[path]

    async def _known(self, path: str, instance: int) -> Client:
        client = await self._client(path)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DISCOVERY_SECONDS
        while instance not in client.instance_ids():
            if loop.time() > deadline:
                raise PeerLost(
                    f"{path} has no instance {instance} (there are "
                    f"{client.instance_ids()})"
                )
            await asyncio.sleep(0.02)
        return client


def unary(
    requests: Any, answer: Callable[[Any], Awaitable[Message]], stage: str
) -> Callable[[Any], AsyncIterator[dict]]:
    """A Dynamo endpoint handler that answers one of ``requests`` with one message.

    An error of ``answer`` becomes a :class:`Refused` reply, with its cause.
    """

    async def handle(data: Any) -> AsyncIterator[dict]:
        try:
            reply = await answer(from_wire(data, requests))
        except (RefitError, msgspec.ValidationError) as error:
            failure = failure_from(error, stage=stage)
            reply = Refused(failure=failure, fenced=isinstance(error, Fenced))
        except Exception as error:
            logger.exception("dynamo-refit: a request failed")
            reply = Refused(failure=failure_from(error, stage=stage))
        yield to_wire(reply)

    return handle


async def serve(
    endpoint: Endpoint,
    handler: Callable[[Any], AsyncIterator],
    *,
    health_check: Message | None = None,
) -> None:
    """Serve ``endpoint`` until the runtime shuts down.

    A coroutine around Dynamo's future, as tasks are made of coroutines. With a
    ``health_check`` (a request it must answer) the process reports itself healthy
    as soon as the endpoint is up.
    """
    payload = to_wire(health_check) if health_check is not None else None
    await endpoint.serve_endpoint(handler, health_check_payload=payload)
