# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One replica's refit: stage, vote, commit, or leave everything as it was.

The agent answers the coordinator's calls and decides no version. Its states:

    serving --prepare--> staging --all ranks hold it--> staged --commit--> committing
       ^                    |                             |                   |
       +---- failed, aborted, or no commit in time -------+                   |
       +---- installed, or put back -------------------------------------------+
                                                                              |
    fenced <---- neither installed nor put back: the process ends ------------+

A commit, once begun, runs to its end whether or not anyone still listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo.refit.errors import (
    Failure,
    NothingStaged,
    OutOfStep,
    RefitError,
    StagingCancelled,
    StaleEpoch,
    failure_from,
)
from dynamo.refit.events import (
    Event,
    RefitFailed,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    Commit,
    Committed,
    CommitTimings,
    Describe,
    Discard,
    Done,
    GetManifest,
    GetStatus,
    InFlightPolicy,
    Install,
    Installed,
    ManifestReply,
    Message,
    Poll,
    Prepare,
    RankReply,
    RankRequest,
    Refused,
    Restore,
    Running,
    Stage,
    Staged,
    Vote,
    WorkerPhase,
    WorkerRequest,
    WorkerStatus,
)
from dynamo.refit.rank.plan import check_extents

logger = logging.getLogger(__name__)

#: Between two polls of the ranks: each one waits for the running step.
POLL_SECONDS = 0.02

#: How long the trainer may take to send its manifest.
MANIFEST_SECONDS = 60.0

#: How long ranks may take to let go of a stage that was cancelled.
DISCARD_SECONDS = 60.0


class RanksFailed(RefitError):
    """One or more ranks refused; carries the first one's failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class WeightsUnknown(RefitError):
    """An install was neither finished nor undone."""


class Engine(Protocol):
    """What the agent needs of an engine; see :class:`worker.engine.RefitEngine`."""

    kv_epoch: str
    admin_lock: asyncio.Lock
    paused_by_user: bool
    asleep: bool

    async def call_ranks(self, request: RankRequest) -> list[RankReply]: ...
    async def pause(self, in_flight: InFlightPolicy) -> None: ...
    async def resume(self) -> None: ...
    def begin_epoch(self, version: int) -> str: ...
    async def declare_version(self, version: int) -> None: ...
    async def probe(self) -> None: ...


class Trainers(Protocol):
    """Reaches a trainer's endpoint; see :class:`dynamo.refit.rpc.Caller`."""

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any: ...


@dataclass(frozen=True)
class HeldManifest:
    """The trainer's manifest, encoded and decoded, and its two fingerprints."""

    fingerprint: str
    layout: str
    payload: bytes
    manifest: Manifest


@dataclass
class Transaction:
    """The version that is being staged, held or committed."""

    request: Prepare
    work: asyncio.Task[Message]
    phase: WorkerPhase = "staging"
    expiry: asyncio.TimerHandle | None = None
    ending: asyncio.Task[None] | None = None


