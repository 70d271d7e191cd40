# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the processes of one group hold, and which of them is the engine's. A worker of
a graph, its engine and its ranks are one group. Owns nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

#: How vLLM's processes begin their titles: the engine core's, and each rank's where
#: ranks have processes of their own.
ENGINE, RANK = "VLLM::EngineCore", "VLLM::Worker"


@dataclass(frozen=True)
class Held:
    """Threads and open file descriptors of all processes of a group."""

    threads: int
    descriptors: int


def processes_of(group: int) -> Iterator[psutil.Process]:
    """The processes of a group; one that has ended may not be reaped yet."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            ended = process.status() == psutil.STATUS_ZOMBIE
            if os.getpgid(process.pid) == group and not ended:
                yield process


def living(group: int) -> list[str]:
    """The names of a group's processes."""
    found = []
    for process in processes_of(group):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(process.name())
    return found


def held(group: int) -> Held:
    """What the group's processes hold now.

    Raises:
        AssertionError: it has no process.
    """
    threads = descriptors = 0
    for process in processes_of(group):
        with contextlib.suppress(psutil.NoSuchProcess):
            threads += process.num_threads()
            descriptors += process.num_fds()
    assert threads > 0, f"there is no process of group {group}"
    return Held(threads, descriptors)


def rank_process(group: int, rank: int = 0) -> psutil.Process:
    """The process that holds a worker's rank: one of its own, or the engine's.

    Raises:
        AssertionError: there is none.
    """
    named: dict[str, psutil.Process] = {}
    for process in processes_of(group):
        with contextlib.suppress(psutil.NoSuchProcess):
            named[" ".join(process.cmdline())] = process
    for title in (RANK, ENGINE):
        found = [name for name in sorted(named) if name.startswith(title)]
        if len(found) > rank:
            return named[found[rank]]
    raise AssertionError(f"no rank among {sorted(named)}")
