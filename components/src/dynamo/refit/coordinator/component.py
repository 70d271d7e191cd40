# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator on the Dynamo runtime: feeds the reconciler and does as it says.

All decisions are the reconciler's. This file owns the subscriptions, the calls
and the clock, and keeps one queue of inputs, so that decisions are taken one
after the other.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

import msgspec
from dynamo.runtime import DistributedRuntime

from dynamo.refit import tracing
from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.bus import EventSubscriber, RejectedPayload
from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    GiveBackLease,
    Input,
    LeaseTaken,
    PrepareAnswered,
    Publish,
    ReleasePeer,
    SendAbort,
    SendAdmit,
    SendCommit,
    SendFence,
    SendPrepare,
    SendServe,
    ServeAnswered,
    TakeLease,
    Tick,
    Unanswered,
)
from dynamo.refit.coordinator.fleet import FleetWatch
from dynamo.refit.coordinator.history import RefitHistory
from dynamo.refit.coordinator.policy import GRACE_SECONDS
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.coordinator.telemetry import CoordinatorTelemetry
from dynamo.refit.errors import RefitError, StaleEpoch, failure_from
from dynamo.refit.events import (
    REFIT_EVENTS,
    SCHEMA,
    WEIGHT_VERSIONS,
    Event,
    RefitRefused,
    WeightVersionReady,
)
from dynamo.refit.metrics import CoordinatorMetrics, export
from dynamo.refit.presence import LastingPublisher, keep_present
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    AcquireLease,
    Admit,
    Command,
    Commit,
    Committed,
    CoordinatorReply,
    CoordinatorRequest,
    Done,
    Fence,
    FleetStatus,
    GetHistory,
    GetStatus,
    Message,
    Prepare,
    Refused,
    ReleaseLease,
    ServeWeights,
    Stepped,
    Vote,
    WeightsServed,
)
from dynamo.refit.release import RELEASE
from dynamo.refit.rpc import Caller, PeerLost, serve, unary

logger = logging.getLogger(__name__)

#: Bound on calls that only take note of something.
SHORT_CALL_SECONDS = 10.0

TICK_SECONDS = 0.25

#: The reconciler's clock goes on by so much between two inputs, at the most.
STEP_SECONDS = 4 * TICK_SECONDS

STALE = StaleEpoch.__name__

C = TypeVar("C", bound=Command)


class CoordinatorReplaced(RefitError):
    """A worker has heard of a newer coordinator: this one has nothing to say."""


class SteadyClock:
    """A clock that stands still while its reader does: after a stall of this process
    the replies that wait for it are read before a deadline is said to have passed.

    Args:
        time: monotonic seconds.
    """

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._read = self._now = time()

    def read(self) -> float:
        """Seconds since some moment, of which at most :data:`STEP_SECONDS` count
        since the last reading."""
        read = self._time()
        self._now += min(read - self._read, STEP_SECONDS)
        self._read = read
        return self._now


class Calls(Protocol):
    """Reaches endpoints; see :class:`dynamo.refit.rpc.Caller`."""

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any: ...


