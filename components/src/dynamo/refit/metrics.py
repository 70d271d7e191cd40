# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a worker and the coordinator show on ``/metrics``.

Fed from the events that are published and the replies that are given anyway; nothing
is measured here. :func:`export` puts a registry on the process's system server
(``DYN_SYSTEM_PORT``), through Dynamo's endpoint metrics and with Dynamo's labels. No
version, announcement or error text ever becomes a label: there is a new one with every
refit, and a series would stay behind for each.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

from dynamo.prometheus_names import labels, name_prefix
from dynamo.runtime import Endpoint
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)

from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitSuperseded,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    Commit,
    CommitTimings,
    FleetStatus,
    Message,
    Prepare,
    RankVote,
    Refused,
    SessionUse,
    WorkerPhase,
    WorkerRequest,
)

PREFIX = f"{name_prefix.COMPONENT}_refit"

#: Seconds. A stall is some milliseconds, the first stage of a large model a minute.
BUCKETS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)

#: Histograms of a worker, and what each is of.
STAGE_SECONDS = {
    "stage": "From the first rank's start to the last rank's end of staging a version",
    "pull": "Reading a version, on the rank that took longest",
    "fingerprint": "Fingerprinting a version beside the pull, on the slowest rank",
}
COMMIT_SECONDS = {
    "pause": "Pausing the engine; 0 for an install between two of its steps",
    "install": "The ranks' answer to an install",
    "copy": "Writing the live parameters, on the slowest rank's device",
    "resume": "Resuming the engine",
    "stall": "The time of a commit in which no token can be made",
    "probe": "The first token on the new version",
    "verify": "Checking the live weights, beside serving",
}

OUTCOMES = ("completed", "failed", "superseded", "refused")


def export(registry: CollectorRegistry, endpoint: Endpoint, path: str) -> None:
    """Show ``registry`` on this process's system server, labelled as Dynamo labels
    its own metrics: namespace, component and endpoint from ``path``, and worker_id.

    Dynamo's helper for it is in ai-dynamo, which a coordinator does without.
    """
    namespace, component, name = path.split(".")
    labelled = _Labelled(
        registry,
        {
            labels.NAMESPACE: namespace,
            labels.COMPONENT: component,
            labels.ENDPOINT: name,
            labels.WORKER_ID: format(endpoint.connection_id(), "x"),
        },
    )
    # /metrics shows text; OTLP exports what is handed over as a structure.
    endpoint.metrics.register_prometheus_expfmt_callback(labelled.text)
    endpoint.metrics.register_prometheus_typed_callback(labelled.typed)


class _Labelled:
    """A registry whose samples carry some labels more."""

    def __init__(self, registry: CollectorRegistry, more: Mapping[str, str]) -> None:
        self._registry = registry
        self._more = more

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            labelled = Metric(
                family.name, family.documentation, family.type, family.unit
            )
            labelled.samples = [
                sample._replace(labels={**self._more, **sample.labels})
                for sample in family.samples
            ]
            yield labelled

    def text(self) -> str:
        return generate_latest(self).decode()

    def typed(self) -> list[tuple]:
        """Name, text, type, unit and samples of each family, as Dynamo takes them."""
        return [
            (
                family.name,
                family.documentation,
                family.type,
                family.unit,
                [
                    (s.name, list(s.labels.items()), float(s.value), s.timestamp)
                    for s in family.samples
                ],
            )
            for family in self.collect()
        ]


