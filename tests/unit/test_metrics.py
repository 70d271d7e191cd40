# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What /metrics shows after what was published and answered: values, names, labels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from dynamo.common.utils.prometheus import register_engine_metrics_callback
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import Failure, RefitError
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.metrics import CoordinatorMetrics, WorkerMetrics, export
from dynamo.refit.protocol import (
    CacheCounters,
    FleetMember,
    FleetStatus,
    Install,
    MemoryUse,
    RankVote,
    Stage,
    StageTimings,
)
from tests.faults.virtual_time import run
from tests.support.fake_replica import Bench, abort, commit
from tests.support.fleet import TIMINGS, joiner, member
from tests.support.observed_world import ObservedWorker, ObservedWorld

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

FAILURE = Failure(kind="TransferFailed", message="no memory", stage="stage")


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"dynamo_component_refit_{name}", labels)


def bucket(registry: CollectorRegistry, name: str, at_most: str) -> float | None:
    return value(registry, f"{name}_seconds_bucket", le=at_most)


def rank_vote(rank: int, **changes: Any) -> RankVote:
    timings = dict.fromkeys(StageTimings.__struct_fields__, 0.0)
    timings |= {"started_at": 100.0, "finished_at": 100.5 + rank}
    timings |= {"pull_ms": 200.0 + 100 * rank, "fingerprint_ms": 40.0}
    vote = RankVote(
        rank=rank,
        nbytes=1000,
        memory=MemoryUse(mode="device", device_nbytes=300, host_nbytes=50),
        session="cold",
        counters=CacheCounters(allocations=3, registrations=2, descriptor_builds=1),
        timings=StageTimings(**timings),
    )
    return msgspec.structs.replace(vote, **changes)


def staged(version: int = 1, **changes: Any) -> WorkerStaged:
    ranks = (rank_vote(0, **changes), rank_vote(1, **changes))
    return WorkerStaged(worker=7, version=version, ranks=ranks)


def refitted(version: int = 1, **changes: Any) -> WorkerRefitted:
    fields = {
        "worker": 7,
        "version": version,
        "fingerprint": "w",
        "kv_epoch": "1-x",
        "in_flight": "continue",
        "timings": TIMINGS,
    }
    return WorkerRefitted(**(fields | changes))


# --- a worker -------------------------------------------------------------------


def test_a_stage_is_what_its_slowest_rank_took() -> None:
    metrics = WorkerMetrics()
    metrics.observe(staged())
    registry = metrics.registry
    assert value(registry, "stage_seconds_sum") == 1.5
    assert value(registry, "pull_seconds_sum") == 0.3
    assert value(registry, "fingerprint_seconds_sum") == 0.04
    assert value(registry, "stage_seconds_count") == 1
    assert (bucket(registry, "pull", "0.25"), bucket(registry, "pull", "0.5")) == (0, 1)
    assert value(registry, "staged_bytes_total") == 2000
    assert value(registry, "staging_memory_bytes", memory="device") == 600
    assert value(registry, "staging_memory_bytes", memory="host") == 100


def test_the_cache_is_counted_by_rank() -> None:
    metrics = WorkerMetrics()
    metrics.observe(staged())
    warm = CacheCounters(hits=1)
    metrics.observe(staged(2, session="warm", counters=warm))
    metrics.observe(staged(3, session="warm", counters=warm))
    registry = metrics.registry
    uses = ("cold", "re-addressed", "warm")
    counted = [value(registry, "sessions_total", use=use) for use in uses]
    assert counted == [2, 0, 4]
    assert value(registry, "allocations_total") == 6
    assert value(registry, "registrations_total") == 4
    assert value(registry, "descriptor_builds_total") == 2
    assert value(registry, "request_hits_total") == 4


def test_a_commit_in_milliseconds_is_shown_in_seconds() -> None:
    metrics = WorkerMetrics()
    timings = msgspec.structs.replace(TIMINGS, install_retries=1)
    metrics.observe(refitted(41, timings=timings, carried_over=3))
    registry = metrics.registry
    sums = {
        name: value(registry, f"{name}_seconds_sum")
        for name in ("pause", "install", "resume", "stall", "probe", "verify")
    }
    assert sums == {
        "pause": 0.001,
        "install": 0.002,
        "resume": 0.003,
        "stall": 0.006,
        "probe": 0.007,
        "verify": 0.008,
    }
    assert bucket(registry, "stall", "0.005") == 0
    assert bucket(registry, "stall", "0.0075") == 1
    assert value(registry, "commits_total") == 1
    assert value(registry, "install_retries_total") == 1
    assert value(registry, "carried_over_requests_total") == 3
    assert value(registry, "version") == 41


