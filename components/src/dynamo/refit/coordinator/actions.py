# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the reconciler hears, and what it wants done: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo.refit.errors import Failure
from dynamo.refit.events import Event, WeightVersionReady
from dynamo.refit.protocol import (
    CommitStep,
    Committed,
    FleetMember,
    InFlightPolicy,
    Refused,
    ReleaseOutcome,
    Stepped,
    Vote,
    WeightsServed,
)

# --- inputs: these, and WeightVersionReady ------------------------------------
#
# An answer carries the announcement that the call was for: that of the transaction,
# also where the bytes come from a peer.


@dataclass(frozen=True)
class FleetSeen:
    """The workers that are there now, each with its own status. Of ``silent`` ones
    nobody knows anything: they are in discovery and have not answered yet.

    ``other_models`` are those that workers and coordinators beside this fleet have.
    """

    members: tuple[FleetMember, ...]
    silent: frozenset[int] = frozenset()
    other_models: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LeaseTaken:
    """The trainer keeps the announcement's bytes; or why it does not."""

    announcement_id: str
    failure: Failure | None


@dataclass(frozen=True)
class ServeAnswered:
    """Worker ``reader`` may read from ``peer``; or why not."""

    peer: int
    reader: int
    announcement_id: str
    reply: WeightsServed | Refused


@dataclass(frozen=True)
class PrepareAnswered:
    worker: int
    announcement_id: str
    reply: Vote | Refused


@dataclass(frozen=True)
class Unanswered:
    """A call has no reply: nobody knows whether it was carried out."""

    failure: Failure


@dataclass(frozen=True)
class CommitAnswered:
    worker: int
    announcement_id: str
    reply: Committed | Stepped | Refused | Unanswered


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Input = (
    WeightVersionReady
    | FleetSeen
    | LeaseTaken
    | ServeAnswered
    | PrepareAnswered
    | CommitAnswered
    | Tick
)


# --- actions ------------------------------------------------------------------


@dataclass(frozen=True)
class TakeLease:
    ready: WeightVersionReady
    seconds: float


@dataclass(frozen=True)
class GiveBackLease:
    ready: WeightVersionReady
    outcome: ReleaseOutcome
    detail: str


@dataclass(frozen=True)
class SendServe:
    """Ask ``peer``, which holds the version, to let ``reader`` read it."""

    peer: int
    reader: int
    ready: WeightVersionReady


@dataclass(frozen=True)
class ReleasePeer:
    """The reader has what it wanted, or has given up."""

    peer: int
    announcement_id: str


@dataclass(frozen=True)
class SendPrepare:
    """Stage ``ready``, from the trainer or from ``peer`` where it is ``served``."""

    worker: int
    ready: WeightVersionReady
    peer: int | None = None
    served: WeightsServed | None = None


@dataclass(frozen=True)
class SendCommit:
    worker: int
    ready: WeightVersionReady
    in_flight: InFlightPolicy
    step: CommitStep = "all"
    withdraw: bool = False


@dataclass(frozen=True)
class SendAbort:
    worker: int
    version: int
    reason: str


@dataclass(frozen=True)
class SendAdmit:
    """The worker's own weights are the fleet's: routers may see it."""

    worker: int


@dataclass(frozen=True)
class SendFence:
    """The worker has to leave, unless it serves the version with this fingerprint."""

    worker: int
    version: int
    fingerprint: str
    reason: str


@dataclass(frozen=True)
class Publish:
    event: Event


Action = (
    TakeLease
    | GiveBackLease
    | SendServe
    | ReleasePeer
    | SendPrepare
    | SendCommit
    | SendAbort
    | SendAdmit
    | SendFence
    | Publish
)
