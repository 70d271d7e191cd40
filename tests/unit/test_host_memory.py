# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Registered host memory asks the kernel for huge pages, which NumPy does for it; and
what is pinned is pinned page by page and given back."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from dynamo.refit.errors import MemoryShort
from dynamo.refit.host_memory import host_zeros, pinned_zeros

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


class FakeCudart:
    """A test fake of ``torch.cuda.cudart()``, which is not there without a GPU: pins
    whole pages, each once."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        assert address % mmap.PAGESIZE == nbytes % mmap.PAGESIZE == 0
        assert not any(
            address < other + size and other < address + nbytes
            for other, size in self.pinned.items()
        )
        if not self.status:
            self.pinned[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0


def test_what_is_pinned_is_given_back_with_the_last_view_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    # Small ones, which lie side by side, have pages of their own.
    buffers = {size: pinned_zeros(size) for size in (1, 5, 4096, 4097, 3 * MIB)}
    for size, buffer in buffers.items():
        assert buffer.dtype == torch.uint8 and buffer.shape == (size,)
        assert not buffer.any()
        assert size <= cudart.pinned[buffer.data_ptr()] < size + mmap.PAGESIZE
    view = buffers[5][2:].view(3)
    del buffer
    buffers.clear()
    gc.collect()
    assert list(cudart.pinned) == [view.data_ptr() - 2]
    del view
    gc.collect()
    assert cudart.pinned == {}


def test_nothing_is_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    assert pinned_zeros(0).shape == (0,)
    assert cudart.pinned == {}


def test_what_the_driver_does_not_pin_is_said_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cudart = FakeCudart(status=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(MemoryShort, match="CUDA error 2 while pinning 4096 bytes"):
        pinned_zeros(4096)
    assert cudart.pinned == {}