def test_start_up_weights_have_no_version() -> None:
    registry = WorkerMetrics().registry
    assert value(registry, "version") is None
    assert value(registry, "commits_total") == 0


def test_a_fence_is_counted() -> None:
    metrics = WorkerMetrics()
    metrics.observe(WorkerFenced(worker=7, version=1, failure=FAILURE))
    assert value(metrics.registry, "fences_total") == 1


async def test_answers_of_an_agent_are_counted() -> None:
    from_bench = Bench()
    metrics = WorkerMetrics()

    async def ask(request: Any) -> None:
        metrics.answered(request, await from_bench.agent.answer(request))

    await ask(from_bench.prepare(5))
    await ask(commit(5))
    from_bench.engine.ranks[1].fail[Stage] = [RefitError("no memory")]
    await ask(from_bench.prepare(6))
    await ask(from_bench.prepare(7))
    await ask(abort(7))
    await ask(from_bench.prepare(8))
    from_bench.engine.ranks[0].fail[Install] = [RefitError("no memory")] * 2
    await ask(commit(8))
    registry = metrics.registry
    assert value(registry, "votes_total", vote="yes") == 3
    assert value(registry, "votes_total", vote="no") == 1
    assert value(registry, "aborts_total") == 1
    assert value(registry, "refused_commits_total") == 1


# --- the coordinator --------------------------------------------------------------


def completed(version: int = 1, **changes: Any) -> RefitCompleted:
    fields = {
        "model": "tiny",
        "version": version,
        "announcement_id": f"a{version}",
        "fingerprint": "w",
        "workers": (7,),
        "seconds": 0.8,
    }
    return RefitCompleted(**(fields | changes))


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (completed(), "completed"),
        (RefitFailed(version=1, failure=FAILURE, serving=()), "failed"),
        (RefitSuperseded(version=1, by=2), "superseded"),
        (RefitRefused(reason="stale", detail="older"), "refused"),
    ],
)
def test_versions_are_counted_by_how_they_ended(event: Event, outcome: str) -> None:
    metrics = CoordinatorMetrics()
    metrics.observe(RefitStarted(model="tiny", version=1, workers=(7,)))
    metrics.observe(event)
    counted = {
        name: value(metrics.registry, "versions_total", outcome=name)
        for name in ("completed", "failed", "superseded", "refused")
    }
    assert counted == {name: float(name == outcome) for name in counted}


def test_a_completed_refit_has_its_time_and_its_exclusions() -> None:
    metrics = CoordinatorMetrics()
    before = time.time()
    metrics.observe(completed(excluded=(FAILURE, FAILURE)))
    metrics.observe(completed(seconds=None))
    registry = metrics.registry
    assert value(registry, "duration_seconds_sum") == 0.8
    assert value(registry, "duration_seconds_count") == 1
    assert value(registry, "excluded_workers_total") == 2
    shown = value(registry, "last_completed_timestamp_seconds")
    assert before <= shown <= time.time()


def test_a_catch_up_is_no_version() -> None:
    metrics = CoordinatorMetrics()
    metrics.observe(completed(catch_up=True))
    assert value(metrics.registry, "versions_total", outcome="completed") == 0
    assert value(metrics.registry, "duration_seconds_count") == 0
    assert value(metrics.registry, "catch_ups_total") == 1


def status(
    *members: FleetMember, desired: int | None = None, completed: int | None = None
) -> FleetStatus:
    return FleetStatus(
        model="tiny",
        epoch=1,
        desired=desired,
        completed=completed,
        under_way=None,
        members=members,
    )


def test_workers_are_shown_by_phase() -> None:
    metrics = CoordinatorMetrics()
    metrics.show(status(member(1), member(2, phase="staging"), joiner(3)))
    metrics.show(status(member(1), member(2, phase="staged"), joiner(3)))
    phases = ("serving", "staging", "staged", "committing", "fenced")
    shown = [value(metrics.registry, "workers", phase=phase) for phase in phases]
    assert shown == [2, 0, 1, 0, 0]
    assert value(metrics.registry, "workers_not_admitted") == 1


