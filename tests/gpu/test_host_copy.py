# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Copies to pinned host memory, by the driver, in slices."""

from __future__ import annotations

import pytest
import torch

from dynamo.refit.rank.host_copy import SLICE, copy_out

pytestmark = [
    pytest.mark.unit,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_byte_arrives_and_no_other_is_written() -> None:
    sizes = [1, SLICE - 1, SLICE, 3 * SLICE + 5]
    sources = [
        torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        for size in sizes
    ]
    places = [
        torch.full((size + 8,), 7, dtype=torch.uint8).pin_memory() for size in sizes
    ]
    copy_out(sources, [place[:-8] for place in places])
    for source, place in zip(sources, places, strict=True):
        assert torch.equal(place[:-8], source.cpu())
        assert place[-8:].eq(7).all()


def test_nothing_is_nothing() -> None:
    copy_out([], [])
