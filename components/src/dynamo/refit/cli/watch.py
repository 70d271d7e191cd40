# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit watch``: refits as they happen."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from rich.console import Console

from dynamo.refit.bus import EventSubscriber, RejectedPayload
from dynamo.refit.cli.live import LiveView
from dynamo.refit.cli.output import (
    AsJson,
    Model,
    Namespace,
    complain,
    is_of,
    time_of,
)
from dynamo.refit.cli.runtime import connect
from dynamo.refit.cli.words import headline
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.rpc import Caller


def watch(
    namespace: Namespace = "dynamo", model: Model = None, as_json: AsJson = False
) -> int:
    """Show refits as they happen, until interrupted.

    On a terminal: every worker with what it serves, how far its ranks are while bytes
    move, its last stall, and the last events. Elsewhere a line per event, or with
    --json the events themselves.
    """
    console = Console()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(namespace, model, as_json, console))
    return 0


async def _watch(
    namespace: str, model: str | None, as_json: bool, console: Console
) -> None:
    in_place = console.is_terminal and not as_json
    runtime = connect(alone_on_terminal=in_place)
    topic = runtime.endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
    async with EventSubscriber(topic) as events:
        if not in_place:
            await _print(events, model, as_json)
            return
        async with LiveView(console, Caller(runtime), namespace, model) as live:
            async for event in events:
                if not isinstance(event, RejectedPayload) and is_of(event, model):
                    live.hear(event)


async def _print(events: EventSubscriber, model: str | None, as_json: bool) -> None:
    async for event in events:
        if isinstance(event, RejectedPayload):
            complain(event.detail)
        elif not is_of(event, model):
            continue
        elif as_json:
            print(msgspec.json.encode(event).decode(), flush=True)
        elif line := headline(event):
            print(f"{time_of(event)}  {line}", flush=True)
