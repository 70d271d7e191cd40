# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish`` against a real coordinator and a fake worker that reads the
files' bytes over NIXL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from dynamo.runtime import DistributedRuntime
from safetensors.torch import save_file

from dynamo.refit.cli.fleet import fetch_history, fetch_status
from dynamo.refit.errors import LayoutRefused
from dynamo.refit.events import (
    AnyEvent,
    RefitCompleted,
    RefitStarted,
    StageProgress,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import RankProgress
from dynamo.refit.publish.checkpoint import INDEX_NAME
from dynamo.refit.publish.publisher import WeightPublisher
from dynamo.refit.rpc import Caller
from tests.support.fake_worker import FakeWorker, fake_worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(180),
]

#: Processes import torch while others keep both cores busy.
PATIENCE_SECONDS = 90.0


@dataclass
class Ended:
    """How a process ended and what it said."""

    code: int
    out: list[str]
    err: list[str]

    @property
    def complaints(self) -> list[str]:
        """Its own lines on standard error; Dynamo's runtime logs there, too."""
        return [line for line in self.err if line.startswith("dynamo-refit: ")]

    @property
    def complaint(self) -> str:
        (line,) = self.complaints
        return line


@dataclass
class Bench:
    """A namespace with a coordinator and a fake worker."""

    environment: dict[str, str]
    worker: FakeWorker
    caller: Caller
    running: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start(
        self, *arguments: str, heard: bool = False
    ) -> asyncio.subprocess.Process:
        """Unless it is ``heard``, what it says goes nowhere: a pipe that nobody reads
        from fills up, and stops it."""
        output = asyncio.subprocess.PIPE if heard else asyncio.subprocess.DEVNULL
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=self.environment,
            stdout=output,
            stderr=output,
        )
        self.running.append(child)
        return child

    async def start_publish(self, *arguments: object) -> asyncio.subprocess.Process:
        words = ["-m", "dynamo.refit.cli", "publish", *map(str, arguments)]
        return await self.start(*words, heard=True)

    async def publish(self, *arguments: object) -> Ended:
        return await end_of(await self.start_publish(*arguments))

    async def prepared(self, times: int) -> None:
        """Until the worker was asked to stage for the ``times``-th time."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.worker.prepares < times:
                await asyncio.sleep(0.02)

    async def settled(self) -> None:
        """Until the coordinator has nothing under way any more."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await fetch_status(self.caller, "dynamo")).under_way is not None:
                await asyncio.sleep(0.1)


async def end_of(child: asyncio.subprocess.Process) -> Ended:
    async with asyncio.timeout(PATIENCE_SECONDS):
        out, err = await child.communicate()
    return Ended(child.returncode, out.decode().splitlines(), err.decode().splitlines())


@pytest.fixture
async def bench(environment: dict[str, str]) -> AsyncIterator[Bench]:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    async with fake_worker(runtime, "dynamo", "tiny") as worker:
        bench = Bench(environment, worker, Caller(runtime))
        await bench.start("-m", "dynamo.refit", "--fleet-poll-seconds", "0.1")
        yield bench
        for child in bench.running:
            if child.returncode is None:
                child.kill()
                await child.wait()
    runtime.shutdown()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.randn(300, 16).to(torch.bfloat16),
        "model.norm.weight": torch.randn(17),
        "lm_head.weight": torch.randn(300, 16).to(torch.bfloat16),
    }