class _Metrics:
    """A registry of its own, and how this package names what is in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(
            f"{PREFIX}_{name}_seconds", text, buckets=BUCKETS, registry=self.registry
        )

    def families(self) -> list[Metric]:
        """Everything that may be shown, by name; also what has no value yet."""
        found = {family.name: family for family in self.registry.collect()}
        for gauge in vars(self).values():
            if isinstance(gauge, _LateGauge):
                found.update((family.name, family) for family in gauge.families())
        return [found[name] for name in sorted(found)]


class _LateGauge:
    """A gauge that is not there before it has a value: start-up weights have no
    version, and 0 is one."""

    def __init__(self, registry: CollectorRegistry, name: str, text: str) -> None:
        self.name = f"{PREFIX}_{name}"
        self._registry = registry
        self._gauge = Gauge(self.name, text, registry=None)
        self._shown = False

    def families(self) -> Iterable[Metric]:
        return self._gauge.collect()

    def set(self, value: float | None) -> None:
        if value is not None:
            self._gauge.set(value)
        if self._shown is (value is not None):
            return
        self._shown = not self._shown
        if self._shown:
            self._registry.register(self._gauge)
        else:
            self._registry.unregister(self._gauge)


class WorkerMetrics(_Metrics):
    """One worker's votes, stages, commits and ends."""

    def __init__(self) -> None:
        super().__init__()
        self._seconds = {
            name: self._histogram(name, text)
            for name, text in (STAGE_SECONDS | COMMIT_SECONDS).items()
        }
        self._staged_bytes = self._counter(
            "staged_bytes", "Bytes that the ranks have read into staging"
        )
        self._memory = self._gauge(
            "staging_memory_bytes",
            "Memory that staging takes on all ranks of this worker",
            ("memory",),
        )
        for memory in ("device", "host"):
            self._memory.labels(memory)
        self._sessions = self._counter(
            "sessions",
            "Stages of ranks by what they found in the session cache: all of it "
            "(warm), all but the requests (re-addressed), or nothing (cold)",
            ("use",),
        )
        for use in get_args(SessionUse):
            self._sessions.labels(use)
        self._built = {
            "allocations": self._counter("allocations", "Staging buffers allocated"),
            "registrations": self._counter(
                "registrations", "Memory regions registered with NIXL"
            ),
            "descriptor_builds": self._counter(
                "descriptor_builds", "NIXL descriptor lists built"
            ),
            "hits": self._counter(
                "request_hits", "Prepared NIXL requests that were posted again"
            ),
        }
        self._votes = self._counter(
            "votes", "Answers to prepare: yes, or no with a cause", ("vote",)
        )
        for vote in ("yes", "no"):
            self._votes.labels(vote)
        self._aborts = self._counter("aborts", "Aborts that were carried out")
        self._commits = self._counter("commits", "Versions that went live here")
        self._refused_commits = self._counter(
            "refused_commits", "Commits, or steps of one, that were refused or undone"
        )
        self._retries = self._counter(
            "install_retries", "Installs repeated from the staged bytes"
        )
        self._carried_over = self._counter(
            "carried_over_requests", "Requests that outlasted the bound of drain"
        )
        self._fences = self._counter(
            "fences", "Times that this worker was taken out of service for good"
        )
        self._version = _LateGauge(
            self.registry, "version", "Version whose weights are live"
        )

    def observe(self, event: Event) -> None:
        """Count what this worker publishes."""
        match event:
            case WorkerStaged(ranks=ranks):
                self._staged(ranks)
            case WorkerRefitted():
                self._commits.inc()
                self._version.set(event.version)
                self._carried_over.inc(event.carried_over)
                self._committed(event.timings)
            case WorkerFenced():
                self._fences.inc()

    def answered(self, request: WorkerRequest, reply: Message) -> None:
        """Count how the coordinator was answered."""
        refused = isinstance(reply, Refused)
        match request:
            case Prepare():
                self._votes.labels("no" if refused else "yes").inc()
            case Commit() if refused:
                self._refused_commits.inc()
            case Abort() if isinstance(reply, Aborted):
                self._aborts.inc()

    def _staged(self, ranks: tuple[RankVote, ...]) -> None:
        timings = [rank.timings for rank in ranks]
        began = min(t.started_at for t in timings)
        self._seconds["stage"].observe(max(t.finished_at for t in timings) - began)
        self._seconds["pull"].observe(max(t.pull_ms for t in timings) / 1e3)
        slowest = max(t.fingerprint_ms for t in timings)
        self._seconds["fingerprint"].observe(slowest / 1e3)
        for rank in ranks:
            self._staged_bytes.inc(rank.nbytes)
            self._sessions.labels(rank.session).inc()
            for name, counter in self._built.items():
                counter.inc(getattr(rank.counters, name))
        memory = [rank.memory for rank in ranks]
        self._memory.labels("device").set(sum(m.device_nbytes for m in memory))
        self._memory.labels("host").set(sum(m.host_nbytes for m in memory))

    def _committed(self, timings: CommitTimings) -> None:
        for name in COMMIT_SECONDS:
            self._seconds[name].observe(getattr(timings, f"{name}_ms") / 1e3)
        self._retries.inc(timings.install_retries)


