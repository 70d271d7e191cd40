# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit history``: which versions came, and how each one ended."""

from __future__ import annotations

import asyncio
from datetime import datetime

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynamo.refit.cli.fleet import fetch_history
from dynamo.refit.cli.output import AsJson, Model, Namespace
from dynamo.refit.cli.runtime import connect
from dynamo.refit.cli.words import count
from dynamo.refit.protocol import History, RefitRecord
from dynamo.refit.rpc import Caller

STYLES = {"completed": "green", "under way": "cyan", "superseded": "yellow"}


def history(
    namespace: Namespace = "dynamo", model: Model = None, as_json: AsJson = False
) -> None:
    """Show which versions came, how each one ended, when, and what it cost.

    The coordinator remembers the last hundred since its own start; one that was
    restarted begins anew.
    """
    past = asyncio.run(_history(namespace, model))
    if as_json:
        for record in past.records:
            print(msgspec.json.encode(record).decode())
        return
    Console().print(history_table(past))


async def _history(namespace: str, model: str | None) -> History:
    return await fetch_history(Caller(connect()), namespace, model)


def history_table(past: History) -> RenderableType:
    """The history for a terminal, the newest version last."""
    began = f"since the coordinator's start at {_moment(past.since)}"
    if not past.records:
        return Text(f"no version has come {began}")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("version", "announced", "took", "stall", "outcome"):
        table.add_column(heading, no_wrap=True)
    table.add_column("", overflow="fold")
    for record in past.records:
        table.add_row(*_row(record))
    return Group(Text(f"{count(len(past.records), 'version')} {began}"), table)


def _row(record: RefitRecord) -> tuple[str | Text, ...]:
    return (
        str(record.version),
        _moment(record.announced_at),
        "-" if record.seconds is None else f"{record.seconds:.2f} s",
        "-" if record.stall_ms is None else f"{record.stall_ms:.1f} ms",
        Text(record.outcome, style=STYLES.get(record.outcome, "red")),
        _told(record),
    )


def _told(record: RefitRecord) -> str:
    lines = [record.detail] if record.detail else []
    if record.outcome == "completed":
        lines.append(count(len(record.workers), "worker"))
    lines += [f"without {failure}" for failure in record.excluded]
    return "\n".join(lines)


def _moment(at: float) -> str:
    """Unix seconds as local date and time."""
    return datetime.fromtimestamp(at).strftime("%m-%d %H:%M:%S")
