# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Conversions on the model's thread: in order, once, a few at a time, and the same ones
on all ranks."""

from __future__ import annotations

import math
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import LayoutRefused, RefitError, StagingCancelled
from dynamo.refit.protocol import Running
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.handover import Handover
from dynamo.refit.worker.ranks import CONVERT_MS, ConversionSteps

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def patient() -> Limit:
    """A wait that a broken handover does not make endless."""
    return Limit(time.monotonic() + 10, lambda: False)


def test_what_is_ready_is_done_once_in_order_and_no_further_than_asked() -> None:
    done: list[int] = []
    handover = Handover(5, done.append)
    handover.run(5)
    assert done == []
    handover.offer(3)
    handover.run(2)
    assert (done, handover.done, handover.ready) == ([0, 1], 2, 3)
    handover.run(1)
    handover.run(5)
    assert done == [0, 1, 2]
    handover.offer(5)
    # Waves without a conversion say less.
    handover.offer(0)
    handover.run(5)
    assert done == [0, 1, 2, 3, 4]
    handover.wait(5, patient())


def test_who_waits_goes_on_when_it_is_done() -> None:
    handover = Handover(2, lambda number: time.sleep(0.01))
    waited: list[int] = []

    def wait() -> None:
        handover.wait(2, patient())
        waited.append(handover.done)

    thread = threading.Thread(target=wait)
    thread.start()
    handover.offer(2)
    handover.run(1)
    assert handover.ms >= 10
    handover.run(2)
    thread.join(10)
    assert waited == [2]


def test_a_failure_reaches_who_waits_and_nothing_comes_after_it() -> None:
    tried: list[int] = []

    def convert(number: int) -> None:
        tried.append(number)
        if number == 1:
            raise RefitError("no memory")

    handover = Handover(3, convert)
    handover.offer(3)
    # The model's thread serves on.
    handover.run(3)
    handover.run(3)
    assert (tried, handover.done) == ([0, 1], 1)
    with pytest.raises(RefitError, match="no memory"):
        handover.wait(3, patient())


def test_waiting_ends_when_it_is_cancelled() -> None:
    with pytest.raises(StagingCancelled, match="model's thread"):
        Handover(1, lambda number: None).wait(1, Limit(math.inf, lambda: True))


def running(total: int | None, ready: int, done: int, ms: float = 0.0) -> Running:
    return Running(conversions=total, ready=ready, converted=done, convert_ms=ms)


@settings(deadline=None)
@given(
    total=st.integers(0, 40),
    costs=st.lists(st.floats(0.01, 5), min_size=40, max_size=40),
    data=st.data(),
)
def test_ranks_carry_out_the_same_ones_until_all_are_done(
    total: int, costs: list[float], data: st.DataObject
) -> None:
    """Two ranks, whose sources come at their own pace."""
    steps, ready, done, ms = ConversionSteps(), [0, 0], 0, 0.0
    while done < total:
        ready = [data.draw(st.integers(r, total), label="ready") for r in ready]
        goes_on = steps.go_on([running(total, r, done, ms) for r in ready])
        assert goes_on is (min(ready) > done)
        if not goes_on:
            ready = [total, total]
            continue
        assert done < steps.before <= min(ready)
        ms = sum(costs[done : steps.before])
        done = steps.before
    assert not steps.go_on([running(total, total, total, ms)] * 2)


def test_quick_ones_are_done_together_and_slow_ones_alone() -> None:
    steps = ConversionSteps()
    sizes = []
    for ms in (0.1, 0.2, 0.4, 0.8, 0.8, 4.0, 0.9):
        before = steps.before
        steps.go_on([running(1000, 1000, before, ms)])
        sizes.append(steps.before - before)
    assert sizes[0] == 1
    assert sizes[3] > 4
    assert sizes[5] == max(1, int(sizes[4] * CONVERT_MS / 4.0))
    assert sizes[6] <= 2 * sizes[5]


def test_the_slowest_rank_says_how_many_are_done_together() -> None:
    """Whatever its place among the ranks is."""
    for slow in (0, 1):
        steps = ConversionSteps()
        sizes = []
        for ms in (0.1, 0.1, 0.1, 8.0):
            before = steps.before
            replies = [running(1000, 1000, before, 0.1) for _ in range(2)]
            replies[slow] = running(1000, 1000, before, ms)
            assert steps.go_on(replies)
            sizes.append(steps.before - before)
        assert sizes[2] > 2
        assert sizes[3] == 1


def test_a_rank_that_does_not_know_yet_is_waited_for() -> None:
    steps = ConversionSteps()
    assert not steps.go_on([running(3, 3, 0), running(None, 0, 0)])
    assert steps.before == 0
    assert steps.go_on([running(3, 3, 0), running(3, 2, 0)])
    assert steps.before == 1


def test_ranks_that_convert_different_numbers_of_layers_are_refused() -> None:
    """Each would wait in a collective for another one."""
    with pytest.raises(LayoutRefused, match=r"\[3, 4\]"):
        ConversionSteps().go_on([running(3, 3, 0), running(4, 3, 0)])
