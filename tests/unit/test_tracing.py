# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One refit is one trace, from the trainer's call to the first token, over the
coordinator and all workers; and where tracing is off there is nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from dynamo.refit import tracing
from dynamo.refit.coordinator.policy import CommitPolicy, Policy
from dynamo.refit.errors import RefitError
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.protocol import Install, Stage
from tests.faults.virtual_time import run
from tests.support.observed_world import ObservedWorld

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

WORKERS = 2

#: A span that a trainer was in when it published.
STEP = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

COMMIT_STEPS = ("pause", "install", "resume", "probe", "verify")


def policy(commit: CommitPolicy = "barrier") -> Policy:
    return Policy(
        stage_seconds=20.0,
        commit_seconds=10.0,
        commit=commit,
        max_unavailable=0,
        hold_seconds=5.0,
        settle_seconds=0.0,
    )


async def started(world: ObservedWorld) -> ObservedWorld:
    for _ in range(WORKERS):
        world.start_worker()
    await asyncio.sleep(0.1)
    await world.start_coordinator()
    await asyncio.sleep(2.0)
    return world


async def refit(world: ObservedWorld, parent: str | None = None) -> None:
    world.publish_under(parent)
    await asyncio.sleep(8.0)
    world.check()


def named(world: ObservedWorld, name: str) -> list[ReadableSpan]:
    return [span for span in world.spans if span.name == name]


def parents(world: ObservedWorld) -> dict[str, set[str | None]]:
    """The names of a span's parents, by its name; ``None`` stands for no span."""
    names = {span.context.span_id: span.name for span in world.spans}
    found: dict[str, set[str | None]] = {}
    for span in world.spans:
        parent = span.parent.span_id if span.parent else None
        found.setdefault(span.name, set()).add(names.get(parent))
    return found


@pytest.mark.parametrize("commit", ["barrier", "rolling"])
def test_a_refit_is_one_tree(commit: CommitPolicy) -> None:
    async def live() -> ObservedWorld:
        world = await started(ObservedWorld(policy(commit)))
        await refit(world)
        return world

    world = run(live())
    assert [e.version for e in world.events if isinstance(e, RefitCompleted)] == [1]
    assert len({span.context.trace_id for span in world.spans}) == 1
    assert parents(world) == {
        "publish": {None},
        "refit": {"publish"},
        "prepare": {"refit"},
        "commit": {"refit", "commit"},
        "stage": {"prepare"},
        "rank 0": {"stage"},
        "rank 1": {"stage"},
        "vote": {"stage"},
        **{step: {"commit"} for step in COMMIT_STEPS},
    }
    # At a barrier the coordinator's commit is three calls to each worker.
    calls = {"barrier": 3, "rolling": 1}[commit]
    assert Counter(span.name for span in world.spans) == {
        "publish": 1,
        "refit": 1,
        "commit": WORKERS * (calls + 1),
        **dict.fromkeys(
            ("prepare", "stage", "rank 0", "rank 1", "vote", *COMMIT_STEPS), WORKERS
        ),
    }


def test_spans_say_what_was_done_and_end_with_the_first_token() -> None:
    async def live() -> ObservedWorld:
        world = await started(ObservedWorld(policy()))
        await refit(world)
        return world

    world = run(live())
    [root] = named(world, "refit")
    assert root.attributes == {
        "refit.version": 1,
        "refit.workers": WORKERS,
        "refit.catch_up": False,
        "refit.outcome": "completed",
    }
    for prepare in named(world, "prepare"):
        assert [event.name for event in prepare.events] == ["vote"]
    workers = {span.attributes["refit.worker"] for span in named(world, "stage")}
    assert workers == set(world.workers)
    for rank in named(world, "rank 1"):
        assert rank.attributes["refit.rank"] == 1
        assert rank.attributes["refit.allocations"] == 1
        assert "refit.pull_ms" in rank.attributes
    steps = [span for name in COMMIT_STEPS for span in named(world, name)]
    own = [s for s in named(world, "commit") if "refit.stall_ms" in s.attributes]
    assert {s.parent.span_id for s in steps} == {s.context.span_id for s in own}
    for commit in own:
        mine = [s for s in steps if s.parent.span_id == commit.context.span_id]
        # One after the other, within the commit.
        assert [s.name for s in mine] == list(COMMIT_STEPS)
        times = [t for s in mine for t in (s.start_time, s.end_time)]
        assert times == sorted(times)
        assert commit.start_time <= times[0]
        probe = mine[COMMIT_STEPS.index("probe")]
        [token] = probe.events
        assert (token.name, token.timestamp) == ("first token", probe.end_time)


def test_the_trainers_own_span_is_above() -> None:
    async def live() -> ObservedWorld:
        world = await started(ObservedWorld(policy()))
        await refit(world, STEP)
        return world

    world = run(live())
    [publish] = named(world, "publish")
    assert publish.parent.span_id == int(STEP.split("-")[2], 16)
    [trace_id] = {span.context.trace_id for span in world.spans}
    assert trace_id == int(STEP.split("-")[1], 16)


