# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The examples of ``graphs/training``: what they publish is what a worker then has.

A real coordinator, and a worker without an engine that reads every byte over NIXL. The
frameworks' own classes are stood in for by as little as the hooks need.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from dynamo.runtime import DistributedRuntime
from safetensors.torch import load_file
from torch import nn

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.publish.handle import Release
from graphs.tiny_model import make_checkpoint
from graphs.training import nemo_rl, prime_rl, verl
from tests.support.fake_worker import FakeWorker, fake_worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(180),
]

#: Processes import torch while others keep both cores busy.
PATIENCE_SECONDS = 120.0


@pytest.fixture
async def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[FakeWorker]:
    """The only worker of a namespace with a coordinator; it serves the model "tiny"."""
    planes = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "error",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in planes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DYN_NAMESPACE", raising=False)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    async with fake_worker(runtime, "dynamo", "tiny") as worker:
        coordinator = await start("dynamo.refit", "--fleet-poll-seconds", "0.1")
        yield worker
        coordinator.kill()
        await coordinator.wait()
    runtime.shutdown()


async def start(module: str, *arguments: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
        env=dict(os.environ),
    )


async def run(module: str, *arguments: object) -> list[dict]:
    """What it says in JSON, if it ends well."""
    child = await start(module, *arguments)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            out, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
    assert child.returncode == 0, out.decode()
    lines = out.decode().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "a", seed=1)


def assert_trained_and_served(
    worker: FakeWorker, said: list[dict], kept: Path, checkpoint: Path
) -> None:
    """Versions 5 and 6 were served as they were kept, and are not what was loaded."""
    assert [line["version"] for line in said] == [5, 5, 6, 6]
    ends = [line for line in said if "outcome" in line]
    assert ends == [
        {"version": version, "outcome": "completed", "detail": ""} for version in (5, 6)
    ]
    before = load_file(checkpoint / "model.safetensors")
    assert worker.served.keys() == {5, 6}
    for version in (5, 6):
        after = load_file(kept / str(version) / "model.safetensors")
        assert_bytes(worker.served[version], after)
        assert before.keys() == after.keys()
        # bf16 swallows a step on weights as large as the norms'.
        moved = [name for name in after if not torch.equal(before[name], after[name])]
        assert len(moved) > len(after) / 2
        before = after


def assert_bytes(found: dict[str, torch.Tensor], weights: dict) -> None:
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        expected = tensor.detach().contiguous().view(-1).view(torch.uint8)
        assert torch.equal(found[name], expected), name


OPTIONS = ("--steps", 2, "--first-version", 5)


async def test_a_plain_loop(
    worker: FakeWorker, checkpoint: Path, tmp_path: Path
) -> None:
    said = await run(
        "graphs.training.plain", "--model", checkpoint, "--keep", tmp_path, *OPTIONS
    )
    assert_trained_and_served(worker, said, tmp_path, checkpoint)
    assert worker.aborted == []


async def test_fsdp2_under_torchrun(
    worker: FakeWorker, checkpoint: Path, tmp_path: Path
) -> None:
    """Two gloo ranks; each has been read from."""
    said = await run(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "graphs.training.fsdp",
        "--model",
        checkpoint,
        "--keep",
        tmp_path,
        *OPTIONS,
    )
    assert_trained_and_served(worker, said, tmp_path, checkpoint)
    assert len(worker.regions) == 2


async def test_a_version_that_is_not_served_ends_the_loop_with_1(
    worker: FakeWorker, checkpoint: Path
) -> None:
    worker.refuse = LayoutRefused("not this model")
    child = await start("graphs.training.plain", "--model", checkpoint, "--steps", 1)
    async with asyncio.timeout(PATIENCE_SECONDS):
        out, _ = await child.communicate()
    assert child.returncode == 1
    end = json.loads(out.decode().splitlines()[-1])
    assert (end["version"], end["outcome"]) == (1, "failed")
    assert "not this model" in end["detail"]


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False))


