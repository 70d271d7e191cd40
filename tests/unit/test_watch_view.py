# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What ``dynamo-refit watch`` shows at 80 columns, from recorded events and
statuses."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable

import msgspec
import pytest
from rich.console import Console

from dynamo.refit.cli.render import screen
from dynamo.refit.cli.view import (
    EVENT_SECONDS,
    LOG_EVENTS,
    View,
    after_event,
    after_status,
)
from dynamo.refit.cli.words import headline, lasting, size
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    StageProgress,
    WorkerAdmitted,
    WorkerFenced,
    WorkerJoined,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import FleetMember, FleetStatus, RankProgress
from tests.support.fake_replica import vote_of
from tests.support.fleet import TIMINGS, member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: Unix seconds of the first event; ids as long as Dynamo's.
AT = 1_800_000_000.5
A, B = 7215758003448580, 7215758003448591
GIB = 2**30


def status(*members: FleetMember, under_way: int | None = None) -> FleetStatus:
    return FleetStatus(
        model="tiny",
        epoch=3,
        desired=8,
        completed=7,
        under_way=under_way,
        members=members,
    )


def moved(*nbytes: int) -> tuple[RankProgress, ...]:
    return tuple(
        RankProgress(rank=rank, nbytes=done, total_nbytes=2 * GIB)
        for rank, done in enumerate(nbytes)
    )


def staged(worker: int) -> WorkerStaged:
    votes = (vote_of(0), vote_of(1))
    held = tuple(msgspec.structs.replace(vote, nbytes=2 * GIB) for vote in votes)
    return WorkerStaged(worker=worker, version=8, ranks=held)


def refitted(worker: int) -> WorkerRefitted:
    return WorkerRefitted(
        worker=worker,
        version=8,
        fingerprint="9f",
        kv_epoch="8-x",
        in_flight="continue",
        timings=TIMINGS,
    )


STARTED = RefitStarted(model="tiny", version=8, workers=(A, B))
COMPLETED = RefitCompleted(
    model="tiny",
    version=8,
    announcement_id="a8",
    fingerprint="9f",
    workers=(A, B),
    seconds=3.25,
)
FAILURE = Failure(kind="MemoryShort", message="no room", stage="stage", worker=A)


def before() -> View:
    """Two replicas that serve version 7, as a late viewer finds them."""
    return after_status(View(), status(member(A, 7), member(B, 7)), now=0.0)


def seen(events: Iterable[Event], view: View | None = None) -> View:
    """The view after ``events``, a second apart."""
    view = view or before()
    for number, event in enumerate(events):
        dated = msgspec.structs.replace(event, at=AT + number, epoch=3)
        view = after_event(view, dated, now=10.0 + number)
    return view


def lines_of(view: View, height: int = 24) -> list[str]:
    console = Console(width=80, height=height, record=True, file=io.StringIO())
    console.print(screen(view, height))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


# --- what is shown ---------------------------------------------------------------


