# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One worker's metrics and spans, from what its agent is asked, answers and publishes.

The agent itself is not touched: :meth:`WorkerTelemetry.answering` stands before it and
:meth:`WorkerTelemetry.publishing` behind it. Spans of a version:

    stage ─┬─ rank 0 .. n     from the vote's timings
           └─ vote            from the last rank's end to the vote
    commit ── pause, install, resume, probe, verify

``commit`` lasts from the first of its calls to ``WorkerRefitted``, whoever is still
there to call; the end of ``probe`` is the first token on the new version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from dynamo.refit.errors import Failure, failure_from
from dynamo.refit.events import (
    Event,
    RefitFailed,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.metrics import WorkerMetrics
from dynamo.refit.protocol import (
    Aborted,
    Commit,
    Committed,
    CommitTimings,
    Message,
    Prepare,
    RankVote,
    Refused,
    WorkerRequest,
)
from dynamo.refit.tracing import Span, Tracer

Answer = Callable[[WorkerRequest], Awaitable[Message]]
Publish = Callable[[Event], object]

STEPS = ("pause", "install", "resume", "probe", "verify")


class WorkerTelemetry:
    """Observes one agent.

    Args:
        worker: its instance id, in every span.
    """

    def __init__(self, metrics: WorkerMetrics, tracer: Tracer, worker: int) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._worker = worker
        #: One version at a time is staged or committed here.
        self._stage: Span | None = None
        self._commit: Span | None = None
        self._committing: int | None = None

    def answering(self, answer: Answer) -> Answer:
        """``answer``, observed. It is not told of traces: requests that differ in
        nothing else are repeats."""

        async def observed(request: WorkerRequest) -> Message:
            span = self._asked(request)
            if isinstance(request, Prepare | Commit):
                request = msgspec.structs.replace(request, traceparent=None)
            try:
                reply = await answer(request)
            except Exception as error:
                stage = type(request).__name__.lower()
                failure = failure_from(error, stage=stage, worker=self._worker)
                self._answered(request, Refused(failure=failure), span)
                raise
            self._answered(request, reply, span)
            return reply

        return observed

    def publishing(self, publish: Publish) -> Publish:
        """``publish``, observed."""

        def observed(event: Event) -> object:
            published = publish(event)
            self._metrics.observe(event)
            self._spans_of(event)
            return published

        return observed

    def _asked(self, request: WorkerRequest) -> Span | None:
        """The span of a prepare, which ends with its answer: a newer one may have
        begun by then."""
        match request:
            case Prepare():
                self._stage = self._begin(request)
                return self._stage
            case Commit(version=version) if version != self._committing:
                self._end_commit()
                self._commit, self._committing = self._begin(request), version
                self._commit.set(in_flight=request.in_flight)
        return None

    def _begin(self, request: Prepare | Commit) -> Span:
        name = "stage" if isinstance(request, Prepare) else "commit"
        return self._tracer.start(
            name,
            request.traceparent,
            "server",
            version=request.version,
            worker=self._worker,
        )

    def _answered(
        self, request: WorkerRequest, reply: Message, span: Span | None
    ) -> None:
        self._metrics.answered(request, reply)
        failure = reply.failure if isinstance(reply, Refused) else None
        if span is not None:
            _end(span, failure)
        match reply:
            case Refused() | Committed() if isinstance(request, Commit):
                self._end_commit(failure)
            case Aborted(version=version) if version == self._committing:
                self._commit.event("sent back at the barrier")
                self._end_commit()

    def _spans_of(self, event: Event) -> None:
        match event:
            case WorkerStaged(ranks=ranks):
                self._staged(ranks)
            case WorkerRefitted(timings=timings):
                self._committed(timings)
                self._end_commit()
            case WorkerFenced(failure=failure) | RefitFailed(failure=failure):
                self._end_commit(failure)

    def _staged(self, ranks: tuple[RankVote, ...]) -> None:
        """What the ranks did, when they did it."""
        if self._stage is None:
            return
        parent = self._stage.traceparent
        for rank in ranks:
            timings = msgspec.structs.asdict(rank.timings)
            began, ended = timings.pop("started_at"), timings.pop("finished_at")
            span = self._tracer.start(
                f"rank {rank.rank}",
                parent,
                at=began,
                rank=rank.rank,
                nbytes=rank.nbytes,
                session=rank.session,
                staging=rank.memory.mode,
                **timings,
                **msgspec.structs.asdict(rank.counters),
            )
            span.end(ended)
        last = max(rank.timings.finished_at for rank in ranks)
        self._tracer.start("vote", parent, at=last).end()

    def _committed(self, timings: CommitTimings) -> None:
        """The steps of a commit; one that was not needed took no time."""
        if self._commit is None:
            return
        self._commit.set(
            stall_ms=timings.stall_ms, install_retries=timings.install_retries
        )
        at = timings.started_at
        for step in STEPS:
            span = self._tracer.start(step, self._commit.traceparent, at=at)
            at += getattr(timings, f"{step}_ms") / 1e3
            if step == "probe":
                span.event("first token", at)
            span.end(at)

    def _end_commit(self, failure: Failure | None = None) -> None:
        if self._commit is not None:
            _end(self._commit, failure)
        self._commit = self._committing = None


def _end(span: Span, failure: Failure | None) -> None:
    if failure is not None:
        span.fail(failure)
    span.end()
