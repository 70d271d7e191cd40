# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a stock frontend makes of the versions of tokens: in streams and whole answers,
of several choices, of a request that it migrates, and of one that does not ask."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from graphs.local import LocalGraph
from graphs.tiny_model import make_checkpoint
from graphs.versions import ASK, TokenVersions
from tests.support import labelled_worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

TOKENS = 5
#: Of every choice, by :mod:`tests.support.labelled_worker`.
MADE = [1, 1, 2, 2, 2]

BODIES = {
    "completions": {"prompt": [1, 2, 3]},
    "chat/completions": {"messages": [{"role": "user", "content": "Once"}]},
}


class Workers:
    """Those of a graph, with its frontend."""

    def __init__(self, graph: LocalGraph) -> None:
        self.graph = graph

    def start(self, name: str, **environment: str) -> int:
        """One more; its instance id."""
        script = [labelled_worker.__file__, str(self.graph.model), self.graph.name]
        process = self.graph.run(name, script, **environment)

        def said() -> list[int]:
            lines = process.log.read_text().splitlines()
            return [int(line) for line in lines if line.isdigit()]

        self.graph.wait_until(f"{name} is there", lambda: len(said()) == 1)
        return said()[0]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    directory = tmp_path_factory.mktemp("graph")
    graph = LocalGraph(
        make_checkpoint(directory / "model", seed=1),
        frontend_args=["--migration-limit=3"],
        namespace="labelled",
        directory=directory,
    )
    with graph:
        graph.start_frontend()
        workers = Workers(graph)
        workers.start("labelled0")
        graph.wait_for_model()
        yield workers


@pytest.fixture
async def session(workers: Workers) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(workers.graph.url) as session:
        yield session


async def ask(session: aiohttp.ClientSession, path: str, **fields: object) -> dict:
    body = {"model": "tiny", "max_tokens": TOKENS, **BODIES[path], **fields}
    async with session.post(f"/v1/{path}", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def stream(
    session: aiohttp.ClientSession, path: str, **fields: object
) -> list[dict]:
    body = {"model": "tiny", "max_tokens": TOKENS, **BODIES[path], **fields}
    async with session.post(f"/v1/{path}", json={**body, "stream": True}) as response:
        lines = (await response.text()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", BODIES)
async def test_whole_answers(session: aiohttp.ClientSession, path: str, n: int) -> None:
    answer = await ask(session, path, n=n, nvext=ASK)
    versions = TokenVersions()
    versions.add(answer)
    assert [versions.of(index) for index in range(n)] == [MADE] * n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", BODIES)
async def test_streams(session: aiohttp.ClientSession, path: str, n: int) -> None:
    """Of the tokens so far, in every chunk."""
    versions = TokenVersions()
    lengths = []
    for chunk in await stream(session, path, n=n, nvext=ASK):
        versions.add(chunk)
        lengths.append(len(versions.of(0)))
    assert [versions.of(index) for index in range(n)] == [MADE] * n
    assert list(dict.fromkeys(lengths)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("nvext", [{}, {"extra_fields": ["worker_id"]}])
@pytest.mark.parametrize("path", BODIES)
async def test_nothing_is_added_where_it_is_not_asked_for(
    session: aiohttp.ClientSession, path: str, nvext: dict
) -> None:
    answer = await ask(session, path, nvext=nvext)
    chunks = await stream(session, path, nvext=nvext)
    for part in (answer, *chunks):
        assert "engine_data" not in (part.get("nvext") or {})


async def test_a_stream_that_is_migrated(
    workers: Workers, session: aiohttp.ClientSession
) -> None:
    """Its worker dies after three tokens; the next one makes the other two, with its
    own version 1. A whole answer is the last worker's, and says so."""
    dying = workers.start("dying", REFIT_TEST_DIES_AFTER="3")
    for _ in range(20):
        versions = TokenVersions()
        for chunk in await stream(session, "completions", nvext=ASK):
            versions.add(chunk)
        assert len(versions.of()) == TOKENS
        if dying in versions.workers:
            break
    workers.graph.processes.pop("dying").kill()
    assert versions.workers[0] == dying
    assert len(versions.workers) == 2
    assert versions.of() == [1, 1, 2, 1, 1]


async def test_a_whole_answer_that_is_migrated(
    workers: Workers, session: aiohttp.ClientSession
) -> None:
    """It has the labels of its last worker's tokens, and of no others."""
    workers.start("dying too", REFIT_TEST_DIES_AFTER="3")
    for _ in range(20):
        answer = await ask(session, "completions", nvext=ASK)
        versions = TokenVersions()
        versions.add(answer)
        if len(versions.of()) < TOKENS:
            break
    workers.graph.processes.pop("dying too").kill()
    assert answer["usage"]["completion_tokens"] == TOKENS
    assert versions.of() == [1, 1]