@pytest.mark.parametrize("request_type", [Stage, Install])
def test_a_failed_refit_has_its_cause(request_type: type) -> None:
    async def live() -> ObservedWorld:
        world = await started(ObservedWorld(policy()))
        rank = world.workers[max(world.workers)].engine.ranks[1]
        rank.fail[request_type] = [RefitError("no memory")] * 2
        await refit(world)
        return world

    world = run(live())
    [failed] = [e for e in world.events if isinstance(e, RefitFailed)]
    [root] = named(world, "refit")
    assert root.attributes["refit.outcome"] == "failed"
    assert root.attributes["refit.failed_worker"] == failed.failure.worker
    assert root.status.status_code is StatusCode.ERROR
    assert "no memory" in root.status.description
    where = {Stage: "stage", Install: "commit"}[request_type]
    kinds = [span.attributes.get("refit.error") for span in named(world, where)]
    assert "RefitError" in kinds
    # Everything that was begun has ended, in one trace.
    assert len({span.context.trace_id for span in world.spans}) == 1
    known = {span.context.span_id for span in world.spans}
    assert {s.parent.span_id for s in world.spans if s.parent} <= known


def test_each_version_is_a_trace_of_its_own() -> None:
    async def live() -> ObservedWorld:
        world = await started(ObservedWorld(policy()))
        for worker in world.workers.values():
            worker.engine.hold("stage")
        world.publish_under(None)
        await asyncio.sleep(3.0)
        for worker in world.workers.values():
            worker.engine.let("stage")
        await refit(world)
        return world

    world = run(live())
    assert [e.by for e in world.events if isinstance(e, RefitSuperseded)] == [2]
    outcomes = {
        s.attributes["refit.version"]: s.attributes["refit.outcome"]
        for s in named(world, "refit")
    }
    assert outcomes == {1: "superseded", 2: "completed"}
    assert len({span.context.trace_id for span in world.spans}) == 2


def test_without_a_tracer_nothing_is_recorded_or_sent() -> None:
    async def live() -> ObservedWorld:
        world = ObservedWorld(policy(), traced=False)
        announced: list[WeightVersionReady] = []
        await started(world)
        hear = world.coordinators[0][0].hear
        world.coordinators[0][0].hear = lambda e: (announced.append(e), hear(e))
        await refit(world)
        said = [e for e in announced if isinstance(e, WeightVersionReady)]
        assert {e.traceparent for e in said} == {None}
        return world

    world = run(live())
    assert [e.version for e in world.events if isinstance(e, RefitCompleted)] == [1]
    assert world.spans == ()


def test_a_trace_passes_through_where_tracing_is_off() -> None:
    span = tracing.Tracer().start("refit", STEP, version=1)
    span.set(outcome="completed")
    span.end()
    assert span.traceparent == STEP


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_tracing_is_off_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", value)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:1")
    assert not tracing.from_environment().enabled


def test_tracing_without_opentelemetry_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "1")
    monkeypatch.setattr(tracing, "trace", None)
    caplog.set_level("WARNING")
    assert not tracing.from_environment().enabled
    assert "pip install 'dynamo-refit[tracing]'" in caplog.text
    assert tracing.current_traceparent() is None


@pytest.mark.parametrize("protocol", [None, "grpc", "http/protobuf"])
def test_exporters_are_opentelemetrys(
    monkeypatch: pytest.MonkeyPatch, protocol: str | None
) -> None:
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "1")
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
    over = {"http/protobuf": "http"}.get(protocol, "grpc")
    loaded = []
    monkeypatch.setattr(tracing, "BatchSpanProcessor", loaded.append)
    monkeypatch.setattr(tracing, "Tracer", lambda processor=None: processor)
    tracing.from_environment()
    [exporter] = loaded
    assert (
        type(exporter).__module__
        == f"opentelemetry.exporter.otlp.proto.{over}.trace_exporter"
    )
    exporter.shutdown()


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORT_ENABLED", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ValueError, match="carrier-pigeon"):
        tracing.from_environment()


async def test_a_tracer_that_is_closed_has_exported_everything() -> None:
    exporter = InMemorySpanExporter()
    tracer = tracing.Tracer(BatchSpanProcessor(exporter))
    tracer.start("refit", None).end()
    await tracer.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["refit"]


async def test_a_close_does_not_wait_for_a_collector_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_SECONDS", 0.1)
    hang, exporter = threading.Event(), InMemorySpanExporter()
    exporter.export = lambda spans: hang.wait(30)
    tracer = tracing.Tracer(BatchSpanProcessor(exporter))
    tracer.start("refit", None).end()
    began = time.monotonic()
    await tracer.close()
    assert time.monotonic() - began < 5
    hang.set()
