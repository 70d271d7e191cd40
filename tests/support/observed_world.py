# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet with metrics and traces around its coordinator, its agents and
its trainer, wired as the processes wire them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.coordinator.component import Coordinator, next_epoch
from dynamo.refit.coordinator.fleet import FleetWatch
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.coordinator.telemetry import CoordinatorTelemetry
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.metrics import CoordinatorMetrics, WorkerMetrics
from dynamo.refit.publish.telemetry import PublishTelemetry
from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.telemetry import WorkerTelemetry
from tests.faults.world import Caller, Worker, World


class ObservedWorker(Worker):
    """An agent behind :class:`WorkerTelemetry`."""

    def __init__(self, world: ObservedWorld, number: int) -> None:
        self.metrics = WorkerMetrics()
        telemetry = WorkerTelemetry(self.metrics, world.tracer, number)
        self.publish = telemetry.publishing(super().publish)
        super().__init__(world, number)
        self.agent.answer = telemetry.answering(self.agent.answer)


class ObservedWorld(World):
    """Every process records into ``exporter``, unless it is not ``traced``."""

    def __init__(self, policy: Policy, *, traced: bool = True) -> None:
        super().__init__(0, policy)
        self.exporter = InMemorySpanExporter()
        self.tracer = Tracer(SimpleSpanProcessor(self.exporter) if traced else None)
        self.metrics = CoordinatorMetrics(clock=self.loop.time)
        self._publishing = PublishTelemetry(self.tracer)
        #: By version, until its announcement has a name.
        self._parents: dict[int, str | None] = {}
        self._coordinating = CoordinatorTelemetry(self.metrics, self.tracer)

    def start_worker(self) -> None:
        ObservedWorker(self, self._life())

    async def start_coordinator(self) -> None:
        config = CoordinatorConfig(
            namespace="sim",
            model=None,
            worker_components=("backend",),
            fleet_poll_seconds=0.5,
            policy=self.policy,
        )
        telemetry, caller = self._coordinating, Caller(self, "coordinator")
        fleet = FleetWatch(caller, config)
        seen = await fleet.look()
        publish = telemetry.publishing(self.events.append)
        coordinator = Coordinator(
            config, telemetry.calling(caller), publish, next_epoch(seen)
        )
        coordinator.hear(seen)
        tasks = [
            self.spawn(coordinator.run()),
            self.spawn(fleet.watch(coordinator.hear)),
            self.spawn(telemetry.watch(coordinator.status, 0.5)),
        ]
        self.coordinators.append((coordinator, caller, tasks))

    def publish_under(self, parent: str | None) -> bool:
        """The next version, published by a trainer that is in the span ``parent``."""
        self._parents[self.versions + 1] = parent
        return self.publish()

    def announce(self, event: WeightVersionReady) -> None:
        if event.version in self._parents:
            parent = self._parents.pop(event.version)
            self._publishing.taken(event.announcement_id, event.version, parent)
        traceparent = self._publishing.announced(event.announcement_id)
        event = msgspec.structs.replace(event, traceparent=traceparent)
        self._coordinating.heard(event)
        super().announce(event)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """What has ended so far."""
        return self.exporter.get_finished_spans()
