# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a paused replica waits for the others: before it installs, and before it
resumes. Never for long: whoever is to say go may be dead."""

from __future__ import annotations

import asyncio

from dynamo.refit.errors import NothingStaged, StagingCancelled
from dynamo.refit.protocol import CommitStep


class Barrier:
    """One commit's barrier. The switch passes through it, the coordinator's calls
    open it.

    Args:
        seconds: how long the replica waits, all in all, from its pause on.
    """

    def __init__(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._until: float | None = None
        self._reached = {"pause": asyncio.Event(), "install": asyncio.Event()}
        #: To install; to resume with the new weights. False: not, go back.
        self._orders = {"install": loop.create_future(), "resume": loop.create_future()}
        self._reason = ""
        #: Nobody said what to do, and it went back by itself.
        self.forsaken = False

    # --- the switch's side ------------------------------------------------------

    async def paused(self) -> None:
        """Wait for the order to install.

        Raises:
            StagingCancelled: it was aborted, or does not come.
        """
        self._until = asyncio.get_running_loop().time() + self._seconds
        self._reached["pause"].set()
        if not await self._order("install", otherwise=False):
            raise StagingCancelled(f"went back at the barrier: {self._reason}")

    async def installed(self) -> None:
        """Wait for the order to resume; without one, resume all the same: others may
        have.

        Raises:
            StagingCancelled: another worker could not install; go back.
        """
        self._reached["install"].set()
        if not await self._order("resume", otherwise=True):
            raise StagingCancelled(f"went back at the barrier: {self._reason}")

    async def _order(self, step: CommitStep, *, otherwise: bool) -> bool:
        order = self._orders[step]
        try:
            async with asyncio.timeout_at(self._until):
                return await asyncio.shield(order)
        except TimeoutError:
            if not order.done():
                self._reason = (
                    f"no order to {step} within {self._seconds:g} s of the pause; the "
                    "coordinator is gone, the next one prepares again"
                )
                order.set_result(otherwise)
                self.forsaken = not otherwise
            return order.result()

    # --- the coordinator's side -------------------------------------------------

    def order(self, step: CommitStep) -> None:
        """Let the replica take its next step.

        Raises:
            NothingStaged: it has gone on by itself, or was aborted.
        """
        before = {"install": "pause", "resume": "install"}[step]
        order = self._orders[step]
        if not self._reached[before].is_set():
            raise NothingStaged(f"not waiting at the barrier for its {step}")
        if not order.done():
            order.set_result(True)
        elif not order.result():
            raise NothingStaged(f"went back at the barrier: {self._reason}")

    def abort(self, reason: str) -> bool:
        """Send the replica back to the old weights; False if it resumes already."""
        resume = self._orders["resume"]
        if resume.done() and resume.result():
            return False
        for order in self._orders.values():
            if not order.done():
                self._reason = reason
                order.set_result(False)
        return True

    async def reached(self, step: CommitStep) -> None:
        """Wait until the replica has taken ``step``."""
        await self._reached[step].wait()
