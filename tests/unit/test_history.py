# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a reconciler's life leaves behind in the history, and how far workers are
behind."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import pytest

from dynamo.refit.coordinator.actions import Input, Publish, Tick
from dynamo.refit.coordinator.history import KEPT, RefitHistory
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.events import RefitCompleted, RefitRefused
from dynamo.refit.protocol import RefitRecord
from tests.support.fleet import (
    POLICY,
    TIMINGS,
    V5,
    V6,
    V7,
    commit_refused,
    committed,
    failure,
    fleet,
    leased,
    member,
    not_leased,
    ready,
    voted,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: Unix seconds at the reconciler's second zero.
EPOCH = 1_800_000_000.0


class Life:
    """A reconciler and the history that listens to it."""

    def __init__(self, *members: object) -> None:
        self.reconciler = Reconciler("tiny", POLICY)
        self.history = RefitHistory(EPOCH)
        self.hear(0.0, fleet(*members))

    def hear(self, now: float, *inputs: Input) -> None:
        for what in inputs:
            actions = self.reconciler.handle(what, now)
            desired = self.reconciler.desired
            self.history.hear(what, actions, desired, EPOCH + now)

    @property
    def records(self) -> list[RefitRecord]:
        return list(self.history.view().records)


def votes(announced: object, *workers: int) -> Iterable[Input]:
    return (voted(worker, announced) for worker in workers)


def test_a_version_is_under_way_and_then_completed() -> None:
    life = Life(1, 2)
    life.hear(10.0, V5, V5, leased(V5), *votes(V5, 1, 2))
    record = RefitRecord(
        version=5, announcement_id="a5", outcome="under way", announced_at=EPOCH + 10.0
    )
    assert life.records == [record]

    slower = committed(2, V5)
    timings = msgspec.structs.replace(TIMINGS, stall_ms=41.5)
    reply = msgspec.structs.replace(slower.reply, timings=timings)
    life.hear(12.5, type(slower)(2, "a5", reply), committed(1, V5))
    assert life.records == [
        msgspec.structs.replace(
            record,
            outcome="completed",
            ended_at=EPOCH + 12.5,
            seconds=2.5,
            stall_ms=41.5,
            workers=(1, 2),
        )
    ]
    # The trainer has not heard it yet.
    life.hear(13.0, V5, Tick())
    assert len(life.records) == 1
    assert life.history.view().since == EPOCH


def test_each_way_to_end_is_told_with_its_cause() -> None:
    life = Life(1)
    life.hear(1.0, V5, not_leased(V5))
    life.hear(2.0, V6, leased(V6))
    life.hear(4.0, V7, ready(3), ready(8, model="other"))

    failed, superseded, under_way, stale, unknown = life.records
    assert (failed.version, failed.outcome) == (5, "failed")
    assert failed.detail == str(failure())
    assert (superseded.version, superseded.outcome) == (6, "superseded")
    assert (superseded.detail, superseded.seconds) == ("by version 7", 2.0)
    assert (under_way.version, under_way.outcome) == (7, "under way")
    assert (stale.version, stale.outcome) == (3, "refused")
    assert stale.detail.startswith("stale: version 3 is older than 7")
    assert (unknown.version, unknown.outcome) == (8, "refused")
    assert unknown.detail.startswith("unknown_model: ")
    assert [r.stall_ms for r in life.records] == [None] * 5


def test_a_worker_that_could_not_follow_is_named() -> None:
    life = Life(1, 2)
    life.hear(1.0, V5, leased(V5), *votes(V5, 1, 2))
    life.hear(2.0, committed(1, V5), commit_refused(2, V5))
    (record,) = life.records
    assert (record.outcome, record.workers) == ("completed", (1,))
    assert record.excluded == (failure(2),)


def test_a_catch_up_changes_no_record() -> None:
    life = Life(1)
    life.hear(1.0, V5, leased(V5), *votes(V5, 1), committed(1, V5))
    before = life.records
    life.hear(2.0, fleet(member(1, 5), member(2)))
    assert life.reconciler.transaction.catch_up
    event = RefitCompleted(
        model="tiny",
        version=5,
        announcement_id="a5",
        fingerprint=V5.fingerprint,
        workers=(1, 2),
        seconds=1.0,
        catch_up=True,
    )
    life.history.hear(Tick(), [Publish(event)], V5, EPOCH + 3.0)
    assert life.records == before


def test_only_the_last_hundred_are_kept() -> None:
    history = RefitHistory(EPOCH)
    for version in range(KEPT + 7):
        refused = RefitRefused(
            reason="stale", detail="-", version=version, announcement_id=f"a{version}"
        )
        history.hear(Tick(), [Publish(refused)], None, EPOCH)
    assert [r.version for r in history.view().records] == list(range(7, KEPT + 7))


def test_what_is_no_version_is_not_kept() -> None:
    history = RefitHistory(EPOCH)
    malformed = RefitRefused(reason="malformed_event", detail="not msgpack")
    history.hear(Tick(), [Publish(malformed)], None, EPOCH)
    assert history.view().records == ()


def test_how_far_workers_are_behind() -> None:
    life = Life(member(1, 4))
    life.hear(10.0, V5, not_leased(V5))
    life.hear(12.0, ready(3))
    life.hear(15.0, V6, leased(V6))
    members = [member(1), member(2, 5), member(3, 6)]
    placed = life.history.place(members, EPOCH + 16.0)
    assert [m.worker for m in placed] == [1, 2, 3]
    # A refused version is nobody's lag.
    assert [m.behind for m in placed] == [2, 1, 0]
    assert [m.behind_seconds for m in placed] == [6.0, 1.0, 0.0]


def test_nobody_is_behind_a_failed_number_that_was_a_mistake() -> None:
    typo = ready(4_200_000)
    life = Life(1)
    life.hear(10.0, V5, leased(V5), *votes(V5, 1), committed(1, V5))
    life.hear(12.0, typo, not_leased(typo))
    (waits,) = life.history.place([member(1, 5)], EPOCH + 13.0)
    assert (waits.behind, waits.behind_seconds) == (1, 1.0)
    life.hear(15.0, V6, leased(V6), *votes(V6, 1), committed(1, V6))
    (placed,) = life.history.place([member(1, 6)], EPOCH + 16.0)
    assert (placed.behind, placed.behind_seconds) == (0, 0.0)


def test_after_a_restart_the_others_show_it_but_not_since_when() -> None:
    history = RefitHistory(EPOCH)
    placed = history.place([member(1, 5), member(2, 7)], EPOCH + 1)
    assert [(m.behind, m.behind_seconds) for m in placed] == [(1, None), (0, 0.0)]
