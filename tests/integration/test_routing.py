# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker's place in routing as another process sees it, over file discovery."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from dynamo.llm import FpmEventSubscriber
from dynamo.runtime import Client, DistributedRuntime

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.events import RefitSuperseded
from dynamo.refit.presence import LastingPublisher
from graphs.local import free_port
from graphs.tiny_model import make_checkpoint
from tests.support import routed_worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

SECONDS = 30.0

#: Dynamo's file discovery forgets a process after 10 s.
LEASE_SECONDS = 10.0


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "v1", seed=1)


@pytest.fixture
async def runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DistributedRuntime]:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    monkeypatch.setenv("DYN_LOG", "error")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    yield runtime
    runtime.shutdown()


class Worker:
    """A process of :mod:`tests.support.routed_worker`, and what others see of it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        clients: dict[str, Client],
        cards: FpmEventSubscriber,
        port: int,
    ) -> None:
        self.process = process
        self.own = 0
        self._clients = clients
        self._cards = cards
        self._port = port

    async def hear(self) -> str:
        async with asyncio.timeout(SECONDS):
            return (await self.process.stdout.readline()).decode().strip()

    async def do(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n".encode())
        assert await self.hear() == "done"

    @property
    def seen(self) -> set[str]:
        """Its endpoints in discovery."""
        return {
            name
            for name, client in self._clients.items()
            if self.own in client.instance_ids()
        }

    @property
    def taints(self) -> set[str] | None:
        """Those on its model card, if there is one."""
        card = self._cards.get_model_cards().get(str(self.own))
        if card is None:
            return None
        return set(json.loads(card)["runtime_config"].get("taints") or ())

    async def ask(self, name: str) -> int:
        stream = await self._clients[name].direct({}, self.own, annotated=False)
        [answer] = [item async for item in stream]
        return answer

    async def healthy(self) -> bool:
        def status() -> int:
            url = f"http://127.0.0.1:{self._port}/health"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status

        return await asyncio.to_thread(status) == 200


@pytest.fixture
async def worker(
    runtime: DistributedRuntime, checkpoint: Path
) -> AsyncIterator[Worker]:
    names = ("generate", "refit", "clear_kv_blocks")
    endpoints = {name: runtime.endpoint(f"routed.backend.{name}") for name in names}
    cards = FpmEventSubscriber(endpoints["generate"])
    cards.start_tracking()
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        routed_worker.__file__,
        str(checkpoint),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "DYN_SYSTEM_PORT": str(port)},
    )
    clients = {name: await endpoint.client() for name, endpoint in endpoints.items()}
    worker = Worker(process, clients, cards, port)
    worker.own = int(await worker.hear())
    await until(lambda: worker.seen == {"refit"})
    yield worker
    if process.returncode is None:
        process.kill()
        await process.wait()
    cards.shutdown()


async def until(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


ALL = {"generate", "refit", "clear_kv_blocks"}


async def test_before_its_admission_only_refit_is_in_discovery_and_it_is_healthy(
    worker: Worker,
) -> None:
    await asyncio.sleep(1)
    assert worker.seen == {"refit"}
    assert worker.taints is None
    assert await worker.healthy()
    assert await worker.ask("refit") == worker.process.pid

    await worker.do("label 3")
    await worker.do("admit")
    await until(lambda: worker.seen == ALL)
    await until(lambda: worker.taints == {"weights=3"})
    assert await worker.healthy()
    assert await worker.ask("generate") == worker.process.pid


async def test_labels_are_merged_with_the_user_s_taints(worker: Worker) -> None:
    await worker.do("admit")
    await until(lambda: worker.seen == ALL)
    await worker.do("taints gpu=h100 fast")
    await worker.do("label 3")
    await until(lambda: worker.taints == {"gpu=h100", "fast", "weights=3"})
    await worker.do("taints slow weights=9")
    await until(lambda: worker.taints == {"slow", "weights=3"})
    await worker.do("label 4")
    await until(lambda: worker.taints == {"slow", "weights=4"})


async def test_others_see_it_leave_routing_and_return(worker: Worker) -> None:
    await worker.do("admit")
    await until(lambda: worker.seen == ALL)
    await worker.do("label 3")
    for _ in range(3):
        await worker.do("withdraw")
        await until(lambda: worker.seen == ALL - {"generate"}, 2)
        await worker.do("restore")
        await until(lambda: worker.seen == ALL, 2)
    assert worker.taints == {"weights=3"}
    assert await worker.ask("generate") == worker.process.pid


async def test_a_fenced_worker_is_out_and_its_weights_are_unknown(
    worker: Worker,
) -> None:
    await worker.do("admit")
    await until(lambda: worker.seen == ALL)
    await worker.do("label 3")
    await worker.do("fence")
    await until(lambda: worker.taints == {"weights=unknown"})
    assert "generate" not in worker.seen
    await worker.do("restore")
    await asyncio.sleep(3)
    assert "generate" not in worker.seen


@pytest.mark.faults
@pytest.mark.parametrize("admitted", [True, False])
async def test_a_worker_that_stalls_past_its_lease_comes_back_as_it_was(
    worker: Worker, admitted: bool
) -> None:
    await worker.do("label 3")
    if admitted:
        await worker.do("admit")
        await worker.do("taints mine")
        await until(lambda: worker.seen == ALL)
        await until(lambda: worker.taints == {"mine", "weights=3"})
    before = worker.seen, worker.taints
    worker.process.send_signal(signal.SIGSTOP)
    try:
        await until(lambda: worker.seen == set(), LEASE_SECONDS + 10)
        assert worker.taints is None
    finally:
        worker.process.send_signal(signal.SIGCONT)
    await until(lambda: (worker.seen, worker.taints) == before, 10)
    assert await worker.ask("generate" if admitted else "refit") == worker.process.pid


async def test_events_reach_new_subscribers_after_their_record_is_lost(
    runtime: DistributedRuntime, tmp_path: Path
) -> None:
    topic = runtime.endpoint("routed.refit.refit_events")
    events = LastingPublisher(topic, "worker-7")
    await events.start()
    [record] = (tmp_path / "discovery" / "v1" / "event_channels").iterdir()
    record.unlink()
    assert await events.renew()
    async with EventSubscriber(topic) as subscriber, asyncio.timeout(SECONDS):
        hearing = asyncio.ensure_future(anext(subscriber))
        while not hearing.done():
            events.publish(RefitSuperseded(version=1, by=2))
            await asyncio.sleep(0.05)
        assert (await hearing).sender == "worker-7.1"
    events.close()


async def test_a_worker_that_waits_ends_at_once_when_it_is_told_to(
    worker: Worker,
) -> None:
    """Not after the 30 s that one with requests would take."""
    told = time.monotonic()
    worker.process.terminate()
    # Its thread that reads would hold it up otherwise.
    worker.process.stdin.close()
    async with asyncio.timeout(10):
        assert await worker.process.wait() == 0
    assert time.monotonic() - told < 10
    await until(lambda: worker.seen == set(), 2)
