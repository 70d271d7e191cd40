# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong, an event says so and the old version serves, bit for bit."""

from __future__ import annotations

import asyncio
import re
import signal
import struct
import time
from pathlib import Path

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventPublisher
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.events import (
    MAX_EVENT_BYTES,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    StageProgress,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from graphs.client import Client, Completion
from graphs.local import Process
from tests.e2e.conftest import COMMIT_SECONDS, STAGE_SECONDS, Bench
from tests.support.process_group import held, living, rank_process
from tests.support.processes import Trainer, fleet_status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.faults,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]

EMBEDDING = "model.embed_tokens.weight"
ROW_PARALLEL = "model.layers.2.mlp.down_proj.weight"
FUSED = "model.layers.1.self_attn.k_proj.weight"


async def assert_unchanged(bench: Bench, before: dict) -> None:
    """The old version serves bit-exactly, nothing is staged, held or paused."""
    await bench.assert_serves(bench.serving)
    status = await asyncio.to_thread(fleet_status, bench.graph)
    (member,), (earlier,) = status["members"], before["members"]
    assert member["worker"] == earlier["worker"]
    assert member["status"]["phase"] == "serving"
    assert member["status"]["pending"] is None
    assert member["status"]["version"] == earlier["status"]["version"]
    assert member["status"]["kv_epoch"] == earlier["status"]["kv_epoch"]
    assert status["under_way"] is None
    assert not [e for e in bench.events.seen if isinstance(e, WorkerFenced)]


def other(bench: Bench) -> str:
    return "B" if bench.serving != "B" else "C"


def publish_and_fail(bench: Bench, trainer: Trainer, name: str) -> RefitFailed:
    version = next(bench.versions)
    trainer.publish(version, bench.models[name])
    failed = bench.events.wait_for(RefitFailed, lambda e: e.version == version)
    assert trainer.released()["outcome"] == "failed"
    assert bench.events.of(RefitCompleted, version) == []
    return failed


async def test_unknown_model(bench: Bench) -> None:
    before = fleet_status(bench.graph)
    with Trainer(bench.graph, bench.models["A"], model="somebody-else") as trainer:
        version = next(bench.versions)
        trainer.publish(version, bench.models["B"])
        refused = bench.events.wait_for(RefitRefused, lambda e: e.version == version)
        assert refused.reason == "unknown_model"
        assert "somebody-else" in refused.detail
        assert trainer.released()["outcome"] == "refused"
    await assert_unchanged(bench, before)


@pytest.mark.parametrize(
    ("reason", "payload"),
    [
        ("malformed_event", b"\x00 not an event \xff"),
        ("oversized_event", b"\x81" * (MAX_EVENT_BYTES + 1)),
    ],
)
async def test_bytes_that_are_no_event(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reason: str, payload: bytes
) -> None:
    before = fleet_status(bench.graph)
    for name, value in bench.graph.environment.items():
        monkeypatch.setenv(name, value)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    topic = runtime.endpoint(f"{bench.graph.namespace}.refit.weight_versions")
    async with EventPublisher(topic, "vandal") as publisher:
        # The coordinator discovers a new publisher within moments.
        for number in range(20):
            frames = [b"", struct.pack(">Q", number), payload]
            publisher._socket.send_multipart(frames)
            await asyncio.sleep(0.05)
    runtime.shutdown()
    refused = await asyncio.to_thread(
        bench.events.wait_for, RefitRefused, lambda e: e.reason == reason
    )
    assert refused.detail
    assert refused.version is None
    await assert_unchanged(bench, before)


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        ("drop", ROW_PARALLEL, "missing or has another shape"),
        ("drop", FUSED, "missing or has another shape"),
        ("grow", FUSED, "another shape"),
        ("shrink", ROW_PARALLEL, "rejects it"),
        ("shrink", EMBEDDING, "rejects it"),
        ("int8", FUSED, "publish it as bfloat16"),
    ],
)
async def test_tensors_that_do_not_fit(
    bench: Bench, change: str, tensor: str, says: str
) -> None:
    """Refused at prepare, by name, before a byte moves."""
    before = fleet_status(bench.graph)
    with Trainer(
        bench.graph, bench.models["A"], change=change, tensor=tensor
    ) as trainer:
        failed = publish_and_fail(bench, trainer, other(bench))
    assert failed.failure.kind == "LayoutRefused"
    assert says in failed.failure.message
    layer = tensor.split(".")[2]
    assert failed.failure.tensor == tensor or (
        # What is missing shows in the parameter that it is part of.
        change == "drop" and f".{layer}." in failed.failure.tensor
    )
    assert failed.serving == ((failed.failure.worker, before["completed"]),)
    await assert_unchanged(bench, before)


