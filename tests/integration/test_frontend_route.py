# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``GET /refit`` of a real frontend: the coordinator's view, or why there is none, and
never in the way of other requests."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dynamo.refit.frontend import ANSWER_SECONDS
from graphs.local import LocalGraph, fetch
from tests.support.processes import fleet_status

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.router,
    pytest.mark.timeout(120),
]

CLIENTS = 12


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[LocalGraph]:
    """A frontend, without workers and without a coordinator."""
    with LocalGraph(tmp_path, directory=tmp_path, namespace="elsewhere") as graph:
        graph.start_frontend()
        graph.wait_until("it answers", lambda: fetch(f"{graph.url}/health") is not None)
        yield graph


def get(url: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def test_it_shows_what_the_coordinator_says(graph: LocalGraph) -> None:
    graph.start_coordinator()
    port = graph.coordinator_env["DYN_SYSTEM_PORT"]
    health = f"http://127.0.0.1:{port}/health"
    graph.wait_until(
        "a coordinator", lambda: (fetch(health) or {}).get("status") == "ready"
    )
    code, shown = get(f"{graph.url}/refit")
    assert code == 200
    assert shown["type"] == "FleetStatus"
    assert shown["epoch"] > 0
    assert shown == fleet_status(graph)


def test_without_a_coordinator_it_says_so_and_holds_nobody_up(
    graph: LocalGraph,
) -> None:
    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        asked = [clients.submit(get, f"{graph.url}/refit") for _ in range(CLIENTS)]
        time.sleep(ANSWER_SECONDS / 4)
        assert get(f"{graph.url}/v1/models")[0] == 200
        assert time.monotonic() - began < ANSWER_SECONDS
        answers = [question.result() for question in asked]
    # They share one question, although the frontend answers them one by one.
    assert time.monotonic() - began < 3 * ANSWER_SECONDS
    assert {code for code, _ in answers} == {503}
    for _, body in answers:
        assert "elsewhere.refit.status" in body["error"]
        assert "python -m dynamo.refit" in body["error"]
