# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A running graph of two real replicas behind the KV router, whose ranks take orders to
fail, and what is needed in order to judge it."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dynamo.refit.events import RefitCompleted, WorkerRefitted
from graphs import agg_router
from graphs.client import Client
from graphs.local import CPU_WORKER_ARGS, LocalGraph, Plane, Process
from graphs.references import MAX_TOKENS, Answer, prompts, reference_answers
from graphs.tiny_model import make_checkpoint
from tests.support import orders
from tests.support.process_group import living
from tests.support.processes import Events, Trainer, fleet_status

CACHE = Path(__file__).resolve().parents[2] / ".cache"
SEEDS = {"A": 1, "B": 2, "C": 3}
HOLD_SECONDS = 8.0


@dataclass
class Fleet:
    """The running graph, and what a test needs in order to judge it."""

    graph: LocalGraph
    events: Events
    models: dict[str, Path]
    expected: dict[str, list[Answer]]
    asked: list[list[int]]
    policy: str = "barrier"
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    version: int | None = None
    serving: str = "A"

    def members(self) -> dict[int, dict]:
        """The status of every worker, by its id."""
        status = fleet_status(self.graph)
        return {m["worker"]: m["status"] for m in status["members"]}

    def other(self) -> str:
        return "B" if self.serving != "B" else "C"

    def refit(
        self, trainer: Trainer, name: str, in_flight: str | None = None
    ) -> RefitCompleted:
        """Publish checkpoint ``name`` and wait until the fleet serves it."""
        self.version = next(self.versions)
        trainer.publish(self.version, self.models[name], in_flight)
        done = self.events.wait_for(RefitCompleted, lambda e: e.version == self.version)
        assert trainer.released()["outcome"] == "completed"
        self.serving = name
        return done

    def refitted(self, count: int) -> list[WorkerRefitted]:
        """What the workers said of the newest version, in the order it was said in."""
        refitted = self.events.find_all(WorkerRefitted, self.version, count)
        return sorted(refitted, key=lambda event: event.at)

    def restart_coordinator(self, *arguments: str) -> None:
        """Another coordinator in place of the one before, which may be dead already."""
        if coordinator := self.graph.processes.pop("coordinator", None):
            coordinator.kill()
        # Epochs are milliseconds, or above all that were before.
        before = time.time() * 1e3
        self.graph.coordinator_args = (f"--hold-seconds={HOLD_SECONDS}", *arguments)
        self.graph.start_coordinator()

        def there() -> bool:
            try:
                return fleet_status(self.graph)["epoch"] > before
            except subprocess.CalledProcessError:
                return False

        self.graph.wait_until("there is another coordinator", there)

    def order(self, index: int, **steps: dict) -> None:
        """Order faults of one worker; see ``tests/support/faulty.py``."""
        orders.give(self._orders(index), **steps)

    def forget_orders(self) -> None:
        for index in range(len(self.graph.worker_envs)):
            orders.forget(self._orders(index))

    def waits_at(self, index: int) -> str | None:
        """The step at which a rank of worker ``index`` waits, as it was ordered to."""
        return orders.waits_at(self._orders(index))

    def wait_until_at(self, index: int, step: str, seconds: float = 60.0) -> None:
        self.graph.wait_until(
            f"worker{index} waits at its {step}",
            lambda: self.waits_at(index) == step,
            seconds,
        )

    def _orders(self, index: int) -> Path:
        return Path(self.graph.worker_envs[index]["REFIT_TEST_FAULTS"])

    def index_of(self, worker: int) -> int:
        """Which process a worker is.

        Raises:
            AssertionError: none of this graph's, as far as their logs tell.
        """
        for index in range(len(self.graph.worker_envs)):
            log = self.graph.directory / f"worker{index}.log"
            if f"refit agent of worker {worker}" in log.read_text():
                return index
        raise AssertionError(f"no log tells of worker {worker}")

    def wait_for_the_end(self, worker: Process, seconds: float = 60.0) -> None:
        """Until a worker's process has ended by itself, and all of its group."""
        deadline = time.monotonic() + seconds
        while worker.running or living(worker.pid):
            if time.monotonic() > deadline:
                raise AssertionError(f"{worker.name}: {living(worker.pid)} still run")
            time.sleep(0.1)

    async def assert_serves(self, name: str, workers: int = 2) -> None:
        """Every answer of every worker is a fresh engine's on ``name``."""
        # One that is gone is in discovery until its lease is over.
        await asyncio.to_thread(
            self.graph.wait_until,
            f"there are {workers} workers",
            lambda: len(self.members()) == workers,
        )
        members = await asyncio.to_thread(self.members)
        async with Client(self.graph.url, self.graph.name) as client:
            for worker in members:
                pinned = {"backend_instance_id": worker}
                for prompt, expected in zip(
                    self.asked, self.expected[name], strict=True
                ):
                    answer = await client.complete(prompt, MAX_TOKENS, nvext=pinned)
                    assert answer.error is None
                    assert answer.answer == expected


@contextmanager
def live_fleet(plane: Plane, directory: Path, *worker_args: str) -> Iterator[Fleet]:
    """Started, on start-up weights ``A``; the references are made first, since there
    are never two engines that start at a time."""
    models = {
        name: make_checkpoint(CACHE / "models" / f"qwen3-{seed}", seed=seed)
        for name, seed in SEEDS.items()
    }
    asked = prompts()
    expected = {
        name: reference_answers(
            model, tensor_parallel=1, asked=asked, cache=CACHE / "references"
        )
        for name, model in models.items()
    }
    graph = agg_router.build(
        models["A"],
        worker_args=[
            *CPU_WORKER_ARGS,
            "--worker-extension-cls=tests.support.faulty.FaultyExtension",
            *worker_args,
        ],
        coordinator_args=[f"--hold-seconds={HOLD_SECONDS}"],
        plane=plane,
        directory=directory,
    )
    for index, env in enumerate(graph.worker_envs):
        env["REFIT_TEST_FAULTS"] = str(directory / f"faults{index}.json")
    with graph:
        graph.start()
        events = Events(graph)
        yield Fleet(graph, events, models, expected, asked)
        events.kill()
