# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit doctor`` where things really are as it says: each condition that it
has to find is made, several for one run."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.events import SCHEMA
from dynamo.refit.release import RELEASE
from dynamo.refit.rpc import Caller
from tests.support.fake_worker import FakeWorker, fake_worker

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(180),
]

PATIENCE_SECONDS = 90.0

#: More than any machine that runs these tests has to spare.
HUGE_BYTES = 1 << 42

#: Registers an endpoint and an event channel, and is killed.
SHORT_LIFE = """
import asyncio, os, signal
from dynamo.refit.bus import EventPublisher
from dynamo.refit.rpc import runtime_from_environment, serve
async def main():
    runtime = runtime_from_environment()
    async def handle(request):
        yield {}
    serving = asyncio.create_task(serve(runtime.endpoint("dynamo.refit.gone"), handle))
    client = await runtime.endpoint("dynamo.refit.gone").client()
    await client.wait_for_instances()
    async with EventPublisher(runtime.endpoint("dynamo.refit.gone_events"), "x"):
        os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""

#: As if no wheel of NIXL were installed, in every process that has it on its path.
WITHOUT_NIXL = """
import sys
for name in ("nixl", "nixl_cu12", "nixl_cu13"):
    sys.modules[name] = None
"""


@dataclass
class Visit:
    """How the doctor ended, and its findings by the name of the check."""

    code: int
    findings: dict[str, dict]

    def failed(self) -> set[str]:
        return {c for c, f in self.findings.items() if f["level"] == "failure"}


def visit(environment: dict[str, str], *arguments: object) -> Visit:
    words = ["-m", "dynamo.refit.cli", "doctor", "--json", *map(str, arguments)]
    ended = subprocess.run(
        [sys.executable, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    findings = [json.loads(line) for line in ended.stdout.splitlines()]
    assert findings, ended.stderr
    assert all(f["remedy"] for f in findings if f["level"] != "ok")
    return Visit(ended.returncode, {f["check"]: f for f in findings})


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "discovery").mkdir()
    here = {n: v for n, v in os.environ.items() if not n.startswith(("DYN_", "UCX_"))}
    return {
        **here,
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "discovery"),
        "DYN_LOG": "error",
    }


def huge_checkpoint(directory: Path) -> Path:
    """A checkpoint whose one tensor is a hole of :data:`HUGE_BYTES`."""
    directory.mkdir()
    tensor = {
        "dtype": "BF16",
        "shape": [HUGE_BYTES >> 12, 2048],
        "data_offsets": [0, HUGE_BYTES],
    }
    header = json.dumps({"lm_head.weight": tensor}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + HUGE_BYTES)
    return directory


def leave_records(environment: dict[str, str]) -> list[Path]:
    """Those of a process that was killed a minute ago."""
    killed = subprocess.run(
        [sys.executable, "-c", SHORT_LIFE], env=environment, timeout=PATIENCE_SECONDS
    )
    assert killed.returncode == -9
    directory = Path(environment["DYN_FILE_KV"])
    records = [file for file in directory.rglob("*") if file.is_file()]
    assert len(records) == 2, records
    for record in records:
        os.utime(record, (time.time() - 60, time.time() - 60))
    return records


def test_stale_records_tcp_only_and_staging_that_does_not_fit(
    environment: dict[str, str], tmp_path: Path
) -> None:
    leave_records(environment)
    model = huge_checkpoint(tmp_path / "model")
    arguments = ["--model", model, "--tensor-parallel", 2, "--staging", "host"]
    found = visit(environment | {"UCX_TLS": "tcp"}, *arguments)
    assert found.code == 1
    assert found.failed() == {"stale records", "UCX transports", "memory plan"}

    stale = found.findings["stale records"]
    assert stale["summary"].startswith("2 records of processes that are gone or stall")
    assert stale["remedy"].endswith(f"rm -r {environment['DYN_FILE_KV']}")
    forced = "UCX_TLS=tcp in the environment forces it: unset it"
    assert found.findings["UCX transports"]["remedy"] == forced
    assert "64 MiB read and compared" in found.findings["NIXL"]["summary"]
    memory = found.findings["memory plan"]["summary"]
    assert memory.startswith("2048 GiB of parameters on each of 2 ranks: host takes")
    assert "of host memory are free" in memory


def test_nixl_that_is_missing_and_a_bus_without_its_server(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_NIXL)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nats = f"nats://127.0.0.1:{closed.getsockname()[1]}"
    planes = {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": nats}
    found = visit(environment | planes | {"PYTHONPATH": str(tmp_path)})
    assert found.code == 1
    assert found.failed() == {"servers", "NIXL"}
    assert found.findings["servers"]["summary"].endswith("there is no event plane")
    missing = found.findings["NIXL"]
    assert "NIXL is not installed" in missing["summary"]
    assert "pip install 'dynamo-refit[trainer]'" in missing["remedy"]


def test_a_bus_on_which_nothing_arrives(environment: dict[str, str]) -> None:
    """Events are published to an address that nobody has."""
    found = visit(environment | {"DYN_EVENT_PLANE_HOST": "198.51.100.7"})
    assert found.code == 1
    assert found.failed() == {"event plane"}
    plane = found.findings["event plane"]
    assert plane["summary"] == "there is none: zmq takes events, and none arrives"
    assert "DYN_EVENT_PLANE_HOST" in plane["remedy"]


@pytest.fixture
async def fleet(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[FakeWorker, Callable[[str], Awaitable[None]]]]:
    """A coordinator, and a worker that says what a test wants it to."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    async with fake_worker(runtime, "dynamo", "tiny") as worker:
        coordinator = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dynamo.refit", "--fleet-poll-seconds", "0.1"
        )
        caller = Caller(runtime)

        async def seen(release: str) -> None:
            worker.release = release
            async with asyncio.timeout(PATIENCE_SECONDS):
                while True:
                    members = (await fetch_status(caller, "dynamo")).members
                    if [m.status.release for m in members] == [release]:
                        return
                    await asyncio.sleep(0.1)

        while not await caller.instances("dynamo.refit.status"):
            await asyncio.sleep(0.1)
        yield worker, seen
        coordinator.kill()
        await coordinator.wait()
    runtime.shutdown()


async def test_a_fleet_of_one_release_is_well_and_another_worker_is_found(
    environment: dict[str, str], fleet: tuple
) -> None:
    worker, seen = fleet
    await seen(RELEASE)
    found = await asyncio.to_thread(visit, environment)
    assert (found.code, found.failed()) == (0, set())
    assert {f["level"] for f in found.findings.values()} == {"ok"}
    assert found.findings["coordinator"]["summary"] == "answers; it sees 1 worker"

    await seen("0.0.1")
    found = await asyncio.to_thread(visit, environment)
    assert (found.code, found.failed()) == (1, {"releases"})
    assert found.findings["releases"]["summary"] == (
        f"workers {worker.worker} run 0.0.1 (schema {SCHEMA}), the coordinator "
        f"{RELEASE} (schema {SCHEMA})"
    )
