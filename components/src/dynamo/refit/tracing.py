# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Spans over OpenTelemetry, or over nothing: the only importer of opentelemetry.

Off unless ``OTEL_EXPORT_ENABLED`` is set, as in Dynamo itself, and then configured as
Dynamo is: ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` (default ``http://localhost:4317``),
``OTEL_EXPORTER_OTLP_TRACES_PROTOCOL`` (``grpc`` or ``http/protobuf``),
``OTEL_SERVICE_NAME`` (``dynamo``) and the sampler's variables. A trace goes from
process to process as a W3C ``traceparent``, which passes through where tracing is off.

Owns no meaning: which spans there are say :mod:`dynamo.refit.coordinator.telemetry`,
:mod:`dynamo.refit.worker.telemetry` and :mod:`dynamo.refit.publish.telemetry`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import threading
import time
from typing import Literal

from dynamo.refit.errors import Failure

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace.propagation.tracecontext import (
        TraceContextTextMapPropagator,
    )
except ImportError:
    trace = None

logger = logging.getLogger(__name__)

SpanKind = Literal["internal", "server", "client", "producer"]
Attribute = str | bool | int | float

TRUE = ("1", "true", "on", "yes")

#: OpenTelemetry's entry points of exporters, and which one is for which protocol.
EXPORTERS = "opentelemetry_traces_exporter"
PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}

#: How long the last spans of a process may take to leave.
FLUSH_SECONDS = 2.0


class Span:
    """A span that was started. Without a recording one below it does nothing, and
    passes on its parent's ``traceparent``."""

    def __init__(self, recording: trace.Span | None, parent: str | None) -> None:
        self._recording = recording
        self._parent = parent

    @property
    def traceparent(self) -> str | None:
        """What its children in any process name as their parent."""
        if self._recording is None:
            return self._parent
        return _traceparent(self._recording)

    def set(self, **attributes: Attribute | None) -> None:
        """Set attributes ``refit.<name>``; those that are ``None`` are left out."""
        if self._recording is not None:
            self._recording.set_attributes(_named(attributes))

    def event(self, name: str, at: float | None = None) -> None:
        """Mark a moment, now or at ``at`` Unix seconds."""
        if self._recording is not None:
            self._recording.add_event(name, timestamp=_nanoseconds(at))

    def fail(self, failure: Failure) -> None:
        """Mark it as failed, with the cause."""
        if self._recording is not None:
            description = str(failure)
            self._recording.set_status(trace.StatusCode.ERROR, description)
            self.set(error=failure.kind, failed_worker=failure.worker)

    def end(self, at: float | None = None) -> None:
        """End it, now or at ``at`` Unix seconds. Only the first end counts."""
        if self._recording is not None and self._recording.is_recording():
            self._recording.end(_nanoseconds(at))


class Tracer:
    """Starts spans; those of a tracer without a ``processor`` record nothing.

    Args:
        processor: takes ended spans. The provider is this tracer's own: the global
            one belongs to whoever runs this process (vLLM, the trainer).
    """

    def __init__(self, processor: SpanProcessor | None = None) -> None:
        self._provider = None
        if processor is not None:
            resource = Resource.create(_service())
            self._provider = TracerProvider(resource=resource)
            self._provider.add_span_processor(processor)
            self._tracer = self._provider.get_tracer("dynamo.refit")

    @property
    def enabled(self) -> bool:
        return self._provider is not None

    def start(
        self,
        name: str,
        parent: str | None,
        kind: SpanKind = "internal",
        at: float | None = None,
        **attributes: Attribute | None,
    ) -> Span:
        """Start a span under ``parent``, a traceparent, or a new trace.

        Args:
            at: Unix seconds; default now.
            attributes: as for :meth:`Span.set`.
        """
        if self._provider is None:
            return Span(None, parent)
        recording = self._tracer.start_span(
            name,
            context=_context(parent),
            kind=trace.SpanKind[kind.upper()],
            attributes=_named(attributes),
            start_time=_nanoseconds(at),
        )
        return Span(recording, parent)

    async def close(self) -> None:
        """Export what has ended, for at most :data:`FLUSH_SECONDS`, and record no more.

        A process that ends in order need not call this. On a thread that nobody waits
        for: where no collector answers, the exporter takes its own time to give up.
        """
        if self._provider is None:
            return
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        deadline = time.monotonic() + FLUSH_SECONDS
        while thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)


def from_environment() -> Tracer:
    """The tracer that the environment asks for; see above."""
    if os.environ.get("OTEL_EXPORT_ENABLED", "").strip().lower() not in TRUE:
        return Tracer()
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Tracer()
    exporter = None if trace is None else _exporter()
    if exporter is None:
        logger.warning(
            "OTEL_EXPORT_ENABLED is set, but there are no traces of refits: "
            "pip install 'dynamo-refit[tracing]'"
        )
        return Tracer()
    return Tracer(BatchSpanProcessor(exporter))


def _exporter() -> SpanExporter | None:
    """What sends spans over the protocol that is asked for, if it is installed.

    An entry point, since the gRPC one is nothing to import where tracing is off.

    Raises:
        ValueError: there is no such protocol.
    """
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"
    )
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL={protocol!r} is none of "
            f"{', '.join(PROTOCOLS)}"
        )
    found = importlib.metadata.entry_points(group=EXPORTERS, name=PROTOCOLS[protocol])
    return next((entry.load()() for entry in found), None)


def current_traceparent() -> str | None:
    """The span that the caller is in, if it uses OpenTelemetry itself."""
    if trace is None:
        return None
    current = trace.get_current_span()
    return _traceparent(current) if current.get_span_context().is_valid else None


def _service() -> dict[str, str]:
    """Dynamo's default where the environment names no service."""
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    return {} if named else {"service.name": "dynamo"}


def _traceparent(span: trace.Span) -> str | None:
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent")


def _context(parent: str | None) -> Context:
    """Never the thread's own context: a trace here is what was handed over."""
    carrier = {} if parent is None else {"traceparent": parent}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _named(attributes: dict[str, Attribute | None]) -> dict[str, Attribute]:
    return {f"refit.{k}": v for k, v in attributes.items() if v is not None}


def _nanoseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1e9)
