# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One cycle's bookkeeping: what it built, how long it took, when it must stop."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dynamo.refit.errors import StagingCancelled
from dynamo.refit.protocol import CacheCounters, StageTimings

STEPS = (
    "lead",
    "plan",
    "allocate",
    "register",
    "prepare",
    "pull",
    "wire",
    "fingerprint",
    "backup",
    "convert",
)


@dataclass
class Progress:
    """Bytes of a pull that are there and fingerprinted, and all of them.

    One thread writes it, and any may look: two numbers that need not be of one moment.
    """

    nbytes: int = 0
    total_nbytes: int = 0


@dataclass(frozen=True)
class Limit:
    """When a transfer must stop: a deadline (monotonic seconds) or a cancel. Whoever
    sets it may look how far the transfer is."""

    deadline: float
    cancelled: Callable[[], bool]
    progress: Progress = field(default_factory=Progress)

    def check(self, doing: str) -> None:
        if self.cancelled():
            raise StagingCancelled(f"cancelled while {doing}")
        if time.monotonic() > self.deadline:
            raise StagingCancelled(
                f"out of time while {doing}: the source does not answer, or the "
                "deadline is too short for the size of the model"
            )


@dataclass
class Cycle:
    """Counts and times one stage or install; begins when it is made.

    Steps overlap: two threads time theirs at once.
    """

    began: float = field(default_factory=time.perf_counter)
    started_at: float = field(default_factory=time.time)
    built: Counter[str] = field(default_factory=Counter)
    ms: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - began)

    def add(self, step: str, seconds: float) -> None:
        with self._lock:
            self.ms[step] += seconds * 1e3

    def first_read(self) -> None:
        """To be called before each post; the first one ends the lead."""
        if "lead" not in self.ms:
            self.ms["lead"] = (time.perf_counter() - self.began) * 1e3

    def counters(self) -> CacheCounters:
        return CacheCounters(**self.built)

    def timings(self) -> StageTimings:
        return StageTimings(
            started_at=self.started_at,
            finished_at=time.time(),
            **{f"{step}_ms": float(self.ms[step]) for step in STEPS},
        )
