# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which byte runs become one descriptor, and how they are cut into slices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.rank.runs import cut, merge

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(60),
]

Run = tuple[int, int, int, int]


def merged(runs: list[Run]) -> list[tuple[int, int, int]]:
    """Of runs ``(remote, local, nbytes, region)``."""
    columns = np.array(runs, dtype=np.int64).reshape(-1, 4).T
    return [tuple(map(int, run)) for run in zip(*merge(*columns), strict=True)]


@pytest.mark.parametrize(
    ("second", "apart"),
    [
        ((10, 110, 5, 0), False),
        # A gap, or an overlap, on one side only.
        ((11, 110, 5, 0), True),
        ((10, 111, 5, 0), True),
        ((9, 110, 5, 0), True),
        # Another registration begins where the first one ends.
        ((10, 110, 5, 1), True),
    ],
)
def test_runs_that_follow_each_other_on_both_sides_are_one(
    second: Run, apart: bool
) -> None:
    first = (0, 100, 10, 0)
    if apart:
        assert merged([first, second]) == [first[:3], second[:3]]
    else:
        assert merged([first, second]) == [(0, 100, 15)]


def test_a_run_alone_stays_as_it_is() -> None:
    assert merged([(7, 3, 2, 0)]) == [(7, 3, 2)]


def test_a_chain_is_one_run_and_another_begins_after_it() -> None:
    chain = [(0, 50, 10, 0), (10, 60, 1, 0), (11, 61, 4, 0)]
    other = [(20, 65, 3, 0), (23, 68, 3, 0)]
    assert merged(chain + other) == [(0, 50, 15), (20, 65, 6)]


@settings(max_examples=200, deadline=None)
@given(
    runs=st.lists(
        st.tuples(
            st.integers(0, 1), st.integers(0, 1), st.integers(1, 3), st.integers(0, 1)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_every_byte_goes_where_it_went(runs: list[Run]) -> None:
    """Runs in a row, with gaps of nothing or a byte on either side."""
    placed, remote, local = [], 0, 1000
    for remote_gap, local_gap, nbytes, region in runs:
        remote, local = remote + remote_gap, local + local_gap
        placed.append((remote, local, nbytes, region))
        remote, local = remote + nbytes, local + nbytes

    def moved(all_runs: list) -> list[tuple[int, int]]:
        return [
            (remote + byte, local + byte)
            for remote, local, nbytes, *_ in all_runs
            for byte in range(nbytes)
        ]

    assert moved(merged(placed)) == moved(placed)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 50),
)
def test_slices_have_every_byte_once_and_in_order(sizes: list[int], limit: int) -> None:
    every = [(run, at) for run, size in enumerate(sizes) for at in range(size)]
    seen: list[tuple[int, int]] = []
    slices = list(cut(np.array(sizes, dtype=np.int64), limit))
    for number, (runs, skipped, nbytes) in enumerate(slices):
        assert nbytes.sum() == limit or number == len(slices) - 1
        for run, start, size in zip(runs, skipped, nbytes, strict=True):
            assert size > 0
            seen += [(int(run), int(start) + at) for at in range(size)]
    assert seen == every
