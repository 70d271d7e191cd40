# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two threads for one pull: reads on the caller's, what follows them on another.

Waves that land in the arena are posted one after the other without waiting, so that
every source has work; a wave through scratch waits until its half of scratch is free
again. As soon as a wave has arrived, its local work is handed to the follower.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from dynamo.refit.rank.bounce import BouncedRead
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.transport.nixl import Read

#: Between two polls of a wave that is under way: a tenth of what it has taken so far,
#: within these bounds. A GPU has hundreds of megabytes there in a tenth of a
#: millisecond; but a poll needs the interpreter that also runs the model.
POLL_SHARE = 0.1
MIN_POLL_SECONDS = 0.00005
MAX_POLL_SECONDS = 0.001

#: Starts local work on the follower's thread, which does one after the other.
Submit = Callable[..., Future]


@dataclass(frozen=True)
class _Flight:
    number: int
    half: int | None
    reads: list[Read | BouncedRead]

    def arrived(self) -> bool:
        # Every read is polled, since that drives its progress.
        return all([read.done() for read in self.reads])


class Pipeline:
    """One pull.

    Args:
        limit: when to stop.
        submit: starts local work.
        settle: the local work that follows wave number ``n``.
    """

    def __init__(
        self, limit: Limit, submit: Submit, settle: Callable[[int], None]
    ) -> None:
        self._limit = limit
        self._submit = submit
        self._settle = settle
        self._flights: deque[_Flight] = deque()
        self._settled: list[Future] = []
        self._halves: dict[int, Future] = {}
        self._first_post: float | None = None
        self._last_arrival = 0.0

    @property
    def wire_seconds(self) -> float:
        """From the first post until the last wave that has arrived was seen there."""
        if self._first_post is None:
            return 0.0
        return max(0.0, self._last_arrival - self._first_post)

    def post(
        self, number: int, half: int | None, reads: list[Read | BouncedRead]
    ) -> None:
        """Start the reads of wave ``number``, which lands in ``half`` of scratch.

        Where UCX copies with the CPU, this does the whole copy, or the first slices of
        one through a bounce.
        """
        self._limit.check("pulling")
        if half is not None:
            self._free(half)
        if self._first_post is None:
            self._first_post = time.perf_counter()
        for read in reads:
            read.post()
        self._flights.append(_Flight(number, half, reads))
        while self._flights and self._flights[0].arrived():
            self._hand_on()

    def drain(self) -> None:
        """Wait until every wave has arrived and has been dealt with."""
        while self._flights:
            self._await_first()
        for future in self._settled:
            future.result()

    def join(self) -> None:
        """Wait until the follower has nothing of this pull left, whatever became of
        it. Reads may still be active."""
        wait(self._settled)

    def _free(self, half: int) -> None:
        while any(flight.half == half for flight in self._flights):
            self._await_first()
        if half in self._halves:
            self._halves[half].result()

    def _await_first(self) -> None:
        first, began = self._flights[0], time.perf_counter()
        while not first.arrived():
            self._limit.check(f"pulling from {', '.join(r.peer for r in first.reads)}")
            wait = (time.perf_counter() - began) * POLL_SHARE
            time.sleep(min(max(wait, MIN_POLL_SECONDS), MAX_POLL_SECONDS))
        self._hand_on()

    def _hand_on(self) -> None:
        flight = self._flights.popleft()
        self._last_arrival = time.perf_counter()
        future = self._submit(self._settle, flight.number)
        self._settled.append(future)
        if flight.half is not None:
            self._halves[flight.half] = future
