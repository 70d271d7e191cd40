# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish`` on a serving graph: its tokens are the checkpoint's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from dynamo.refit.events import RefitCompleted, RefitFailed, RefitStarted
from tests.e2e.conftest import Bench
from tests.support.processes import PATIENCE_SECONDS, fleet_status

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("no_faults"),
]


def start_publish(bench: Bench, name: str, version: int) -> subprocess.Popen:
    """The command as a user types it, for checkpoint ``name``."""
    command = ["-m", "dynamo.refit.cli", "publish", str(bench.models[name])]
    return subprocess.Popen(
        [sys.executable, *command, "--version", str(version), "--json"],
        env={**os.environ, **bench.graph.environment, "DYN_LOG": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_a_checkpoint_on_disk_is_served(bench: Bench) -> None:
    """Two in a row: another process each time, the same layout."""
    for name in ("B", "C"):
        version = next(bench.versions)
        child = start_publish(bench, name, version)
        out, err = await asyncio.to_thread(child.communicate, timeout=PATIENCE_SECONDS)
        assert child.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {
            "model": bench.graph.name,
            "version": version,
            "outcome": "completed",
            "detail": "",
        }
        completed = await asyncio.to_thread(bench.events.find, RefitCompleted, version)
        assert len(completed.workers) == 1
        bench.serving = name
        await bench.assert_serves(name)


async def test_an_interrupted_publish_leaves_the_old_version(bench: Bench) -> None:
    """Ctrl-C while rank 0 has not begun to read: it finds nobody to read from."""
    before = await asyncio.to_thread(fleet_status, bench.graph)
    bench.order(stage={"rank": 0, "seconds": 4.0})
    version = next(bench.versions)
    name = "A" if bench.serving != "A" else "B"
    child = start_publish(bench, name, version)
    await asyncio.to_thread(
        bench.events.wait_for, RefitStarted, lambda e: e.version == version
    )
    await asyncio.sleep(1.0)
    child.send_signal(signal.SIGINT)
    _, err = await asyncio.to_thread(child.communicate, timeout=PATIENCE_SECONDS)
    assert child.returncode == 130, err
    assert f"interrupted; version {version} is withdrawn" in err
    await asyncio.to_thread(bench.events.find, RefitFailed, version)
    await bench.assert_serves(bench.serving)
    after = await asyncio.to_thread(fleet_status, bench.graph)
    assert (after["completed"], after["under_way"]) == (before["completed"], None)
