# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One graph for all end-to-end tests: a frontend, a real worker with two tensor-
parallel ranks, and the coordinator. Its worker takes orders to fail (see
``tests/support/faulty.py``); versions grow from test to test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dynamo.refit.events import RefitCompleted, WorkerRefitted
from dynamo.refit.worker.args import GENERATION
from graphs.client import Client, Completion
from graphs.local import CPU_WORKER_ARGS, LocalGraph, free_port
from graphs.references import MAX_TOKENS, Answer, prompts, reference_answers
from graphs.tiny_model import make_checkpoint
from tests.support import orders
from tests.support.processes import Events, Trainer

CACHE = Path(__file__).resolve().parents[2] / ".cache"
SEEDS = {"A": 1, "B": 2, "C": 3}
STAGE_SECONDS = 20
COMMIT_SECONDS = 4


@dataclass
class Bench:
    """The running graph and what a test needs in order to judge it."""

    graph: LocalGraph
    events: Events
    models: dict[str, Path]
    expected: dict[str, list[Answer]]
    asked: list[list[int]]
    faults: Path
    system_port: int
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    serving: str = "A"
    #: That is served.
    version: int | None = None
    #: By version, the checkpoint that it is of.
    checkpoints: dict[int | None, str] = field(default_factory=lambda: {None: "A"})

    def refit(
        self,
        trainer: Trainer,
        name: str,
        in_flight: str | None = None,
        version: int | None = None,
    ) -> WorkerRefitted:
        """Publish checkpoint ``name`` and wait until it is served."""
        version = version or next(self.versions)
        self.checkpoints[version] = name
        trainer.publish(version, self.models[name], in_flight)
        done = self.events.wait_for(RefitCompleted, lambda e: e.version == version)
        assert trainer.released()["outcome"] == "completed"
        assert done.version == version
        self.serving, self.version = name, version
        # Another publisher's event may come later than the coordinator's.
        return self.events.find(WorkerRefitted, version)

    def order(self, **steps: dict) -> None:
        """Order faults; see ``tests/support/faulty.py``."""
        orders.give(self.faults, **steps)

    def wait_until_at(self, step: str, seconds: float = 60.0) -> None:
        """Until a rank waits at ``step``, as it was ordered to."""
        self.graph.wait_until(
            f"a rank waits at its {step}",
            lambda: orders.waits_at(self.faults) == step,
            seconds,
        )

    async def ask(self, client: Client) -> list[Completion]:
        return [await client.complete(prompt, MAX_TOKENS) for prompt in self.asked]

    async def assert_serves(self, name: str) -> None:
        """Every answer equals, bit for bit, a fresh engine's on ``name``."""
        async with Client(self.graph.url, self.graph.name) as client:
            for _ in ("cold", "hot"):
                answers = await self.ask(client)
                assert [a.error for a in answers] == [None] * len(answers)
                assert [a.answer for a in answers] == self.expected[name]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    models = {
        name: make_checkpoint(CACHE / "models" / f"qwen3-{seed}", seed=seed)
        for name, seed in SEEDS.items()
    }
    asked = prompts()
    # References first: never two engines at a time on two cores.
    expected = {
        name: reference_answers(
            model, tensor_parallel=2, asked=asked, cache=CACHE / "references"
        )
        for name, model in models.items()
    }
    directory = tmp_path_factory.mktemp("graph")
    faults = directory / "faults.json"
    os.environ["REFIT_TEST_FAULTS"] = str(faults)
    system_port = free_port()
    graph = LocalGraph(
        models["A"],
        tensor_parallel=2,
        worker_args=[
            *CPU_WORKER_ARGS,
            "--worker-extension-cls=tests.support.faulty.FaultyExtension",
        ],
        worker_env={
            "DYN_SYSTEM_PORT": str(system_port),
            # As on Kubernetes: the worker serves in a namespace of its generation,
            # and the frontend looks into those of all generations.
            GENERATION: "a1b2c3d4",
        },
        frontend_args=["--namespace-prefix=dynamo"],
        coordinator_args=[
            f"--stage-seconds={STAGE_SECONDS}",
            f"--commit-seconds={COMMIT_SECONDS}",
            "--drain-seconds=0",
        ],
        directory=directory,
    )
    with graph:
        graph.start()
        events = Events(graph)
        yield Bench(graph, events, models, expected, asked, faults, system_port)
        events.kill()


@pytest.fixture
def no_faults(bench: Bench) -> Iterator[None]:
    yield
    orders.forget(bench.faults)