async def test_bytes_that_change_after_the_announcement(
    bench: Bench, tmp_path: Path
) -> None:
    """Everything fits but one number of one tensor: no rank installs it. The same
    trainer's next version is whole."""
    before = fleet_status(bench.graph)
    order = tmp_path / "torn"
    order.touch()
    with Trainer(
        bench.graph,
        bench.models["A"],
        change="torn",
        tensor=FUSED,
        REFIT_TEST_TORN=str(order),
    ) as trainer:
        failed = publish_and_fail(bench, trainer, other(bench))
        assert failed.failure.kind == "FingerprintMismatch"
        assert failed.failure.tensor == FUSED
        await assert_unchanged(bench, before)
        order.unlink()
        bench.refit(trainer, other(bench))
    await bench.assert_serves(bench.serving)


def begin_to_read(bench: Bench) -> tuple[Trainer, int]:
    """A trainer that is deaf, and the version that is being staged from it.

    An event says that it is, not the command line: while ranks poll such a trainer,
    another process has taken the kernel up to 18 s to start or to end.
    """
    trainer = Trainer(bench.graph, bench.models["A"], change="deaf")
    version = next(bench.versions)
    trainer.publish(version, bench.models[other(bench)])
    progress = bench.events.wait_for(StageProgress, lambda e: e.version == version)
    assert [(rank.rank, rank.nbytes) for rank in progress.ranks] == [(0, 0), (1, 0)]
    return trainer, version


async def test_trainer_killed_in_the_middle_of_the_pull(bench: Bench) -> None:
    before = fleet_status(bench.graph)
    trainer, version = begin_to_read(bench)
    trainer.kill()
    failed = bench.events.wait_for(RefitFailed, lambda e: e.version == version)
    assert failed.failure.kind == "TransferFailed"
    assert failed.failure.rank in (0, 1)
    assert failed.failure.version == version
    await assert_unchanged(bench, before)


async def test_trainer_that_discovery_has_given_up(bench: Bench) -> None:
    """Stopped for longer than its lease; a transport takes it for a slow one."""
    before = fleet_status(bench.graph)
    trainer, version = begin_to_read(bench)
    trainer.child.send_signal(signal.SIGSTOP)
    failed = bench.events.wait_for(RefitFailed, lambda e: e.version == version)
    trainer.kill()
    assert failed.failure.kind == "TransferFailed"
    assert re.fullmatch(
        r"instance \d+ of \S+, from which 0 of \d+ bytes had been read, is gone from "
        "discovery: publish the version again",
        failed.failure.message,
    )
    assert (failed.failure.rank, failed.failure.version) == (0, version)
    assert failed.failure.worker == before["members"][0]["worker"]
    await assert_unchanged(bench, before)


async def test_source_that_never_answers(bench: Bench) -> None:
    """The pull is given up at its deadline. Its bytes may still land later, so its
    buffers are not used again: the next refit is whole, before and after they do."""
    before = fleet_status(bench.graph)
    deaf = Trainer(bench.graph, bench.models["A"], change="deaf")
    began = time.monotonic()
    failed = publish_and_fail(bench, deaf, other(bench))
    assert failed.failure.kind == "StagingCancelled"
    assert STAGE_SECONDS - 1 < time.monotonic() - began < STAGE_SECONDS + 30
    await assert_unchanged(bench, before)
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        name = other(bench)
        refitted = bench.refit(trainer, name)
        for rank in bench.events.find(WorkerStaged, refitted.version).ranks:
            assert rank.session == "cold"
        await bench.assert_serves(name)
        deaf.kill()
        bench.refit(trainer, "A")
        await bench.assert_serves("A")


@pytest.mark.parametrize("rank", [0, 1])
async def test_rank_raises_in_stage(bench: Bench, rank: int) -> None:
    before = fleet_status(bench.graph)
    bench.order(stage={"rank": rank, "error": "no luck today", "times": 1})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        failed = publish_and_fail(bench, trainer, other(bench))
        assert failed.failure.kind == "RuntimeError"
        assert failed.failure.message == "no luck today"
        assert (failed.failure.stage, failed.failure.rank) == ("stage", rank)
        await assert_unchanged(bench, before)
        bench.refit(trainer, other(bench))
    await bench.assert_serves(bench.serving)