@pytest.fixture
def checkpoint(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """In two files with an index, as larger models come."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    names = list(weights)
    files = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    for file, held in files.items():
        save_file({name: weights[name] for name in held}, directory / file)
    table = {name: file for file, held in files.items() for name in held}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": table}))
    return directory


def assert_live(worker: FakeWorker, weights: dict[str, torch.Tensor]) -> None:
    assert worker.live.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(worker.live[name], tensor.reshape(-1).view(torch.uint8)), (
            name
        )


async def test_a_checkpoint_becomes_the_served_version(
    bench: Bench, checkpoint: Path, weights: dict[str, torch.Tensor]
) -> None:
    """The model's name is the coordinator's, the bytes are the files'; a second time
    as JSON, with an in-flight policy; then used and old numbers are refused at once."""
    ended = await bench.publish(checkpoint, "--version", 3)
    assert (ended.code, ended.complaints) == (0, [])
    assert ended.out[0].startswith(f"{checkpoint}: 3 tensors, 0.0 MiB, publishing as ")
    assert ended.out[-1] == "version 3 is served"
    said = "\n".join(ended.out)
    assert f"worker {bench.worker.worker} serves it, stall 1.5 ms" in said
    assert "completed: 1 worker refitted" in said
    assert bench.worker.version == 3
    # One registered region per file.
    assert bench.worker.regions == [2]
    assert_live(bench.worker, weights)

    bench.worker.live = {}
    ended = await bench.publish(
        checkpoint, "--version", 4, "--policy", "recompute", "--json", "--model", "tiny"
    )
    assert (ended.code, ended.complaints) == (0, [])
    *lines, end = ended.out
    events = [msgspec.json.decode(line, type=AnyEvent) for line in lines]
    assert {type(e) for e in events} >= {WorkerStaged, WorkerRefitted, RefitCompleted}
    assert {type(e) for e in events} <= {
        RefitStarted, WorkerStaged, WorkerRefitted, RefitCompleted,
    }  # fmt: skip
    assert {event.version for event in events} == {4}
    expected = {"model": "tiny", "version": 4, "outcome": "completed", "detail": ""}
    assert json.loads(end) == expected
    assert bench.worker.in_flight == ["continue", "recompute"]
    assert_live(bench.worker, weights)

    ended = await bench.publish(checkpoint, "--version", 4)
    assert ended.code == 1
    assert "every worker serves a version 4 already" in ended.complaint

    ended = await bench.publish(checkpoint, "--version", 2)
    assert ended.code == 1
    assert "version 2 was not installed: refused: " in ended.complaint
    assert "publish old weights under a new number" in ended.complaint
    assert any("refused (stale): " in line for line in ended.out)
    assert bench.worker.version == 4


async def test_another_model_is_refused_at_once(bench: Bench, checkpoint: Path) -> None:
    ended = await bench.publish(checkpoint, "--version", 1, "--model", "other")
    assert ended.code == 1
    assert "model 'other' is not served here (served: 'tiny')" in ended.complaint
    assert bench.worker.prepares == 0


async def test_a_worker_that_refuses(bench: Bench, checkpoint: Path) -> None:
    bench.worker.refuse = LayoutRefused("has another shape", tensor="lm_head.weight")
    ended = await bench.publish(checkpoint, "--version", 1, "--json")
    assert ended.code == 1
    for part in ("failed", "LayoutRefused: has another shape", "lm_head.weight"):
        assert part in ended.complaint
    end = json.loads(ended.out[-1])
    assert (end["outcome"], end["version"]) == ("failed", 1)
    assert bench.worker.version is None


async def test_a_newer_version_supersedes(
    bench: Bench, checkpoint: Path, weights: dict[str, torch.Tensor]
) -> None:
    bench.worker.gate.clear()
    older = await bench.start_publish(checkpoint, "--version", 5)
    await bench.prepared(1)
    newer = await bench.start_publish(checkpoint, "--version", 6)
    ended = await end_of(older)
    assert ended.code == 1
    assert "version 5 was not installed: superseded: " in ended.complaint
    assert "version 6" in ended.complaint
    bench.worker.gate.set()
    assert (await end_of(newer)).code == 0
    assert bench.worker.version == 6
    assert_live(bench.worker, weights)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupt_withdraws_the_version(
    bench: Bench, checkpoint: Path, weights: dict[str, torch.Tensor], number: int
) -> None:
    """While a worker is about to read: it cannot, keeps what it has, and the
    coordinator is ready for the next version."""
    bench.worker.gate.clear()
    child = await bench.start_publish(checkpoint, "--version", 1)
    await bench.prepared(1)
    child.send_signal(number)
    ended = await end_of(child)
    assert ended.code == 130
    assert ended.complaint.startswith(
        "dynamo-refit: interrupted; version 1 is withdraw"
    )
    assert not any("Traceback" in line for line in ended.err)
    bench.worker.gate.set()
    await bench.settled()
    assert bench.worker.version is None
    ended = await bench.publish(checkpoint, "--version", 2)
    assert ended.code == 0, ended
    assert bench.worker.version == 2
    assert_live(bench.worker, weights)


async def test_a_version_that_does_not_end_is_withdrawn(
    bench: Bench, checkpoint: Path
) -> None:
    bench.worker.gate.clear()
    ended = await bench.publish(checkpoint, "--version", 1, "--timeout", 2)
    assert ended.code == 1
    assert "had not ended after 2 s and is withdrawn" in ended.complaint
    assert bench.worker.version is None


async def test_a_trainer_publishes_again_what_failed(
    bench: Bench, weights: dict[str, torch.Tensor]
) -> None:
    """Under the number that failed, once the cause is gone; and goes on above it."""
    bench.worker.refuse = LayoutRefused("has another shape", tensor="lm_head.weight")
    publisher = await asyncio.to_thread(WeightPublisher, "tiny", weights)
    try:
        assert (await publisher.publish(3).released()).outcome == "failed"
        bench.worker.refuse = None
        assert (await publisher.publish(3).released()).outcome == "completed"
        assert bench.worker.version == 3
        assert_live(bench.worker, weights)

        with torch.no_grad():
            weights["model.norm.weight"] += 1
        assert (await publisher.publish(8).released()).outcome == "completed"
        assert bench.worker.version == 8
        assert_live(bench.worker, weights)
        assert (await publisher.publish(6).released()).outcome == "refused"
    finally:
        await asyncio.to_thread(publisher.close)
    history = await fetch_history(bench.caller, "dynamo")
    told = [(r.version, r.outcome) for r in history.records]
    assert told == [
        (3, "failed"),
        (3, "completed"),
        (8, "completed"),
        (6, "refused"),
    ]
    assert history.records[1].stall_ms == 1.5
    assert history.records[1].workers == (bench.worker.worker,)


async def test_on_a_terminal_it_is_shown_in_place(
    bench: Bench, checkpoint: Path
) -> None:
    """With bars from the worker's progress, and nothing of Dynamo's log between."""
    worker = bench.worker
    worker.gate.clear()
    del bench.environment["DYN_LOG"]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    words = ["-m", "dynamo.refit.cli", "publish", str(checkpoint), "--version", "3"]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        env=bench.environment | {"TERM": "xterm-256color"},
        stdout=theirs,
        stderr=theirs,
    )
    bench.running.append(child)
    os.close(theirs)
    reading = asyncio.create_task(asyncio.to_thread(_read_all, ours))
    await bench.prepared(1)
    half = RankProgress(rank=0, nbytes=1 << 30, total_nbytes=2 << 30)
    for _ in range(5):
        worker.events.publish(
            StageProgress(worker=worker.worker, version=3, ranks=(half,))
        )
        await asyncio.sleep(0.2)
    worker.gate.set()
    async with asyncio.timeout(PATIENCE_SECONDS):
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", await reading)
    assert await child.wait() == 0, shown
    assert "tiny  completed start-up weights  under way 3  0 of 1 vote" in shown
    assert "50% of 2.00 GiB" in shown
    assert f"worker {worker.worker} serves it, stall 1.5 ms" in shown
    assert shown.splitlines()[-1] == "version 3 is served"
    assert "INFO" not in shown
    _, *view = re.split(r"[\r\n]+", shown)
    assert max(map(len, view)) <= 80


def _read_all(descriptor: int) -> str:
    """What comes over a terminal until its other side is closed."""
    read = bytearray()
    # That is how it ends on Linux.
    with contextlib.suppress(OSError):
        while chunk := os.read(descriptor, 4096):
            read += chunk
    os.close(descriptor)
    return read.decode(errors="replace")


@pytest.fixture
async def alone(environment: dict[str, str]) -> Bench:
    """Nobody else in the namespace."""
    return Bench(environment, worker=None, caller=None)


async def test_without_a_coordinator(alone: Bench, checkpoint: Path) -> None:
    ended = await alone.publish(checkpoint, "--version", 1)
    assert (ended.code, ended.out) == (1, [])
    assert "no coordinator in namespace 'dynamo': start `python" in ended.complaint


async def test_a_coordinator_that_knows_no_model(
    alone: Bench, checkpoint: Path
) -> None:
    coordinator = await alone.start("-m", "dynamo.refit")
    ended = await alone.publish(checkpoint, "--version", 1)
    assert ended.code == 1
    assert "give --model NAME, or start a worker first" in ended.complaint
    coordinator.kill()
    await coordinator.wait()
