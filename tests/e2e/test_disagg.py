# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode worker are refitted in one version. KV goes from one to the
other over NIXL, and none of another version is ever shared."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dynamo.refit.events import RefitCompleted, WorkerRefitted
from graphs import disagg
from graphs.client import Client, Load
from graphs.local import Plane
from graphs.references import MAX_TOKENS, prompts, reference_answers
from graphs.tiny_model import make_checkpoint
from graphs.versions import ASK
from tests.support.live_fleet import CACHE, SEEDS
from tests.support.processes import Events, Trainer, fleet_status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.router,
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize("plane", ["file", "etcd"])
async def test_both_kinds_of_workers_change_in_one_version(
    plane: Plane, tmp_path: Path
) -> None:
    """One at a time, so that there are requests whose prefill was of another version
    than their decoding: they are answered, and leave nothing behind."""
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
    graph = disagg.build(
        models["A"],
        coordinator_args=["--commit-policy=rolling"],
        plane=plane,
        directory=tmp_path,
    )
    with graph:
        await asyncio.to_thread(graph.start)
        events = Events(graph)
        members = fleet_status(graph)["members"]
        assert {m["component"] for m in members} == {"backend", "prefill"}
        workers = {m["worker"] for m in members}
        with Trainer(graph, models["A"]) as trainer:
            async with Client(graph.url, graph.name) as client:
                load = Load(client, asked, streams=3, max_tokens=MAX_TOKENS)
                load.start()
                for version, name in enumerate("BCABCA", start=1):
                    trainer.publish(version, models[name])
                    await asyncio.to_thread(events.find, RefitCompleted, version)
                    for _ in ("cold", "hot"):
                        answers = [
                            await client.complete(prompt, MAX_TOKENS, nvext=ASK)
                            for prompt in asked
                        ]
                        assert [a.error for a in answers] == [None] * len(asked)
                        labels = {answer.versions for answer in answers}
                        assert labels == {(version,) * MAX_TOKENS}
                        assert [a.answer for a in answers] == expected[name], version
                    done = await asyncio.to_thread(
                        events.find_all, WorkerRefitted, version, 2
                    )
                    assert {event.worker for event in done} == workers
                    assert len({event.fingerprint for event in done}) == 1
                    assert trainer.released()["outcome"] == "completed"
                await load.stop()
        assert load.failed == []
        assert load.truncated == []
        assert len(load.completions) > 20
        events.kill()
