# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Copies from a GPU to pinned host memory that hold nobody up.

A GPU copies to the host in the order in which it is asked, whatever the stream: behind
8 GB that are asked for at once, every step's tokens wait for 150 ms, and an H100 then
makes a tenth of them. So the copies are made in slices, one at a time. In Python the
loop would take turns with the model at the interpreter's lock, hundreds of times: it
is compiled, and calls the driver.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import numba
import numpy as np
import torch

from dynamo.refit.errors import RefitError

#: Bytes of a slice: a PCIe 5 link has them there in less than a tenth of a millisecond.
SLICE = 4 << 20

#: Their arguments are addresses and numbers of 64 bits; 0 is success.
_ARGUMENTS = [ctypes.c_uint64] * 4


class CopyFailed(RefitError):
    """The driver refused a copy from the device."""


def copy_out(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy each source, of one GPU, to its target in pinned host memory; blocks.

    All are contiguous. On the current stream, without the interpreter's lock.

    Raises:
        CopyFailed: with the driver's error number.
    """
    if not sources:
        return
    device = sources[0].device
    with torch.cuda.device(device):
        status = _driver_copy()(
            _addresses(targets),
            _addresses(sources),
            np.array([source.nbytes for source in sources], dtype=np.uint64),
            np.uint64(SLICE),
            np.uint64(torch.cuda.current_stream(device).cuda_stream),
        )
    if status:
        raise CopyFailed(
            f"CUDA error {status} while copying {len(sources)} tensors of {device} to "
            "host memory: restart this worker"
        )


def warm_up() -> None:
    """Compile, which takes a second, before it is needed."""
    empty = np.zeros(0, dtype=np.uint64)
    _driver_copy()(empty, empty, empty, np.uint64(SLICE), np.uint64(0))


def _addresses(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.uint64)


@functools.cache
def _driver_copy() -> Callable[..., int]:
    driver = ctypes.CDLL("libcuda.so.1")
    copy, wait = driver.cuMemcpyDtoHAsync_v2, driver.cuStreamSynchronize
    copy.argtypes, wait.argtypes = _ARGUMENTS, _ARGUMENTS[:1]
    copy.restype = wait.restype = ctypes.c_int
    return sliced(copy, wait)


def sliced(copy: Callable[..., int], wait: Callable[..., int]) -> Callable[..., int]:
    """A compiled loop over two C functions: ``copy(target, source, nbytes, stream)``
    starts a copy, ``wait(stream)`` waits for it. It gives the first status that is
    not 0, and makes no copy after it."""

    @numba.njit(nogil=True)
    def run(targets, sources, sizes, step, stream):
        for number in range(len(sizes)):
            done = np.uint64(0)
            while done < sizes[number]:
                nbytes = min(step, sizes[number] - done)
                status = copy(
                    targets[number] + done, sources[number] + done, nbytes, stream
                )
                if status != 0:
                    return status
                status = wait(stream)
                if status != 0:
                    return status
                done += nbytes
        return np.int32(0)

    return run