def test_staleness_grows_until_the_fleet_serves_the_newest_version() -> None:
    now = 50.0
    metrics = CoordinatorMetrics(clock=lambda: now)
    registry = metrics.registry
    names = ("desired_version", "completed_version", "versions_behind")

    def shown() -> list[float | None]:
        return [value(registry, name) for name in (*names, "staleness_seconds")]

    metrics.show(status())
    assert shown() == [None, None, None, 0]
    metrics.show(status(desired=10))
    now = 53.0
    metrics.show(status(desired=10))
    assert shown() == [10, None, None, 3]
    metrics.show(status(desired=10, completed=10))
    assert shown() == [10, 10, 0, 0]
    now = 60.0
    metrics.show(status(desired=14, completed=10))
    now = 62.0
    metrics.show(status(desired=14, completed=10))
    assert shown() == [14, 10, 4, 2]
    # A newer one is waited for from its own announcement on.
    metrics.show(status(desired=15, completed=10))
    now = 62.5
    assert shown() == [15, 10, 5, 0.5]


# --- all together -----------------------------------------------------------------


def test_a_simulated_fleet_shows_what_happened_to_it() -> None:
    """Two versions of which one fails, over the real coordinator and agents."""

    async def live() -> tuple[ObservedWorld, list[ObservedWorker]]:
        policy = Policy(stage_seconds=20.0, commit_seconds=10.0, settle_seconds=0.0)
        world = ObservedWorld(policy, traced=False)
        for _ in range(2):
            world.start_worker()
        await asyncio.sleep(0.1)
        await world.start_coordinator()
        await asyncio.sleep(2.0)
        world.publish()
        await asyncio.sleep(8.0)
        workers = list(world.workers.values())
        workers[0].engine.ranks[0].fail[Stage] = [RefitError("no memory")]
        world.publish()
        await asyncio.sleep(8.0)
        world.check()
        return world, workers

    world, workers = run(live())
    fleet = world.metrics.registry
    assert value(fleet, "versions_total", outcome="completed") == 1
    assert value(fleet, "versions_total", outcome="failed") == 1
    assert value(fleet, "workers", phase="serving") == 2
    assert value(fleet, "desired_version") == 2
    assert value(fleet, "completed_version") == 1
    assert value(fleet, "versions_behind") == 1
    assert [value(w.metrics.registry, "version") for w in workers] == [1, 1]
    assert [value(w.metrics.registry, "commits_total") for w in workers] == [1, 1]
    no = [value(w.metrics.registry, "votes_total", vote="no") for w in workers]
    assert no[0] == 1


class FakeEndpoint:
    """Takes the callbacks as Dynamo's endpoint does."""

    def __init__(self) -> None:
        self.metrics = self
        self.text: Callable[[], str] | None = None
        self.typed: Callable[[], list] | None = None

    def connection_id(self) -> int:
        return 0xABC

    def register_prometheus_expfmt_callback(self, callback: Callable[[], str]) -> None:
        self.text = callback

    def register_prometheus_typed_callback(self, callback: Callable[[], list]) -> None:
        self.typed = callback


@pytest.mark.parametrize("kind", [WorkerMetrics, CoordinatorMetrics])
def test_names_and_labels_are_dynamos_and_no_version_is_a_label(kind: type) -> None:
    metrics, endpoint = kind(), FakeEndpoint()
    export(metrics.registry, endpoint, "ns.backend.refit")
    for event in (staged(123456), refitted(123456), completed(123456)):
        metrics.observe(event)
    own = {"use", "vote", "memory", "phase", "outcome", "le"}
    families = list(text_string_to_metric_families(endpoint.text()))
    assert len(families) > 10
    for family in families:
        assert family.name.startswith("dynamo_component_refit_")
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("dynamo_namespace") == "ns"
            assert labels.pop("dynamo_component") == "backend"
            assert labels.pop("dynamo_endpoint") == "refit"
            assert labels.pop("worker_id") == "abc"
            assert set(labels) <= own
            assert "123456" not in labels.values()


@pytest.mark.parametrize("kind", [WorkerMetrics, CoordinatorMetrics])
def test_what_is_shown_is_what_dynamo_s_own_helper_shows(kind: type) -> None:
    """It is in ai-dynamo, which the coordinator's package does not ask for."""
    metrics, ours, theirs = kind(), FakeEndpoint(), FakeEndpoint()
    for event in (staged(), refitted(), completed()):
        metrics.observe(event)
    export(metrics.registry, ours, "ns.backend.refit")
    register_engine_metrics_callback(
        theirs,
        metrics.registry,
        namespace_name="ns",
        component_name="backend",
        endpoint_name="refit",
    )
    assert ours.text() == theirs.text()
    assert ours.typed() == theirs.typed()
    names = [family.name for family in metrics.registry.collect()]
    assert [family[0] for family in ours.typed()] == names
