# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A coordinator process exports its spans over OTLP, in the trainer's trace, where that
is asked for; and connects to nobody where it is not."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import msgspec
import pytest
from dynamo.runtime import DistributedRuntime
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from dynamo.refit.bus import EventPublisher, EventSubscriber
from dynamo.refit.events import (
    REFIT_EVENTS,
    WEIGHT_VERSIONS,
    RefitRefused,
    WeightVersionReady,
)
from graphs.local import LocalGraph, free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

#: How long a process may take to end.
STOP_SECONDS = 15.0

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
READY = WeightVersionReady(
    model="another model",
    version=7,
    announcement_id="a7",
    endpoint="dynamo.trainer.weights",
    instance=1,
    manifest_digest="",
    slot=0,
    fingerprint="",
    traceparent=f"00-{TRACE}-{PARENT}-01",
)


class Collector(ThreadingHTTPServer):
    """Takes spans over OTLP/HTTP; counts every connection. Dynamo's own runtime, which
    reads the same variables, may send its spans and logs here, too."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connections = 0

    def get_request(self) -> tuple:
        self.connections += 1
        return super().get_request()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/traces":
            self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class GrpcCollector(TraceServiceServicer):
    """Takes spans over OTLP/gRPC."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self.server)
        self.url = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def Export(  # noqa: N802, as the service defines it
        self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        self.requests.append(request)
        return ExportTraceServiceResponse()


@pytest.fixture
def grpc_collector() -> Iterator[GrpcCollector]:
    collector = GrpcCollector()
    collector.server.start()
    yield collector
    collector.server.stop(None).wait(5)


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join(5)
    server.server_close()


async def announce_until_refused(graph: LocalGraph) -> RefitRefused:
    """Announce one version after the other, each in the trace, until the coordinator
    has heard of one."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    versions = runtime.endpoint(f"{graph.namespace}.refit.{WEIGHT_VERSIONS}")
    topic = runtime.endpoint(f"{graph.namespace}.refit.{REFIT_EVENTS}")
    try:
        async with (
            asyncio.timeout(60),
            EventPublisher(versions, "trainer") as publisher,
            EventSubscriber(topic) as events,
        ):
            repeating = asyncio.create_task(announce(publisher))
            refused = await anext(events)
            repeating.cancel()
    finally:
        runtime.shutdown()
    assert isinstance(refused, RefitRefused), refused
    return refused


async def announce(publisher: EventPublisher) -> None:
    for version in itertools.count(READY.version):
        name = f"a{version}"
        changed = {"version": version, "announcement_id": name}
        publisher.publish(msgspec.structs.replace(READY, **changed))
        await asyncio.sleep(0.1)


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalGraph]:
    with LocalGraph(
        tmp_path, directory=tmp_path, coordinator_args=["--model", "tiny"]
    ) as graph:
        for name, value in graph.environment.items():
            monkeypatch.setenv(name, value)
        yield graph


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_spans_leave_over_otlp_in_the_trainers_trace(
    graph: LocalGraph,
    collector: Collector,
    grpc_collector: GrpcCollector,
    protocol: str,
) -> None:
    url = f"{collector.url}/v1/traces"
    if protocol == "grpc":
        collector, url = grpc_collector, grpc_collector.url
    graph.coordinator_env |= {
        "OTEL_EXPORT_ENABLED": "1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": url,
    }
    coordinator = graph.start_coordinator()
    refused = await announce_until_refused(graph)
    # What is not sent yet goes when the process ends.
    await asyncio.to_thread(coordinator.stop)
    resources = [
        resource
        for request in collector.requests
        for resource in request.resource_spans
        if resource.scope_spans[0].scope.name == "dynamo.refit"
    ]
    services = {
        attribute.value.string_value
        for resource in resources
        for attribute in resource.resource.attributes
        if attribute.key == "service.name"
    }
    assert services == {"dynamo"}
    spans = [s for r in resources for scope in r.scope_spans for s in scope.spans]
    assert {(s.name, s.trace_id.hex(), s.parent_span_id.hex()) for s in spans} == {
        ("refit", TRACE, PARENT)
    }
    versions = [
        attribute.value.int_value
        for span in spans
        for attribute in span.attributes
        if attribute.key == "refit.version"
    ]
    assert refused.version in versions


async def test_nobody_is_connected_to_where_tracing_is_off(
    graph: LocalGraph, collector: Collector
) -> None:
    graph.coordinator_env |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces",
    }
    coordinator = graph.start_coordinator()
    await announce_until_refused(graph)
    await asyncio.to_thread(coordinator.stop)
    assert collector.connections == 0


async def test_without_a_collector_it_ends_all_the_same(graph: LocalGraph) -> None:
    graph.coordinator_env |= {
        "OTEL_EXPORT_ENABLED": "1",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        # OpenTelemetry's own bound on an export; 10 s by default.
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "1",
    }
    coordinator = graph.start_coordinator()
    await announce_until_refused(graph)
    coordinator.ask_to_stop()
    deadline = time.monotonic() + STOP_SECONDS
    while coordinator.running and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert not coordinator.running
