# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Events as data: what comes back from the bytes, and what is refused."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.refit.errors import EventRefused, Failure
from dynamo.refit.events import (
    MAX_EVENT_BYTES,
    SCHEMA,
    AnyEvent,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    StageProgress,
    WeightVersionReady,
    WorkerAdmitted,
    WorkerFenced,
    WorkerJoined,
    WorkerRefitted,
    WorkerStaged,
    decode,
    encode,
)
from dynamo.refit.protocol import (
    CacheCounters,
    CommitTimings,
    MemoryUse,
    RankProgress,
    RankVote,
    StageTimings,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: A version's fingerprint.
WEIGHTS = "9f" * 32

STAMP = {
    "sender": "coordinator-1",
    "sequence": 9,
    "epoch": 4,
    "at": 1753000000.25,
    "mac": b"\0\xff",
}

FAILURE = Failure(
    kind="TransferFailed",
    message="\0 Größe \U0001f4a5",
    stage="stage",
    tensor="lm_head.weight",
    rank=1,
    worker=2**53 - 1,
    version=5,
)

VOTE = RankVote(
    rank=1,
    nbytes=2**40,
    memory=MemoryUse(mode="host", device_nbytes=0, host_nbytes=2**53),
    session="warm",
    counters=CacheCounters(hits=3),
    timings=StageTimings(
        started_at=1.5,
        finished_at=2.5,
        lead_ms=0.5,
        plan_ms=0.0,
        allocate_ms=1.0,
        register_ms=2.0,
        prepare_ms=3.0,
        pull_ms=4.0,
        wire_ms=3.5,
        fingerprint_ms=4.5,
        backup_ms=5.0,
    ),
)

READY = WeightVersionReady(
    model="tiny",
    version=5,
    announcement_id="a1",
    endpoint="ns.trainer.weights",
    instance=2**53 - 1,
    manifest_digest="0123abcd",
    slot=1,
    fingerprint=WEIGHTS,
    in_flight="recompute",
    **STAMP,
)

EVENTS = [
    READY,
    RefitStarted(model="tiny", version=5, workers=(1, 2), **STAMP),
    WorkerStaged(worker=1, version=5, ranks=(VOTE, VOTE), **STAMP),
    WorkerRefitted(
        worker=1,
        version=5,
        fingerprint=WEIGHTS,
        kv_epoch="5",
        in_flight="continue",
        timings=CommitTimings(
            pause_ms=1.0,
            install_ms=2.0,
            copy_ms=1.5,
            resume_ms=3.0,
            stall_ms=6.0,
            probe_ms=7.0,
            verify_ms=8.0,
            install_retries=1,
        ),
        **STAMP,
    ),
    RefitCompleted(
        model="tiny",
        version=5,
        announcement_id="a1",
        fingerprint=WEIGHTS,
        workers=(1, 2),
        seconds=None,
        **STAMP,
    ),
    RefitFailed(version=5, failure=FAILURE, serving=((1, None), (2, 4)), **STAMP),
    RefitSuperseded(version=5, by=6, **STAMP),
    RefitRefused(
        reason="stale",
        detail="5 is installed",
        version=4,
        announcement_id="a0",
        **STAMP,
    ),
    WorkerFenced(worker=1, version=5, failure=FAILURE, **STAMP),
    WorkerJoined(worker=3, version=None, **STAMP),
    WorkerAdmitted(worker=3, version=5, **STAMP),
    StageProgress(
        worker=1,
        version=5,
        ranks=(RankProgress(rank=0, nbytes=2**40 - 1, total_nbytes=2**40),),
        **STAMP,
    ),
]


def changed(event: Any, /, **fields: Any) -> bytes:
    """The event's bytes with ``fields`` set, known to it or not."""
    return msgspec.msgpack.encode(
        msgspec.to_builtins(event, builtin_types=(bytes,)) | fields
    )


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_round_trip(event: Any) -> None:
    got = decode(encode(event))
    assert type(got) is type(event)
    assert got == event


def test_every_type_is_in_the_round_trip() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(AnyEvent))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_the_class_name_is_the_tag(event: Any) -> None:
    fields = msgspec.msgpack.decode(encode(event))
    assert fields["event"] == type(event).__name__
    assert fields["schema"] == SCHEMA


def test_types_with_the_same_fields_are_told_apart() -> None:
    joined = WorkerJoined(worker=1, version=5)
    assert type(decode(changed(joined))) is WorkerJoined
    started = {"event": "RefitStarted", "model": "tiny", "workers": [1]}
    assert decode(changed(joined, **started)) == RefitStarted(
        model="tiny", version=5, workers=(1,)
    )


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_unknown_fields_are_tolerated(event: Any) -> None:
    assert decode(changed(event, added_later={"deep": [1, None, b"\0"]})) == event


