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
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from dynamo.runtime import DistributedRuntime

from dynamo.refit.cli.fleet import fetch_status
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


def test_ucx_that_is_held_to_tcp(environment: dict[str, str]) -> None:
    found = visit(environment | {"UCX_TLS": "tcp"})
    assert found.code == 1
    assert found.failed() == {"UCX transports"}
    forced = "UCX_TLS=tcp in the environment forces it: unset it"
    assert found.findings["UCX transports"]["remedy"] == forced
    assert "64 MiB read and compared" in found.findings["NIXL"]["summary"]
    nobody = found.findings["coordinator"]
    assert nobody["level"] == "warning"
    assert nobody["remedy"].startswith("no coordinator in namespace 'dynamo': start")


def test_nixl_that_is_missing_and_a_bus_without_its_server(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_NIXL)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nats = f"nats://127.0.0.1:{closed.getsockname()[1]}"
    planes = {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": nats}
    path = os.pathsep.join([str(tmp_path), environment.get("PYTHONPATH", "")])
    found = visit(environment | planes | {"PYTHONPATH": path.rstrip(os.pathsep)})
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


def test_discovery_that_no_dynamo_knows(environment: dict[str, str]) -> None:
    found = visit(environment | {"DYN_DISCOVERY_BACKEND": "consul"})
    assert found.code == 1
    assert found.failed() == {"event plane"}
    assert "consul" in found.findings["event plane"]["summary"]


async def test_a_fleet_of_one_release_is_well_and_another_worker_is_found(
    environment: dict[str, str], fleet: tuple
) -> None:
    _, seen = fleet
    await seen(RELEASE)
    found = await asyncio.to_thread(visit, environment)
    assert (found.code, found.failed()) == (0, set())
    assert {f["level"] for f in found.findings.values()} == {"ok"}
    assert found.findings["coordinator"]["summary"] == "answers; it sees 1 worker"

    await seen("0.0.1")
    found = await asyncio.to_thread(visit, environment)
    assert (found.code, found.failed()) == (1, {"coordinator"})
    assert found.findings["coordinator"]["summary"] == (
        f"this command is of release {RELEASE}, the fleet of ['0.0.1']"
    )