async def test_install_that_fails_once_is_repeated(bench: Bench) -> None:
    bench.order(install={"rank": 1, "error": "hiccup", "times": 1})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        refitted = bench.refit(trainer, other(bench))
    assert refitted.timings.install_retries == 1
    await bench.assert_serves(bench.serving)


@pytest.mark.parametrize("step", ["install", "after_install"])
async def test_install_that_fails_is_undone(bench: Bench, step: str) -> None:
    """Rank 0 writes (before or after raising), rank 1 writes: both are put back."""
    before = fleet_status(bench.graph)
    bench.order(**{step: {"rank": 0, "error": "broken for good"}})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        failed = publish_and_fail(bench, trainer, other(bench))
        assert failed.failure.message == "broken for good"
        assert (failed.failure.stage, failed.failure.rank) == ("install", 0)
        await assert_unchanged(bench, before)
        bench.faults.unlink()
        bench.refit(trainer, other(bench))
    await bench.assert_serves(bench.serving)


async def test_coordinator_killed_after_prepare(bench: Bench) -> None:
    """The worker gives the version up by itself and says so; a new coordinator
    brings it after all."""
    before = fleet_status(bench.graph)
    name = other(bench)
    kept = Policy(commit_seconds=COMMIT_SECONDS, drain_seconds=0).keep_seconds(1)
    bench.order(stage={"rank": 0, "seconds": 2.0})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        version = next(bench.versions)
        trainer.publish(version, bench.models[name])
        bench.events.wait_for(RefitStarted, lambda e: e.version == version)
        await asyncio.sleep(1.0)
        bench.graph.processes["coordinator"].kill()
        bench.events.wait_for(WorkerStaged, lambda e: e.version == version)
        failed = bench.events.wait_for(
            RefitFailed,
            lambda e: e.version == version,
            STAGE_SECONDS + kept + 10,
        )
        assert failed.sender.startswith("worker-")
        assert failed.failure.stage == "vote"
        assert "coordinator" in failed.failure.message
        await bench.assert_serves(bench.serving)
        bench.faults.unlink()
        bench.graph.start_coordinator()
        bench.events.wait_for(RefitCompleted, lambda e: e.version == version)
        assert trainer.released()["outcome"] == "completed"
    bench.serving = name
    await bench.assert_serves(name)
    assert fleet_status(bench.graph)["epoch"] > before["epoch"]


async def test_coordinator_killed_after_commit_was_sent(bench: Bench) -> None:
    """The worker carries the commit through alone and is not left paused; a new
    coordinator finds it done."""
    name = other(bench)
    bench.order(install={"rank": 0, "seconds": 2.0})
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        version = next(bench.versions)
        trainer.publish(version, bench.models[name])
        bench.events.wait_for(WorkerStaged, lambda e: e.version == version)
        await asyncio.sleep(1.0)
        bench.graph.processes["coordinator"].kill()
        bench.events.find(WorkerRefitted, version)
        bench.serving = name
        await bench.assert_serves(name)
        bench.graph.start_coordinator()
        completed = bench.events.wait_for(
            RefitCompleted, lambda e: e.version == version
        )
        assert completed.seconds is None
        assert trainer.released()["outcome"] == "completed"


async def test_failures_leak_nothing(bench: Bench) -> None:
    """Threads and file descriptors of every worker process after many failed cycles
    are those after the first."""
    counts = []
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        bench.refit(trainer, other(bench))
        for _ in range(6):
            bench.order(stage={"rank": 1, "error": "again", "times": 1})
            publish_and_fail(bench, trainer, other(bench))
            counts.append(held(bench.graph.processes["worker0"].pid))
        bench.refit(trainer, other(bench))
    await bench.assert_serves(bench.serving)
    threads = [each.threads for each in counts[1:]]
    descriptors = [each.descriptors for each in counts[1:]]
    assert max(threads) - min(threads) <= 2
    assert max(descriptors) - min(descriptors) <= 4


