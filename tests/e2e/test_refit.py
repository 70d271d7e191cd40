# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A live TP=2 replica is refitted by events, and every answer is a fresh engine's."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
import uuid

import aiohttp
import pytest

from dynamo.refit.events import SCHEMA, StageProgress, WorkerStaged
from dynamo.refit.fingerprint import Batch, Part, version_fingerprint
from dynamo.refit.release import RELEASE
from graphs.client import Client, Completion, Load
from graphs.references import MAX_TOKENS, Answer, prompts
from graphs.trainer import load_weights
from graphs.versions import ASK, TokenVersions
from tests.e2e.conftest import Bench
from tests.support.labels import mislabelled
from tests.support.processes import Trainer, ask_cli, fleet_status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]

LENGTH = 1200

#: How long a request decodes before the version is staged; it takes longer itself.
STRADDLING_SECONDS = 0.6


async def test_start_up_weights_answer_like_a_fresh_engine(bench: Bench) -> None:
    await bench.assert_serves("A")


async def test_four_versions_under_load(bench: Bench) -> None:
    """B, C, A, B: bit-equal each time, no request fails or is cut short, the first
    cycle builds and the others build nothing."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            load = Load(client, prompts(count=5, seed=11), streams=2, max_tokens=64)
            load.start()
            counters = []
            for name in ("B", "C", "A", "B"):
                refitted = await asyncio.to_thread(bench.refit, trainer, name)
                assert refitted.timings.stall_ms > 0
                await bench.assert_serves(name)
                staged = bench.events.find(WorkerStaged, refitted.version)
                assert [rank.rank for rank in staged.ranks] == [0, 1]
                counters.append([rank.counters for rank in staged.ranks])
            await load.stop()
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 4
    for first in counters[0]:
        # Scratch; the shadows were there before the first version.
        assert (first.allocations, first.registrations) == (1, 1)
        assert first.descriptor_builds > 0
        assert first.hits == 0
    for warm in (rank for cycle in counters[1:] for rank in cycle):
        assert (warm.allocations, warm.registrations, warm.descriptor_builds) == (
            0,
        ) * 3
        assert warm.hits == 1


@pytest.mark.parametrize("in_flight", ["continue", "recompute"])
async def test_no_block_of_old_weights_is_reused(bench: Bench, in_flight: str) -> None:
    """A prompt whose KV is hot under the old weights, and is still being decoded with
    when they change: a later request has no cached token, then its own. What was being
    decoded goes on as if it had been asked for anew with ``recompute``, and on its old
    KV with ``continue``."""
    prompt = bench.asked[2]
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            name = "C" if bench.serving != "C" else "A"
            before = bench.version
            await client.complete(prompt, 8)
            hot = await client.complete(prompt, 8)
            assert hot.cached_tokens == 96  # 100 tokens, blocks of 32
            undisturbed = await client.complete(prompt, LENGTH, ignore_eos=True)
            bench.order(stage={"rank": 0, "seconds": STRADDLING_SECONDS})
            refit = asyncio.create_task(
                asyncio.to_thread(bench.refit, trainer, name, in_flight)
            )
            await asyncio.to_thread(bench.wait_until_at, "stage")
            running = asyncio.create_task(
                client.complete(prompt, LENGTH, ignore_eos=True, nvext=ASK)
            )
            refitted = await refit
            assert refitted.in_flight == in_flight
            first = await client.complete(prompt, 24)
            again = await client.complete(prompt, 24)
            straddling = await running
            changed = first_difference(undisturbed.answer, straddling.answer)
            anew = await client.complete(
                [*prompt, *straddling.answer.tokens[:changed]],
                LENGTH - changed,
                ignore_eos=True,
            )
    assert first.answer == bench.expected[name][2]
    assert first.cached_tokens == 0
    assert again.answer == bench.expected[name][2]
    assert again.cached_tokens == 96
    assert straddling.error is None
    assert len(straddling.answer.tokens) == LENGTH
    assert first.versions == ()
    labels = [before] * changed + [refitted.version] * (LENGTH - changed)
    assert list(straddling.versions) == labels
    rest = Answer(
        straddling.answer.tokens[changed:], straddling.answer.logprobs[changed:]
    )
    assert (rest == anew.answer) == (in_flight == "recompute")


async def test_every_token_says_its_version(bench: Bench) -> None:
    """Eight streams without a gap across a dozen changes, as far as fresh engines can
    tell. A version may be the same checkpoint as the one before."""
    seen: list[tuple[int, Completion]] = []
    stop = asyncio.Event()

    async def stream(client: Client, turn: int) -> None:
        while not stop.is_set():
            prompt = turn % len(bench.asked)
            asked = bench.asked[prompt]
            # On KV of its own: a request that waits in the engine across a change may
            # hit blocks of the old weights otherwise.
            nvext = {**ASK, "cache_salt": uuid.uuid4().hex}
            answer = await client.complete(asked, MAX_TOKENS, nvext=nvext)
            seen.append((prompt, answer))
            turn += 1

    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            streams = [asyncio.create_task(stream(client, turn)) for turn in range(8)]
            first = bench.version
            for name in "ABBCABCCABCA":
                await asyncio.to_thread(bench.refit, trainer, name)
            stop.set()
            await asyncio.gather(*streams)
    for prompt, completion in seen:

        def answer_of(version: int | None, prompt: int = prompt) -> Answer:
            return bench.expected[bench.checkpoints[version]][prompt]

        assert completion.error is None
        labels = [version or 0 for version in completion.versions]
        assert labels == sorted(labels)
        assert mislabelled(completion, answer_of) == ""
    said = {version for _, completion in seen for version in completion.versions}
    assert said == {first, *range(bench.version - 11, bench.version + 1)}
    assert sum(len(set(completion.versions)) > 1 for _, completion in seen) >= 5


async def test_whole_answers_say_it_for_every_choice(bench: Bench) -> None:
    """Completions and chat, one choice and more; nothing where it is not asked for."""
    bodies = {
        "completions": {"prompt": bench.asked[0]},
        "chat/completions": {"messages": [{"role": "user", "content": "Once"}]},
    }
    async with aiohttp.ClientSession(bench.graph.url) as session:

        async def ask(path: str, **fields: object) -> dict:
            body = {"model": bench.graph.name, "max_tokens": 9, "ignore_eos": True}
            body |= {**bodies[path], **fields}
            async with session.post(f"/v1/{path}", json=body) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        for path in bodies:
            for n in (1, 3):
                answer = await ask(path, n=n, nvext=ASK)
                assert answer["usage"]["completion_tokens"] == 9 * n
                versions = TokenVersions()
                versions.add(answer)
                said = [versions.of(index) for index in range(n)]
                assert said == [[bench.version] * 9] * n
            assert "nvext" not in await ask(path)


def first_difference(undisturbed: Answer, straddling: Answer) -> int:
    """The first token that was made with the new weights: until then, tokens and log
    probabilities are those of the old ones."""
    pairs = [zip(a.tokens, a.logprobs, strict=True) for a in (undisturbed, straddling)]
    made = zip(*pairs, strict=True)
    differ = [number for number, (old, new) in enumerate(made) if old != new]
    assert differ, "it had ended before the change"
    assert differ[0] > 0, "it had not begun before the change"
    return differ[0]


async def test_in_place_tensors_and_a_restarted_trainer(bench: Bench) -> None:
    """Another trainer process: new agent, new addresses, same layout. Buffers and
    registrations stay, only the requests are built again."""
    with Trainer(bench.graph, bench.models["A"], mode="in_place") as trainer:
        for name, session in (("B", "re-addressed"), ("A", "warm")):
            refitted = await asyncio.to_thread(bench.refit, trainer, name)
            staged = bench.events.find(WorkerStaged, refitted.version)
            for rank in staged.ranks:
                assert rank.session == session
                assert rank.counters.allocations == 0
                assert rank.counters.registrations == 0
                assert (rank.counters.descriptor_builds > 0) == (session != "warm")
            await bench.assert_serves(name)


async def test_tokens_flow_while_a_pull_is_under_way(bench: Bench) -> None:
    """The source does not answer for two seconds; serving does not notice."""
    bench.order(stage={"rank": 0, "seconds": 2.0})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        async with Client(bench.graph.url, bench.graph.name) as client:
            load = Load(client, prompts(count=3, seed=5), streams=1, max_tokens=100)
            load.start()
            refitted = await asyncio.to_thread(bench.refit, trainer, "C")
            await load.stop()
    staged = bench.events.find(WorkerStaged, refitted.version)
    assert staged.at - min(r.timings.started_at for r in staged.ranks) > 1.9
    progress = bench.events.of(StageProgress, refitted.version)
    assert 4 <= len(progress) <= 12, "a few times a second"
    held = [(r.rank, r.nbytes, r.total_nbytes) for r in progress[2].ranks]
    nbytes = staged.ranks[1].nbytes
    # The first rank's source has not said a byte; the other rank has all of them.
    assert held == [(0, 0, 0), (1, nbytes, nbytes)]
    offset = time.time() - time.monotonic()
    times = [t + offset for c in load.completions for t in c.times]
    during = [t for t in times if staged.at - 2.0 < t < staged.at]
    assert len(during) > 20
    await bench.assert_serves("C")


async def test_every_view_names_the_version(bench: Bench) -> None:
    """Dynamo's own admin route, vLLM's, and the coordinator's status agree."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        refitted = await asyncio.to_thread(bench.refit, trainer, "A")
    route = f"http://127.0.0.1:{bench.system_port}/engine/get_weight_version"
    request = urllib.request.Request(route, b"{}", {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer) == {
            "status": "ok",
            "version": refitted.version,
            "version_declared": True,
        }
    tensors = load_weights(bench.models["A"]).values()
    parts = [Part(t, tuple((0, n) for n in t.shape), t.shape) for t in tensors]
    fingerprint = version_fingerprint(Batch(parts).fold())
    verified = await asyncio.to_thread(ask_cli, bench.graph, "verify")
    assert verified == {
        "worker": refitted.worker,
        "type": "WeightsVerified",
        "version": refitted.version,
        "fingerprint": fingerprint,
    }
    assert refitted.fingerprint == fingerprint
    status = await asyncio.to_thread(fleet_status, bench.graph)
    (member,) = status["members"]
    assert (status["completed"], status["under_way"]) == (refitted.version, None)
    assert member["status"]["version"] == refitted.version
    assert member["status"]["kv_epoch"] == refitted.kv_epoch
    assert member["status"]["phase"] == "serving"
    assert member["behind"] == 0
    assert member["status"]["stall_ms"] == refitted.timings.stall_ms
    assert abs(member["status"]["since"] - refitted.at) < 60
    ours = {"release": RELEASE, "schema": SCHEMA}
    for view in (status, member["status"]):
        assert {name: view[name] for name in ours} == ours
    staged = bench.events.find(WorkerStaged, refitted.version)
    cache = member["status"]["cache"]
    assert cache["session"] == staged.ranks[0].session
    assert cache["counters"]["hits"] == sum(r.counters.hits for r in staged.ranks)


async def test_the_doctor_finds_nothing_wrong(bench: Bench) -> None:
    """Or it would end with 1, which is not taken."""
    last = await asyncio.to_thread(ask_cli, bench.graph, "doctor")
    assert (last["check"], last["level"]) == ("UCX transports", "ok")


async def test_the_history_tells_what_came_last(bench: Bench) -> None:
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        refitted = await asyncio.to_thread(bench.refit, trainer, "B")
    last = await asyncio.to_thread(ask_cli, bench.graph, "history")
    assert (last["version"], last["outcome"]) == (refitted.version, "completed")
    assert last["workers"] == [refitted.worker]
    assert last["stall_ms"] == refitted.timings.stall_ms
    assert 0 < last["seconds"] < last["ended_at"] - last["announced_at"] + 1
