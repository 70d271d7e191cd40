# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two real replicas behind the stock KV router: one version everywhere or nowhere,
joiners from a peer, taints, drains; on files and ZMQ, and on etcd and NATS."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockStored,
    KVCacheEvent,
    KVEventBatch,
)

from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    WorkerAdmitted,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import StageTimings
from graphs.client import Client, Completion, Load
from graphs.local import LocalGraph
from graphs.references import MAX_TOKENS, Answer, prompts
from tests.support.live_fleet import (
    HOLD_SECONDS,
    Fleet,
    live_fleet,
)
from tests.support.process_group import rank_process
from tests.support.processes import Trainer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.router,
    pytest.mark.timeout(600),
]

LENGTH = 300


@pytest.fixture(scope="module", params=["file", "etcd"])
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    with live_fleet(request.param, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture(autouse=True)
def no_faults(fleet: Fleet) -> Iterator[None]:
    yield
    fleet.forget_orders()


async def test_start_up_weights_serve_where_there_is_no_version(fleet: Fleet) -> None:
    await asyncio.to_thread(
        fleet.graph.wait_until,
        "both are admitted, as the coordinator sees it",
        lambda: [m["admitted"] for m in fleet.members().values()] == [True, True],
    )
    members = await asyncio.to_thread(fleet.members)
    assert [m["version"] for m in members.values()] == [None, None]
    await fleet.assert_serves("A")


async def test_both_change_together_under_load(fleet: Fleet) -> None:
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        async with Client(fleet.graph.url, fleet.graph.name) as client:
            load = Load(client, prompts(count=5, seed=11), streams=4, max_tokens=64)
            load.start()
            for name in ("B", "C"):
                done = await asyncio.to_thread(fleet.refit, trainer, name)
                first, second = await asyncio.to_thread(fleet.refitted, 2)
                assert set(done.workers) == {first.worker, second.worker}
                assert done.excluded == ()
                # Both waited for the other one at the barrier.
                for each in (first, second):
                    assert each.timings.pause_ms > 0
                    assert each.timings.stall_ms < HOLD_SECONDS * 1e3
                await fleet.assert_serves(name)
            await load.stop()
    assert load.failed == []
    assert load.truncated == []
    assert len(load.completions) >= 8


async def test_a_request_can_ask_for_a_version(fleet: Fleet) -> None:
    """Taints of both workers name the version, beside the user's own."""
    port = fleet.graph.worker_envs[0]["DYN_SYSTEM_PORT"]
    body = json.dumps({"taints": ["zone=a", "weights=12345"]}).encode()
    route = f"http://127.0.0.1:{port}/engine/update/model_taints"
    request = urllib.request.Request(route, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        before = fleet.version
        await asyncio.to_thread(fleet.refit, trainer, fleet.other())
    async with Client(fleet.graph.url, fleet.graph.name) as client:
        now = f"weights={fleet.version}"
        for taints, served in (
            ([now], True),
            ([now, "zone=a"], True),
            ([f"weights={before}"], False),
            (["weights=12345"], False),
            ([now, "zone=b"], False),
        ):
            constraints = {"routing_constraints": {"required_taints": taints}}
            asked = fleet.asked[0]
            answer = await client.complete(asked, MAX_TOKENS, nvext=constraints)
            assert (answer.error is None) is served, taints
            if served:
                assert answer.answer == fleet.expected[fleet.serving][0]


async def test_the_router_hears_when_all_kv_is_gone(fleet: Fleet) -> None:
    """``recompute`` clears prefix caches. vLLM tells so with its next step: an idle
    engine would not, but for the probe. With ``continue`` they stay, under old keys."""
    heard = [KvEvents(fleet.graph, index) for index in range(2)]
    # Nobody has asked this before, and it fills a block.
    prompt = prompts(count=2, seed=12)[1]
    async with Client(fleet.graph.url, fleet.graph.name) as client:
        with Trainer(fleet.graph, fleet.models["A"]) as trainer:
            for policy, cleared in (("recompute", 1), ("continue", 0)):
                for worker in await asyncio.to_thread(fleet.members):
                    pinned = {"backend_instance_id": worker}
                    await client.complete(prompt, MAX_TOKENS, nvext=pinned)
                for events in heard:
                    assert len(events.read(BlockStored)) > 0
                await asyncio.to_thread(fleet.refit, trainer, fleet.other(), policy)
                await asyncio.to_thread(fleet.refitted, 2)
                for events in heard:
                    assert len(events.read(AllBlocksCleared)) == cleared, policy
    for events in heard:
        events.close()
    await fleet.assert_serves(fleet.serving)


class KvEvents:
    """What a worker of the graph tells the KV router."""

    def __init__(self, graph: LocalGraph, index: int) -> None:
        command = graph.commands[f"worker{index}"]
        config = json.loads(command[command.index("--kv-events-config") + 1])
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.subscribe(b"")
        self._socket.connect(config["endpoint"].replace("*", "127.0.0.1"))
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def read(self, kind: type[KVCacheEvent]) -> list[KVCacheEvent]:
        """What has come of ``kind``, and within a second after it."""
        found: list[KVCacheEvent] = []
        while self._socket.poll(1000):
            *_, payload = self._socket.recv_multipart()
            found += self._decoder.decode(payload).events
        return [event for event in found if isinstance(event, kind)]

    def close(self) -> None:
        self._socket.close(linger=0)


async def test_the_example_follows_the_newest_version(fleet: Fleet) -> None:
    """README's client: it goes on while versions change, and is never behind."""
    command = [
        "-m",
        "graphs.follow_version",
        "--url",
        fleet.graph.url,
        "--count",
        "100",
    ]
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        first = fleet.version
        example = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            env={**os.environ, **fleet.graph.environment, "DYN_LOG": "error"},
            stdout=asyncio.subprocess.PIPE,
        )
        lines = [await asyncio.wait_for(example.stdout.readline(), 60)]
        await asyncio.to_thread(fleet.refit, trainer, fleet.other())
        rest, _ = await asyncio.wait_for(example.communicate(), 60)
    assert example.returncode == 0
    answers = [json.loads(line) for line in [*lines, *rest.splitlines()]]
    versions = [answer["version"] for answer in answers]
    assert len(versions) == 100
    for answer in answers:
        made = answer["token_versions"]
        assert len(made) == 16
        # It was sent to a worker of this version, which may have changed since.
        assert made == sorted(made)
        assert made[0] >= answer["version"]
        assert made[-1] <= fleet.version
    assert versions == sorted(versions)
    assert set(versions) == {first, fleet.version}


async def test_one_that_cannot_install_takes_both_back(fleet: Fleet) -> None:
    """At the barrier: the one that has installed goes back to the old weights, and no
    token of the new ones was made."""
    before = await asyncio.to_thread(fleet.members)
    fleet.order(0, install={"rank": 0, "error": "cannot write"})
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        version = next(fleet.versions)
        trainer.publish(version, fleet.models[fleet.other()])
        failed = await asyncio.to_thread(
            fleet.events.wait_for, RefitFailed, lambda e: e.version == version
        )
        assert trainer.released()["outcome"] == "failed"
    assert "cannot write" in failed.failure.message
    assert (failed.failure.rank, failed.failure.version) == (0, version)
    assert failed.failure.worker in before
    assert dict(failed.serving) == {w: m["version"] for w, m in before.items()}
    await fleet.assert_serves(fleet.serving)
    after = await asyncio.to_thread(fleet.members)
    for worker, member in after.items():
        assert (member["phase"], member["pending"]) == ("serving", None)
        assert member["version"] == before[worker]["version"]
        assert member["kv_epoch"] == before[worker]["kv_epoch"]
    assert fleet.events.of(WorkerRefitted, version) == []


async def test_one_that_cannot_stage_leaves_both_as_they_are(fleet: Fleet) -> None:
    fleet.order(1, stage={"rank": 0, "error": "no memory"})
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        version = next(fleet.versions)
        trainer.publish(version, fleet.models[fleet.other()])
        failed = await asyncio.to_thread(
            fleet.events.wait_for, RefitFailed, lambda e: e.version == version
        )
    assert "no memory" in failed.failure.message
    assert failed.failure.rank == 0 and failed.failure.worker is not None
    await fleet.assert_serves(fleet.serving)


async def test_a_coordinator_that_dies_leaves_nobody_paused(fleet: Fleet) -> None:
    """While one installs slowly the other one waits at the barrier, and the coordinator
    is killed: each goes on by itself, and the next coordinator brings them together."""
    fleet.order(0, install={"rank": 0, "seconds": 3.0})
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        name = fleet.other()
        fleet.version = next(fleet.versions)
        trainer.publish(fleet.version, fleet.models[name])
        for _ in range(2):
            await asyncio.to_thread(
                fleet.events.wait_for,
                WorkerStaged,
                lambda e: e.version == fleet.version,
            )
        await asyncio.sleep(0.5)
        # Nobody serves it yet: one is installing, the other one waits.
        assert fleet.events.of(WorkerRefitted, fleet.version) == []
        await asyncio.to_thread(fleet.restart_coordinator)
        async with Client(fleet.graph.url, fleet.graph.name) as client:
            # Whoever is asked answers, at the latest when the barrier's time is up.
            answers = await asyncio.gather(
                *(client.complete(fleet.asked[0], MAX_TOKENS) for _ in range(4))
            )
            assert [answer.error for answer in answers] == [None] * 4
        await asyncio.to_thread(
            fleet.events.wait_for,
            RefitCompleted,
            lambda e: e.version == fleet.version,
        )
    fleet.serving = name
    await fleet.assert_serves(name)


async def test_nothing_stays_paused_when_all_of_them_die(fleet: Fleet) -> None:
    """At the barrier: one installs slowly, the other one waits. Coordinator, trainer
    and, where the bus has one, its server are killed at once. Everyone goes on by
    itself, on one version, and when all are back there is another refit."""
    graph = fleet.graph
    before, name = fleet.serving, fleet.other()
    fleet.order(0, install={"rank": 0, "seconds": 2.0})
    members = await asyncio.to_thread(fleet.members)
    with Trainer(graph, fleet.models["A"]) as trainer:
        fleet.version = next(fleet.versions)
        trainer.publish(fleet.version, fleet.models[name])
        await asyncio.to_thread(fleet.wait_until_at, 0, "install")
        # Before anybody has changed.
        assert fleet.events.of(WorkerRefitted, fleet.version) == []
        dead = [graph.processes.pop("coordinator"), graph.processes.pop("nats", None)]
        trainer.child.kill()
        for process in filter(None, dead):
            process.kill()
    assert (dead[1] is not None) == (graph.environment["DYN_EVENT_PLANE"] == "nats")
    began = time.monotonic()
    async with Client(graph.url, graph.name) as client:
        await asyncio.gather(*(ask_all(fleet, client, worker) for worker in members))
        # They wait for an order from their pause on, and not longer.
        assert time.monotonic() - began < HOLD_SECONDS + 5
        for worker in members:
            # What each serves now is one version, the old or the new one.
            answers = await ask_all(fleet, client, worker)
            assert answers in (fleet.expected[before], fleet.expected[name])
    if dead[1] is not None:
        await asyncio.to_thread(graph.start_nats)
    await asyncio.to_thread(fleet.restart_coordinator)
    with Trainer(graph, fleet.models["A"]) as trainer:
        done = await asyncio.to_thread(fleet.refit, trainer, "A")
    assert set(done.workers) == set(members)
    await fleet.assert_serves("A")


async def ask_all(fleet: Fleet, client: Client, worker: int) -> list[Answer]:
    """Every prompt to one worker; its answers, none failed or cut short."""
    pinned = {"backend_instance_id": worker}
    completions = [
        await client.complete(prompt, MAX_TOKENS, nvext=pinned)
        for prompt in fleet.asked
    ]
    assert [c.error for c in completions] == [None] * len(completions)
    assert {len(c.answer.tokens) for c in completions} == {MAX_TOKENS}
    return [c.answer for c in completions]


async def test_a_rank_that_dies_takes_its_replica_out(fleet: Fleet) -> None:
    """Only the process of its rank is killed, while it installs. The version fails and
    says on which worker, that worker's process ends, and the other one serves on."""
    before = await asyncio.to_thread(fleet.members)
    fleet.order(1, install={"rank": 0, "seconds": 2.0})
    worker = fleet.graph.processes["worker1"]
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        version = next(fleet.versions)
        trainer.publish(version, fleet.models[fleet.other()])
        await asyncio.to_thread(fleet.wait_until_at, 1, "install")
        del fleet.graph.processes["worker1"]
        rank_process(worker.pid).kill()
        failed = await asyncio.to_thread(
            fleet.events.wait_for, RefitFailed, lambda e: e.version == version
        )
        assert trainer.released()["outcome"] == "failed"
    gone = failed.failure.worker
    assert await asyncio.to_thread(fleet.index_of, gone) == 1
    # One event says who, why, and what is served now.
    (other,) = set(before) - {gone}
    assert dict(failed.serving)[other] == before[other]["version"]
    assert fleet.events.of(WorkerRefitted, version) == []
    await asyncio.to_thread(fleet.wait_for_the_end, worker)
    await fleet.assert_serves(fleet.serving, workers=1)


async def test_a_joiner_comes_from_a_peer_and_never_shows_its_own(
    fleet: Fleet,
) -> None:
    """A replica is gone and comes back on the start-up weights, with the trainer long
    gone. All the while clients ask, and get tokens of the fleet's version only."""
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        for name in ("C", "B"):
            await asyncio.to_thread(fleet.refit, trainer, name)
    before = await asyncio.to_thread(fleet.members)
    if "worker1" in fleet.graph.processes:
        fleet.graph.processes.pop("worker1").kill()
    asking = asyncio.create_task(ask_until_told(fleet, stop := asyncio.Event()))
    await asyncio.to_thread(fleet.graph.start_worker, 1)
    admitted = await asyncio.to_thread(
        fleet.events.wait_for, WorkerAdmitted, lambda e: e.worker not in before
    )
    await asyncio.to_thread(fleet.graph.wait_for_worker, 1, "generate")
    await asyncio.sleep(2)
    stop.set()
    completions = await asking
    assert admitted.version == fleet.version
    expected = fleet.expected[fleet.serving][1]
    answered = [c for c in completions if c.error is None]
    # Lost are those that the killed worker had, and some that were sent there while it
    # still was in discovery.
    assert len(completions) - len(answered) <= 16
    assert len(answered) > 20
    assert {c.answer for c in answered} == {expected}
    await fleet.assert_serves(fleet.serving)
    staged = [
        e for e in fleet.events.of(WorkerStaged, fleet.version)
        if e.worker == admitted.worker
    ]  # fmt: skip
    assert [rank.session for rank in staged[-1].ranks] == ["cold"]
    done = fleet.events.of(RefitCompleted, fleet.version)[-1]
    assert done.catch_up
    assert admitted.worker in done.workers


async def ask_until_told(fleet: Fleet, stop: asyncio.Event) -> list[Completion]:
    completions = []
    async with Client(fleet.graph.url, fleet.graph.name) as client:
        while not stop.is_set():
            completions += await asyncio.gather(
                *(client.complete(fleet.asked[1], MAX_TOKENS) for _ in range(2))
            )
            await asyncio.sleep(0.2)
    return completions


async def test_only_so_many_read_from_the_trainer(fleet: Fleet) -> None:
    """The other one reads from the first, as soon as that one holds the version."""
    await asyncio.to_thread(fleet.restart_coordinator, "--direct-readers=1")
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        for _ in range(2):
            await asyncio.to_thread(fleet.refit, trainer, fleet.other())
            votes = await asyncio.to_thread(
                fleet.events.find_all, WorkerStaged, fleet.version, 2
            )
            direct, other = sorted(votes, key=lambda vote: vote.worker)
            assert stage(direct).finished_at < stage(other).started_at
            await fleet.assert_serves(fleet.serving)
    # Its reads from the peer are prepared for good, too.
    assert other.ranks[0].session == "warm"


def stage(vote: WorkerStaged) -> StageTimings:
    return vote.ranks[0].timings


async def test_rolling_changes_one_at_a_time(fleet: Fleet) -> None:
    await asyncio.to_thread(
        fleet.restart_coordinator, "--commit-policy=rolling", "--max-unavailable=1"
    )
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        await asyncio.to_thread(fleet.refit, trainer, fleet.other())
    first, second = await asyncio.to_thread(fleet.refitted, 2)
    # The second one is told when the first one has checked its live weights.
    assert second.at - seconds_of(second) > first.at
    await fleet.assert_serves(fleet.serving)


def seconds_of(refitted: WorkerRefitted) -> float:
    timings = refitted.timings
    return (timings.stall_ms + timings.probe_ms + timings.verify_ms) / 1e3


async def test_a_drain_ends_requests_under_the_old_weights(fleet: Fleet) -> None:
    """With ``rolling``: one at a time is out of routing, and no request fails."""
    prompt = fleet.asked[0]
    async with Client(fleet.graph.url, fleet.graph.name) as client:
        alone = await client.complete(prompt, LENGTH, ignore_eos=True)
        with Trainer(fleet.graph, fleet.models["A"]) as trainer:
            running = [
                asyncio.create_task(client.complete(prompt, LENGTH, ignore_eos=True))
                for _ in range(4)
            ]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(fleet.refit, trainer, fleet.other(), "drain")
            done = await asyncio.gather(*running)
    assert [c.error for c in done] == [None] * 4
    assert {c.answer for c in done} == {alone.answer}
    for each in await asyncio.to_thread(fleet.refitted, 2):
        assert (each.in_flight, each.carried_over) == ("drain", 0)
    await fleet.assert_serves(fleet.serving)


async def test_one_that_cannot_follow_is_fenced(fleet: Fleet) -> None:
    """With ``canary``: one has changed, so there is only forward. The last test."""
    await asyncio.to_thread(fleet.restart_coordinator, "--commit-policy=canary")
    members = await asyncio.to_thread(fleet.members)
    canary = min(members)
    index = await asyncio.to_thread(fleet.index_of, max(members))
    fleet.order(index, install={"rank": 0, "error": "cannot write"})
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        done = await asyncio.to_thread(fleet.refit, trainer, fleet.other())
    assert done.workers == (canary,)
    (why,) = done.excluded
    assert (why.worker, why.rank) == (max(members), 0)
    assert "cannot write" in why.message
    fenced = await asyncio.to_thread(fleet.events.find, WorkerFenced, fleet.version)
    assert fenced.worker == max(members)
    worker = fleet.graph.processes.pop(f"worker{index}")
    # Its engine goes with it.
    await asyncio.to_thread(fleet.wait_for_the_end, worker)
    await fleet.assert_serves(fleet.serving, workers=1)
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        version = next(fleet.versions)
        trainer.publish(version, fleet.models["A"], "drain")
        refused = await asyncio.to_thread(
            fleet.events.wait_for, RefitRefused, lambda e: e.version == version
        )
        assert refused.reason == "unsafe_policy"
