# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H through a real graph: experts, attention and Mamba-2. Its loader computes
the decay, and its kernels read a packed convolution."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.refit.events import WorkerStaged
from graphs.client import Client
from graphs.local import LocalGraph
from graphs.references import MAX_TOKENS, Answer, prompts, reference_answers
from graphs.tiny_model import VOCABULARY_SIZE
from tests.support.architectures import checkpoint
from tests.support.child import ROOT
from tests.support.processes import Events

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(420),
]

#: Of the checkpoint at the start, and of the versions.
SEEDS = (1, 2, 3)

ASKED = prompts()


@pytest.fixture(scope="module")
def models() -> dict[int, Path]:
    changes = {"max_position_embeddings": 4096, "vocab_size": VOCABULARY_SIZE}
    return {seed: checkpoint("nemotronh", seed, **changes) for seed in SEEDS}


@pytest.fixture(scope="module")
def expected(models: dict[int, Path]) -> dict[int, list[Answer]]:
    """Of fresh engines, before the graph starts: never two at a time on two cores."""
    cache = ROOT / ".cache" / "references"
    return {
        seed: reference_answers(
            models[seed], tensor_parallel=1, asked=ASKED, cache=cache
        )
        for seed in SEEDS[1:]
    }


@pytest.fixture(scope="module")
def graph(
    models: dict[int, Path],
    expected: dict[int, list[Answer]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LocalGraph]:
    directory = tmp_path_factory.mktemp("graph")
    with LocalGraph(models[1], directory=directory) as graph:
        graph.start()
        yield graph


@pytest.fixture
def events(graph: LocalGraph) -> Iterator[Events]:
    events = Events(graph)
    yield events
    events.kill()


def run(graph: LocalGraph, *command: str) -> subprocess.CompletedProcess:
    """``dynamo-refit``, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "dynamo.refit.cli", *command],
        env={**os.environ, **graph.environment, "DYN_LOG": "error"},
        capture_output=True,
        text=True,
        timeout=120,
    )


async def answers(graph: LocalGraph) -> list[Answer]:
    async with Client(graph.url, graph.name) as client:
        found = [await client.complete(prompt, MAX_TOKENS) for prompt in ASKED]
    assert [each.error for each in found] == [None] * len(found)
    return [each.answer for each in found]


async def test_nemotron_h_answers_as_a_fresh_engine_would(
    graph: LocalGraph,
    events: Events,
    models: dict[int, Path],
    expected: dict[int, list[Answer]],
) -> None:
    assert expected[2] != expected[3]
    for version, seed in enumerate(SEEDS[1:], 1):
        command = ["publish", str(models[seed]), "--version", str(version), "--json"]
        published = await asyncio.to_thread(run, graph, *command)
        assert published.returncode == 0, published.stderr
        done = json.loads(published.stdout.splitlines()[-1])
        assert (done["version"], done["outcome"]) == (version, "completed")
        # Twice: without and with a prefix cache.
        for _ in range(2):
            assert await answers(graph) == expected[seed]
        verified = await asyncio.to_thread(run, graph, "verify")
        assert verified.returncode == 0, verified.stderr
        staged = await asyncio.to_thread(events.find, WorkerStaged, version)
        (vote,) = staged.ranks
        assert vote.can_undo
        # The first one builds; the one after it only reads.
        assert (vote.counters.allocations == 0) == (version > 1)
