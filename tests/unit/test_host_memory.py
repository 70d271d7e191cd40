# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Registered host memory asks the kernel for huge pages, which NumPy does for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dynamo.refit.host_memory import host_zeros

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> list[str]:
    """What the kernel was told of the mapping that ``address`` is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("not mapped")


def test_it_is_zero_and_may_be_in_huge_pages() -> None:
    if not HUGE_PAGES.exists():
        pytest.skip("this kernel has no transparent huge pages")
    buffer = host_zeros(64 * MIB)
    assert buffer.dtype == torch.uint8 and buffer.shape == (64 * MIB,)
    assert not buffer.any()
    assert "hg" in flags_of(buffer.data_ptr() + 32 * MIB)