class CoordinatorMetrics(_Metrics):
    """The fleet: what is wanted, what is served, and how each refit ended.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._duration = self._histogram(
            "duration", "From the arrival of an announcement to its RefitCompleted"
        )
        self._versions = self._counter(
            "versions", "Announced versions by how they ended", ("outcome",)
        )
        for outcome in OUTCOMES:
            self._versions.labels(outcome)
        self._catch_ups = self._counter(
            "catch_ups", "Times that workers were brought to what the fleet serves"
        )
        self._excluded = self._counter(
            "excluded_workers", "Workers that a completed version went without"
        )
        self._workers = self._gauge("workers", "Workers by phase", ("phase",))
        for phase in get_args(WorkerPhase):
            self._workers.labels(phase)
        self._waiting = self._gauge(
            "workers_not_admitted", "Workers that routers do not see yet"
        )
        self._desired = _LateGauge(
            self.registry, "desired_version", "Newest version that was announced"
        )
        self._completed = _LateGauge(
            self.registry, "completed_version", "Version that all workers serve"
        )
        self._behind = _LateGauge(
            self.registry,
            "versions_behind",
            "desired_version less completed_version: the fleet's policy lag",
        )
        self._completed_at = _LateGauge(
            self.registry,
            "last_completed_timestamp_seconds",
            "Unix time of the last RefitCompleted",
        )
        staleness = self._gauge(
            "staleness_seconds",
            "Since when a version is announced that not all workers serve; else 0",
        )
        staleness.set_function(self._staleness)
        self._waiting_since: float | None = None
        self._last: FleetStatus | None = None

    def observe(self, event: Event) -> None:
        """Count what the coordinator publishes."""
        match event:
            case RefitCompleted():
                self._completed_at.set(time.time())
                self._excluded.inc(len(event.excluded))
                if event.catch_up:
                    self._catch_ups.inc()
                    return
                self._versions.labels("completed").inc()
                if event.seconds is not None:
                    self._duration.observe(event.seconds)
            case RefitFailed(catch_up=False):
                self._versions.labels("failed").inc()
            case RefitSuperseded(catch_up=False):
                self._versions.labels("superseded").inc()
            case RefitRefused():
                self._versions.labels("refused").inc()

    def show(self, status: FleetStatus) -> None:
        """Take in the coordinator's view, as it is now."""
        before, self._last = self._last, status
        phases = Tally(member.status.phase for member in status.members)
        for phase in get_args(WorkerPhase):
            self._workers.labels(phase).set(phases[phase])
        self._waiting.set(sum(not m.status.admitted for m in status.members))
        desired, completed = status.desired, status.completed
        self._desired.set(desired)
        self._completed.set(completed)
        known = desired is not None and completed is not None
        self._behind.set(desired - completed if known else None)
        if desired is None or desired == completed:
            self._waiting_since = None
        elif before is None or before.desired != desired:
            self._waiting_since = self._clock()

    def _staleness(self) -> float:
        since = self._waiting_since
        return 0.0 if since is None else self._clock() - since
