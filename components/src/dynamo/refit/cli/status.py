# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit status``: which worker serves what, and since when."""

from __future__ import annotations

import asyncio
import time

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.output import AsJson, Model, Namespace
from dynamo.refit.cli.runtime import connect
from dynamo.refit.cli.words import lasting
from dynamo.refit.protocol import CacheUse, FleetMember, FleetStatus
from dynamo.refit.rpc import Caller

LEGEND = "cache: session of the last stage, and buffers/registrations/requests built"


def status(
    namespace: Namespace = "dynamo", model: Model = None, as_json: AsJson = False
) -> None:
    """Show which worker serves which version, and what its last refit was like.

    Staleness is how many announced versions a worker is behind, and for how long.
    """
    fleet = asyncio.run(_status(namespace, model))
    if as_json:
        print(msgspec.json.encode(fleet).decode())
        return
    Console().print(fleet_table(fleet, time.time()))


async def _status(namespace: str, model: str | None) -> FleetStatus:
    return await fetch_status(Caller(connect()), namespace, model)


def fleet_table(fleet: FleetStatus, now: float) -> RenderableType:
    """The status for a terminal; ``now`` in Unix seconds."""
    title = Text(fleet.model or "no model yet", style="bold")
    title.append(f"  desired {_show(fleet.desired)}", style="default")
    title.append(f"  completed {_show(fleet.completed)}")
    if fleet.under_way is not None:
        title.append(f"  under way {fleet.under_way}")
    if not fleet.members:
        return Group(title, Text("no worker has come yet"))
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("worker", no_wrap=True)
    for heading in ("ranks", "serves", "since", "behind", "state", "stall", "cache"):
        table.add_column(heading, overflow="fold")
    for member in fleet.members:
        table.add_row(*_row(member, now))
    return Group(title, table, Text(LEGEND, style="dim"))


def _row(member: FleetMember, now: float) -> tuple[str, ...]:
    view = member.status
    state = view.phase if view.pending is None else f"{view.phase}\n{view.pending}"
    if view.phase == "serving" and not view.admitted:
        state = "waiting"
    return (
        f"{member.worker}\n{member.component}",
        str(view.ranks),
        _show(view.version),
        "-" if view.since is None else lasting(now - view.since),
        _staleness(member),
        state,
        "-" if view.stall_ms is None else f"{view.stall_ms:.1f} ms",
        "-" if view.cache is None else _cache(view.cache),
    )


def _staleness(member: FleetMember) -> str:
    if not member.behind or member.behind_seconds is None:
        return str(member.behind)
    return f"{member.behind}\n{lasting(member.behind_seconds)}"


def _cache(use: CacheUse) -> str:
    counters = use.counters
    built = counters.allocations, counters.registrations, counters.descriptor_builds
    return f"{use.session}\n{'/'.join(map(str, built))} built"


def _show(version: int | None) -> str:
    return "start-up" if version is None else str(version)
