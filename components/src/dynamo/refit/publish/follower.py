# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer rank other than 0: it finds rank 0 of its own job, and asks it.

Every request is safe to repeat, so a lost answer is asked for again; rank 0 counts as
lost when it has not answered for :data:`LOST_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from dynamo.runtime import DistributedRuntime

from dynamo.refit.errors import RefitError, SourceLost, error_from
from dynamo.refit.protocol import (
    AwaitGroup,
    AwaitRelease,
    Done,
    FindGroup,
    GroupReply,
    GroupRequest,
    Join,
    Leave,
    Refused,
)
from dynamo.refit.rpc import Caller, PeerLost

#: The bound on one call, beyond what it asks rank 0 to wait.
CALL_SECONDS = 5.0

#: How long rank 0 may be silent. Its interpreter may be busy for seconds.
LOST_SECONDS = 20.0

#: Between two tries.
RETRY_SECONDS = 0.1


class Follower:
    """The seat of a rank that asks rank 0.

    Args:
        runtime: of this seat; it is shut down with it.
        path: the endpoint of rank 0, and of other jobs' rank 0.
        member: this rank's name.
    """

    def __init__(self, runtime: DistributedRuntime, path: str, member: str) -> None:
        self._runtime = runtime
        self._caller = Caller(runtime)
        self._path = path
        self._member = member
        self._instance: int | None = None

    async def start(self) -> None:
        """Nothing is served here."""

    async def run(self) -> None:
        """Nothing runs here that could fail: rank 0 is lost when it is asked."""
        await asyncio.Event().wait()

    async def join(self, request: Join, seconds: float) -> None:
        """Find the rank 0 that is of this job, and join it.

        Raises:
            SourceLost: there is none within ``seconds``.
            ManifestInvalid: it does not take this rank.
        """
        deadline = time.monotonic() + seconds
        while True:
            instances = await self._caller.instances(self._path)
            for instance in instances:
                if await self._leads(instance, request.group):
                    self._instance = instance
                    await self.ask(request)
                    return
            if time.monotonic() > deadline:
                raise SourceLost(
                    f"rank 0 of the trainer job {request.group!r} was not found within "
                    f"{seconds:g} s among the {len(instances)} instances of "
                    f"{self._path}: start it, and give all ranks the same group"
                )
            await asyncio.sleep(RETRY_SECONDS)

    async def _leads(self, instance: int, group: str) -> bool:
        """Whether ``instance`` is of this job. One that does not answer, or does not
        understand the question, is not."""
        try:
            reply = await self._call(instance, FindGroup(group=group), CALL_SECONDS)
        except RefitError:
            return False
        return isinstance(reply, Done)

    async def ask(self, request: GroupRequest) -> GroupReply:
        """Rank 0's answer.

        Raises:
            RefitError: rank 0 refuses, with that error.
            SourceLost: it has not answered for :data:`LOST_SECONDS`.
        """
        waits = isinstance(request, AwaitGroup | AwaitRelease)
        seconds = CALL_SECONDS + (request.seconds if waits else 0)
        deadline = time.monotonic() + LOST_SECONDS
        while True:
            try:
                return await self._call(self._instance, request, seconds)
            except PeerLost as error:
                if time.monotonic() > deadline:
                    raise SourceLost(
                        f"rank 0 of this trainer job does not answer: {error}; start "
                        "all ranks again"
                    ) from error
            await asyncio.sleep(RETRY_SECONDS)

    async def stop(self) -> None:
        """Tell rank 0 that this rank's memory goes."""
        if self._instance is not None:
            with contextlib.suppress(RefitError):
                leave = Leave(member=self._member)
                await self._call(self._instance, leave, CALL_SECONDS)
        self._runtime.shutdown()

    async def _call(
        self, instance: int, request: GroupRequest, seconds: float
    ) -> GroupReply:
        reply = await self._caller.call(
            self._path, instance, request, GroupReply | Refused, seconds
        )
        if isinstance(reply, Refused):
            raise error_from(reply.failure)
        return reply
