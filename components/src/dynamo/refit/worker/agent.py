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

A commit, once begun, runs to its end whether or not anyone still listens; at a barrier
it waits for the others, and not for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from dynamo.refit.errors import (
    Failure,
    Fenced,
    NothingStaged,
    OtherModel,
    OutOfStep,
    RefitError,
    StagingCancelled,
    StaleEpoch,
    failure_from,
)
from dynamo.refit.events import (
    SCHEMA,
    Event,
    RefitFailed,
    StageProgress,
    WorkerFenced,
    WorkerRefitted,
    WorkerStaged,
)
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    Admit,
    Command,
    Commit,
    Committed,
    Done,
    Fence,
    GetFingerprints,
    GetManifest,
    GetStatus,
    Message,
    Prepare,
    RankProgress,
    RankReply,
    RankRequest,
    Refused,
    ReleaseLease,
    ServeWeights,
    StagingChoice,
    Stepped,
    VerifyWeights,
    Vote,
    WeightsVerified,
    WorkerPhase,
    WorkerRequest,
    WorkerStatus,
)
from dynamo.refit.release import RELEASE
from dynamo.refit.worker.barrier import Barrier
from dynamo.refit.worker.last import LastRefit
from dynamo.refit.worker.peer import PeerSource
from dynamo.refit.worker.ranks import Ranks, RanksFailed
from dynamo.refit.worker.source import Trainers
from dynamo.refit.worker.switch import Engine, Switch, check_awake

logger = logging.getLogger(__name__)

#: How long the next version waits for a worker that leaves a barrier: the order to go
#: back may be lost, and it then goes by itself.
BACK_SECONDS = 10.0

#: How long a worker that is told to leave lets running requests come to their end.
LEAVE_SECONDS = 30.0


@dataclass
class Transaction:
    """The version that is being staged, held or committed; since ``began`` on the
    loop's clock."""

    request: Prepare
    work: asyncio.Task[Message]
    began: float
    phase: WorkerPhase = "staging"
    barrier: Barrier | None = None
    expiry: asyncio.TimerHandle | None = None
    ending: asyncio.Task[None] | None = None


class Routing(Protocol):
    """This worker's place in routing; see :class:`worker.routing.WorkerRouting`."""

    admitted: bool

    def admit(self) -> None: ...
    async def label(self, version: int) -> None: ...
    async def withdraw(self) -> None: ...
    async def restore(self) -> None: ...


class FencedByCoordinator(RefitError):
    """The fleet serves a version that this worker could not take."""


