# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The moment in which a replica changes its weights: between two steps, or in a pause.

It ends in one of three ways: the new version serves and was checked, the old one
serves as before, or nobody knows and the engine makes no token more.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from dynamo.refit.errors import RefitError, StagingCancelled, failure_from
from dynamo.refit.protocol import (
    Committed,
    CommitTimings,
    InFlightPolicy,
    Prepare,
    RankReply,
    RankRequest,
)
from dynamo.refit.worker.barrier import Barrier
from dynamo.refit.worker.ranks import Ranks, RanksFailed, WeightsUnknown

logger = logging.getLogger(__name__)

#: How long an engine may take to stop when its weights are unknown.
SILENCE_SECONDS = 5.0


class Engine(Protocol):
    """What the agent needs of an engine; see :class:`worker.engine.RefitEngine`."""

    kv_epoch: str
    admin_lock: asyncio.Lock
    paused_by_user: bool
    asleep: bool
    installs_in_step: bool

    async def call_ranks(self, request: RankRequest) -> list[RankReply]: ...
    async def pause(self, in_flight: InFlightPolicy) -> None: ...
    async def resume(self) -> None: ...
    async def forget_media(self) -> None: ...
    def begin_epoch(self, version: int) -> str: ...
    async def declare_version(self, version: int) -> None: ...
    async def probe(self) -> None: ...
    async def drain(self, seconds: float) -> int: ...


class Switch:
    """Installs what all ranks have staged.

    Args:
        engine: the replica's engine.
        ranks: of that engine.
        now_serving: called when the new weights are live, before they serve.
    """

    def __init__(
        self, engine: Engine, ranks: Ranks, now_serving: Callable[[Prepare], None]
    ) -> None:
        self._engine = engine
        self._ranks = ranks
        self._now_serving = now_serving

    async def run(
        self,
        staged: Prepare,
        in_flight: InFlightPolicy,
        barrier: Barrier | None = None,
    ) -> Committed:
        """Install on every rank, new KV epoch, probe, verify.

        With a ``barrier``, in a pause and together with other replicas.

        Raises:
            RanksFailed: the install failed and the old weights are back, serving.
            Exception: anything else; the engine is left paused, or is gone.
        """
        engine, version = self._engine, staged.version
        async with engine.admin_lock:
            started_at = time.time()
            clock = [time.perf_counter()]
            if barrier is None and self._may_go_on(in_flight):
                retries = await self._install_in_step(staged, clock)
            else:
                retries = await self._install_in_pause(
                    staged, in_flight, barrier, clock
                )
            # Still under the lock: a pause of the user's would look like a death, and
            # a sleep takes the weights away that are read here.
            try:
                await engine.declare_version(version)
                if not engine.paused_by_user:
                    await engine.probe()
                clock.append(time.perf_counter())
                copy_ms = await self._check_live(version)
            except BaseException:
                await self._silence()
                raise
            clock.append(time.perf_counter())
        pause, install, resume, probe, verify = (
            (later - earlier) * 1e3 for earlier, later in itertools.pairwise(clock)
        )
        return Committed(
            version=version,
            fingerprint=staged.fingerprint,
            kv_epoch=engine.kv_epoch,
            timings=CommitTimings(
                pause_ms=pause,
                install_ms=install,
                copy_ms=copy_ms,
                resume_ms=resume,
                stall_ms=pause + max(install, copy_ms) + resume,
                probe_ms=probe,
                verify_ms=verify,
                install_retries=retries,
                started_at=started_at,
            ),
        )

    def _may_go_on(self, in_flight: InFlightPolicy) -> bool:
        """No pause is needed: requests keep their KV, and the install reaches all ranks
        between the same two steps and can be undone there."""
        engine = self._engine
        return (
            in_flight != "recompute"
            and engine.installs_in_step
            and self._ranks.can_undo
            and not engine.paused_by_user
        )

    async def _install_in_step(self, staged: Prepare, clock: list[float]) -> int:
        """Between two steps, on all ranks or none; returns how often it was repeated.

        Until the epoch changes, a request may still be admitted with the old one: it
        is in flight like the others, and what it caches nobody after it can hit.
        """
        try:
            check_awake(self._engine)
        except RefitError as error:
            failure = failure_from(error, stage="install", version=staged.version)
            raise RanksFailed(failure) from error
        clock.append(clock[0])
        try:
            retries = await self._ranks.install(staged.version, in_step=True)
            clock.append(time.perf_counter())
            self._serve(staged)
            await self._engine.forget_media()
        except RanksFailed:
            raise
        except BaseException:
            await self._silence()
            raise
        clock.append(time.perf_counter())
        return retries

    async def _install_in_pause(
        self,
        staged: Prepare,
        in_flight: InFlightPolicy,
        barrier: Barrier | None,
        clock: list[float],
    ) -> int:
        """Pause, install, resume; returns how often the install was repeated."""
        engine = self._engine
        await self._pause(in_flight, staged.version)
        clock.append(time.perf_counter())
        failed: RanksFailed | None = None
        retries = 0
        try:
            retries = await self._replace(staged, barrier)
        except RanksFailed as error:
            failed = error
        else:
            self._serve(staged)
        clock.append(time.perf_counter())
        if not engine.paused_by_user:
            await engine.resume()
        clock.append(time.perf_counter())
        if failed is not None:
            raise failed
        return retries

    async def _replace(self, staged: Prepare, barrier: Barrier | None) -> int:
        """Install while paused; returns how often it was repeated.

        Raises:
            RanksFailed: the old weights are there, still or again.
        """
        version = staged.version
        if barrier is not None:
            with self._sent_back(version):
                await barrier.paused()
        try:
            retries = await self._ranks.install(version)
            if barrier is not None:
                with self._sent_back(version):
                    await barrier.installed()
        except RanksFailed as error:
            await self._ranks.restore(version, error)
            raise
        return retries

    @contextlib.contextmanager
    def _sent_back(self, version: int) -> Iterator[None]:
        try:
            yield
        except StagingCancelled as error:
            failure = failure_from(error, stage="barrier", version=version)
            raise RanksFailed(failure) from error

    def _serve(self, staged: Prepare) -> None:
        self._now_serving(staged)
        self._engine.begin_epoch(staged.version)

    async def _check_live(self, version: int) -> float:
        """
        Raises:
            WeightsUnknown: what is live is not what was installed.
        """
        try:
            return await self._ranks.verify(version)
        except RanksFailed as error:
            raise WeightsUnknown(
                f"the live weights are not those of version {version}: {error.failure}"
            ) from error

    async def _silence(self) -> None:
        """No further token: what they would be made with is not known."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._engine.pause("continue"), SILENCE_SECONDS)

    async def _pause(self, in_flight: InFlightPolicy, version: int) -> None:
        try:
            check_awake(self._engine)
            await self._engine.pause(in_flight)
        except Exception as error:
            # Nothing is written yet: going on with the old weights is safe.
            if not (self._engine.paused_by_user or self._engine.asleep):
                await self._engine.resume()
            failure = failure_from(error, stage="pause", version=version)
            raise RanksFailed(failure) from error


def check_awake(engine: Engine) -> None:
    """
    Raises:
        RefitError: its weights may not even be in memory.
    """
    if engine.asleep:
        raise RefitError("the engine sleeps: wake it up before a refit")