def test_a_refit_from_the_first_byte_to_the_end() -> None:
    progress = StageProgress(worker=A, version=8, ranks=moved(GIB, GIB // 2))
    assert lines_of(seen([STARTED, progress, staged(B)])) == [
        "tiny  completed 7  under way 8  1 of 2 votes",
        "worker             serves state                              bytes    stall",
        f"{A}        7 staging    ━━━━╸         38% of 4.00 GiB        -",
        "  rank 0                             ━━━━━━        50% of 2.00 GiB",
        "  rank 1                             ━━━           25% of 2.00 GiB",
        f"{B}        7 staged     ━━━━━━━━━━━━ 100% of 4.00 GiB        -",
        "  rank 0                             ━━━━━━━━━━━━ 100% of 2.00 GiB",
        "  rank 1                             ━━━━━━━━━━━━ 100% of 2.00 GiB",
        "",
        "08:00:00  version 8: staging on 2 workers",
        f"08:00:02  version 8: worker {B} holds it: 4.00 GiB on 2 ranks",
    ]
    whole = [STARTED, progress, staged(B), staged(A), refitted(A), refitted(B)]
    assert lines_of(seen([*whole, COMPLETED])) == [
        "tiny  completed 8",
        "worker             serves state                              bytes    stall",
        f"{A}        8 serving                                    6.0 ms",
        f"{B}        8 serving                                    6.0 ms",
        "",
        "08:00:00  version 8: staging on 2 workers",
        f"08:00:02  version 8: worker {B} holds it: 4.00 GiB on 2 ranks",
        f"08:00:03  version 8: worker {A} holds it: 4.00 GiB on 2 ranks",
        f"08:00:04  version 8: worker {A} serves it, stall 6.0 ms",
        f"08:00:05  version 8: worker {B} serves it, stall 6.0 ms",
        "08:00:06  version 8: completed: 2 workers refitted in 3.25 s",
    ]


def test_before_anything_is_known() -> None:
    complaint = "no coordinator in namespace 'dynamo': start `python -m dynamo.refit`"
    lines = lines_of(View(complaint=complaint))
    assert lines[0].startswith("no model yet  completed start-up weights  no coord")
    assert lines[0].endswith("…")


def test_one_rank_needs_no_line_of_its_own() -> None:
    view = seen([STARTED, StageProgress(worker=A, version=8, ranks=moved(GIB))])
    assert not [line for line in lines_of(view) if "rank" in line]
    assert "50% of 2.00 GiB" in lines_of(view)[2]


def test_states_of_workers_that_do_not_serve() -> None:
    fenced = WorkerFenced(worker=A, version=8, failure=FAILURE)
    joined = WorkerJoined(worker=5, version=None)
    view = after_status(seen([fenced, joined]), status(member(5)), now=0.0)
    lines = lines_of(after_status(view, status(member(5, admitted=False)), now=1e3))
    assert lines[2].split() == ["5", "start-up", "waiting", "-"]
    states = {r.worker: r.phase for r in seen([fenced, joined]).replicas.values()}
    assert states == {A: "fenced", B: "serving", 5: "serving"}
    assert seen([WorkerAdmitted(worker=5, version=8)]).replicas[5].admitted


@pytest.mark.parametrize("width", [20, 16])
@pytest.mark.parametrize("ranks", [1, 8])
def test_no_line_is_longer_than_the_terminal(width: int, ranks: int) -> None:
    """Whatever the ids and the sizes: a line that is too long is wrapped, and then the
    view jumps."""
    workers = [10 ** (width - 1) + n for n in range(3)]
    found = status(*(member(w, 123_456) for w in workers), under_way=123_457)
    huge = tuple(
        RankProgress(rank=r, nbytes=999 * GIB, total_nbytes=1000 * GIB)
        for r in range(ranks)
    )
    events = [StageProgress(worker=w, version=123_457, ranks=huge) for w in workers]
    lines = lines_of(seen(events, after_status(View(), found, now=0.0)), height=60)
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if str(workers[0])[:-1] in line]) >= 3


@pytest.mark.parametrize("height", [10, 24, 50])
def test_a_large_fleet_is_cut_to_the_screen_and_what_happens_comes_first(
    height: int,
) -> None:
    view = after_status(View(), status(*(member(w, 7) for w in range(100))), now=0.0)
    busy = StageProgress(worker=99, version=8, ranks=moved(0, GIB))
    lines = lines_of(
        seen([busy] + [WorkerJoined(worker=1, version=7)] * 20, view), height
    )
    assert len(lines) <= height
    assert lines[2].split()[:3] == ["99", "7", "staging"]
    shown = sum(
        line.split()[1:3] in (["7", "serving"], ["7", "staging"]) for line in lines
    )
    assert f"and {100 - shown} more workers" in lines


# --- events and statuses --------------------------------------------------------


