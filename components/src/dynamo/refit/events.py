# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The events of a refit: typed, versioned, small.

Events are hints and the state behind them is the truth: each one is safe to
lose, to repeat and to reorder. The bus stamps ``sender``, ``sequence``, ``epoch``
and ``at`` on every event it sends, so that a receiver can tell a gap or a repeat.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from dynamo.refit.errors import EventRefused, Failure
from dynamo.refit.protocol import (
    CommitTimings,
    InFlightPolicy,
    RankProgress,
    RankVote,
    Version,
)

#: Raised when a field changes its meaning; new optional fields do not count.
SCHEMA = 2

#: The NATS event plane refuses payloads above 1 MB; events stay far below.
MAX_EVENT_BYTES = 256 * 1024

#: Endpoint names under ``<namespace>.refit`` that carry the two event streams.
WEIGHT_VERSIONS = "weight_versions"
REFIT_EVENTS = "refit_events"


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event"):
    """What every event carries.

    ``model`` is the served model's name (empty: not known yet, or of none);
    ``sequence`` counts the events of one ``sender``; ``epoch`` is the coordinator's (0
    for a sender that has none); ``at`` is seconds since the Unix epoch. ``mac`` is the
    place for a message authentication code: none is made or verified yet.
    """

    schema: int = SCHEMA
    model: str = ""
    sender: str = ""
    sequence: int = 0
    epoch: int = 0
    at: float = 0.0
    mac: bytes = b""


#: What others send is bounded where it is read: it is quoted in answers, logs and
#: further events. Characters of a name and of an identifier or a digest.
Name = Annotated[str, msgspec.Meta(max_length=1024)]
Identifier = Annotated[str, msgspec.Meta(max_length=256)]


class WeightVersionReady(Event, frozen=True, kw_only=True, tag=True):
    """A trainer's version can be read.

    ``announcement_id`` names one call of ``publish()``: repeats of the event carry
    the same one. ``endpoint`` and ``instance`` say where the manifest with the
    digest ``manifest_digest`` is served; ``slot`` is where in it the version lies.
    ``fingerprint`` is what every worker's bytes must show.
    ``source_version`` is what the version is called where it comes from, if it has a
    name there: a ModelExpress uid, for instance. ``traceparent`` (W3C) is the trainer's
    span, if it traces.
    """

    model: Name
    version: Version
    announcement_id: Identifier
    endpoint: Name
    instance: int
    manifest_digest: Identifier
    slot: int
    fingerprint: Identifier
    in_flight: InFlightPolicy | None = None
    source_version: Identifier = ""
    traceparent: Identifier | None = None


class RefitStarted(Event, frozen=True, kw_only=True, tag=True):
    """The coordinator asks ``workers`` to stage ``version``.

    ``catch_up``: the others serve it already.
    """

    version: int
    workers: tuple[int, ...]
    catch_up: bool = False


class StageProgress(Event, frozen=True, kw_only=True, tag=True):
    """How far the ranks of a worker are with ``version``: a few times a second, and not
    at all for a stage that ends sooner."""

    worker: int
    version: int
    ranks: tuple[RankProgress, ...]


class WorkerStaged(Event, frozen=True, kw_only=True, tag=True):
    """Every rank of a worker holds the version, and the worker votes for it."""

    worker: int
    version: int
    ranks: tuple[RankVote, ...]


class WorkerRefitted(Event, frozen=True, kw_only=True, tag=True):
    """A worker serves ``version``; ``kv_epoch`` is in its prefix-cache keys.

    ``fingerprint`` is what its live weights were found to have. ``carried_over``
    requests outlasted the bound of ``drain``.
    """

    worker: int
    version: int
    fingerprint: str
    kv_epoch: str
    in_flight: InFlightPolicy
    timings: CommitTimings
    carried_over: int = 0


