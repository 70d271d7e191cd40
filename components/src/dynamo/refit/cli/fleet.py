# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit status``, ``watch`` and ``verify``: look at a running deployment."""

from __future__ import annotations

import asyncio

import msgspec
from rich.console import Console
from rich.table import Table

from dynamo.refit.bus import EventSubscriber, RejectedPayload
from dynamo.refit.cli.output import AsJson, Namespace, complain, time_of
from dynamo.refit.errors import RefitError
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import (
    FleetStatus,
    GetStatus,
    Refused,
    VerifyWeights,
    WeightsVerified,
    to_wire,
)
from dynamo.refit.rpc import Caller, runtime_from_environment

#: How long the coordinator may take to be found and to answer.
STATUS_SECONDS = 5.0

#: How long a worker may take to read all of its weights once.
VERIFY_SECONDS = 120.0


def status(namespace: Namespace = "dynamo", as_json: AsJson = False) -> None:
    """Show which worker serves which version."""
    fleet = asyncio.run(_status(namespace))
    if as_json:
        print(msgspec.json.encode(fleet).decode())
        return
    under_way = "-" if fleet.under_way is None else fleet.under_way
    table = Table(
        title=f"{fleet.model}: desired {_show(fleet.desired)}, "
        f"completed {_show(fleet.completed)}, under way {under_way}"
    )
    for heading in ("worker", "component", "ranks", "serves", "phase", "KV epoch"):
        table.add_column(heading)
    for member in fleet.members:
        view = member.status
        table.add_row(
            str(member.worker),
            member.component,
            str(view.ranks),
            _show(view.version),
            view.phase if view.admitted else f"{view.phase}, not admitted",
            view.kv_epoch or "-",
        )
    Console().print(table)


def watch(namespace: Namespace = "dynamo", as_json: AsJson = False) -> None:
    """Print refit events as they come, until interrupted."""
    asyncio.run(_watch(namespace, as_json))


def verify(namespace: Namespace = "dynamo", as_json: AsJson = False) -> int:
    """Have every worker compare its live weights with the version it serves.

    Exits with 0 when all of them are what was published, byte for byte.
    """
    replies = asyncio.run(_verify(namespace))
    for worker, reply in replies.items():
        if as_json:
            line = {"worker": worker, **to_wire(reply)}
            print(msgspec.json.encode(line).decode())
        elif isinstance(reply, Refused):
            complain(f"worker {worker}: {reply.failure}")
        else:
            unchecked = f", {reply.unchecked} parameters cannot be compared"
            print(
                f"worker {worker} serves version {reply.version}, fingerprint "
                f"{reply.weights}{unchecked if reply.unchecked else ''}"
            )
    return int(any(isinstance(reply, Refused) for reply in replies.values()))


async def _verify(namespace: str) -> dict[int, WeightsVerified | Refused]:
    caller = Caller(runtime_from_environment())
    fleet = await fetch_status(caller, namespace)
    replies = {}
    for member in fleet.members:
        path = f"{namespace}.{member.component}.refit"
        replies[member.worker] = await caller.call(
            path,
            member.worker,
            VerifyWeights(),
            WeightsVerified | Refused,
            VERIFY_SECONDS,
        )
    return replies


async def _status(namespace: str) -> FleetStatus:
    return await fetch_status(Caller(runtime_from_environment()), namespace)


async def fetch_status(caller: Caller, namespace: str) -> FleetStatus:
    """The newest coordinator's view of its fleet; see :func:`find_coordinator`."""
    return (await find_coordinator(caller, namespace))[0]


async def find_coordinator(caller: Caller, namespace: str) -> tuple[FleetStatus, int]:
    """The newest coordinator's view, and its instance of the status endpoint.

    Raises:
        RefitError: there is no coordinator within :data:`STATUS_SECONDS`, or it does
            not answer.
    """
    path = f"{namespace}.refit.status"
    deadline = asyncio.get_running_loop().time() + STATUS_SECONDS
    while not (found := await caller.instances(path)):
        if asyncio.get_running_loop().time() > deadline:
            raise RefitError(
                f"no coordinator in namespace {namespace!r}: start `python -m "
                "dynamo.refit`, and check that DYN_NAMESPACE and the discovery "
                "variables are the graph's"
            )
        await asyncio.sleep(0.05)
    asked = [_ask_status(caller, path, instance) for instance in found]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    answered = [
        (reply, instance)
        for reply, instance in zip(replies, found, strict=True)
        if isinstance(reply, FleetStatus)
    ]
    if not answered:
        raise RefitError(f"the coordinator does not answer: {replies[0]}")
    # One that was killed is in discovery for some seconds more.
    return max(answered, key=lambda answer: answer[0].epoch)


async def _ask_status(caller: Caller, path: str, instance: int) -> FleetStatus:
    reply = await caller.call(
        path, instance, GetStatus(), FleetStatus | Refused, STATUS_SECONDS
    )
    if isinstance(reply, Refused):
        raise RefitError(str(reply.failure))
    return reply


async def _watch(namespace: str, as_json: bool) -> None:
    topic = runtime_from_environment().endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
    async with EventSubscriber(topic) as events:
        async for event in events:
            if isinstance(event, RejectedPayload):
                complain(event.detail)
            elif as_json:
                print(msgspec.json.encode(event).decode(), flush=True)
            else:
                print(f"{time_of(event)} {event.publisher} {event}", flush=True)


def _show(version: int | None) -> str:
    return "start-up weights" if version is None else str(version)