def test_a_status_does_not_take_back_what_an_event_has_just_told() -> None:
    view = seen([STARTED, refitted(A)])
    old = status(member(A, 7, "committing", pending=8), member(B, 7), under_way=8)
    soon, later = 11.0 + EVENT_SECONDS / 2, 11.0 + EVENT_SECONDS
    assert after_status(view, old, soon).replicas[A].version == 8
    assert after_status(view, old, later).replicas[A].phase == "committing"


def test_a_status_corrects_what_lost_events_have_left() -> None:
    progress = StageProgress(worker=A, version=8, ranks=moved(GIB, GIB))
    view = after_status(seen([STARTED, progress]), status(member(A, 8)), now=1e3)
    assert list(view.replicas) == [A]
    replica = view.replicas[A]
    assert (replica.version, replica.target, replica.ranks) == (8, None, ())
    assert view.under_way is None


def test_a_stall_stays_where_the_status_does_not_tell_it() -> None:
    view = seen([refitted(A), refitted(B)])
    view = after_status(view, status(member(A, 8), member(B, 9)), now=1e3)
    assert (view.replicas[A].stall_ms, view.replicas[B].stall_ms) == (6.0, None)


def test_bars_stay_while_a_status_says_the_same() -> None:
    progress = StageProgress(worker=A, version=8, ranks=moved(GIB, GIB))
    now = status(member(A, 7, "staging", pending=8), member(B, 7), under_way=8)
    view = after_status(seen([STARTED, progress]), now, now=1e3)
    assert view.replicas[A].ranks == moved(GIB, GIB)


@pytest.mark.parametrize(
    "end",
    [
        RefitFailed(version=8, failure=FAILURE, serving=()),
        RefitSuperseded(version=8, by=9),
    ],
    ids=lambda event: type(event).__name__,
)
def test_what_is_given_up_leaves_no_bar(end: Event) -> None:
    view = seen([STARTED, staged(A), end])
    assert view.under_way is None
    assert {(r.phase, r.target, r.ranks) for r in view.replicas.values()} == {
        ("serving", None, ())
    }


def test_a_worker_s_own_failure_is_not_the_end_of_the_version() -> None:
    failed = RefitFailed(version=8, failure=FAILURE, serving=())
    view = after_event(seen([STARTED]), failed, now=11.0)
    assert view.under_way == 8


def test_a_catch_up_completes_nothing_new() -> None:
    caught_up = msgspec.structs.replace(COMPLETED, version=6, catch_up=True)
    assert seen([caught_up]).completed == 7


def test_the_log_is_bounded_and_progress_is_not_in_it() -> None:
    joined = [WorkerJoined(worker=n, version=None) for n in range(LOG_EVENTS + 5)]
    view = seen([*joined, StageProgress(worker=A, version=8, ranks=())])
    assert len(view.log) == LOG_EVENTS
    last = f"worker {LOG_EVENTS + 4} has come, with start-up weights"
    assert view.log[-1] == (AT + LOG_EVENTS + 4, last)


# --- words ----------------------------------------------------------------------


def test_every_event_but_progress_has_its_words() -> None:
    progress = StageProgress(worker=A, version=8, ranks=())
    assert headline(progress) is None
    told = headline(RefitFailed(version=8, failure=FAILURE, serving=()))
    assert told == f"version 8: failed: stage: MemoryShort: no room (worker {A})"


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (0, "0.0 MiB"),
        (2**20 * 5 // 2, "2.5 MiB"),
        (1000 * 2**20, "1000 MiB"),
        (2**30, "1.00 GiB"),
        (34 * 2**30, "34.0 GiB"),
        (1400 * 2**30, "1400 GiB"),
    ],
)
def test_sizes(nbytes: int, told: str) -> None:
    assert size(nbytes) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0.0 s"), (0.44, "0.4 s"), (59, "59 s"), (180, "3 min"), (9000, "2 h")],
)
def test_times(seconds: float, told: str) -> None:
    assert lasting(seconds) == told