def train(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight moves; returns what they are then."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.125
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


class Policy:
    """NeMo-RL's policy with two workers, each a thread with a replica of the model."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2)
        self.workers = [nemo_rl.PolicyWorkerHooks() for _ in (0, 1)]
        store = dist.HashStore()
        for rank, worker in enumerate(self.workers):
            worker.model, worker.rank, worker.world_size = module(1), rank, 2
            worker.store = store

    def _run_all(self, method: str, *arguments: object) -> list:
        futures = [
            self._pool.submit(getattr(worker, method), *arguments)
            for worker in self.workers
        ]
        return [future.result() for future in futures]

    def init_refit(self, model: str) -> None:
        self._run_all("init_refit", model)

    def publish_refit(self, version: int) -> list[Release]:
        return self._run_all("publish_refit", version)

    def shutdown_refit(self) -> None:
        self._run_all("shutdown_refit")


async def test_nemo_rl_synchronizes_through_refit(worker: FakeWorker) -> None:
    policy = Policy()
    synchronizer = nemo_rl.Synchronizer(policy, "tiny", next_version=3)
    await asyncio.to_thread(synchronizer.init_communicator)
    for version in (3, 4):
        synchronizer.mark_stale()
        weights, _ = [train(worker.model) for worker in policy.workers]
        metrics = await asyncio.to_thread(synchronizer.sync_weights)
        assert metrics == {"weight_version": version}
        assert not synchronizer.is_stale
        assert worker.version == version
        assert_bytes(worker.live, weights)

    synchronizer.mark_stale()
    with pytest.raises(NotImplementedError, match="KV-cache scales"):
        synchronizer.sync_weights(kv_scales={"k": 1.0})
    worker.refuse = LayoutRefused("not this model")
    with pytest.raises(RuntimeError, match=r"version 5 failed: .*not this model"):
        await asyncio.to_thread(synchronizer.sync_weights)
    assert synchronizer.is_stale
    assert worker.version == 4
    worker.refuse = None
    await asyncio.to_thread(synchronizer.sync_weights)
    assert (worker.version, synchronizer.is_stale) == (6, False)
    await asyncio.to_thread(synchronizer.shutdown)


def gathered(model: nn.Module, taken: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """As verl hands over weights: whole, one by one, and gone again."""
    for name, parameter in model.named_parameters():
        taken.append(name)
        tensor = parameter.detach().clone()
        yield name, tensor
        tensor.zero_()


async def test_verl_sends_through_refit(worker: FakeWorker) -> None:
    model = module(2)
    master = verl.Engine(1 << 20, is_master=True, model="tiny")
    other = verl.Engine(1 << 20, model="tiny")
    names = [name for name, _ in model.named_parameters()]
    for steps, version in ((7, 7), (None, 8)):
        weights = train(model)
        for engine in (master, other):
            taken: list[str] = []
            engine.prepare()
            trainers, rollouts = engine.build_topology(2, 4, [None] * 6)
            assert (trainers, rollouts) == ({}, {})
            engine.init_process_group(**trainers)
            await engine.send_weights(gathered(model, taken), steps)
            engine.finalize()
            assert taken == names
        assert worker.version == version
        assert_bytes(worker.live, weights)
    assert [item async for item in other.receive_weights()] == []

    worker.refuse = LayoutRefused("not this model")
    with pytest.raises(RuntimeError, match=r"version 9 failed: .*not this model"):
        await master.send_weights(gathered(model, []), 9)
    assert worker.version == 8


async def test_verl_does_not_write_what_is_still_read(worker: FakeWorker) -> None:
    """A step that was given up, while its version is being staged."""
    model = module(2)
    master = verl.Engine(1 << 20, is_master=True, model="tiny")
    given_up, taken = train(model), []
    worker.gate.clear()
    sending = asyncio.create_task(master.send_weights(gathered(model, []), 5))
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not worker.prepares:
            await asyncio.sleep(0.01)
    sending.cancel()
    await asyncio.wait([sending])
    weights = train(model)
    sending = asyncio.create_task(master.send_weights(gathered(model, taken), 6))
    await asyncio.sleep(1)
    assert taken == []
    worker.gate.set()
    await asyncio.wait_for(sending, PATIENCE_SECONDS)
    assert_bytes(worker.served[5], given_up)
    assert worker.version == 6
    assert_bytes(worker.live, weights)


class PrimeRlSender(prime_rl.Sender):
    """With what prime-rl's own ``broadcast()`` does around ``_broadcast()``."""

    model_name = "tiny"
    world = SimpleNamespace(rank=0, world_size=1)

    def broadcast(self, model: nn.Module, step: int, step_dir: Path) -> None:
        while not (step_dir / ".receiver_ready").exists():
            time.sleep(0.01)
        self._broadcast(model, step, step_dir)
        (step_dir / prime_rl.FINISHED_MARKER).touch()


class PrimeRlReceiver(prime_rl.Receiver):
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def step_dir(self, step: int) -> Path:
        return self._directory / str(step)

    def _ack(self, step: int) -> None:
        (self.step_dir(step) / ".receiver_ready").touch()


async def test_prime_rl_broadcasts_through_refit(
    worker: FakeWorker, tmp_path: Path
) -> None:
    model = module(3)
    sender, receiver = PrimeRlSender(), PrimeRlReceiver(tmp_path)
    for step in (1, 2):
        weights = train(model)
        receiver.step_dir(step).mkdir()
        worker.gate.clear()
        sending = asyncio.create_task(
            asyncio.to_thread(sender.broadcast, model, step, receiver.step_dir(step))
        )
        receiving = asyncio.create_task(receiver.receive(step))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while worker.prepares < step:
                await asyncio.sleep(0.02)
        # The orchestrator does not move on while the fleet still has to read.
        await asyncio.sleep(3 * prime_rl.POLL_SECONDS)
        assert not receiving.done()
        worker.gate.set()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await receiving
        assert worker.version == step
        assert_bytes(worker.live, weights)
        await sending
