# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's span of a version: ``publish``, from the slot that rank 0 takes to the
announcement, which carries it to the coordinator. It is the root of the refit's trace,
or below the span that the trainer itself was in when it called ``publish()``."""

from __future__ import annotations

from collections import OrderedDict

from dynamo.refit.publish.publication import KEPT
from dynamo.refit.tracing import Span, Tracer


class PublishTelemetry:
    """Observes the publications of a trainer job, on rank 0."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._spans: OrderedDict[str, Span] = OrderedDict()

    def taken(
        self, announcement_id: str, version: int, traceparent: str | None
    ) -> None:
        """Rank 0 begins to write, in the trainer's span ``traceparent`` (W3C)."""
        self._spans[announcement_id] = self._tracer.start(
            "publish", traceparent, "producer", version=version
        )
        while len(self._spans) > KEPT:
            self._spans.popitem(last=False)

    def announced(self, announcement_id: str) -> str | None:
        """What an announcement, the first or a repeat, names as its trace."""
        span = self._spans.get(announcement_id)
        if span is None:
            return None
        span.end()
        return span.traceparent

    async def close(self) -> None:
        """See :meth:`dynamo.refit.tracing.Tracer.close`."""
        await self._tracer.close()
