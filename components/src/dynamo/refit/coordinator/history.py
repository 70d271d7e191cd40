# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What became of the versions that came, and how far behind each worker is.

Pure: what the reconciler wants and what it publishes goes in, with the time. It decides
nothing, and nothing of it outlives the coordinator.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec

from dynamo.refit.coordinator.actions import Action, CommitAnswered, Input, Publish
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.protocol import Committed, FleetMember, History, RefitRecord

#: Announcements that are remembered.
KEPT = 100

#: Characters of an excluded worker's failure: a hundred records go in one reply.
EXCLUDED_CHARACTERS = 200

UNDER_WAY = "under way"


class RefitHistory:
    """The last :data:`KEPT` announcements since ``since`` (Unix seconds)."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._records: OrderedDict[str, RefitRecord] = OrderedDict()

    def view(self) -> History:
        return History(since=self._since, records=tuple(self._records.values()))

    def hear(
        self,
        what: Input,
        actions: Iterable[Action],
        desired: WeightVersionReady | None,
        at: float,
    ) -> None:
        """The reconciler has heard ``what``, desires ``desired`` now, and says
        ``actions``. ``at``: Unix seconds."""
        # Repeats of an announcement change nothing.
        if desired is not None and desired.announcement_id not in self._records:
            self._add(desired.version, desired.announcement_id, at)
        if isinstance(what, CommitAnswered):
            self._answered(what)
        for action in actions:
            if isinstance(action, Publish):
                self._published(action.event, at)

    def place(self, members: list[FleetMember], at: float) -> tuple[FleetMember, ...]:
        """The members with how far each one is behind what was announced."""
        announced = self._announced()
        served = {m.status.version for m in members} - {None}
        return tuple(_placed(m, announced, served, at) for m in members)

    def _announced(self) -> dict[int, float]:
        """When each version that a worker may lack was announced first.

        A failed number that the trainer has gone on below was a mistake: nobody waits
        for it.
        """
        announced: dict[int, float] = {}
        lowest_later = math.inf
        for record in reversed(self._records.values()):
            if record.outcome == "refused":
                continue
            if record.outcome != "failed" or record.version <= lowest_later:
                announced[record.version] = record.announced_at
            lowest_later = min(lowest_later, record.version)
        return announced

    def _answered(self, answer: CommitAnswered) -> None:
        """A worker may have committed."""
        record = self._records.get(answer.announcement_id)
        reply = answer.reply
        if record is None or record.outcome != UNDER_WAY:
            return
        if isinstance(reply, Committed):
            stall = max(record.stall_ms or 0.0, reply.timings.stall_ms)
            self._change(record, stall_ms=stall)

    def _published(self, event: Event, at: float) -> None:
        """An event of the coordinator that may be the end of an announcement."""
        match event:
            case RefitCompleted(
                announcement_id=name, workers=workers, excluded=excluded
            ):
                self._end(
                    self._records.get(name),
                    "completed",
                    at,
                    workers=workers,
                    excluded=tuple(_shortened(failure) for failure in excluded),
                )
            case RefitFailed(version=version, failure=failure):
                self._end(self._open(version), "failed", at, detail=str(failure))
            case RefitSuperseded(version=version, by=by):
                detail = f"by version {by}"
                self._end(self._open(version), "superseded", at, detail=detail)
            case RefitRefused(version=int(version), announcement_id=str(name)):
                if name not in self._records:
                    self._add(version, name, at)
                detail = f"{event.reason}: {event.detail}"
                self._end(self._records[name], "refused", at, detail=detail)

    def _open(self, version: int) -> RefitRecord | None:
        for record in self._records.values():
            if record.version == version and record.outcome == UNDER_WAY:
                return record
        return None

    def _add(self, version: int, announcement_id: str, at: float) -> None:
        self._records[announcement_id] = RefitRecord(
            version=version,
            announcement_id=announcement_id,
            outcome=UNDER_WAY,
            announced_at=at,
        )
        while len(self._records) > KEPT:
            self._records.popitem(last=False)

    def _end(
        self, record: RefitRecord | None, outcome: str, at: float, **what: Any
    ) -> None:
        """Once: what comes later is about workers that caught up."""
        if record is None or record.outcome != UNDER_WAY:
            return
        seconds = at - record.announced_at
        self._change(record, outcome=outcome, ended_at=at, seconds=seconds, **what)

    def _change(self, record: RefitRecord, **what: Any) -> None:
        self._records[record.announcement_id] = msgspec.structs.replace(record, **what)


def _shortened(failure: Failure) -> Failure:
    message = failure.message[:EXCLUDED_CHARACTERS]
    return msgspec.structs.replace(failure, message=message)


def _placed(
    member: FleetMember, announced: dict[int, float], served: set[int], at: float
) -> FleetMember:
    version = member.status.version
    newer = {v for v in announced.keys() | served if version is None or v > version}
    heard = [announced[v] for v in newer if v in announced]
    seconds = None
    if not newer:
        seconds = 0.0
    elif heard:
        seconds = at - min(heard)
    return msgspec.structs.replace(member, behind=len(newer), behind_seconds=seconds)
