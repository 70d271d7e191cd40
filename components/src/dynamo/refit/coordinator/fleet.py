# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which workers of one model there are and what each says of itself.

Dynamo's Python bindings have no membership callback, so discovery is polled; it
is a local view that the runtime keeps up to date.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.coordinator.actions import FleetSeen
from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import (
    FleetMember,
    FleetStatus,
    GetStatus,
    Refused,
    WorkerStatus,
)
from dynamo.refit.rpc import Caller

logger = logging.getLogger(__name__)

#: A worker answers its status from memory; longer means that it is stalled.
STATUS_SECONDS = 5.0

S = TypeVar("S", WorkerStatus, FleetStatus)


class SeveralModels(RefitError):
    """A coordinator without a model of its own finds workers of several."""


class FleetWatch:
    """Reads the status of every worker of the configured components.

    The fleet is the workers of one model: the configured one, else the one that the
    first workers have. Workers of other models belong to other coordinators.

    Args:
        itself: this coordinator's instance of the status endpoint, which is not asked.
    """

    def __init__(
        self, caller: Caller, config: CoordinatorConfig, itself: int | None = None
    ) -> None:
        self._caller = caller
        self._config = config
        self._itself = itself
        self._model = config.model
        self._known: dict[int, FleetMember] = {}
        #: Models of other coordinators, and those that were warned of.
        self._neighbours: set[str] = set()
        self._reported: set[str] = set()
        #: The workers of each layout, when that was last looked at.
        self._layouts: dict[str, list[int]] = {}

    async def watch(self, hear: Callable[[FleetSeen], None]) -> None:
        """Tell of the fleet every ``fleet_poll_seconds``.

        Raises:
            SeveralModels: as :meth:`look`.
        """
        while True:
            await asyncio.sleep(self._config.fleet_poll_seconds)
            hear(await self.look())

    async def look(self) -> FleetSeen:
        """The fleet now. A worker that is registered but does not answer keeps the
        status that it last gave.

        Raises:
            SeveralModels: no model is configured, and the first workers have several.
        """
        found = [
            (component, worker)
            for component in self._config.worker_components
            for worker in await self._caller.instances(self._path(component))
        ]
        members = await asyncio.gather(*(self._member(*place) for place in found))
        self._known = {m.worker: m for m in members if m is not None}
        silent = frozenset(worker for _, worker in found) - self._known.keys()
        models = {m.status.model for m in self._known.values()}
        if self._model is None and models:
            self._model = _only(models)
        others = frozenset((models | self._neighbours) - {self._model})
        self._report(models - {self._model})
        fleet = [m for m in self._known.values() if m.status.model == self._model]
        self._report_layouts(fleet)
        return FleetSeen(tuple(fleet), silent, others)

    def _report(self, others: set[str]) -> None:
        for model in sorted(others - self._reported):
            logger.warning(
                "workers of model %r are not in this fleet, which serves %r: they wait "
                "for a coordinator of their own (python -m dynamo.refit --model %s)",
                model,
                self._model,
                model,
            )
        self._reported |= others

    def _report_layouts(self, fleet: list[FleetMember]) -> None:
        """Warn where workers have several layouts: once, until they are others."""
        layouts: dict[str, list[int]] = {}
        for member in sorted(fleet, key=lambda member: member.worker):
            if member.status.layout:
                layouts.setdefault(member.status.layout, []).append(member.worker)
        if len(layouts) > 1 and layouts != self._layouts:
            groups = (", ".join(map(str, group)) for group in layouts.values())
            logger.warning(
                "workers of %d layouts are in this fleet (%s): a worker reads weights "
                "from others of its own layout only. The only one of a layout reads "
                "every version from the trainer; where it joins when the trainer does "
                "not keep the served version any more, it waits for the next one",
                len(layouts),
                " | ".join(groups),
            )
        self._layouts = layouts

    def _path(self, component: str) -> str:
        return f"{self._config.namespace}.{component}.refit"

    async def watch_neighbours(self) -> None:
        """Keep the models of the namespace's other coordinators known."""
        path = f"{self._config.namespace}.refit.status"
        while True:
            others = set(await self._caller.instances(path)) - {self._itself}
            asked = (self._ask(path, instance, FleetStatus) for instance in others)
            replies = await asyncio.gather(*asked)
            self._neighbours = {r.model for r in replies if r is not None} - {""}
            await asyncio.sleep(self._config.fleet_poll_seconds)

    async def _member(self, component: str, worker: int) -> FleetMember | None:
        status = await self._ask(self._path(component), worker, WorkerStatus)
        if status is None:
            return self._known.get(worker)
        return FleetMember(worker=worker, component=component, status=status)

    async def _ask(self, path: str, instance: int, expected: type[S]) -> S | None:
        """The status of one instance; ``None`` if it gives none."""
        try:
            status = await self._caller.call(
                path, instance, GetStatus(), expected | Refused, STATUS_SECONDS
            )
        except (RefitError, msgspec.ValidationError) as error:
            logger.warning("%s %d does not give its status: %s", path, instance, error)
            return None
        if isinstance(status, Refused):
            logger.warning("%s %d: %s", path, instance, status.failure)
            return None
        return status


def _only(models: set[str]) -> str:
    if len(models) == 1:
        return next(iter(models))
    raise SeveralModels(
        f"workers of {len(models)} models are here ({', '.join(sorted(models))}): run "
        "one coordinator per model, each with --model"
    )
