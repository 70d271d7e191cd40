# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""An event loop whose clock jumps to the next timer: an hour of waiting takes nothing,
and what happens depends on the seed (in one life of 40 on the order of a set, too)."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")


class _NoWait(selectors.DefaultSelector):
    """The loop would wait for the timer after one that was cancelled."""

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("nothing is left that could happen")
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in their order; nothing here waits for a thread or a socket."""

    def __init__(self) -> None:
        super().__init__(_NoWait())
        self._virtual = 0.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._virtual = max(self._virtual, self._scheduled[0].when())
        super()._run_once()


async def _in_this_thread(work: Any, *arguments: Any) -> Any:
    return work(*arguments)


@contextmanager
def _no_other_clock(loop: VirtualTimeLoop) -> Iterator[None]:
    clock = SimpleNamespace(monotonic=loop.time)
    with (
        mock.patch("dynamo.refit.worker.ranks.time", clock),
        mock.patch("dynamo.refit.worker.peer.time", clock, create=True),
        mock.patch("asyncio.to_thread", _in_this_thread),
    ):
        yield


def run(main: Coroutine[Any, Any, T]) -> T:
    """The result of ``main``; what it left running is cancelled."""
    loop = VirtualTimeLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner, _no_other_clock(loop):
        return runner.run(main)
