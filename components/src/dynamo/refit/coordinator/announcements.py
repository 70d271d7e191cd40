# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which version is wanted, which announcements must not be followed, and how each one
ended: a trainer that has not heard it announces again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

from dynamo.refit.coordinator.actions import Action, GiveBackLease, Publish
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import MAX_MESSAGE
from dynamo.refit.events import RefitRefused, RefusalReason, WeightVersionReady
from dynamo.refit.protocol import MAX_VERSION, FleetMember, ReleaseOutcome

#: Announcements whose end is remembered, so that a repeat of one starts nothing.
REMEMBERED = 256


class Announcements:
    """What was announced; the newest is desired."""

    def __init__(self) -> None:
        self.desired: WeightVersionReady | None = None
        #: When the desired one was heard of, in monotonic seconds.
        self.heard = 0.0
        self._outcome: ReleaseOutcome | None = None
        self._ended: OrderedDict[str, ReleaseOutcome] = OrderedDict()

    @property
    def open(self) -> WeightVersionReady | None:
        """The desired version, unless its announcement has ended."""
        return self.desired if self._outcome is None else None

    def want(self, ready: WeightVersionReady, now: float) -> None:
        self.desired, self.heard, self._outcome = ready, now, None

    def is_desired(self, ready: WeightVersionReady) -> bool:
        desired = self.desired
        return desired is not None and ready.announcement_id == desired.announcement_id

    def outcome(self, ready: WeightVersionReady) -> ReleaseOutcome | None:
        """How an announcement ended, if it did; the desired one is not forgotten."""
        if self.is_desired(ready):
            return self._outcome
        return self._ended.get(ready.announcement_id)

    def end(
        self, ready: WeightVersionReady, outcome: ReleaseOutcome, detail: str
    ) -> list[Action]:
        if self.is_desired(ready):
            self._outcome = outcome
        self._ended[ready.announcement_id] = outcome
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)
        return [GiveBackLease(ready, outcome, detail)]

    def refuse(
        self,
        ready: WeightVersionReady,
        model: str | None,
        fleet: Mapping[int, FleetMember],
        policy: Policy,
        newest: int | None,
    ) -> list[Action]:
        """What to do about a version that must not be installed; empty if it may.

        Args:
            newest: the highest version that was served or is under way.
        """
        found = (
            _other_model(ready, model)
            or _out_of_range(ready)
            or self._stale(ready, fleet.values(), newest)
            or _unsafe(ready, fleet.values(), policy)
        )
        if found is None:
            return []
        reason, detail = found[0], found[1][:MAX_MESSAGE]
        event = RefitRefused(
            reason=reason,
            detail=detail,
            version=ready.version,
            announcement_id=ready.announcement_id,
        )
        return [Publish(event), *self.end(ready, "refused", detail)]

    def _stale(
        self,
        ready: WeightVersionReady,
        members: Collection[FleetMember],
        newest: int | None,
    ) -> tuple[RefusalReason, str] | None:
        """A version that failed makes none stale: its number may be a mistake."""
        wanted = self.open
        if wanted is not None and wanted.model == ready.model:
            newest = wanted.version if newest is None else max(newest, wanted.version)
        if newest is not None and newest > ready.version:
            return (
                "stale",
                f"version {ready.version} is older than {newest}: versions must grow; "
                "publish old weights under a new number to go back",
            )
        for member in members:
            status = member.status
            if (
                status.version == ready.version
                and status.fingerprint != ready.fingerprint
            ):
                return (
                    "stale",
                    f"worker {member.worker} serves other weights as version "
                    f"{ready.version}: publish these under a new number",
                )
        return None


def _other_model(
    ready: WeightVersionReady, model: str | None
) -> tuple[RefusalReason, str] | None:
    if model is None or ready.model == model:
        return None
    return (
        "unknown_model",
        f"model {ready.model!r} is not served here (served: {model!r})",
    )


def _out_of_range(ready: WeightVersionReady) -> tuple[RefusalReason, str] | None:
    if 0 <= ready.version <= MAX_VERSION:
        return None
    return (
        "malformed_event",
        f"version {ready.version} is no number from 0 to 2**63 - 1: take one",
    )


def _unsafe(
    ready: WeightVersionReady, members: Collection[FleetMember], policy: Policy
) -> tuple[RefusalReason, str] | None:
    """A worker that drains is not routed to: another of its component has to be."""
    if (ready.in_flight or policy.in_flight) != "drain":
        return None
    if policy.commit == "barrier":
        why = "with commit policy barrier nobody would be left to serve"
    elif alone := _cannot_be_spared(members):
        why = f"one worker of {alone!r} alone cannot be spared"
    else:
        return None
    return (
        "unsafe_policy",
        f"in-flight policy drain takes workers out of routing, and {why}: use "
        "continue or recompute, or rolling with two workers of each component",
    )


def _cannot_be_spared(members: Collection[FleetMember]) -> str | None:
    """A component with a single worker that is routed to, or with none."""
    routable = {member.component: 0 for member in members}
    for member in members:
        status = member.status
        routable[member.component] += status.admitted and status.phase != "fenced"
    return next((name for name, count in routable.items() if count < 2), None)
