# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Host memory that NIXL reads from and writes into, and a GPU copies from and to."""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch

from dynamo.refit.errors import MemoryShort

#: ``cudaHostRegisterPortable``: pinned for every GPU of the process.
PORTABLE = 1


def host_zeros(nbytes: int) -> torch.Tensor:
    """``nbytes`` zeros, uint8, with a page behind each of them.

    UCX reads another process's memory page by page, so huge pages make it about twice
    as fast. NumPy asks the kernel for them where it gives them on request only (the
    default of most distributions), and torch does not.
    """
    return torch.from_numpy(np.empty(nbytes, dtype=np.uint8)).zero_()


def pinned_zeros(nbytes: int) -> torch.Tensor:
    """As :func:`host_zeros`, in memory that a GPU copies from and to directly.

    torch's own pinned memory is rounded up to a power of two, nearly twice a model's
    size at the worst, and is never given back.

    Raises:
        MemoryShort: the driver pins no more, with its error number.
    """
    # Whole pages: the driver pins a page once, for one buffer.
    span = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = np.empty(span + mmap.PAGESIZE, dtype=np.uint8)
    start = -pages.ctypes.data % mmap.PAGESIZE
    memory = torch.from_numpy(pages).zero_()[start : start + nbytes]
    if nbytes:
        cudart, address = torch.cuda.cudart(), pages.ctypes.data + start
        status = int(cudart.cudaHostRegister(address, span, PORTABLE))
        if status:
            raise MemoryShort(
                f"CUDA error {status} while pinning {nbytes} bytes of host memory: "
                "give the host more of it, or raise the limit of locked memory "
                "(ulimit -l)"
            )
        # Before the memory goes: its tensors hold the array. With the process it goes
        # by itself.
        weakref.finalize(pages, cudart.cudaHostUnregister, address).atexit = False
    return memory