class RefitAgent:
    """Carries out prepare, commit, abort and status for one replica.

    Args:
        engine: the replica's engine.
        trainers: reaches the trainer's endpoint.
        publish: sends an event.
        fence: takes this worker out of service and ends the process.
        model: the served model's name.
        worker: this worker's instance id.
    """

    def __init__(
        self,
        engine: Engine,
        trainers: Trainers,
        publish: Callable[[Event], object],
        fence: Callable[[], None],
        *,
        model: str,
        worker: int,
    ) -> None:
        self._engine = engine
        self._trainers = trainers
        self._publish = publish
        self._fence = fence
        self._model = model
        self._worker = worker
        self._ranks = 0
        self._version: int | None = None
        self._epoch = 0
        self._fenced = False
        self._transaction: Transaction | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._last_commit: tuple[int, Committed] | None = None
        self._manifest: HeldManifest | None = None
        self._ranks_manifest: str | None = None
        self._checked_layout: str | None = None

    async def start(self) -> None:
        """Let every rank get ready to plan; before the first prepare.

        Raises:
            RanksFailed: a rank cannot be refitted, and says why.
        """
        described = await self._call(Describe())
        self._ranks = len(described)
        total = sum(reply.nbytes for reply in described)
        logger.info(
            "refit agent of worker %d: model %s, %d ranks, %.1f MiB of parameters; "
            "staging and backup take as much again each",
            self._worker,
            self._model,
            self._ranks,
            total / 2**20,
        )

    async def answer(self, request: WorkerRequest) -> Message:
        """Carry out a request; raises :class:`RefitError` where it is refused."""
        match request:
            case GetStatus():
                return self.status()
            case Prepare():
                self._check_epoch(request.epoch)
                return await self._prepare(request)
            case Commit():
                self._check_epoch(request.epoch)
                return await self._commit(request)
            case Abort():
                self._check_epoch(request.epoch)
                return await self._abort(request)

    def status(self) -> WorkerStatus:
        transaction = self._transaction
        phase: WorkerPhase = transaction.phase if transaction else "serving"
        return WorkerStatus(
            model=self._model,
            phase="fenced" if self._fenced else phase,
            version=self._version,
            pending=transaction.request.version if transaction else None,
            epoch=self._epoch,
            kv_epoch=self._engine.kv_epoch,
            ranks=self._ranks,
        )

    def _check_epoch(self, epoch: int) -> None:
        if self._fenced:
            raise WeightsUnknown("this worker is fenced: restart it")
        if epoch < self._epoch:
            raise StaleEpoch(
                f"coordinator epoch {epoch} was replaced by {self._epoch}: there is a "
                "newer coordinator for this model"
            )
        self._epoch = epoch

    # --- prepare --------------------------------------------------------------

    async def _prepare(self, request: Prepare) -> Message:
        self._check_awake()
        while (current := self._transaction) is not None:
            if current.request == request and current.ending is None:
                return await self._outcome(current)
            if current.phase == "committing":
                raise RefitError(
                    f"version {current.request.version} is being committed: wait"
                )
            await self._give_up(current)
        work = asyncio.create_task(self._stage(request))
        self._transaction = Transaction(request, work)
        return await self._outcome(self._transaction)

    async def _outcome(self, transaction: Transaction) -> Message:
        """What its work answers; the work goes on if whoever asked is gone."""
        try:
            return await asyncio.shield(transaction.work)
        except asyncio.CancelledError:
            if not transaction.work.cancelled():
                raise
            # It was given up before it began.
            return self._given_up(transaction.request)

    async def _stage(self, request: Prepare) -> Message:
        version = request.version
        try:
            vote = await self._stage_on_ranks(request)
        except asyncio.CancelledError:
            return self._given_up(request)
        # A task's result crosses the process boundary: every cause is kept.
        except Exception as error:
            logger.warning("staging version %d failed: %s", version, error)
            with contextlib.suppress(RefitError):
                await self._discard(version)
            self._transaction = None
            return Refused(failure=self._failure(error, "stage", version))
        transaction = self._transaction
        transaction.phase = "staged"
        transaction.expiry = asyncio.get_running_loop().call_later(
            request.commit_seconds, self._expire, transaction
        )
        self._publish(
            WorkerStaged(worker=self._worker, version=version, ranks=vote.ranks)
        )
        return vote

    def _given_up(self, request: Prepare) -> Refused:
        error = StagingCancelled("aborted or superseded while staging")
        return Refused(failure=self._failure(error, "stage", request.version))

    async def _stage_on_ranks(self, request: Prepare) -> Vote:
        held = await self._fetch_manifest(request)
        fingerprint, layout = held.fingerprint, held.layout
        known = self._ranks_manifest == fingerprint
        self._ranks_manifest = None
        await self._call(
            Stage(
                version=request.version,
                manifest=fingerprint,
                slot=request.slot,
                seconds=request.stage_seconds,
                payload=None if known else held.payload,
                want_reads=layout != self._checked_layout,
            )
        )
        self._ranks_manifest = fingerprint
        staged = await self._poll(request.version)
        if layout != self._checked_layout:
            check_extents(held.manifest, (reply.reads for reply in staged))
            self._checked_layout = layout
        return Vote(
            version=request.version, ranks=tuple(reply.vote for reply in staged)
        )

    async def _fetch_manifest(self, request: Prepare) -> HeldManifest:
        if self._manifest is None or self._manifest.fingerprint != request.manifest:
            reply = await self._trainers.call(
                request.endpoint,
                request.instance,
                GetManifest(manifest=request.manifest),
                ManifestReply | Refused,
                MANIFEST_SECONDS,
            )
            if isinstance(reply, Refused):
                raise RanksFailed(reply.failure)
            manifest = msgspec.msgpack.decode(reply.payload, type=Manifest)
            manifest.validate()
            self._manifest = HeldManifest(
                fingerprint=request.manifest,
                layout=manifest.layout_fingerprint(),
                payload=reply.payload,
                manifest=manifest,
            )
        return self._manifest

    async def _poll(self, version: int) -> list[Staged]:
        """Wait until every rank has ended; the ranks keep their own deadline."""
        while True:
            replies = await self._ask(Poll(version=version))
            if not any(isinstance(reply, Running) for reply in replies):
                return _all_or_raise(replies)
            if any(isinstance(reply, Refused) for reply in replies):
                # One has failed: the others need not finish.
                _all_or_raise([r for r in replies if not isinstance(r, Running)])
            await asyncio.sleep(POLL_SECONDS)

    async def _discard(self, version: int) -> None:
        """Stop the ranks' stage and forget it.

        Raises:
            RefitError: a rank does not let go.
        """
        deadline = time.monotonic() + DISCARD_SECONDS
        while True:
            replies = await self._ask(Discard(version=version))
            if all(isinstance(reply, Done) for reply in replies):
                return
            if time.monotonic() > deadline:
                raise RefitError(f"a rank does not let go of version {version}")
            await asyncio.sleep(POLL_SECONDS)

    async def _give_up(self, transaction: Transaction) -> None:
        """End a stage, or forget what is staged, and wait until the ranks let go.

        Whoever calls it shares one ending; nothing is staged meanwhile.
        """
        if transaction.ending is None:
            transaction.phase = "staging"
            transaction.ending = asyncio.create_task(self._end(transaction))
        await asyncio.shield(transaction.ending)

    async def _end(self, transaction: Transaction) -> None:
        if transaction.expiry is not None:
            transaction.expiry.cancel()
        transaction.work.cancel()
        await asyncio.wait([transaction.work])
        try:
            await self._discard(transaction.request.version)
        finally:
            if self._transaction is transaction:
                self._transaction = None

    def _expire(self, transaction: Transaction) -> None:
        if transaction.phase == "staged" and transaction.ending is None:
            self._expiring = asyncio.create_task(self._expired(transaction))

    async def _expired(self, transaction: Transaction) -> None:
        request = transaction.request
        await self._give_up(transaction)
        error = StagingCancelled(
            f"no commit within {request.commit_seconds:g} s of the vote: coordinator "
            f"epoch {request.epoch} is gone; the next one prepares again"
        )
        self._publish(
            RefitFailed(
                version=request.version,
                failure=self._failure(error, "vote", request.version),
                serving=((self._worker, self._version),),
            )
        )

    async def _abort(self, request: Abort) -> Message:
        current = self._transaction
        if current is not None and current.request.version == request.version:
            if current.phase == "committing":
                raise RefitError(f"version {request.version} is being committed")
            logger.info("version %d aborted: %s", request.version, request.reason)
            await self._give_up(current)
        return Aborted(version=request.version)

    # --- commit ---------------------------------------------------------------

    async def _commit(self, request: Commit) -> Message:
        if self._last_commit and self._last_commit[0] == request.epoch:
            committed = self._last_commit[1]
            if committed.version == request.version:
                return committed
        current = self._transaction
        if current is None or current.request.version != request.version:
            raise NothingStaged(
                f"version {request.version} is not staged on this worker"
            )
        if current.phase == "staging":
            how = "being given up" if current.ending else "still being staged"
            raise NothingStaged(f"version {request.version} is {how}")
        if current.phase == "staged":
            current.expiry.cancel()
            current.phase = "committing"
            current.work = asyncio.create_task(self._install(request))
        return await asyncio.shield(current.work)

    async def _install(self, request: Commit) -> Message:
        version = request.version
        try:
            committed = await self._switch(version, request.in_flight)
        except RanksFailed as error:
            logger.error("version %d was not installed: %s", version, error.failure)
            with contextlib.suppress(RefitError):
                await self._discard(version)
            failure = msgspec.structs.replace(error.failure, worker=self._worker)
            return Refused(failure=failure)
        # What the live weights are is not known now, whatever the cause.
        except BaseException as error:
            return self._fence_off(version, error)
        finally:
            self._transaction = None
        self._last_commit = (request.epoch, committed)
        self._publish(
            WorkerRefitted(
                worker=self._worker,
                version=version,
                kv_epoch=committed.kv_epoch,
                in_flight=request.in_flight,
                timings=committed.timings,
            )
        )
        return committed

    async def _switch(self, version: int, in_flight: InFlightPolicy) -> Committed:
        """Pause, install on every rank, new epoch, resume, probe.

        Raises:
            RanksFailed: the install failed and the old weights are back, serving.
            Exception: anything else; the engine is left paused then.
        """
        engine = self._engine
        async with engine.admin_lock:
            clock = [time.perf_counter()]
            await self._pause(in_flight, version)
            clock.append(time.perf_counter())
            failed: RanksFailed | None = None
            retries = 0
            try:
                retries = await self._install_on_ranks(version)
            except RanksFailed as error:
                await self._restore(version, error)
                failed = error
            else:
                self._version = version
                engine.begin_epoch(version)
            clock.append(time.perf_counter())
            if not engine.paused_by_user:
                await engine.resume()
            clock.append(time.perf_counter())
            if failed is not None:
                raise failed
            await engine.declare_version(version)
            if not engine.paused_by_user:
                # Still under the lock: a pause of the user's would look like a death.
                await engine.probe()
        clock.append(time.perf_counter())
        pause, install, resume, probe = (
            (later - earlier) * 1e3 for earlier, later in itertools.pairwise(clock)
        )
        return Committed(
            version=version,
            kv_epoch=engine.kv_epoch,
            timings=CommitTimings(
                pause_ms=pause,
                install_ms=install,
                resume_ms=resume,
                stall_ms=pause + install + resume,
                probe_ms=probe,
                install_retries=retries,
            ),
        )

    def _check_awake(self) -> None:
        if self._engine.asleep:
            raise RefitError("the engine sleeps: wake it up before a refit")

    async def _pause(self, in_flight: InFlightPolicy, version: int) -> None:
        try:
            self._check_awake()
            await self._engine.pause(in_flight)
        except Exception as error:
            # Nothing is written yet: going on with the old weights is safe.
            if not (self._engine.paused_by_user or self._engine.asleep):
                await self._engine.resume()
            failure = failure_from(error, stage="pause", version=version)
            raise RanksFailed(failure) from error

    async def _install_on_ranks(self, version: int) -> int:
        """Install, and once more where it failed: the staged copy is intact."""
        try:
            await self._call(Install(version=version))
        except RanksFailed as error:
            logger.warning("installing version %d again: %s", version, error.failure)
            await self._call(Install(version=version))
            return 1
        return 0

    async def _restore(self, version: int, cause: RanksFailed) -> None:
        replies = await self._ask(Restore(version=version))
        for reply in replies:
            if not isinstance(reply, Installed):
                raise WeightsUnknown(
                    f"version {version} was installed on some ranks only "
                    f"({cause.failure}) and could not be undone ({reply})"
                ) from cause

    def _fence_off(self, version: int | None, error: BaseException) -> Refused:
        """Leave the engine as it is (paused, in a commit), tell everyone, and go."""
        failure = self._failure(error, "install", version)
        if not self._fenced:
            self._fenced = True
            logger.critical("fencing worker %d: %s", self._worker, failure)
            event = WorkerFenced(worker=self._worker, version=version, failure=failure)
            self._publish(event)
            self._fence()
        return Refused(failure=failure)

    # --- shared ---------------------------------------------------------------

    async def _ask(self, request: RankRequest) -> list[RankReply]:
        try:
            return await self._engine.call_ranks(request)
        except OutOfStep as error:
            # Nothing that the ranks say can be trusted from here on.
            self._fence_off(getattr(request, "version", None), error)
            raise

    async def _call(self, request: RankRequest) -> list:
        return _all_or_raise(await self._ask(request))

    def _failure(
        self, error: BaseException, stage: str, version: int | None
    ) -> Failure:
        if isinstance(error, RanksFailed):
            return msgspec.structs.replace(error.failure, worker=self._worker)
        return failure_from(error, stage=stage, worker=self._worker, version=version)


def _all_or_raise(replies: list[RankReply]) -> list:
    for reply in replies:
        if isinstance(reply, Refused):
            raise RanksFailed(reply.failure)
    return replies