class RefitCompleted(Event, frozen=True, kw_only=True, tag=True):
    """Every worker serves ``version``, whose fingerprint is ``fingerprint``.

    All but those in ``excluded``, which could not take it and were fenced, or are
    gone: a failure for each, with worker, rank and cause. ``catch_up``: some were
    brought to what the others served. ``seconds`` is the time from the announcement's
    arrival at the coordinator; ``None`` if this coordinator found the version already
    installed.
    """

    version: int
    announcement_id: str
    fingerprint: str
    workers: tuple[int, ...]
    seconds: float | None
    excluded: tuple[Failure, ...] = ()
    catch_up: bool = False


class RefitFailed(Event, frozen=True, kw_only=True, tag=True):
    """A version is not installed: why, and what each worker serves instead.

    ``serving`` has a pair ``(worker, version)`` per worker that is not fenced; version
    ``None`` stands for the weights the worker started with. ``catch_up``: the fleet
    serves the version, and those that were to be brought there are not; they are tried
    again.
    """

    version: int
    failure: Failure
    serving: tuple[tuple[int, int | None], ...]
    catch_up: bool = False


class RefitSuperseded(Event, frozen=True, kw_only=True, tag=True):
    """``version`` was given up before its commit for the newer ``by``; ``catch_up``: by
    those that were to be brought to it, the others serve it."""

    version: int
    by: int
    catch_up: bool = False


RefusalReason = Literal[
    "unknown_model", "malformed_event", "oversized_event", "stale", "unsafe_policy"
]


class RefitRefused(Event, frozen=True, kw_only=True, tag=True):
    """An announcement that starts nothing: why, and what to do about it."""

    reason: RefusalReason
    detail: str
    version: int | None = None
    announcement_id: str | None = None


class WorkerFenced(Event, frozen=True, kw_only=True, tag=True):
    """A worker was taken out of service for good: its weights are not known.

    ``version`` is what was being staged or installed.
    """

    worker: int
    version: int | None
    failure: Failure


class WorkerJoined(Event, frozen=True, kw_only=True, tag=True):
    """The coordinator sees a worker it did not know; ``version`` as above."""

    worker: int
    version: int | None


class WorkerAdmitted(Event, frozen=True, kw_only=True, tag=True):
    """A worker that joined has the fleet's weights: routers see it from now on."""

    worker: int
    version: int | None


AnyEvent = (
    WeightVersionReady
    | RefitStarted
    | StageProgress
    | WorkerStaged
    | WorkerRefitted
    | RefitCompleted
    | RefitFailed
    | RefitSuperseded
    | RefitRefused
    | WorkerFenced
    | WorkerJoined
    | WorkerAdmitted
)


class _AnySchema(msgspec.Struct):
    """Any event, as far as telling its schema goes."""

    schema: int = SCHEMA


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyEvent)
_schema_decoder = msgspec.msgpack.Decoder(_AnySchema)


def encode(event: Event) -> bytes:
    """The event as msgpack.

    Raises:
        EventRefused: it is larger than :data:`MAX_EVENT_BYTES`, or holds text that
            is not Unicode or a number above 64 bits.
    """
    try:
        payload = _encoder.encode(event)
    except (UnicodeEncodeError, OverflowError) as error:
        raise EventRefused(f"{type(event).__name__} cannot be sent: {error}") from error
    if len(payload) > MAX_EVENT_BYTES:
        raise EventRefused(
            f"{type(event).__name__} has {len(payload)} bytes, at most "
            f"{MAX_EVENT_BYTES} go over the event plane: send an id, not the data"
        )
    return payload


def decode(payload: bytes) -> AnyEvent:
    """The event in ``payload``.

    Raises:
        EventRefused: it is too large, not an event of this package, or of a
            schema this release does not read.
    """
    if len(payload) > MAX_EVENT_BYTES:
        raise EventRefused(
            f"oversized event: {len(payload)} bytes, at most {MAX_EVENT_BYTES}"
        )
    try:
        # The schema first: an event of another one need not have our fields.
        schema = _schema_decoder.decode(payload).schema
        if schema != SCHEMA:
            raise EventRefused(
                f"event schema {schema}, this release reads {SCHEMA}: run the same "
                "release of dynamo-refit everywhere"
            )
        return _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventRefused(f"malformed event: {error}") from error
