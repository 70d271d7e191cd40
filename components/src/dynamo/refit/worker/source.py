# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether the process that weights are read from is still there.

NIXL ends a read whose source has died, but no sooner than the kernel closes its
sockets, and that was seen to take 9 s after a SIGKILL; those of a process that is
stopped stay open. The read would wait for the stage's deadline. Discovery knows: a
process that does not live loses its lease.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from dynamo.refit.protocol import Message

#: A source counts as gone when discovery has not had it for so long. One that only
#: stalled for longer than its lease is put back sooner: see
#: :data:`dynamo.refit.presence.MISSING_SECONDS`.
GONE_SECONDS = 4.0


class Trainers(Protocol):
    """Reaches a trainer's endpoint; see :class:`dynamo.refit.rpc.Caller`."""

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any: ...

    async def instances(self, path: str) -> list[int]: ...


class SourceWatch:
    """Watches instance ``instance`` of the endpoint ``path``: a trainer, or a peer."""

    def __init__(self, trainers: Trainers, path: str, instance: int) -> None:
        self._trainers = trainers
        self._path = path
        self._instance = instance
        self._missing_since: float | None = None

    async def is_gone(self) -> bool:
        """Whether discovery has been without it for :data:`GONE_SECONDS`, as far as
        this was called meanwhile: a reader that stalled gives it as long once more."""
        now = asyncio.get_running_loop().time()
        if self._instance in await self._trainers.instances(self._path):
            self._missing_since = None
            return False
        if self._missing_since is None:
            self._missing_since = now
        return now - self._missing_since >= GONE_SECONDS

    def __str__(self) -> str:
        return f"instance {self._instance} of {self._path}"
