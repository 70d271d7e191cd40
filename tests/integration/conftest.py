# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A Dynamo of its own for each test: file discovery, TCP and ZMQ."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from dynamo.runtime import DistributedRuntime


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What this process has, and gives to those that it starts."""
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    monkeypatch.setenv("DYN_LOG", "error")
    monkeypatch.delenv("DYN_NAMESPACE", raising=False)
    return dict(os.environ)


@pytest.fixture
async def runtime(environment: dict[str, str]) -> AsyncIterator[DistributedRuntime]:
    """A runtime on this test's loop."""
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    yield runtime
    runtime.shutdown()
