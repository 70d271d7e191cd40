# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The loop that copies in slices, over C functions that stand for the driver's.

What the driver does with it is tested on a GPU: ``tests/gpu/test_host_copy.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numba import cfunc

from dynamo.refit.rank.host_copy import sliced

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

COPY = "int32(uint64, uint64, uint64, uint64)"
WAIT = "int32(uint64)"


@cfunc(WAIT)
def no_wait(stream):
    return 0


def run(copy: Callable, wait: Callable = no_wait, *, sizes=(10,), step=4) -> int:
    count = len(sizes)
    return sliced(copy.ctypes, wait.ctypes)(
        np.arange(1, count + 1, dtype=np.uint64) * np.uint64(1000),
        np.arange(1, count + 1, dtype=np.uint64) * np.uint64(5000),
        np.array(sizes, dtype=np.uint64),
        np.uint64(step),
        np.uint64(7),
    )


def test_every_byte_is_in_one_slice_and_no_slice_is_too_large() -> None:
    @cfunc(COPY)
    def expected_only(target, source, nbytes, stream):
        # Of 1 000 .. 1 010 from 5 000 on, and of 2 000 .. 2 003 from 10 000 on.
        first = (target, source, nbytes)
        known = (
            first == (1000, 5000, 4)
            or first == (1004, 5004, 4)
            or first == (1008, 5008, 2)
            or first == (2000, 10000, 3)
        )
        return 0 if known and stream == 7 else 1

    assert run(expected_only, sizes=(10, 3)) == 0
    # One that is not among them.
    assert run(expected_only, sizes=(11, 3)) == 1


@pytest.mark.parametrize(("sizes", "last"), [((10,), 1008), ((8,), 1004), ((3,), 1000)])
def test_it_goes_on_to_the_last_slice(sizes: tuple[int], last: int) -> None:
    @cfunc(COPY)
    def fails_at_the_last(target, source, nbytes, stream):
        return 9 if target == last else 0

    assert run(fails_at_the_last, sizes=sizes) == 9


def test_the_first_failure_ends_it() -> None:
    @cfunc(COPY)
    def says_how_many(target, source, nbytes, stream):
        return nbytes

    @cfunc(WAIT)
    def fails(stream):
        return 100 + stream

    @cfunc(COPY)
    def works(target, source, nbytes, stream):
        return 0

    assert run(says_how_many) == 4
    assert run(works, fails) == 107


def test_nothing_is_copied_of_nothing() -> None:
    @cfunc(COPY)
    def fails(target, source, nbytes, stream):
        return 1

    assert run(fails, sizes=()) == 0
    assert run(fails, sizes=(0, 0)) == 0