class RefitAgent:
    """Carries out prepare, commit, abort and status for one replica.

    Args:
        engine: the replica's engine.
        trainers: reaches the trainer's endpoint.
        publish: sends an event.
        routing: lets routers see this worker, or not.
        fence: takes this worker out of service and ends the process.
        model: the served model's name.
        worker: this worker's instance id.
        staging: where its ranks keep a version until the commit.
    """

    def __init__(
        self,
        engine: Engine,
        trainers: Trainers,
        publish: Callable[[Event], object],
        routing: Routing,
        fence: Callable[[], None],
        *,
        model: str,
        worker: int,
        staging: StagingChoice = "auto",
    ) -> None:
        self._engine = engine
        self._ranks = Ranks(self, trainers, staging)
        self._peer = PeerSource(self._ranks)
        self._switch = Switch(engine, self._ranks, self._now_serving)
        self._publish = publish
        self._routing = routing
        self._fence = fence
        self._model = model
        self._worker = worker
        self._size = 0
        self._version: int | None = None
        self._fingerprint = ""
        self._last = LastRefit()
        self._epoch = 0
        self._fenced = False
        self._transaction: Transaction | None = None
        self._expiring: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._labelling: asyncio.Task[None] | None = None
        self._last_commit: Committed | None = None
        # A stage waits for a check that somebody asked for: ranks do one thing.
        self._verifying = asyncio.Lock()

    async def start(self) -> None:
        """Let every rank get ready to plan; before the first prepare.

        Raises:
            RanksFailed: a rank cannot be refitted, and says why.
        """
        described = await self._ranks.describe()
        self._size = len(described)
        first = described[0]
        mode = self._last.staging = self._ranks.staging
        memory = next(d.memory for d in described if d.memory.mode == mode)
        logger.info(
            "refit agent of worker %d: model %s, %d ranks of %.1f MiB of parameters; "
            "staging in mode %s takes %.1f MiB of device and %.1f MiB of host memory "
            "of each",
            self._worker,
            self._model,
            self._size,
            first.nbytes / 2**20,
            memory.mode,
            memory.device_nbytes / 2**20,
            memory.host_nbytes / 2**20,
        )
        if not memory.can_undo:
            logger.warning(
                "mode %s keeps no copy of the old weights, so an install that fails "
                "fences this worker: mode host, which can undo it, takes about twice "
                "that host memory",
                memory.mode,
            )

    async def answer(self, request: WorkerRequest) -> Message:
        """Carry out a request; raises :class:`RefitError` where it is refused."""
        match request:
            case GetStatus():
                return self.status()
            case Prepare():
                self._check(request)
                return await self._prepare(request)
            case Commit():
                self._check(request)
                return await self._commit(request)
            case Abort():
                self._check(request)
                return await self._abort(request)
            case Admit():
                self._check(request)
                self._routing.admit()
                return Done()
            case Fence():
                self._check(request)
                return self._leave(request)
            case ServeWeights():
                self._check(request)
                return await self._serve_weights(request)
            case GetManifest():
                return self._peer.manifest(request)
            case GetFingerprints():
                return self._peer.fingerprints(request)
            case ReleaseLease():
                return await self._peer.release(request)
            case VerifyWeights():
                self._check_not_fenced()
                # The ranks go on with it if whoever asked is gone.
                return await asyncio.shield(asyncio.ensure_future(self._verify()))

    def status(self) -> WorkerStatus:
        transaction = self._transaction
        phase: WorkerPhase = transaction.phase if transaction else "serving"
        return WorkerStatus(
            model=self._model,
            phase="fenced" if self._fenced else phase,
            version=self._version,
            fingerprint=self._fingerprint,
            pending=transaction.request.version if transaction else None,
            epoch=self._epoch,
            kv_epoch=self._engine.kv_epoch,
            ranks=self._size,
            admitted=self._routing.admitted,
            since=self._last.since,
            stall_ms=self._last.stall_ms,
            staging=self._last.staging,
            cache=self._last.cache,
            release=RELEASE,
            schema=SCHEMA,
            layout=self._ranks.layout,
        )

    def _check_not_fenced(self) -> None:
        if self._fenced:
            raise Fenced("this worker is fenced: restart it")

    def _check(self, command: Command) -> None:
        """Whether a coordinator may say this here; from then on no older one may."""
        self._check_not_fenced()
        if command.model != self._model:
            raise OtherModel(
                f"a command for model {command.model!r} came to worker {self._worker}, "
                f"which serves {self._model!r}: run one coordinator per model, each "
                "with --model"
            )
        if command.epoch < self._epoch:
            raise self._stale(command.epoch)
        self._epoch = command.epoch

    def _stale(self, epoch: int) -> StaleEpoch:
        return StaleEpoch(
            f"coordinator epoch {epoch} was replaced by {self._epoch}: there is a "
            "newer coordinator for this model"
        )

    # --- prepare --------------------------------------------------------------

    async def _prepare(self, request: Prepare) -> Message:
        await self._leave_barrier()
        # There may be a newer coordinator by now, or a fence.
        self._check(request)
        check_awake(self._engine)
        if (vote := self._vote_of_served(request)) is not None:
            return vote
        while (current := self._transaction) is not None:
            if current.request == request and current.ending is None:
                return await self._outcome(current)
            if current.phase == "committing":
                raise RefitError(
                    f"version {current.request.version} is being committed: wait"
                )
            await self._give_up(current)
        work = asyncio.create_task(self._stage(request))
        began = asyncio.get_running_loop().time()
        self._transaction = Transaction(request, work, began)
        return await self._outcome(self._transaction)

    def _vote_of_served(self, request: Prepare) -> Vote | None:
        """Where the version is served here already, a vote that no rank had to work
        for; the commit that follows is answered as the one that installed it.

        Raises:
            RefitError: the version is older than the served one, or is other weights
                under the served one's number.
        """
        current = self._transaction
        if self._version is None or request.version > self._version:
            return None
        if request.version < self._version:
            # A coordinator may have looked before another one's last commit was here.
            raise RefitError(
                f"version {self._version} is served here: {request.version} is older"
            )
        if request.fingerprint != self._fingerprint:
            raise RefitError(
                f"version {self._version} is served here with the fingerprint "
                f"{self._fingerprint}, and other weights ({request.fingerprint}) were "
                "announced under its number: publish them under a higher one, or "
                "restart this worker"
            )
        if current is not None and current.phase == "committing":
            return None
        return Vote(version=self._version, fingerprint=self._fingerprint, ranks=())

    async def _leave_barrier(self) -> None:
        """Wait for the end of a commit with others: who prepares has given it up, but
        the order to go back may be under way, or being carried out."""
        current = self._transaction
        if current is not None and current.barrier is not None:
            await asyncio.wait([current.work], timeout=BACK_SECONDS)

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
            async with self._verifying:
                await self._peer.end()
                report = functools.partial(self._progress, version)
                votes = await self._ranks.stage(request, report)
        except asyncio.CancelledError:
            return self._given_up(request)
        # A task's result crosses the process boundary: every cause is kept.
        except Exception as error:
            logger.warning("staging version %d failed: %s", version, error)
            with contextlib.suppress(RefitError):
                await self._ranks.discard(version)
            self._transaction = None
            failure = self._failure(error, "stage", version)
            return Refused(failure=failure, fenced=self._fenced)
        self._last.staged(votes)
        transaction = self._transaction
        transaction.phase = "staged"
        # Others may take until the stage's deadline, and the commit comes after that.
        transaction.expiry = asyncio.get_running_loop().call_at(
            transaction.began + request.stage_seconds + request.keep_seconds,
            self._expire,
            transaction,
        )
        self._publish(WorkerStaged(worker=self._worker, version=version, ranks=votes))
        return Vote(version=version, fingerprint=request.fingerprint, ranks=votes)

    def _progress(self, version: int, ranks: tuple[RankProgress, ...]) -> None:
        event = StageProgress(worker=self._worker, version=version, ranks=ranks)
        self._publish(event)

    def _given_up(self, request: Prepare) -> Refused:
        error: RefitError = StagingCancelled("aborted or superseded while staging")
        if request.epoch < self._epoch:
            # It is not how the version ends: a newer coordinator has it staged anew.
            error = self._stale(request.epoch)
        return Refused(failure=self._failure(error, "stage", request.version))

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
            await self._ranks.discard(transaction.request.version)
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
            f"no commit within {request.keep_seconds:g} s of the stage's deadline: "
            f"coordinator epoch {request.epoch} is gone; the next one prepares again"
        )
        failure = self._failure(error, "vote", request.version)
        self._report_failure(request.version, failure)

    def _report_failure(self, version: int, failure: Failure) -> None:
        """In place of a coordinator, which is gone."""
        serving = ((self._worker, self._version),)
        self._publish(RefitFailed(version=version, failure=failure, serving=serving))

    async def _abort(self, request: Abort) -> Message:
        current = self._transaction
        if current is not None and current.request.version == request.version:
            if current.phase == "committing":
                return await self._send_back(current, request)
            logger.info("version %d aborted: %s", request.version, request.reason)
            await self._give_up(current)
        return Aborted(version=request.version)

    async def _send_back(self, current: Transaction, request: Abort) -> Message:
        """From the barrier to the old weights."""
        if current.barrier is None or not current.barrier.abort(request.reason):
            raise RefitError(f"version {request.version} is being committed")
        await asyncio.shield(asyncio.wait([current.work]))
        return Aborted(version=request.version)

    # --- commit ---------------------------------------------------------------

    async def _commit(self, request: Commit) -> Message:
        committed = self._last_commit
        if committed is not None and committed.version == request.version:
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
            if request.step in ("install", "resume"):
                raise NothingStaged(f"not paused for version {request.version}")
            current.expiry.cancel()
            current.phase = "committing"
            if request.step == "pause":
                current.barrier = Barrier(request.hold_seconds)
            install = self._install(current, request)
            current.work = asyncio.create_task(install)
        if request.step in ("install", "resume"):
            if current.barrier is None:
                raise NothingStaged("it goes to the end without a barrier")
            current.barrier.order(request.step)
        if current.barrier is None or request.step in ("all", "resume"):
            return await asyncio.shield(current.work)
        return await self._step(current, request)

    async def _step(self, current: Transaction, request: Commit) -> Message:
        """Answer when the step is taken, or the whole commit has ended."""
        step = asyncio.ensure_future(current.barrier.reached(request.step))
        try:
            await asyncio.wait(
                [step, current.work], return_when=asyncio.FIRST_COMPLETED
            )
            if step.done():
                return Stepped(version=request.version, step=request.step)
            return await asyncio.shield(current.work)
        finally:
            step.cancel()

    async def _install(self, current: Transaction, request: Commit) -> Message:
        staged, version = current.request, request.version
        try:
            async with self._withdrawn(request.withdraw):
                left = 0
                if request.in_flight == "drain":
                    left = await self._engine.drain(request.drain_seconds)
                committed = await self._switch.run(
                    staged, request.in_flight, current.barrier
                )
                await self._labelling
        except RanksFailed as error:
            logger.error("version %d was not installed: %s", version, error.failure)
            with contextlib.suppress(RefitError):
                await self._ranks.discard(version)
            failure = self._failure(error, "install", version)
            if current.barrier is not None and current.barrier.forsaken:
                self._report_failure(version, failure)
            return Refused(failure=failure)
        # What the live weights are is not known now, whatever the cause.
        except BaseException as error:
            return self._fence_off(version, error)
        finally:
            self._transaction = None
        self._routing.admit()
        self._last_commit = committed
        self._last.stall_ms = committed.timings.stall_ms
        self._publish(
            WorkerRefitted(
                worker=self._worker,
                version=version,
                fingerprint=committed.fingerprint,
                kv_epoch=committed.kv_epoch,
                in_flight=request.in_flight,
                timings=committed.timings,
                carried_over=left,
            )
        )
        return committed

    @contextlib.asynccontextmanager
    async def _withdrawn(self, withdraw: bool) -> AsyncIterator[None]:
        """Unseen by routers, if asked for; seen again unless it is fenced."""
        if not withdraw:
            yield
            return
        await self._routing.withdraw()
        try:
            yield
        except RanksFailed:
            await self._routing.restore()
            raise
        await self._routing.restore()

    def _now_serving(self, staged: Prepare) -> None:
        """The label follows at once, beside the rest of the commit."""
        self._version, self._fingerprint = staged.version, staged.fingerprint
        self._last.since = time.time()
        self._labelling = asyncio.create_task(self._routing.label(staged.version))

    async def _verify(self) -> Message:
        """Check the live weights while nothing else is under way."""
        if self._version is None:
            raise RefitError("no version was installed here since the start")
        if self._transaction is not None:
            raise RefitError("a refit is under way: it verifies by itself")
        check_awake(self._engine)
        async with self._verifying:
            version, fingerprint = self._version, self._fingerprint
            try:
                await self._ranks.verify(version)
            except RanksFailed as error:
                return Refused(failure=self._failure(error, "verify", version))
        return WeightsVerified(version=version, fingerprint=fingerprint)

    def _leave(self, request: Fence) -> Message:
        """Its weights are whole, but not the fleet's: no new requests, and when the
        running ones have ended, the end."""
        current = self._transaction
        if current is not None and current.phase == "committing":
            raise RefitError(f"version {current.request.version} is being committed")
        if (request.version, request.fingerprint) == (self._version, self._fingerprint):
            # The coordinator has not had the reply to the commit.
            raise RefitError(f"version {request.version} is what is served here")
        self._fenced = True
        error = FencedByCoordinator(
            f"this worker could not take version {request.version}, which the fleet "
            f"serves ({request.reason}): restart it"
        )
        failure = self._failure(error, "commit", request.version)
        logger.error("fencing worker %d: %s", self._worker, failure)
        event = WorkerFenced(
            worker=self._worker, version=request.version, failure=failure
        )
        self._publish(event)
        self._leaving = asyncio.create_task(self._drain_and_leave())
        return Done()

    async def _drain_and_leave(self) -> None:
        try:
            await self._routing.withdraw()
            await self._engine.drain(LEAVE_SECONDS)
        finally:
            self._fence()

    def _fence_off(self, version: int | None, error: BaseException) -> Refused:
        """Leave the engine as it is (paused, in a commit), tell everyone, and go."""
        failure = self._failure(error, "install", version)
        if not self._fenced:
            self._fenced = True
            logger.error("fencing worker %d: %s", self._worker, failure)
            event = WorkerFenced(worker=self._worker, version=version, failure=failure)
            self._publish(event)
            self._fence()
        return Refused(failure=failure, fenced=True)

    async def _serve_weights(self, request: ServeWeights) -> Message:
        try:
            return await self._peer.serve(request)
        except RanksFailed as error:
            return Refused(failure=self._failure(error, "serve", request.version))

    # --- shared ---------------------------------------------------------------

    async def call_ranks(self, request: RankRequest) -> list[RankReply]:
        """Every rank's answer; an answer out of step fences this worker."""
        try:
            return await self._engine.call_ranks(request)
        except OutOfStep as error:
            # A commit fences by itself, when its engine is silent.
            if self._transaction is None or self._transaction.phase != "committing":
                self._fence_off(getattr(request, "version", None), error)
            raise

    def _failure(
        self, error: BaseException, stage: str, version: int | None
    ) -> Failure:
        if isinstance(error, RanksFailed):
            return msgspec.structs.replace(error.failure, worker=self._worker)
        return failure_from(error, stage=stage, worker=self._worker, version=version)
