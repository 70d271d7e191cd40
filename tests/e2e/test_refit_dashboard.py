# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a refit: /metrics of a real worker and coordinator, every panel
of the dashboard over a Prometheus that has scraped them, and the coordinator's status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.refit.events import RefitCompleted, WorkerRefitted, WorkerStaged
from dynamo.refit.metrics import COMMIT_SECONDS
from graphs.client import Client, Load
from graphs.references import prompts
from tests.e2e.conftest import Bench
from tests.support.processes import Trainer, fleet_status
from tests.support.prometheus import (
    Prometheus,
    expressions,
    filled_in,
    numbers,
    prometheus_program,
    scrape,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]

#: What Dynamo puts on the metrics of every process.
DYNAMO_LABELS = {
    "dynamo_namespace",
    "dynamo_component",
    "dynamo_endpoint",
    "worker_id",
}


def targets(bench: Bench) -> list[str]:
    """The frontend, the worker and the coordinator."""
    ports = [
        bench.graph.port,
        bench.system_port,
        bench.graph.coordinator_env["DYN_SYSTEM_PORT"],
    ]
    return [f"127.0.0.1:{port}" for port in ports]


class Shown:
    """Our metrics of the worker and the coordinator, at one moment."""

    def __init__(self, bench: Bench) -> None:
        self._values: dict[tuple[str, frozenset], float] = {}
        for target in targets(bench)[1:]:
            for (name, labels), value in scrape(f"http://{target}/metrics").items():
                own = frozenset(pair for pair in labels if pair[0] not in DYNAMO_LABELS)
                self._values[name, own] = value

    def __call__(self, name: str, **labels: str) -> float:
        return self._values[f"dynamo_component_refit_{name}", frozenset(labels.items())]


@pytest.fixture
def prometheus(bench: Bench, tmp_path: Path) -> Iterator[Prometheus]:
    if prometheus_program() is None:
        pytest.skip("no Prometheus: `make prometheus`, or put one on PATH")
    with Prometheus(tmp_path, targets(bench)) as server:
        yield server


def refit(bench: Bench, trainer: Trainer) -> tuple[WorkerRefitted, RefitCompleted]:
    """To the checkpoint that is not served."""
    refitted = bench.refit(trainer, "C" if bench.serving == "B" else "B")
    return refitted, bench.events.find(RefitCompleted, refitted.version)


async def test_metrics_are_what_the_events_said(bench: Bench) -> None:
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        await asyncio.to_thread(refit, bench, trainer)
        before = Shown(bench)
        refitted, completed = await asyncio.to_thread(refit, bench, trainer)
    staged = bench.events.find(WorkerStaged, refitted.version)
    # The coordinator shows its view as often as it reads the workers' status.
    await asyncio.sleep(1.5)
    after = Shown(bench)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    for step in COMMIT_SECONDS:
        seconds = getattr(refitted.timings, f"{step}_ms") / 1e3
        assert grown(f"{step}_seconds_sum") == pytest.approx(seconds)
        assert grown(f"{step}_seconds_count") == 1
    slowest = max(rank.timings.pull_ms for rank in staged.ranks)
    assert grown("pull_seconds_sum") == pytest.approx(slowest / 1e3)
    assert grown("staged_bytes_total") == sum(rank.nbytes for rank in staged.ranks)
    assert grown("sessions_total", use="warm") == len(staged.ranks)
    assert grown("allocations_total") == grown("descriptor_builds_total") == 0
    assert grown("votes_total", vote="yes") == 1
    assert grown("duration_seconds_sum") == pytest.approx(completed.seconds)
    assert grown("versions_total", outcome="completed") == 1
    for name in ("version", "desired_version", "completed_version"):
        assert after(name) == refitted.version
    assert after("versions_behind") == after("staleness_seconds") == 0
    assert after("workers", phase="serving") == 1


async def test_every_panel_shows_what_happened(
    bench: Bench, prometheus: Prometheus
) -> None:
    """Right values, not only some: what has one right value is compared."""
    prometheus.wait_until_scraped()
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            load = Load(client, prompts(count=4, seed=5), streams=2, max_tokens=32)
            load.start()
            refitted, _ = await asyncio.to_thread(refit, bench, trainer)
            await load.stop()
    ended = time.time() + 1.5
    await asyncio.to_thread(prometheus.wait_until_scraped, ended)
    [namespace] = prometheus.values_of(
        "dynamo_namespace", "dynamo_component_refit_workers"
    )
    shown = {
        (title, legend): numbers(prometheus.query(filled_in(expression, namespace)))
        for title, legend, expression in expressions()
    }
    assert len(shown) > 30
    assert [place for place, values in shown.items() if not values] == []
    served = [float(refitted.version)]
    exact = {
        ("Serves", "served"): served,
        ("Announced", "announced"): served,
        ("Version by worker", "{{dynamo_component}} {{worker_id}}"): served,
        ("Versions behind", "behind"): [0.0],
        ("Staleness", "staleness"): [0.0],
        ("Workers", "workers"): [1.0],
        ("Trouble", "no votes"): [0.0],
        ("Trouble", "fences"): [0.0],
    }
    assert {place: shown[place] for place in exact} == exact
    [ago] = shown["Last refit", "ago"]
    assert 0 < ago < 60
    # The one refit in the interval; increase() extrapolates to its ends.
    assert sum(shown["Versions by outcome", "{{outcome}}"]) == pytest.approx(1, rel=0.5)
    [stall] = shown["Stall", "p99"]
    assert stall < 10 * refitted.timings.stall_ms / 1e3 + 0.001
    [install] = shown["A commit, step by step", "install"]
    assert install == pytest.approx(refitted.timings.install_ms / 1e3, rel=0.01)
    assert max(shown["Session cache", "{{use}}"]) > 0
    assert shown["Transfer", "during the pull"][0] > 0


async def test_the_status_shows_the_fleet(bench: Bench) -> None:
    shown = fleet_status(bench.graph)
    [member] = shown["members"]
    assert member["status"]["phase"] == "serving"
    assert member["status"]["version"] == shown["completed"]
