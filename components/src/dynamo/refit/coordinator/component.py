# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The coordinator on the Dynamo runtime: feeds the reconciler and does as it says.

All decisions are the reconciler's. This file owns the subscriptions, the calls
and the clock, and keeps one queue of inputs, so that decisions are taken one
after the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

import msgspec
from dynamo.runtime import DistributedRuntime

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.bus import EventPublisher, EventSubscriber, RejectedPayload
from dynamo.refit.coordinator.fleet import FleetWatch
from dynamo.refit.coordinator.reconciler import (
    GRACE_SECONDS,
    Action,
    CommitAnswered,
    GiveBackLease,
    Input,
    LeaseTaken,
    PrepareAnswered,
    Publish,
    Reconciler,
    SendAbort,
    SendCommit,
    SendPrepare,
    TakeLease,
    Tick,
)
from dynamo.refit.errors import RefitError, failure_from
from dynamo.refit.events import (
    REFIT_EVENTS,
    WEIGHT_VERSIONS,
    RefitRefused,
    WeightVersionReady,
)
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    AcquireLease,
    Commit,
    Committed,
    Done,
    FleetStatus,
    GetStatus,
    Message,
    Prepare,
    Refused,
    ReleaseLease,
    Vote,
)
from dynamo.refit.rpc import Caller, serve, unary

logger = logging.getLogger(__name__)

#: Bound on calls that only take note of something.
SHORT_CALL_SECONDS = 10.0

TICK_SECONDS = 0.25


