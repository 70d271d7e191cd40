# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which workers there are and what each says of itself.

Dynamo's Python bindings have no membership callback, so discovery is polled; it
is a local view that the runtime keeps up to date.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.coordinator.actions import FleetSeen
from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import FleetMember, GetStatus, Refused, WorkerStatus
from dynamo.refit.rpc import Caller

logger = logging.getLogger(__name__)

#: A worker answers its status from memory; longer means that it is stalled.
STATUS_SECONDS = 5.0


class FleetWatch:
    """Reads the status of every worker of the configured components."""

    def __init__(self, caller: Caller, config: CoordinatorConfig) -> None:
        self._caller = caller
        self._config = config
        self._known: dict[int, FleetMember] = {}

    async def watch(self, hear: Callable[[FleetSeen], None]) -> None:
        """Tell of the fleet every ``fleet_poll_seconds``."""
        while True:
            await asyncio.sleep(self._config.fleet_poll_seconds)
            hear(await self.look())

    async def look(self) -> FleetSeen:
        """The fleet now. A worker that is registered but does not answer keeps the
        status that it last gave."""
        found = [
            (component, worker)
            for component in self._config.worker_components
            for worker in await self._caller.instances(self._path(component))
        ]
        members = await asyncio.gather(*(self._member(*place) for place in found))
        self._known = {m.worker: m for m in members if m is not None}
        silent = frozenset(worker for _, worker in found) - self._known.keys()
        return FleetSeen(tuple(self._known.values()), silent)

    def _path(self, component: str) -> str:
        return f"{self._config.namespace}.{component}.refit"

    async def _member(self, component: str, worker: int) -> FleetMember | None:
        try:
            status = await self._caller.call(
                self._path(component),
                worker,
                GetStatus(),
                WorkerStatus | Refused,
                STATUS_SECONDS,
            )
        except (RefitError, msgspec.ValidationError) as error:
            logger.warning("worker %d does not give its status: %s", worker, error)
            return self._known.get(worker)
        if isinstance(status, Refused):
            logger.warning("worker %d: %s", worker, status.failure)
            return self._known.get(worker)
        return FleetMember(worker=worker, component=component, status=status)
