# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How a command tells of one version until its end: bars on a terminal, a line per
event elsewhere, or JSON."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from rich.console import Console

from dynamo.refit.bus import EventPlaneUnavailable, EventSubscriber
from dynamo.refit.cli.live import LiveView
from dynamo.refit.cli.output import complain, is_of, time_of
from dynamo.refit.cli.words import describe
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitSuperseded,
    WorkerRefitted,
)
from dynamo.refit.protocol import FleetStatus
from dynamo.refit.rpc import Caller

#: The last event may come this much later than the word of how it ended.
LAST_EVENT_SECONDS = 1.0

LOOK = "`dynamo-refit status` shows what each worker serves"


class Report:
    """Says what happens to ``version``.

    On a terminal that is ``in_place``, without other output meanwhile.

    Args:
        as_json: events as JSON, and the outcome as the last line.
    """

    def __init__(self, version: int, as_json: bool) -> None:
        self.version = version
        self._as_json = as_json
        self._console = Console()
        self.in_place = self._console.is_terminal and not as_json
        self._live: LiveView | None = None
        self._showing: asyncio.Task[None] | None = None
        self._announced = False
        self._model: str | None = None

    def announced(self, what: str, fleet: FleetStatus) -> None:
        """``what`` is published, to ``fleet``."""
        self._announced = True
        if self._as_json:
            return
        print(what, flush=True)
        if not fleet.members:
            print("there is no worker yet: waiting for one", flush=True)

    @contextlib.asynccontextmanager
    async def following(
        self,
        events: EventSubscriber,
        caller: Caller,
        namespace: str,
        model: str | None = None,
    ) -> AsyncIterator[None]:
        """Show the version's events, until the end of the block at the latest."""
        self._model = model
        async with contextlib.AsyncExitStack() as stack:
            if self.in_place:
                live = LiveView(self._console, caller, namespace, model, self._concerns)
                self._live = await stack.enter_async_context(live)
            self._showing = asyncio.create_task(self._show(events))
            stack.callback(self._showing.cancel)
            yield

    async def last_event(self) -> None:
        """It has ended: return when that was shown, or soon."""
        await asyncio.wait([self._showing], timeout=LAST_EVENT_SECONDS)

    async def _show(self, events: EventSubscriber) -> None:
        refitted: set[int] = set()
        awaited: set[int] | None = None
        try:
            async for event in events:
                if not isinstance(event, Event) or not self._concerns(event):
                    continue
                self._tell(event)
                if isinstance(event, WorkerRefitted):
                    refitted.add(event.worker)
                if is_last(event):
                    # Events of two publishers have no order: a worker's may follow.
                    completed = isinstance(event, RefitCompleted)
                    awaited = set(event.workers) if completed else set()
                if awaited is not None and awaited <= refitted:
                    return
        except EventPlaneUnavailable as error:
            # How the version ends is told to the publisher, not by an event.
            complain(f"no events are shown from here on: {error}")

    def _concerns(self, event: Event) -> bool:
        same = getattr(event, "version", None) == self.version
        return same and is_of(event, self._model)

    def _tell(self, event: Event) -> None:
        if self._as_json:
            print(msgspec.json.encode(event).decode(), flush=True)
        elif self._live is not None:
            self._live.hear(event)
        elif line := describe(event):
            print(f"{time_of(event)}  {line}", flush=True)

    def ended(self, model: str, outcome: str, detail: str) -> int:
        """Say how it ended; the exit code."""
        if self._as_json:
            end = {
                "model": model,
                "version": self.version,
                "outcome": outcome,
                "detail": detail,
            }
            print(msgspec.json.encode(end).decode(), flush=True)
        if outcome == "completed":
            if not self._as_json:
                print(f"version {self.version} is served", flush=True)
            return 0
        complain(
            f"version {self.version} was not installed: {outcome}: "
            f"{detail or 'no cause given'}; {LOOK}"
        )
        return 1

    def interrupted(self) -> None:
        """Somebody does not want to wait any longer."""
        if self._announced:
            complain(
                f"interrupted; version {self.version} is withdrawn, but a worker that "
                f"held all of it already may install it: {LOOK}"
            )
        else:
            complain("interrupted; nothing was announced")


def is_last(event: Event) -> bool:
    """Whether the version has ended with it."""
    match event:
        case RefitCompleted() | RefitSuperseded() | RefitRefused():
            return True
        case RefitFailed(epoch=epoch):
            # A worker's own failure (epoch 0) is followed by the coordinator's word.
            return epoch > 0
    return False
