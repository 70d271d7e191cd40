# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Rank 0 of a trainer job. All decisions are made on one thread, which has the event
loop of Dynamo's runtime; another one polls the store, where the other ranks are."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
import uvloop

from dynamo.refit.errors import SourceLost
from dynamo.refit.protocol import InFlightPolicy
from dynamo.refit.publish.endpoint import WeightsEndpoint
from dynamo.refit.publish.handle import PublishedVersion
from dynamo.refit.publish.job import JobState, OwnVersions, RankState, Report
from dynamo.refit.publish.merge import RankPart
from dynamo.refit.publish.store import POLL_SECONDS, Generation, store_error
from dynamo.refit.rpc import runtime_from_environment

logger = logging.getLogger(__name__)

#: How often deadlines, leases and lost ranks are looked for.
TICK_SECONDS = 0.1

#: How long the end waits until the other ranks know how their versions ended.
LINGER_SECONDS = 5.0

#: How long one decision may take, and the loop its end.
CALL_SECONDS = 60.0
STOP_SECONDS = 120.0

T = TypeVar("T")


class RankZero:
    """Rank 0's side of a publisher.

    Args:
        store: see :func:`~dynamo.refit.publish.store.store_of_job`.
        endpoint: for the fleet; its group makes all decisions.
    """

    def __init__(self, store: dist.Store | None, endpoint: WeightsEndpoint) -> None:
        self.endpoint = endpoint
        self.group = endpoint.group
        self._store = store
        self._member = endpoint.member
        self._own = OwnVersions()
        self._state = JobState()
        #: The other ranks' states.
        self._others: dict[int, RankState] = {}
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._serve, name="refit-publisher", daemon=True
        )
        self._main_task: asyncio.Task | None = None
        self._ended: BaseException | None = None
        self._closing = threading.Event()
        self._meeting: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._meeting_ends = threading.Event()

    # --- for the publisher's threads ------------------------------------------

    def start(self, part: RankPart) -> None:
        """Serve, and join."""
        self._part = part
        self._thread.start()

    def missing(self) -> tuple[int, ...]:
        """The ranks that have not joined.

        Raises:
            ManifestInvalid: the ranks do not fit together.
        """
        error = self.group.fault or self._ended
        if error is not None:
            raise error
        return self.group.missing()

    def take(
        self, version: int, in_flight: InFlightPolicy | None, traceparent: str | None
    ) -> PublishedVersion:
        """The handle of ``version``, in the slot to write it into.

        Raises:
            LeaseHeld: what is in the slot is being read.
            SourceLost: the job is at its end.
        """

        def take() -> PublishedVersion:
            publication = self.group.take_slot(
                self._member, version, self._own.after, time.monotonic(), in_flight
            )
            handle = self._own.take(publication.state())
            self.endpoint.telemetry.taken(handle.announcement_id, version, traceparent)
            return handle

        try:
            return self._decide(take).result(CALL_SECONDS)
        except concurrent.futures.CancelledError as error:
            raise SourceLost("this publisher is closed") from error
        except TimeoutError as error:
            raise SourceLost(
                f"this publisher has not answered within {CALL_SECONDS:g} s"
            ) from error

    def report(self, report: Report) -> None:
        """A version is written, or will not be."""
        # At the end of the job every handle has ended.
        with contextlib.suppress(SourceLost):
            self._decide(
                lambda: self.group.report(self._member, report, time.monotonic())
            )

    def close(self) -> None:
        """Tell the other ranks that this is the end, for a moment, and stop serving."""
        self._closing.set()
        # The loop may have ended by itself.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel)
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def _cancel(self) -> None:
        if self._main_task is not None:
            self._main_task.cancel()

    def _decide(self, decision: Callable[[], T]) -> concurrent.futures.Future[T]:
        """What comes of a decision, made on the loop's thread."""

        async def decide() -> T:
            try:
                return decision()
            finally:
                self._notify()

        coroutine = decide()
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise SourceLost("this publisher is closed") from error

    # --- the loop's thread ----------------------------------------------------

    def _serve(self) -> None:
        """However it ends, nobody waits for it any longer."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            self._ended = error
            if self.group.merged and not isinstance(error, asyncio.CancelledError):
                logger.error("the publisher's event loop ended", exc_info=error)
        self._own.end_all(SourceLost("the publisher was closed before the release"))

    async def _main(self) -> None:
        """Until this publisher is closed, or a part of it fails: everything that is out
        then ends with its error."""
        self._main_task = asyncio.current_task()
        if self._closing.is_set():
            raise asyncio.CancelledError
        runtime = runtime_from_environment()
        try:
            await self.endpoint.start(runtime, self._notify)
            self.group.join(self._member, 0, self._part, time.monotonic())
            self._notify()
            parts = [*self.endpoint.tasks, asyncio.create_task(self._tick())]
            if self._store is not None:
                parts.append(asyncio.wrap_future(self._meeting))
                # A store that does not answer cannot be interrupted, and must not keep
                # the process from its end.
                threading.Thread(
                    target=self._meet, name="refit-store", daemon=True
                ).start()
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
            raise SourceLost("the endpoint of the weights is served no more")
        except Exception as error:
            self.group.close(
                f"the publisher of rank 0 failed: {type(error).__name__}: {error}; "
                "make the publishers of all ranks anew"
            )
            raise
        finally:
            await self._stop()

    async def _stop(self) -> None:
        """Tell the other ranks that this is the end, for a moment; stop serving."""
        self.group.close("the publisher of rank 0 was closed before the release")
        self._notify()
        give_up = time.monotonic() + LINGER_SECONDS
        while not self._meeting.done() and time.monotonic() < give_up:
            if all(state.left for state in self._others.values()):
                break
            await asyncio.sleep(POLL_SECONDS)
        self._meeting_ends.set()
        await self.endpoint.stop()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if self.group.expire(time.monotonic()):
                self._notify()

    def _notify(self) -> None:
        """Announce what has become ready, and end the handles of what has ended."""
        self.endpoint.announce_ready()
        self._state = self.group.state()
        self._own.apply(self._state)

    # --- the store's thread ---------------------------------------------------

    def _meet(self) -> None:
        try:
            generation = Generation.begin(self._store)
            while not self._meeting_ends.wait(POLL_SECONDS):
                self._exchange(generation)
        # A thread's outermost line: the error ends every handle.
        except Exception as error:
            self._meeting.set_exception(store_error(error))

    def _exchange(self, generation: Generation) -> None:
        """Take in what is new of the other ranks, and write what they are to know."""
        # One rank more than there are: if it comes, the ranks do not fit together.
        states = generation.read(range(1, self.group.world_size + 1), RankState)
        news = {r: s for r, s in states.items() if s != self._others.get(r)}
        payloads = {
            key: generation.payload(key)
            for state in news.values()
            for key in state.payloads
            if generation.holds(key)
        }

        def take_in() -> None:
            self._others.update(news)
            for rank, state in news.items():
                self.group.take_in(rank, state, payloads, time.monotonic())

        if news:
            self._decide(take_in).result()
        generation.write(self._state)
        for key in payloads:
            generation.delete(key)
