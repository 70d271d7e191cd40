# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer holds of a version that it has published: how it will end."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass, field

from dynamo.refit.protocol import ReleaseOutcome


@dataclass(frozen=True)
class Release:
    """How a version's publication ended, as the coordinator says it.

    Without the coordinator: ``superseded`` by a later version, in its buffer or that
    has ended before it, or ``failed`` since a rank's memory is gone.
    """

    outcome: ReleaseOutcome
    detail: str


@dataclass(eq=False)
class PublishedVersion:
    """One call of :meth:`WeightPublisher.publish`."""

    version: int
    announcement_id: str
    slot: int
    _released: concurrent.futures.Future = field(
        default_factory=concurrent.futures.Future
    )

    async def released(self) -> Release:
        """Wait until nobody reads this version's bytes any more.

        Ends alike on all ranks. With ``in_place`` the tensors may be written again
        after this, whether it returns or raises.

        Raises:
            SourceLost: a rank has not written it in time, or rank 0 is gone, or this
                publisher was closed.
            FingerprintMismatch: two ranks hold different bytes of the same block.
        """
        return await asyncio.shield(asyncio.wrap_future(self._released))

    def wait(self, timeout: float | None = None) -> Release:
        """As :meth:`released`, blocking; raises TimeoutError after ``timeout`` s."""
        return self._released.result(timeout)

    def end(self, end: Release | BaseException) -> None:
        """For the publisher: the first end counts."""
        if self._released.done():
            return
        if isinstance(end, BaseException):
            self._released.set_exception(end)
        else:
            self._released.set_result(end)
