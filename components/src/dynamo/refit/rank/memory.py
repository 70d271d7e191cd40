# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a rank stages, and whether that fits: decided before a byte is allocated.

    device        a shadow of the rank's parameters beside them: the shortest pause
    host          the shadow in (pinned) host memory: the pause holds one upload
    host-no-undo  as ``host``, in half of its memory: an install that fails fences

``device`` and ``host`` also keep a copy of the live parameters in host memory, which
undoes an install that fails on some rank. Pure, but for :func:`free_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import psutil
import torch

from dynamo.refit.errors import MemoryShort
from dynamo.refit.protocol import MemoryUse, StagingChoice, StagingMode

#: Left alone on either side, for whatever else grows while the model serves.
HEADROOM = 256 << 20

#: The staging mode that the worker was started with, for its rank processes.
STAGING_VARIABLE = "DYN_REFIT_STAGING"

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class FreeMemory:
    """Bytes this rank may take. ``device`` is ``None`` where the model runs on the
    host, and shadow and scratch are host memory, too."""

    device: int | None
    host: int


def free_memory(device: torch.device, ranks: int) -> FreeMemory:
    """What is free now; ``ranks`` of one host share its memory evenly."""
    host = psutil.virtual_memory().available
    limit = _cgroup_room(CGROUP)
    if limit is not None:
        host = min(host, limit)
    room = max(0, host - HEADROOM) // ranks
    if device.type != "cuda":
        return FreeMemory(None, room)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds and does not use is as good as free to this process.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(max(0, free - HEADROOM), room)


def choose(
    wanted: StagingChoice,
    *,
    arena: int,
    scratch: int,
    free: FreeMemory,
    held: MemoryUse | None = None,
) -> MemoryUse:
    """The staging mode and the bytes that it takes.

    Args:
        wanted: a mode, or ``auto`` for the first that fits, in the order above.
        arena: bytes of the rank's parameters.
        scratch: bytes of scratch.
        held: what the rank has already. Its arena is used again; its scratch is not,
            as an old session keeps it until the new one is installed.

    Raises:
        MemoryShort: the mode, or in ``auto`` every mode, needs more than there is.
    """
    modes: tuple[StagingMode, ...] = (
        get_args(StagingMode) if wanted == "auto" else (wanted,)
    )
    on_host = free.device is None
    device_again = host_again = 0
    if held is not None:
        kept = _use(held.mode, 0, scratch, on_host)
        device_again = held.device_nbytes - kept.device_nbytes
        host_again = held.host_nbytes - kept.host_nbytes
    short = []
    for mode in modes:
        use = _use(mode, arena, scratch, on_host)
        device = use.device_nbytes - device_again
        host = use.host_nbytes - host_again
        if device <= (free.device or 0) and host <= free.host:
            return use
        short.append(
            f"{mode} takes {_gib(use.device_nbytes)} of device and "
            f"{_gib(use.host_nbytes)} of host memory"
        )
    there = f"{_gib(free.host)} of host memory are free"
    if free.device is not None:
        there = f"{_gib(free.device)} of device and {there}"
    raise MemoryShort(
        f"{'; '.join(short)}; {there}: give vLLM less KV cache or the host more memory"
    )


def room_for_cache(
    available: int, wanted: StagingChoice, *, arena: int, scratch: int
) -> int:
    """What is left of ``available`` device bytes for the KV cache beside staging.

    With ``auto`` a shadow on the device may take half of it; where it would take more,
    the cache keeps all, and staging what it finds.

    Args:
        wanted, arena, scratch: as for :func:`choose`.

    Raises:
        MemoryShort: ``wanted`` takes all there is.
    """
    mode: StagingMode = "device" if wanted == "auto" else wanted
    staging = _use(mode, arena, scratch, on_host=False).device_nbytes
    if staging:
        staging += HEADROOM
    left = available - staging
    if wanted == "auto":
        return left if 2 * staging <= available else available
    if left <= 0:
        raise MemoryShort(
            f"staging in mode {wanted} takes {_gib(staging)} of device memory, and "
            f"{_gib(max(0, available))} are left for it and the KV cache: raise "
            "--gpu-memory-utilization, or use --refit-staging host"
        )
    return left


def _use(mode: StagingMode, arena: int, scratch: int, on_host: bool) -> MemoryUse:
    """What ``mode`` takes: shadow, backup (in host memory always) and scratch."""
    if mode == "device" and not on_host:
        return MemoryUse(mode=mode, device_nbytes=arena + scratch, host_nbytes=arena)
    images = 1 if mode == "host-no-undo" else 2
    host = images * arena + scratch
    return MemoryUse(mode=mode, device_nbytes=0, host_nbytes=host)


def _cgroup_room(root: Path) -> int | None:
    """Bytes below the container's memory limit (cgroup v2); ``None`` without one."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((root / "memory.current").read_text())
        cache = dict(
            line.split() for line in (root / "memory.stat").read_text().splitlines()
        )
    except OSError:
        return None
    # Pages of files are given up before anything is killed.
    return int(limit) - used + int(cache.get("inactive_file", 0))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
