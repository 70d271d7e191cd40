# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's shadows as a source for other replicas: who may be reading, and what must
not be overwritten meanwhile.

A shadow is registered with NIXL from the start, so a version is served from where it
is, without a copy. Nothing is written here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from vllm.logger import init_logger

from dynamo.refit.errors import LeaseHeld, PeerUnsuitable, TransferFailed
from dynamo.refit.manifest import Region, Source
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.pipeline import Submit
from dynamo.refit.transport.nixl import NixlAgent, memory_of

logger = init_logger("vllm.dynamo_refit")

#: UCX answers a reader that connects when it is polled: enough for that, and no load.
PROGRESS_SECONDS = 0.002

#: After a poll that failed: the log is to stay readable.
FAILURE_SECONDS = 1.0

#: A reader that comes too late is still answered for this long: it then finds out from
#: the bytes at once, and not from its own deadline.
LINGER_SECONDS = 30.0

#: Between two looks at whether a stage that waits for readers was cancelled.
WAIT_SECONDS = 0.05


def as_source(arena: Arena, agent: NixlAgent) -> Source:
    """``arena`` as readers see it: every shadow is a slot, of one region."""
    buffers = [shadow.buffer.bytes for shadow in arena.shadows]
    memory, device = memory_of(buffers[0].device)
    return Source(
        agent=agent.name,
        metadata=agent.metadata(),
        memory=memory,
        device=device,
        slots=tuple((Region(b.data_ptr(), b.numel()),) for b in buffers),
    )


@dataclass
class _Open:
    """Others may read ``version`` in a shadow, until then (monotonic seconds)."""

    version: int
    arena: Arena
    shadow: int
    until: float


class Offers:
    """What others may read, and for how long.

    While there is something, a thread polls NIXL, which has none of its own here: it
    is what answers a reader that connects. The bytes need nobody.

    Args:
        agent: serves the arenas.
        submit: starts work on another thread.
    """

    def __init__(self, agent: NixlAgent, submit: Submit) -> None:
        #: Held by whoever calls the agent, which is for one thread at a time. A stage
        #: keeps it: its own polls answer readers, too.
        self.agent_use = threading.Lock()
        self._agent = agent
        self._submit = submit
        self._source: Source | None = None
        #: By version and shadow, what was found there.
        self._parts: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._changed = threading.Condition()
        self._open: list[_Open] = []
        #: What a version is coming into: it cannot be offered.
        self._taken: tuple[Arena, frozenset[int]] | None = None
        self._thread: threading.Thread | None = None

    def know(self, arena: Arena) -> None:
        """From now on ``arena`` is what is offered. With ``agent_use``.

        How others see it stays the same for as long as it is, and so does what they
        have built on that.
        """
        with self._changed:
            self._source, self._parts = as_source(arena, self._agent), {}

    def parts(
        self, version: int, shadow: int, find: Callable[[], np.ndarray]
    ) -> np.ndarray | None:
        """What ``find`` makes of ``version`` in ``shadow``: once, and without waiting;
        ``None`` is not yet. Only while it is offered."""
        with self._changed:
            found = self._parts.get((version, shadow))
            if found is None:
                found = self._parts[version, shadow] = self._submit(find)
        return found.result() if found.done() else None

    def add(self, version: int, arena: Arena, shadow: int, seconds: float) -> Source:
        """Let others read what is in ``shadow`` for ``seconds``, or for longer if they
        already may; where that is.

        Raises:
            PeerUnsuitable: it is being overwritten.
        """
        with self._changed:
            if self._taken is not None:
                taken, shadows = self._taken
                if taken is arena and shadow in shadows:
                    raise PeerUnsuitable(
                        f"version {version} is making room for the next one on this "
                        "rank: read that one, or from another replica"
                    )
            until = time.monotonic() + seconds
            for offer in self._current():
                if (offer.version, offer.arena, offer.shadow) == (
                    version,
                    arena,
                    shadow,
                ):
                    offer.until = max(offer.until, until)
                    return self._source
            self._open.append(_Open(version, arena, shadow, until))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._poll, name="refit-offer", daemon=True
                )
                self._thread.start()
            return self._source

    def end(
        self, version: int, besides: tuple[Arena, int | None] | None = None
    ) -> None:
        """Nobody reads ``version`` any more, but for its copy in ``besides``."""
        with self._changed:
            self._open = [
                offer
                for offer in self._open
                if offer.version != version or (offer.arena, offer.shadow) == besides
            ]
            self._changed.notify_all()

    def holds(self, arena: Arena | None) -> bool:
        """May others be reading from ``arena``?"""
        with self._changed:
            return any(offer.arena is arena for offer in self._current())

    @contextmanager
    def overwriting(self, arena: Arena | None, limit: Limit) -> Iterator[None]:
        """While a version comes into ``arena``: nobody reads what it overwrites.

        Blocks until those who do have ended. All of them are bounded in time.

        Raises:
            LeaseHeld: they had not by the deadline. StagingCancelled: see ``limit``.
        """
        if arena is None:
            yield
            return
        shadows = arena.expendable
        with self._changed:
            while reading := [
                offer
                for offer in self._current()
                if offer.arena is arena and offer.shadow in shadows
            ]:
                self._await(reading[0], limit)
            self._taken = arena, shadows
            kept = {p: f for p, f in self._parts.items() if p[1] not in shadows}
            self._parts = kept
        try:
            yield
        finally:
            with self._changed:
                self._taken = None

    def _await(self, reading: _Open, limit: Limit) -> None:
        left = reading.until - time.monotonic()
        if time.monotonic() > limit.deadline:
            raise LeaseHeld(
                f"version {reading.version} is being read by other replicas from the "
                "memory that the next one needs: release their leases, or prepare "
                f"again in {left:.0f} s, when they have expired"
            )
        limit.check(f"waiting for the readers of version {reading.version}")
        self._changed.wait(min(left, WAIT_SECONDS))

    def _current(self) -> list[_Open]:
        now = time.monotonic()
        self._open = [offer for offer in self._open if now < offer.until]
        return self._open

    def _poll(self) -> None:
        last_offered = time.monotonic()
        while True:
            with self._changed:
                if self._current():
                    last_offered = time.monotonic()
                elif time.monotonic() - last_offered > LINGER_SECONDS:
                    self._thread = None
                    return
            pause = PROGRESS_SECONDS
            try:
                with self.agent_use:
                    self._agent.progress()
            except TransferFailed:
                # Of one reader; the others go on, and that one finds out by itself.
                logger.exception("dynamo-refit: a reader could not be answered")
                pause = FAILURE_SECONDS
            time.sleep(pause)
