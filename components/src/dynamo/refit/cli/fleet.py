# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit status`` and ``watch``: look at a running deployment."""

from __future__ import annotations

import asyncio

import msgspec
from rich.console import Console
from rich.table import Table

from dynamo.refit.bus import EventSubscriber, RejectedPayload
from dynamo.refit.cli.output import AsJson, Namespace, complain, time_of
from dynamo.refit.errors import RefitError
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import FleetStatus, GetStatus, Refused
from dynamo.refit.rpc import Caller, runtime_from_environment

#: How long the coordinator may take to be found and to answer.
STATUS_SECONDS = 5.0


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
            view.phase,
            view.kv_epoch or "-",
        )
    Console().print(table)


def watch(namespace: Namespace = "dynamo", as_json: AsJson = False) -> None:
    """Print refit events as they come, until interrupted."""
    asyncio.run(_watch(namespace, as_json))


async def _status(namespace: str) -> FleetStatus:
    return await fetch_status(Caller(runtime_from_environment()), namespace)


async def fetch_status(caller: Caller, namespace: str) -> FleetStatus:
    """The newest coordinator's view of its fleet.

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
    reply = await caller.call(
        path, max(found), GetStatus(), FleetStatus | Refused, STATUS_SECONDS
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