async def test_a_worker_of_unknown_weights_is_fenced(bench: Bench) -> None:
    """Rank 0 can neither install nor undo, rank 1 has installed: no token of such a
    mixture is made, and the process ends. In a pause: the agent does it, and says so.
    It takes the worker along.
    """
    async with Client(bench.graph.url, bench.graph.name) as client:
        with Trainer(bench.graph, bench.models["A"]) as trainer:
            await asyncio.to_thread(bench.refit, trainer, other(bench))
            bench.order(
                install={"rank": 0, "error": "cannot write"},
                restore={"rank": 0, "error": "cannot undo"},
            )
            straddling = asyncio.create_task(stream_until_cut_off(bench, client))
            version = next(bench.versions)
            trainer.publish(version, bench.models[other(bench)], "recompute")
            fenced = await asyncio.to_thread(
                bench.events.wait_for, WorkerFenced, lambda e: e.version == version
            )
            failed = await asyncio.to_thread(bench.events.find, RefitFailed, version)
            assert trainer.released()["outcome"] == "failed"
        cut_off = await straddling
    for failure in (fenced.failure, failed.failure):
        assert failure.kind == "WeightsUnknown"
        assert "cannot write" in failure.message
        assert "cannot undo" in failure.message
    # The stream ends in an error, which a router can act on; not in a "stop".
    assert cut_off.error is not None
    assert cut_off.finish_reason is None
    await assert_ends(bench.graph.processes.pop("worker0"))


async def stream_until_cut_off(bench: Bench, client: Client) -> Completion:
    """One stream after another, until one does not come to its end."""
    while True:
        completion = await client.complete(bench.asked[0], 1500, ignore_eos=True)
        if completion.error is not None or completion.finish_reason != "length":
            return completion


async def assert_ends(worker: Process) -> None:
    deadline = time.monotonic() + 30
    while worker.running and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert not worker.running
    worker.kill()


async def bring_a_worker(bench: Bench, trainer: Trainer) -> None:
    """The one before is gone, and with it the last copy of what was served: another
    one serves nothing before it has a version."""
    bench.graph.start_worker()
    bench.graph.wait_for_worker()
    lost = await asyncio.to_thread(
        bench.events.wait_for, RefitFailed, lambda e: e.failure.kind == "NoSource"
    )
    assert "publish a new version" in lost.failure.message
    async with Client(bench.graph.url, bench.graph.name) as client:
        assert (await client.complete(bench.asked[0], 1)).error is not None
    await asyncio.to_thread(bench.refit, trainer, "A")
    await asyncio.to_thread(bench.graph.wait_for_model)
    await bench.assert_serves("A")


async def test_ranks_that_end_take_their_worker_along(bench: Bench) -> None:
    """The same between two steps: the ranks end by themselves, then the engine, and
    Dynamo ends the process, perhaps before the agent can say why. The coordinator
    says that it is gone.
    """
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        if "worker0" not in bench.graph.processes:
            await bring_a_worker(bench, trainer)
        bench.order(
            install={"rank": 0, "error": "cannot write"},
            restore={"rank": 0, "error": "cannot undo"},
        )
        async with Client(bench.graph.url, bench.graph.name) as client:
            straddling = asyncio.create_task(stream_until_cut_off(bench, client))
            version = next(bench.versions)
            trainer.publish(version, bench.models["B"], "continue")
            failed = await asyncio.to_thread(bench.events.find, RefitFailed, version)
            assert trainer.released()["outcome"] == "failed"
            cut_off = await straddling
    assert failed.failure.worker is not None
    assert failed.failure.stage in ("commit", "committing", "install")
    assert bench.events.of(WorkerRefitted, version) == []
    assert bench.events.of(RefitCompleted, version) == []
    assert cut_off.error is not None
    assert cut_off.finish_reason is None
    await assert_ends(bench.graph.processes.pop("worker0"))


@pytest.mark.parametrize("step", ["stage", "install"])
async def test_one_rank_of_two_is_killed(bench: Bench, step: str) -> None:
    """The other one may wait for it in vain: the version fails, and says on whom, and
    the worker ends with all that it has started."""
    with Trainer(bench.graph, bench.models["A"]) as trainer:
        if "worker0" in bench.graph.processes:
            await asyncio.to_thread(bench.refit, trainer, "A")
        else:
            await bring_a_worker(bench, trainer)
        (member,) = (await asyncio.to_thread(fleet_status, bench.graph))["members"]
        bench.order(**{step: {"rank": 1, "seconds": 3.0}})
        version = next(bench.versions)
        trainer.publish(version, bench.models["B"])
        await asyncio.to_thread(bench.wait_until_at, step)
        worker = bench.graph.processes.pop("worker0")
        rank_process(worker.pid, rank=1).kill()
        failed = await asyncio.to_thread(bench.events.find, RefitFailed, version)
        assert trainer.released()["outcome"] == "failed"
    assert failed.failure.worker == member["worker"]
    assert bench.events.of(WorkerRefitted, version) == []
    deadline = time.monotonic() + 30
    while living(worker.pid) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert living(worker.pid) == []
    await assert_ends(worker)
