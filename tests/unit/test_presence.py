# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What puts a process's records back, over a discovery that is a list of calls. The
worker's own are in ``test_routing.py``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from dynamo.refit import presence
from dynamo.refit.presence import keep_present

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

OWN = 7


class Process:
    """An endpoint, and events whose next ``failures`` renewals fail."""

    def __init__(self) -> None:
        self.registered = True
        self.down = False
        self.failures = 0
        self.calls: list[str] = []

    def connection_id(self) -> int:
        return OWN

    async def client(self) -> SimpleNamespace:
        return SimpleNamespace(instance_ids=lambda: [3] + [OWN] * self.registered)

    async def register_endpoint_instance(self) -> None:
        self.calls.append("register")
        if self.down:
            raise Exception("discovery is down")
        self.registered = True

    async def renew(self) -> bool:
        self.calls.append("renew")
        self.failures -= 1
        return self.failures < 0


@pytest.fixture
async def process(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Process]:
    for name, seconds in (
        ("WATCH_SECONDS", 0.01),
        ("MISSING_SECONDS", 0.05),
        ("LOST_SECONDS", 0.2),
    ):
        monkeypatch.setattr(presence, name, seconds)
    process = Process()
    keeping = asyncio.create_task(keep_present(process, process))
    yield process
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


async def settle() -> None:
    await asyncio.sleep(0.3)


async def test_what_is_there_is_left_alone(process: Process) -> None:
    await settle()
    assert process.calls == []


async def test_what_a_stall_lost_is_put_back_once(process: Process) -> None:
    for _ in range(2):
        process.registered = False
        process.calls.clear()
        await settle()
        assert process.registered
        assert process.calls == ["register", "renew"]


async def test_a_renewal_that_fails_is_tried_again(process: Process) -> None:
    """The endpoint is there again, the event channel not yet."""
    process.registered, process.failures = False, 2
    await settle()
    assert process.calls == ["register", "renew"] * 3


async def test_a_discovery_that_is_down_is_reported_and_tried_again(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.registered, process.down = False, True
    await settle()
    assert process.calls.count("register") > 2
    [first, *_] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "nobody finds it" in first.getMessage()
    process.down = False
    await settle()
    assert process.registered
