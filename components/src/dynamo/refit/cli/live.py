# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The view on a terminal, kept up to date in place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console
from rich.live import Live

from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.render import screen
from dynamo.refit.cli.view import View, after_event, after_status
from dynamo.refit.errors import RefitError
from dynamo.refit.events import Event
from dynamo.refit.rpc import Caller

#: Between two paintings, at least: events come in bursts.
PAINT_SECONDS = 0.1

#: Between two questions for the status, which corrects what events have left.
STATUS_SECONDS = 1.0


class LiveView:
    """Shows a view; ``async with`` begins and ends it, and leaves its last state.

    Args:
        shown: whether an event belongs to it.
    """

    def __init__(
        self,
        console: Console,
        caller: Caller,
        namespace: str,
        model: str | None,
        shown: Callable[[Event], bool] = lambda event: True,
    ) -> None:
        self._console = console
        self._caller = caller
        self._namespace = namespace
        self._model = model
        self._shown = shown
        self._view = View()
        self._stale = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=lambda: screen(self._view, console.height),
            vertical_overflow="crop",
        )

    def hear(self, event: Event) -> None:
        if self._shown(event):
            self._show(after_event(self._view, event, time.monotonic()))

    def _show(self, view: View) -> None:
        if view != self._view:
            self._view = view
            self._stale.set()

    async def _ask(self) -> None:
        while True:
            try:
                status = await fetch_status(self._caller, self._namespace, self._model)
                self._show(after_status(self._view, status, time.monotonic()))
            except RefitError as error:
                self._show(replace(self._view, complaint=str(error)))
            await asyncio.sleep(STATUS_SECONDS)

    async def _paint(self) -> None:
        while True:
            await self._stale.wait()
            self._stale.clear()
            self._live.refresh()
            await asyncio.sleep(PAINT_SECONDS)

    async def __aenter__(self) -> LiveView:
        self._live.start()
        self._tasks = [
            asyncio.create_task(self._ask()),
            asyncio.create_task(self._paint()),
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._live.stop()
