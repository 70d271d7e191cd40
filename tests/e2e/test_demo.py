# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it, to its end and interrupted. Comes before the tests
that share a graph: two engines at a time are too many for two cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).resolve().parents[2]


class Demo:
    """``python -m graphs.demo``, with a mark in the environment of all it starts."""

    def __init__(self) -> None:
        self._mark = f"REFIT_TEST_MARK={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "graphs.demo"],
            cwd=ROOT,
            env={**os.environ, name: value, "DYN_LOG": "error"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []

    def read_until(self, text: str) -> None:
        for line in self.child.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def read_to_end(self) -> int:
        self.lines.extend(self.child.stdout)
        return self.child.wait(60)

    def left_behind(self) -> list[str]:
        """Command lines of live processes that carry the mark."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark.encode() in environ.read_bytes():
                    command = (environ.parent / "cmdline").read_bytes()
                    found.append(command.replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


def test_the_demo_holds() -> None:
    demo = Demo()
    code = demo.read_to_end()
    assert code == 0, "".join(demo.lines)
    summary = json.loads(demo.lines[-1])
    assert summary["requests"] > 0
    assert summary["stall_ms_max"] > 0
    expected = {
        "refits": 4,
        "failed": 0,
        "truncated": 0,
        "mismatched": 0,
        "stale_cached_tokens": 0,
        "warm": {"allocations": 0, "registrations": 0, "descriptor_builds": 0},
    }
    assert {name: summary[name] for name in expected} == expected
    # What is said of the worker's start may come before the demo listens.
    start = ("joined", "admitted")
    events = {name: n for name, n in summary["events"].items() if name not in start}
    assert events == {"started": 4, "staged": 4, "refitted": 4, "completed": 4}
    assert demo.left_behind() == []


@pytest.mark.parametrize("moment", ["starting worker", "version 1 "])
def test_ctrl_c_leaves_no_process(moment: str) -> None:
    demo = Demo()
    demo.read_until(moment)
    if moment.startswith("starting"):
        # vLLM's own children are up by then.
        time.sleep(8)
    demo.child.send_signal(signal.SIGINT)
    assert demo.read_to_end() == 130, "".join(demo.lines)
    assert demo.left_behind() == []