class Coordinator:
    """Refits the workers of one namespace; see the module."""

    def __init__(self, runtime: DistributedRuntime, config: CoordinatorConfig) -> None:
        self._runtime = runtime
        self._config = config
        self._caller = Caller(runtime)
        self._reconciler = Reconciler(config.model, config.policy)
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        self._calls: set[asyncio.Task] = set()
        # A lease is taken and given back in the order that was decided.
        self._lease_turn: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._epoch = 0

    async def run(self) -> None:
        """Serve until the runtime shuts down or a part of it fails."""
        prefix = f"{self._config.namespace}.refit"
        status = self._runtime.endpoint(f"{prefix}.status")
        fleet = FleetWatch(self._caller, self._config)
        seen = await fleet.look()
        # Above every epoch a worker has seen, whatever this machine's clock says.
        highest = max((m.status.epoch for m in seen.members), default=0)
        self._epoch = max(int(time.time() * 1e3), highest + 1)
        topic = self._runtime.endpoint(f"{prefix}.{REFIT_EVENTS}")
        versions = self._runtime.endpoint(f"{prefix}.{WEIGHT_VERSIONS}")
        name = f"coordinator-{status.connection_id()}"
        async with (
            EventPublisher(topic, name, self._epoch) as self._events,
            EventSubscriber(versions) as announcements,
        ):
            self._inputs.put_nowait(seen)
            logger.info(
                "refit coordinator: namespace %s, epoch %d, %d workers",
                self._config.namespace,
                self._epoch,
                len(seen.members),
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._decide())
                tasks.create_task(self._listen(announcements))
                tasks.create_task(fleet.watch(self._inputs))
                tasks.create_task(self._tick())
                tasks.create_task(
                    serve(
                        status,
                        unary(GetStatus, self._status, "status"),
                        health_check=GetStatus(),
                    )
                )

    async def _decide(self) -> None:
        while True:
            what = await self._inputs.get()
            for action in self._reconciler.handle(what, time.monotonic()):
                self._perform(action)

    async def _listen(self, announcements: EventSubscriber) -> None:
        async for event in announcements:
            match event:
                case WeightVersionReady():
                    self._inputs.put_nowait(event)
                case RejectedPayload(reason=reason, detail=detail):
                    logger.warning("refused an event: %s", detail)
                    self._events.publish(RefitRefused(reason=reason, detail=detail))
                case _:
                    logger.warning("%s does not belong here", type(event).__name__)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._inputs.put_nowait(Tick())

    async def _status(self, request: GetStatus) -> Message:
        reconciler = self._reconciler
        transaction, desired = reconciler.transaction, reconciler.desired
        return FleetStatus(
            model=reconciler.model or "",
            epoch=self._epoch,
            desired=desired.version if desired else None,
            completed=reconciler.completed,
            under_way=transaction.ready.version if transaction else None,
            members=tuple(m for _, m in sorted(reconciler.fleet.items())),
        )

    # --- actions --------------------------------------------------------------

    def _perform(self, action: Action) -> None:
        match action:
            case Publish(event=event):
                logger.info("%s", event)
                self._events.publish(event)
            case TakeLease():
                self._spawn(self._take_lease(action))
            case GiveBackLease():
                self._spawn(self._give_back_lease(action))
            case SendPrepare():
                self._spawn(self._prepare(action))
            case SendCommit():
                self._spawn(self._commit(action))
            case SendAbort():
                self._spawn(self._abort(action))

    def _spawn(self, call: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def _take_lease(self, action: TakeLease) -> None:
        ready = action.ready
        request = AcquireLease(
            announcement=ready.announcement,
            holder=f"coordinator epoch {self._epoch}",
            seconds=action.seconds,
        )
        failure = None
        try:
            reply = await self._call_trainer(ready, request)
            if isinstance(reply, Refused):
                failure = reply.failure
        except (RefitError, msgspec.ValidationError) as error:
            failure = failure_from(error, stage="lease", version=ready.version)
        self._inputs.put_nowait(LeaseTaken(ready.announcement, failure))

    async def _give_back_lease(self, action: GiveBackLease) -> None:
        ready = action.ready
        request = ReleaseLease(
            announcement=ready.announcement,
            outcome=action.outcome,
            detail=action.detail,
        )
        try:
            await self._call_trainer(ready, request)
        except (RefitError, msgspec.ValidationError) as error:
            # A trainer that is alive announces again, and is told again.
            logger.warning("version %d: lease not released: %s", ready.version, error)
        finally:
            self._lease_turn.pop(ready.announcement, None)

    async def _call_trainer(
        self, ready: WeightVersionReady, request: AcquireLease | ReleaseLease
    ) -> Done | Refused:
        async with self._lease_turn[ready.announcement]:
            return await self._caller.call(
                ready.endpoint,
                ready.instance,
                request,
                Done | Refused,
                SHORT_CALL_SECONDS,
            )

    async def _prepare(self, action: SendPrepare) -> None:
        ready, policy = action.ready, self._config.policy
        request = Prepare(
            version=ready.version,
            epoch=self._epoch,
            announcement=ready.announcement,
            weights=ready.weights,
            endpoint=ready.endpoint,
            instance=ready.instance,
            manifest=ready.manifest,
            slot=ready.slot,
            stage_seconds=policy.stage_seconds,
            commit_seconds=policy.commit_seconds,
        )
        seconds = policy.stage_seconds + GRACE_SECONDS
        reply = await self._ask(action.worker, request, Vote | Refused, seconds)
        self._inputs.put_nowait(
            PrepareAnswered(action.worker, ready.announcement, reply)
        )

    async def _commit(self, action: SendCommit) -> None:
        ready, policy = action.ready, self._config.policy
        request = Commit(
            version=ready.version, epoch=self._epoch, in_flight=action.in_flight
        )
        seconds = policy.commit_seconds + GRACE_SECONDS
        reply = await self._ask(action.worker, request, Committed | Refused, seconds)
        self._inputs.put_nowait(
            CommitAnswered(action.worker, ready.announcement, reply)
        )

    async def _abort(self, action: SendAbort) -> None:
        request = Abort(version=action.version, epoch=self._epoch, reason=action.reason)
        reply = await self._ask(
            action.worker, request, Aborted | Refused, SHORT_CALL_SECONDS
        )
        if isinstance(reply, Refused):
            logger.warning("abort of version %d: %s", action.version, reply.failure)

    async def _ask(
        self, worker: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        """The worker's reply; what keeps it from replying as a :class:`Refused`."""
        member = self._reconciler.fleet.get(worker)
        component = member.component if member else self._config.worker_components[0]
        path = f"{self._config.namespace}.{component}.refit"
        try:
            return await self._caller.call(path, worker, request, expected, seconds)
        except (RefitError, msgspec.ValidationError) as error:
            stage = type(request).__name__.lower()
            version = getattr(request, "version", None)
            return Refused(
                failure=failure_from(error, stage=stage, worker=worker, version=version)
            )
