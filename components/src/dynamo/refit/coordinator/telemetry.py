# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator's metrics and spans, from what it hears, calls and publishes.

The coordinator itself is not touched: :meth:`CoordinatorTelemetry.publishing` and
:meth:`CoordinatorTelemetry.calling` stand around it. Spans of a version, below the
trainer's ``publish``:

    refit ─┬─ prepare      a worker's stage and vote; the worker's spans are below
           └─ commit       the same; at a barrier once for each step

``refit`` lasts from the first arrival of the announcement to the event that ends it. A
version that ends before it was started has that span only.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo.refit.errors import Failure, failure_from
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.metrics import CoordinatorMetrics
from dynamo.refit.protocol import Commit, FleetStatus, Message, Prepare, Refused, Vote
from dynamo.refit.tracing import Span, Tracer

#: Announcements whose arrival is remembered.
REMEMBERED = 64

Publish = Callable[[Event], object]


class Calls(Protocol):
    """Reaches endpoints; see :class:`dynamo.refit.rpc.Caller`."""

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any: ...


@dataclass(frozen=True)
class _Arrival:
    """When an announcement first came, in Unix seconds, and the trainer's span."""

    announcement_id: str
    at: float
    traceparent: str | None


class CoordinatorTelemetry:
    """Observes one coordinator."""

    def __init__(self, metrics: CoordinatorMetrics, tracer: Tracer) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._arrivals: OrderedDict[int, _Arrival] = OrderedDict()
        #: One version at a time is under way.
        self._version: int | None = None
        self._refit: Span | None = None

    def heard(self, ready: WeightVersionReady) -> None:
        """An announcement came, or came again; to be told before the coordinator."""
        known = self._arrivals.get(ready.version)
        if known is None or known.announcement_id != ready.announcement_id:
            arrival = _Arrival(ready.announcement_id, time.time(), ready.traceparent)
            self._arrivals[ready.version] = arrival
            while len(self._arrivals) > REMEMBERED:
                self._arrivals.popitem(last=False)

    async def watch(self, status: Callable[[], FleetStatus], seconds: float) -> None:
        """Show the coordinator's view every ``seconds``."""
        while True:
            self._metrics.show(status())
            await asyncio.sleep(seconds)

    def publishing(self, publish: Publish) -> Publish:
        """``publish``, observed."""

        def observed(event: Event) -> object:
            # It has happened, whether or not others hear of it.
            self._metrics.observe(event)
            self._spans_of(event)
            return publish(event)

        return observed

    def calling(self, calls: Calls) -> Calls:
        """``calls``, observed; prepare and commit carry the trace to the worker."""
        return _ObservedCalls(calls, self)

    def call_span(self, request: Prepare | Commit, worker: int) -> Span:
        """A span for a call of a version that is under way."""
        step = request.step if isinstance(request, Commit) else None
        return self._tracer.start(
            type(request).__name__.lower(),
            self._parent_of(request.version),
            "client",
            version=request.version,
            worker=worker,
            step=step,
        )

    def _parent_of(self, version: int) -> str | None:
        if self._refit is not None and self._version == version:
            return self._refit.traceparent
        arrival = self._arrivals.get(version)
        return arrival.traceparent if arrival else None

    def _spans_of(self, event: Event) -> None:
        match event:
            case RefitStarted():
                self._end()
                self._version = event.version
                self._refit = self._begin(event.version, catch_up=event.catch_up)
                self._refit.set(workers=len(event.workers))
            case RefitCompleted(version=version):
                self._ended(version, "completed")
            case RefitFailed(version=version, failure=failure):
                self._ended(version, "failed", failure)
            case RefitSuperseded(version=version, by=by):
                self._ended(version, "superseded", by=by)
            case RefitRefused(version=version) if version is not None:
                self._ended(version, "refused", reason=event.reason)

    def _begin(self, version: int, *, catch_up: bool = False) -> Span:
        arrival = self._arrivals.get(version)
        if arrival is None or catch_up:
            traceparent = arrival.traceparent if arrival else None
            arrival = _Arrival("", time.time(), traceparent)
        return self._tracer.start(
            "refit",
            arrival.traceparent,
            at=arrival.at,
            version=version,
            catch_up=catch_up,
        )

    def _ended(
        self,
        version: int,
        outcome: str,
        failure: Failure | None = None,
        **attributes: str | int,
    ) -> None:
        if self._version != version:
            # It was never started: its span is the time that it waited.
            span = self._begin(version)
        else:
            span, self._refit, self._version = self._refit, None, None
        span.set(outcome=outcome, **attributes)
        if failure is not None:
            span.fail(failure)
        span.end()

    def _end(self) -> None:
        if self._refit is not None:
            self._refit.end()
        self._refit = self._version = None


class _ObservedCalls:
    def __init__(self, calls: Calls, telemetry: CoordinatorTelemetry) -> None:
        self._calls = calls
        self._telemetry = telemetry

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        if not isinstance(request, Prepare | Commit):
            return await self._calls.call(path, instance, request, expected, seconds)
        span = self._telemetry.call_span(request, instance)
        request = msgspec.structs.replace(request, traceparent=span.traceparent)
        try:
            reply = await self._calls.call(path, instance, request, expected, seconds)
            if isinstance(reply, Refused):
                span.fail(reply.failure)
            elif isinstance(reply, Vote):
                span.event("vote")
            return reply
        except Exception as error:
            stage = type(request).__name__.lower()
            span.fail(failure_from(error, stage=stage, worker=instance))
            raise
        finally:
            span.end()
