# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Questions to the coordinator, for all commands."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import (
    FleetStatus,
    GetHistory,
    GetStatus,
    History,
    Message,
    Refused,
)
from dynamo.refit.rpc import Caller

M = TypeVar("M", bound=Message)

#: How long the coordinator may take to be found and to answer.
STATUS_SECONDS = 5.0


async def fetch_status(
    caller: Caller, namespace: str, model: str | None = None
) -> FleetStatus:
    """The newest coordinator's view of its fleet; see :func:`find_coordinator`."""
    return (await find_coordinator(caller, namespace, model))[0]


async def fetch_history(
    caller: Caller, namespace: str, model: str | None = None
) -> History:
    """What the newest coordinator remembers of the versions that came.

    Raises:
        RefitError: as :func:`find_coordinator`.
    """
    _, instance = await find_coordinator(caller, namespace, model)
    return await _ask(caller, namespace, instance, GetHistory(), History)


async def find_coordinator(
    caller: Caller, namespace: str, model: str | None = None
) -> tuple[FleetStatus, int]:
    """The view of the newest coordinator of ``model``, and its instance of the status
    endpoint.

    Args:
        model: may be left out where the namespace has one model.

    Raises:
        RefitError: there is no coordinator within :data:`STATUS_SECONDS`, it does not
            answer, or there are several models to choose from.
    """
    deadline = asyncio.get_running_loop().time() + STATUS_SECONDS
    while not (found := await caller.instances(_path(namespace))):
        if asyncio.get_running_loop().time() > deadline:
            raise RefitError(
                f"no coordinator in namespace {namespace!r}: start `python -m "
                "dynamo.refit`, and check that DYN_NAMESPACE and the discovery "
                "variables are the graph's"
            )
        await asyncio.sleep(0.05)
    asked = [_ask(caller, namespace, i, GetStatus(), FleetStatus) for i in found]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    answered = [
        (reply, instance)
        for reply, instance in zip(replies, found, strict=True)
        if isinstance(reply, FleetStatus)
    ]
    if not answered:
        raise RefitError(f"the coordinator does not answer: {replies[0]}")
    models = sorted({status.model for status, _ in answered})
    if model is None and len(models) > 1:
        raise RefitError(
            f"namespace {namespace!r} has coordinators of {len(models)} models "
            f"({', '.join(map(repr, models))}): choose one with --model"
        )
    if model is not None:
        # A coordinator that has seen no worker yet may not know its model.
        answered = [a for a in answered if a[0].model in (model, "")]
        if not answered:
            raise RefitError(
                f"model {model!r} is not served here (served: "
                f"{', '.join(map(repr, models))})"
            )
    # One that was killed is in discovery for some seconds more.
    return max(answered, key=lambda answer: answer[0].epoch)


async def _ask(
    caller: Caller, namespace: str, instance: int, request: Message, expected: type[M]
) -> M:
    reply = await caller.call(
        _path(namespace), instance, request, expected | Refused, STATUS_SECONDS
    )
    if isinstance(reply, Refused):
        raise RefitError(str(reply.failure))
    return reply


def _path(namespace: str) -> str:
    return f"{namespace}.refit.status"