def test_missing_optional_fields_have_their_defaults() -> None:
    fields = msgspec.to_builtins(READY, builtin_types=(bytes,))
    for name in (*STAMP, "schema", "in_flight"):
        del fields[name]
    got = decode(msgspec.msgpack.encode(fields))
    assert (got.sender, got.sequence, got.epoch, got.at) == ("", 0, 0, 0.0)
    assert (got.schema, got.in_flight) == (SCHEMA, None)


@pytest.mark.parametrize("schema", [0, 1, SCHEMA + 1, 2**63])
def test_another_schema_is_refused(schema: int) -> None:
    with pytest.raises(EventRefused, match=f"event schema {schema}, this release"):
        decode(changed(READY, schema=schema))


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "truncated"),
        (encode(READY)[:-1], "truncated"),
        (encode(READY) + b"\0", "trailing characters"),
        (b"\xc1", "malformed event"),
        (msgspec.msgpack.encode([1, 2]), "Expected `object`"),
        (msgspec.msgpack.encode({"version": 1}), "missing required field `event`"),
        (changed(READY, event="Rebooted"), "'Rebooted'"),
        (changed(READY, version="5"), r"Expected `int`, got `str` - at `\$.version`"),
        (changed(READY, version=-1), r"Expected `int` >= 0 - at `\$.version`"),
        (changed(READY, version=2**63), r"Expected `int` <= .* - at `\$.version`"),
        (changed(READY, model="m" * 70_000), r"length <= 1024 - at `\$.model`"),
        (changed(READY, fingerprint="9" * 257), r"length <= 256 - at `\$.fingerprint`"),
        (changed(READY, in_flight="abort"), r"'abort' - at `\$.in_flight`"),
        (changed(EVENTS[7], reason="bored"), r"'bored' - at `\$.reason`"),
    ],
)
def test_malformed_is_refused_with_the_place(payload: bytes, why: str) -> None:
    with pytest.raises(EventRefused, match=why):
        decode(payload)


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (READY, "slot"),
        (READY, "fingerprint"),
        (EVENTS[3], "fingerprint"),
        (EVENTS[4], "fingerprint"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_missing_field_is_refused_by_name(event: Any, name: str) -> None:
    """An announcement or an end without its proof is none."""
    fields = msgspec.to_builtins(event, builtin_types=(bytes,))
    del fields[name]
    with pytest.raises(EventRefused, match=f"missing required field `{name}`"):
        decode(msgspec.msgpack.encode(fields))


def test_the_largest_fleet_s_vote_fits_an_event() -> None:
    """A worker of 256 ranks, each with its memory and its timings."""
    staged = WorkerStaged(worker=1, version=5, ranks=(VOTE,) * 256)
    payload = encode(staged)
    assert decode(payload) == staged
    assert len(payload) < MAX_EVENT_BYTES


def test_the_largest_event_passes_and_one_byte_more_is_refused() -> None:
    def refused(detail: str) -> RefitRefused:
        return RefitRefused(reason="stale", detail=detail)

    # 70000 bytes have the long form of a string's length, as those at the limit do.
    overhead = len(encode(refused("x" * 70_000))) - 70_000
    largest = refused("x" * (MAX_EVENT_BYTES - overhead))
    payload = encode(largest)
    assert len(payload) == MAX_EVENT_BYTES
    assert decode(payload) == largest

    over = refused(largest.detail + "x")
    with pytest.raises(EventRefused, match=f"RefitRefused has {MAX_EVENT_BYTES + 1}"):
        encode(over)
    with pytest.raises(EventRefused, match="oversized event"):
        decode(msgspec.msgpack.encode(over))


def test_oversized_is_refused_unread() -> None:
    with pytest.raises(EventRefused, match="oversized event"):
        decode(b"\xc1" * (MAX_EVENT_BYTES + 1))


@given(
    message=st.text(),
    tensor=st.none() | st.text(),
    serving=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.none() | st.integers(0, 2**63 - 1))
    ),
)
def test_any_text_and_number_round_trips(
    message: str, tensor: str | None, serving: list[tuple[int, int | None]]
) -> None:
    event = RefitFailed(
        version=1,
        failure=Failure(kind="K", message=message, stage="s", tensor=tensor),
        serving=tuple(serving),
    )
    assert decode(encode(event)) == event


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        READY.version = 6
