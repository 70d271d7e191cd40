# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator process by itself: healthy, and able to say that nobody is there."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from dynamo.runtime import DistributedRuntime, Endpoint

from dynamo.refit import bus
from dynamo.refit.args import parse_args
from dynamo.refit.bus import EventPlaneUnavailable
from dynamo.refit.coordinator.component import coordinate
from graphs.local import free_port

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(90),
]


@pytest.fixture
def system_port(environment: dict[str, str]) -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamo.refit", "--model", "tiny"],
        env={**environment, "DYN_SYSTEM_PORT": str(port)},
    )
    yield port
    process.terminate()
    process.wait(20)


def run_cli(environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dynamo.refit.cli", "status", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_it_is_healthy_for_kubernetes_probes(system_port: int) -> None:
    url = f"http://127.0.0.1:{system_port}/health"
    deadline = time.monotonic() + 40
    status = None
    while status != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        except OSError:
            continue
    assert status == 200


def test_status_of_an_empty_fleet(
    system_port: int, environment: dict[str, str]
) -> None:
    answer = run_cli(environment)
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout.splitlines()[-1])
    assert (status["model"], status["members"]) == ("tiny", [])
    assert (status["desired"], status["completed"]) == (None, None)


def test_dynamo_s_own_log_is_seen_where_it_is_asked_for_only(
    system_port: int, environment: dict[str, str]
) -> None:
    asked = run_cli(environment)
    assert "route request completed" in asked.stderr
    del environment["DYN_LOG"]
    answer = run_cli(environment)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == asked.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"DYN_EVENT_PLANE": "smoke"}, "Invalid DYN_EVENT_PLANE value 'smoke'"),
        (
            {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": "http://127.0.0.1:9"},
            "no etcd answers: http://127.0.0.1:9 (Connection refused): start etcd",
        ),
    ],
)
def test_a_wrong_environment_is_told_at_once_in_one_line(
    environment: dict[str, str], wrong: dict[str, str], says: str
) -> None:
    del environment["DYN_LOG"]
    began = time.monotonic()
    answer = run_cli(environment | wrong)
    assert time.monotonic() - began < 20
    assert answer.returncode == 1
    (line,) = answer.stderr.splitlines()
    assert line.startswith("dynamo-refit: ")
    assert says in line


def test_without_a_coordinator_the_cli_says_what_to_do(
    environment: dict[str, str],
) -> None:
    answer = run_cli(environment)
    assert answer.returncode == 1
    line = answer.stderr.splitlines()[-1]
    assert line.startswith("dynamo-refit: no coordinator in namespace 'dynamo'")
    assert "python -m dynamo.refit" in line


class Deaf:
    """A stand-in for Dynamo's subscriber that cannot subscribe."""

    def __init__(self, endpoint: Endpoint) -> None:
        pass

    def recv(self) -> None:
        return None

    def shutdown(self) -> None:
        pass


async def test_one_that_cannot_hear_announcements_ends(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "FpmEventSubscriber", Deaf)
    monkeypatch.setattr(bus, "RESUBSCRIBE_SECONDS", 0.01)
    config = parse_args(["--namespace", "deaf", "--model", "tiny"])
    with pytest.raises(ExceptionGroup) as ended:
        await asyncio.wait_for(coordinate(runtime, config), 20)
    assert ended.group_contains(EventPlaneUnavailable, match="ended by itself")
