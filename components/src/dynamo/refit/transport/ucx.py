# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What this package sets for UCX: reads on a GPU without NVLink, and what it shows.

UCX reads GPU memory of another process over CUDA IPC, which on one GPU needs no link
at all. But where it finds no NVLink it switches reads off ("cuda-ipc get zcopy
disabled as no nvlinks detected") and falls back to TCP: 0.4 GB/s on an H100 instead of
1 400 (UCX 1.22). Everywhere else it chooses well, and is only asked to show what.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

try:
    import pynvml
except ImportError:
    pynvml = None

READS = "UCX_CUDA_IPC_ENABLE_GET_ZCOPY"

#: The variable that has UCX write tables of the protocols that it chooses, one for each
#: kind of peer and memory, and the pattern of the tables about reads.
TABLES, OF_READS = "UCX_PROTO_INFO", "*memory read*"

#: They say what is to be seen of UCX, and choose nothing.
SHOWING = ("UCX_LOG_", "UCX_PROTO_INFO", "UCX_STATS_", "UCX_PROFILE_")


def allow_reads_on_one_gpu() -> None:
    """Switch CUDA IPC reads on in this process, where UCX would not.

    Before UCX is used for the first time: it reads its environment then. Nothing is
    changed where the operator has chosen anything, or a GPU has an NVLink.
    """
    if READS not in os.environ and needs_reads(os.environ, _nvlinks()):
        os.environ[READS] = "y"


def show_reads() -> None:
    """Have UCX write on the output of this process what it reads with, by transport
    and size, when it first does; before UCX is used for the first time. An operator's
    own choice of tables stays."""
    os.environ.setdefault(TABLES, OF_READS)


def needs_reads(variables: Iterable[str], nvlinks: int | None) -> bool:
    """Whether the setting is called for.

    Args:
        variables: names of the environment.
        nvlinks: active links of all GPUs; ``None``: no GPU, or nobody knows.
    """
    chosen = any(
        name.startswith("UCX_") and not name.startswith(SHOWING) for name in variables
    )
    return nvlinks == 0 and not chosen


def _nvlinks() -> int | None:
    if pynvml is None or not torch.cuda.is_available():
        return None
    try:
        pynvml.nvmlInit()
        try:
            return sum(
                _active_links(pynvml.nvmlDeviceGetHandleByIndex(index))
                for index in range(pynvml.nvmlDeviceGetCount())
            )
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _active_links(gpu: object) -> int:
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += pynvml.nvmlDeviceGetNvLinkState(gpu, link)
        except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_InvalidArgument):
            # A GPU without NVLink, or with fewer of them.
            break
    return active