async def coordinate(runtime: DistributedRuntime, config: CoordinatorConfig) -> None:
    """Refit the workers of one namespace until the runtime shuts down or a part of
    this fails."""
    prefix = f"{config.namespace}.refit"
    status = runtime.endpoint(f"{prefix}.status")
    caller = Caller(runtime)
    tracer = tracing.from_environment()
    metrics = CoordinatorMetrics()
    export(metrics.registry, status, f"{prefix}.status")
    telemetry = CoordinatorTelemetry(metrics, tracer)
    fleet = FleetWatch(caller, config, status.connection_id())
    seen = await fleet.look()
    epoch = next_epoch(seen)
    topic = runtime.endpoint(f"{prefix}.{REFIT_EVENTS}")
    versions = runtime.endpoint(f"{prefix}.{WEIGHT_VERSIONS}")
    name = f"coordinator-{status.connection_id()}"

    async with (
        LastingPublisher(topic, name, epoch) as events,
        EventSubscriber(versions) as announcements,
    ):
        publish = telemetry.publishing(events.publish)
        coordinator = Coordinator(
            config, telemetry.calling(caller), publish, epoch, name
        )
        coordinator.hear(seen)
        logger.info(
            "refit coordinator: namespace %s, epoch %d, %d workers",
            config.namespace,
            epoch,
            len(seen.members),
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(coordinator.run())
            tasks.create_task(_listen(announcements, coordinator, telemetry, publish))
            tasks.create_task(fleet.watch(coordinator.hear))
            tasks.create_task(fleet.watch_neighbours())
            tasks.create_task(keep_present(status, events))
            tasks.create_task(
                telemetry.watch(coordinator.status, config.fleet_poll_seconds)
            )
            tasks.create_task(
                serve(
                    status,
                    unary(CoordinatorRequest, coordinator.answer, "coordinator"),
                    health_check=GetStatus(),
                )
            )


def next_epoch(seen: FleetSeen) -> int:
    """Above every epoch a worker has seen, whatever this machine's clock says."""
    highest = max((m.status.epoch for m in seen.members), default=0)
    return max(int(time.time() * 1e3), highest + 1)


async def _listen(
    announcements: EventSubscriber,
    coordinator: Coordinator,
    telemetry: CoordinatorTelemetry,
    publish: Callable[[Event], object],
) -> None:
    async for event in announcements:
        match event:
            case WeightVersionReady():
                telemetry.heard(event)
                coordinator.hear(event)
            case RejectedPayload(reason=reason, detail=detail):
                logger.warning("refused an event: %s", detail)
                _tell(publish, RefitRefused(reason=reason, detail=detail))
            case _:
                logger.warning("%s does not belong here", type(event).__name__)


class Coordinator:
    """Feeds a reconciler and does as it says.

    Args:
        caller: reaches workers and trainers.
        publish: sends an event.
        epoch: above those of all coordinators before it.
        sender: names this coordinator in its commands.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        caller: Calls,
        publish: Callable[[Event], object],
        epoch: int,
        sender: str = "",
    ) -> None:
        self._sender = sender
        self._sequence = itertools.count(1)
        self._config = config
        self._caller = caller
        self._publish = publish
        self._epoch = epoch
        self._reconciler = Reconciler(config.model, config.policy)
        self._history = RefitHistory(time.time())
        self._inputs: asyncio.Queue[Input | CoordinatorReplaced] = asyncio.Queue()
        self._calls: set[asyncio.Task] = set()
        # A lease is taken and given back in the order that was decided.
        self._lease_turn: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def hear(self, what: Input) -> None:
        """Take ``what`` into account, after what was heard before."""
        self._inputs.put_nowait(what)

    async def run(self) -> None:
        """Decide and act until cancelled; what was begun is then given up.

        Raises:
            CoordinatorReplaced: there is a newer one. From then on nothing is said,
                to a trainer either, whom the newer one serves.
        """
        clock = SteadyClock(asyncio.get_running_loop().time)
        try:
            while True:
                try:
                    async with asyncio.timeout(TICK_SECONDS):
                        what = await self._inputs.get()
                except TimeoutError:
                    what = Tick()
                if isinstance(what, CoordinatorReplaced):
                    raise what
                if isinstance(what, FleetSeen):
                    self._check_newest(what)
                actions = self._reconciler.handle(what, clock.read())
                desired = self._reconciler.desired
                self._history.hear(what, actions, desired, time.time())
                for action in actions:
                    self._perform(action)
        finally:
            for call in self._calls:
                call.cancel()

    def _check_newest(self, seen: FleetSeen) -> None:
        """
        Raises:
            CoordinatorReplaced: a worker has been told something by a newer one.
        """
        for member in seen.members:
            if member.status.epoch > self._epoch:
                raise CoordinatorReplaced(
                    f"worker {member.worker} obeys coordinator epoch "
                    f"{member.status.epoch}, which is newer than this one "
                    f"({self._epoch}): run one coordinator per model"
                )

    async def answer(self, request: CoordinatorRequest) -> CoordinatorReply:
        """The fleet as it is seen now, or what became of the versions that came."""
        if isinstance(request, GetHistory):
            return self._history.view()
        return self.status()

    def status(self) -> FleetStatus:
        reconciler = self._reconciler
        transaction, desired = reconciler.transaction, reconciler.desired
        return FleetStatus(
            model=reconciler.model or "",
            epoch=self._epoch,
            desired=desired.version if desired else None,
            completed=reconciler.completed,
            under_way=transaction.ready.version if transaction else None,
            members=self._history.place(
                [m for _, m in sorted(reconciler.fleet.items())], time.time()
            ),
            release=RELEASE,
            schema=SCHEMA,
        )

    # --- actions --------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case Publish(event=event):
                logger.info("%s", event)
                model = event.model or self._reconciler.model or ""
                _tell(self._publish, msgspec.structs.replace(event, model=model))
            case TakeLease():
                self._spawn(self._take_lease(action))
            case GiveBackLease():
                self._spawn(self._give_back_lease(action))
            case SendPrepare():
                self._spawn(self._prepare(action))
            case SendCommit():
                self._spawn(self._commit(action))
            case SendServe():
                self._spawn(self._serve(action))
            case SendAbort(worker=worker, version=version, reason=reason):
                request = self._command(Abort, version=version, reason=reason)
                self._spawn(self._tell(worker, request))
            case SendAdmit(worker=worker):
                self._spawn(self._tell(worker, self._command(Admit)))
            case SendFence(worker=worker):
                request = self._command(
                    Fence,
                    version=action.version,
                    fingerprint=action.fingerprint,
                    reason=action.reason,
                )
                self._spawn(self._tell(worker, request))
            case ReleasePeer(peer=peer, announcement_id=announcement_id):
                request = self._command(
                    ReleaseLease, announcement_id=announcement_id, outcome="completed"
                )
                self._spawn(self._tell(peer, request))

    def _command(self, kind: type[C], **fields: Any) -> C:
        """A command of this coordinator, for its own model unless told otherwise."""
        envelope = {
            "model": self._reconciler.model,
            "epoch": self._epoch,
            "sender": self._sender,
            "sequence": next(self._sequence),
        }
        return kind(**(envelope | fields))

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _take_lease(self, action: TakeLease) -> None:
        ready = action.ready
        request = self._command(
            AcquireLease,
            model=ready.model,
            announcement_id=ready.announcement_id,
            seconds=action.seconds,
        )
        failure = None
        try:
            reply = await self._call_trainer(ready, request)
            if isinstance(reply, Refused):
                failure = reply.failure
        except (RefitError, msgspec.ValidationError) as error:
            failure = failure_from(error, stage="lease", version=ready.version)
        self._inputs.put_nowait(LeaseTaken(ready.announcement_id, failure))

    async def _give_back_lease(self, action: GiveBackLease) -> None:
        ready = action.ready
        request = self._command(
            ReleaseLease,
            model=ready.model,
            announcement_id=ready.announcement_id,
            outcome=action.outcome,
            detail=action.detail,
        )
        try:
            await self._call_trainer(ready, request)
        except (RefitError, msgspec.ValidationError) as error:
            # A trainer that is alive announces again, and is told again.
            logger.warning("version %d: lease not released: %s", ready.version, error)
        finally:
            self._lease_turn.pop(ready.announcement_id, None)

    async def _call_trainer(
        self, ready: WeightVersionReady, request: AcquireLease | ReleaseLease
    ) -> Done | Refused:
        async with self._lease_turn[ready.announcement_id]:
            return await self._caller.call(
                ready.endpoint,
                ready.instance,
                request,
                Done | Refused,
                SHORT_CALL_SECONDS,
            )

    async def _prepare(self, action: SendPrepare) -> None:
        ready, policy, served = action.ready, self._config.policy, action.served
        source = ready if served is None else served
        request = self._command(
            Prepare,
            version=ready.version,
            announcement_id=source.announcement_id,
            fingerprint=ready.fingerprint,
            endpoint=ready.endpoint if served is None else self._path(action.peer),
            instance=ready.instance if served is None else action.peer,
            manifest_digest=source.manifest_digest,
            slot=source.slot,
            runtime_fingerprint=served.runtime_fingerprint if served else "",
            stage_seconds=policy.stage_seconds,
            keep_seconds=policy.keep_seconds(len(self._reconciler.fleet)),
        )
        seconds = policy.stage_seconds + GRACE_SECONDS
        reply = await self._ask(action.worker, request, Vote | Refused, seconds)
        self._inputs.put_nowait(
            PrepareAnswered(action.worker, ready.announcement_id, reply)
        )

    async def _serve(self, action: SendServe) -> None:
        ready = action.ready
        request = self._command(
            ServeWeights,
            version=ready.version,
            fingerprint=ready.fingerprint,
            seconds=self._config.policy.lease_seconds(len(self._reconciler.fleet)),
        )
        reply = await self._ask(
            action.peer, request, WeightsServed | Refused, SHORT_CALL_SECONDS
        )
        self._inputs.put_nowait(
            ServeAnswered(action.peer, action.reader, ready.announcement_id, reply)
        )

    async def _commit(self, action: SendCommit) -> None:
        ready, policy = action.ready, self._config.policy
        request = self._command(
            Commit,
            version=ready.version,
            in_flight=action.in_flight,
            step=action.step,
            hold_seconds=policy.hold_seconds,
            withdraw=action.withdraw,
            drain_seconds=policy.drain_seconds,
        )
        seconds = policy.commit_seconds + policy.drain_seconds + GRACE_SECONDS
        expected = Committed | Stepped | Refused
        try:
            reply = await self._call_worker(action.worker, request, expected, seconds)
        except PeerLost as error:
            # It may have committed: whether it is asked again is not decided here.
            failure = failure_from(
                error, stage="commit", worker=action.worker, version=ready.version
            )
            reply = Unanswered(failure)
        except (RefitError, msgspec.ValidationError) as error:
            reply = _refused(error, request, action.worker)
        self._inputs.put_nowait(
            CommitAnswered(action.worker, ready.announcement_id, reply)
        )

    async def _tell(self, worker: int, request: Message) -> None:
        """Ask for what the worker's next status shows."""
        expected = Aborted | Done | Refused
        reply = await self._ask(worker, request, expected, SHORT_CALL_SECONDS)
        if isinstance(reply, Refused):
            logger.warning("%s: %s", type(request).__name__, reply.failure)

    async def _ask(
        self, worker: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        """The worker's reply; what keeps it from replying as a :class:`Refused`."""
        try:
            return await self._call_worker(worker, request, expected, seconds)
        except (RefitError, msgspec.ValidationError) as error:
            return _refused(error, request, worker)

    async def _call_worker(
        self, worker: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        """The worker's reply.

        Raises:
            PeerLost: there is none; what was asked for may have been done.
            msgspec.ValidationError: it is none of ``expected``.
        """
        reply = await self._caller.call(
            self._path(worker), worker, request, expected, seconds
        )
        if not isinstance(reply, Refused):
            return reply
        if reply.failure.kind == STALE:
            # What it makes of this reply must not be acted on.
            self._inputs.put_nowait(CoordinatorReplaced(str(reply.failure)))
        if reply.failure.worker is None:
            # An error that its agent did not expect, as of an engine that is dead.
            failure = msgspec.structs.replace(reply.failure, worker=worker)
            return msgspec.structs.replace(reply, failure=failure)
        return reply

    def _path(self, worker: int) -> str:
        member = self._reconciler.fleet.get(worker)
        component = member.component if member else self._config.worker_components[0]
        return f"{self._config.namespace}.{component}.refit"


def _tell(publish: Callable[[Event], object], event: Event) -> None:
    """Publish ``event``, if it can be: events are hints, and the fleet goes on."""
    try:
        publish(event)
    # The event plane is a boundary of the process, and raises what it likes.
    except Exception:
        logger.exception("%s was not published", type(event).__name__)


def _refused(error: Exception, request: Message, worker: int) -> Refused:
    stage = type(request).__name__.lower()
    version = getattr(request, "version", None)
    return Refused(
        failure=failure_from(error, stage=stage, worker=worker, version=version)
    )
