# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The view of a refit as a terminal shows it, 80 columns wide or more. Pure: what goes
in comes out as a rich renderable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dynamo.refit.cli.view import Replica, View
from dynamo.refit.cli.words import count, size
from dynamo.refit.protocol import RankProgress

#: Columns of a progress bar.
BAR = 12

#: Lines besides replicas and events: what it is about, headings, what is left out.
FRAME = 6

STYLES = {
    "serving": "green",
    "staging": "cyan",
    "staged": "blue",
    "committing": "yellow",
    "fenced": "red",
}


def screen(view: View, height: int) -> RenderableType:
    """All of it, in at most ``height`` lines."""
    room = max(4, height - FRAME)
    replicas = sorted(view.replicas.values(), key=_by_interest)
    events = min(len(view.log), max(3, room - sum(_lines(r) for r in replicas)))
    shown, left = _that_fit(replicas, room - events)
    rest = f"and {count(left, 'more worker')}" if left else ""
    log = [_log_line(at, line) for at, line in view.log[len(view.log) - events :]]
    return Group(_title(view), _table(shown), Text(rest, style="dim"), *log)


def _title(view: View) -> Text:
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(view.model or "no model yet", style="bold")
    served = "start-up weights" if view.completed is None else view.completed
    title.append(f"  completed {served}")
    if view.under_way is not None:
        voted, of = view.votes
        title.append(f"  under way {view.under_way}", style="bold cyan")
        title.append(f"  {voted} of {count(of, 'vote')}")
    if view.complaint:
        title.append(f"  {view.complaint}", style="red")
    return title


def _table(replicas: Iterable[Replica]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    # As wide as what they may hold: columns that move are hard to read.
    table.add_column("worker", no_wrap=True, min_width=16)
    table.add_column("serves", no_wrap=True, min_width=8, justify="right")
    table.add_column("state", no_wrap=True, min_width=10)
    table.add_column("", width=BAR)
    table.add_column("bytes", no_wrap=True, min_width=16, justify="right")
    table.add_column("stall", no_wrap=True, min_width=8, justify="right")
    for replica in replicas:
        serves = "start-up" if replica.version is None else str(replica.version)
        stall = "-" if replica.stall_ms is None else f"{replica.stall_ms:.1f} ms"
        whole = _sum(replica.ranks)
        state = _state(replica)
        table.add_row(str(replica.worker), serves, state, *_moved(whole), stall)
        for rank in replica.ranks if len(replica.ranks) > 1 else ():
            name = Text(f"  rank {rank.rank}", style="dim")
            table.add_row(name, "", "", *_moved(rank), "")
    return table


def _state(replica: Replica) -> Text:
    waits = replica.phase == "serving" and not replica.admitted
    return Text("waiting" if waits else replica.phase, style=STYLES[replica.phase])


def _moved(progress: RankProgress | None) -> tuple[RenderableType, str]:
    """A bar, and the bytes in numbers; empty where nothing moves."""
    if progress is None:
        return "", ""
    total = progress.total_nbytes
    bar = ProgressBar(total=total or 1, completed=progress.nbytes, width=BAR)
    if not total:
        return bar, ""
    return bar, f"{progress.nbytes / total:.0%} of {size(total)}"


def _sum(ranks: tuple[RankProgress, ...]) -> RankProgress | None:
    if not ranks:
        return None
    return RankProgress(
        rank=-1,
        nbytes=sum(r.nbytes for r in ranks),
        total_nbytes=sum(r.total_nbytes for r in ranks),
    )


def _log_line(at: float, line: str) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(datetime.fromtimestamp(at).strftime("%H:%M:%S"), style="dim")
    text.append(f"  {line}")
    return text


def _by_interest(replica: Replica) -> tuple[bool, int]:
    """Those that something happens to first."""
    return replica.phase == "serving", replica.worker


def _lines(replica: Replica) -> int:
    ranks = len(replica.ranks)
    return 1 + (ranks if ranks > 1 else 0)


def _that_fit(replicas: list[Replica], lines: int) -> tuple[list[Replica], int]:
    """The first ones that fit into so many lines, at least one; how many do not."""
    shown = list(_fitting(replicas, lines)) or replicas[:1]
    return shown, len(replicas) - len(shown)


def _fitting(replicas: list[Replica], lines: int) -> Iterator[Replica]:
    for replica in replicas:
        lines -= _lines(replica)
        if lines < 0:
            return
        yield replica
