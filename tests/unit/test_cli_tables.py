# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``dynamo-refit status`` and ``history`` show at 80 columns."""

from __future__ import annotations

import io
import time

import msgspec
import pytest
from rich.console import Console, RenderableType

from dynamo.refit.cli.history import history_table
from dynamo.refit.cli.status import fleet_table
from dynamo.refit.errors import Failure
from dynamo.refit.protocol import (
    CacheCounters,
    CacheUse,
    FleetMember,
    FleetStatus,
    History,
    RefitRecord,
)
from tests.support.fleet import member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

NOW = 1_800_000_000.0
A, B = 7215758003448580, 7215758003448591

FLEET = FleetStatus(
    model="tiny", epoch=3, desired=8, completed=7, under_way=8, members=()
)


def lines_of(what: RenderableType) -> list[str]:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def worker(number: int, cache: CacheUse, **about: object) -> FleetMember:
    status = msgspec.structs.replace(
        member(number, 7).status, since=NOW - 190, stall_ms=6.04, cache=cache
    )
    return msgspec.structs.replace(member(number, 7), status=status, **about)


def test_a_fleet() -> None:
    warm = CacheUse(session="warm", counters=CacheCounters(hits=2))
    cold = CacheUse(
        session="cold",
        counters=CacheCounters(allocations=6, registrations=6, descriptor_builds=14),
    )
    staging = worker(B, cold, behind=1, behind_seconds=2.25)
    status = msgspec.structs.replace(staging.status, phase="staging", pending=8)
    members = (worker(A, warm), msgspec.structs.replace(staging, status=status))
    joiner = msgspec.structs.replace(member(5, admitted=False), behind=2)
    fleet = msgspec.structs.replace(FLEET, members=(*members, joiner))
    assert lines_of(fleet_table(fleet, NOW)) == [
        "tiny  desired 8  completed 7  under way 8",
        "worker           ranks serves   since behind state   stall  cache",
        "7215758003448580 1     7        3 min 0      serving 6.0 ms warm",
        "backend                                                     0/0/0 built",
        "7215758003448591 1     7        3 min 1      staging 6.0 ms cold",
        "backend                               2.2 s  8              6/6/14 built",
        "5                1     start-up -     2      waiting -      -",
        "backend",
        "cache: session of the last stage, and buffers/registrations/requests built",
    ]


def test_nobody_is_there_yet() -> None:
    assert lines_of(fleet_table(FLEET, NOW)) == [
        "tiny  desired 8  completed 7  under way 8",
        "no worker has come yet",
    ]


def record(version: int, outcome: str, **about: object) -> RefitRecord:
    return RefitRecord(
        version=version,
        announcement_id=f"a{version}",
        outcome=outcome,
        announced_at=NOW + version,
        **about,
    )


def test_a_history() -> None:
    gone = Failure(kind="WorkerLeft", message="it left", stage="commit", worker=B)
    past = History(
        since=NOW,
        records=(
            record(4, "failed", seconds=0.5, detail="stage: MemoryShort: no room"),
            record(
                5,
                "completed",
                seconds=1.25,
                stall_ms=41.53,
                workers=(A,),
                excluded=(gone,),
            ),
            record(6, "superseded", seconds=0.125, detail="by version 7"),
            record(7, "under way"),
        ),
    )
    assert lines_of(history_table(past)) == [
        "4 versions since the coordinator's start at 01-15 08:00:00",
        "version announced      took   stall   outcome",
        "4       01-15 08:00:04 0.50 s -       failed     stage: MemoryShort: no room",
        "5       01-15 08:00:05 1.25 s 41.5 ms completed  1 worker",
        f"{' ' * 49}without commit: WorkerLeft: it",
        f"{' ' * 49}left (worker 7215758003448591)",
        "6       01-15 08:00:06 0.12 s -       superseded by version 7",
        "7       01-15 08:00:07 -      -       under way",
    ]


def test_no_version_has_come() -> None:
    (line,) = lines_of(history_table(History(since=NOW, records=())))
    assert line == "no version has come since the coordinator's start at 01-15 08:00:00"
