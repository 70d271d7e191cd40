# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A refit's pause is nothing that a kubelet would restart or unlist a worker for."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from graphs.client import Client, Load
from graphs.references import prompts
from tests.e2e.conftest import Bench
from tests.support.processes import Trainer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]

#: How long an installing rank holds the engine: longer than any install should take.
HELD_SECONDS = 2.0

#: Of the operator's own probes.
PROBE_TIMEOUT_SECONDS = 4.0


@dataclass(frozen=True)
class Answer:
    path: str
    status: int
    #: Unix seconds.
    began: float
    seconds: float

    def inside(self, since: float, until: float) -> bool:
        return since < self.began and self.began + self.seconds < until


@contextmanager
def probing(port: int) -> Iterator[list[Answer]]:
    """Probes as a kubelet's, only more of them, one after the other."""
    answers: list[Answer] = []
    stop = threading.Event()

    def probe() -> None:
        while not stop.wait(0.05):
            for path in ("/live", "/health"):
                began = time.time()
                # An answer that is no 2xx raises, and is missed below.
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}{path}", timeout=PROBE_TIMEOUT_SECONDS
                ) as answer:
                    seconds = time.time() - began
                    answers.append(Answer(path, answer.status, began, seconds))

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield answers
    finally:
        alive = thread.is_alive()
        stop.set()
        thread.join()
    assert alive, f"a probe failed after {len(answers)} answers"


@pytest.mark.parametrize("in_flight", ["continue", "recompute"])
async def test_probes_are_answered_while_the_engine_is_held(
    bench: Bench, in_flight: str
) -> None:
    bench.order(install={"rank": 0, "seconds": HELD_SECONDS})
    name = "B" if bench.serving != "B" else "C"
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            load = Load(client, prompts(count=2, seed=9), streams=1, max_tokens=64)
            load.start()
            with probing(bench.system_port) as answers:
                refitted = await asyncio.to_thread(
                    bench.refit, trainer, name, in_flight
                )
            await load.stop()
    assert refitted.timings.stall_ms > 1000 * HELD_SECONDS
    assert {answer.status for answer in answers} == {200}
    # Others want the two cores, too: one answer within the stall is what counts.
    timings = refitted.timings
    stall = timings.started_at, timings.started_at + timings.stall_ms / 1e3
    for path in ("/live", "/health"):
        assert [a for a in answers if a.path == path and a.inside(*stall)]
        times = sorted(a.began for a in answers if a.path == path)
        # Also in the stall, wherever in the refit it was: no long gap between two.
        gaps = [after - before for before, after in itertools.pairwise(times)]
        assert len(times) > HELD_SECONDS / 0.2
        assert max(gaps) < HELD_SECONDS / 2
    await bench.assert_serves(name)
