# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Between a coordinator and its fleet: whether a version ends as it must where a worker
does not answer at the barrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dynamo.refit.coordinator.component import Calls
from dynamo.refit.events import Event, RefitCompleted
from dynamo.refit.protocol import Commit, Message

#: The steps before which no worker has changed.
STEPS = "pause", "install"


class BarrierJudge:
    """Passes on one coordinator's calls and events.

    Args:
        report: hears of a version that completed without a worker that was told to
            pause or to install and gave no answer: that is a refusal, whether or not
            the worker is still there.
    """

    def __init__(
        self,
        caller: Calls,
        publish: Callable[[Event], object],
        report: Callable[[str], object],
    ) -> None:
        self._caller = caller
        self._publish = publish
        self._report = report
        #: By worker, the version and the step of an order that has no answer yet.
        self._unanswered: dict[int, tuple[int, str]] = {}

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        waits = isinstance(request, Commit) and request.step in STEPS
        if waits:
            self._unanswered[instance] = (request.version, request.step)
        reply = await self._caller.call(path, instance, request, expected, seconds)
        if waits:
            self._unanswered.pop(instance, None)
        return reply

    def publish(self, event: Event) -> None:
        if isinstance(event, RefitCompleted) and not event.catch_up:
            for worker, (version, step) in self._unanswered.items():
                if version == event.version and worker not in event.workers:
                    what = f"version {version} completed without worker {worker}"
                    self._report(f"{what}, which did not answer to {step!r}")
        self._publish(event)
