# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Calls as data: every message survives the wire, every error has its cause."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import msgspec
import msgspec.inspect as shape
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit import protocol
from dynamo.refit.errors import Fenced, LayoutRefused, RefitError
from dynamo.refit.protocol import (
    Abort,
    Aborted,
    Command,
    CoordinatorReply,
    CoordinatorRequest,
    GetStatus,
    ManifestReply,
    Message,
    Prepare,
    RankReply,
    RankRequest,
    Refused,
    TrainerReply,
    TrainerRequest,
    WorkerReply,
    WorkerRequest,
    WorkerStatus,
    from_wire,
    to_wire,
)
from dynamo.refit.rpc import PeerLost, unary

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

MESSAGES = [
    kind
    for _, kind in inspect.getmembers(protocol, inspect.isclass)
    if issubclass(kind, Message) and kind not in (Message, Command)
]
UNIONS = (
    WorkerRequest,
    WorkerReply,
    TrainerRequest,
    TrainerReply,
    CoordinatorRequest,
    CoordinatorReply,
    RankRequest,
    RankReply,
)

PREPARE = Prepare(
    model="tiny",
    announcement_id="a1",
    fingerprint="w1",
    version=5,
    epoch=1753000000123,
    endpoint="ns.trainer.weights",
    instance=2**53 + 1,
    manifest_digest="0123abcd",
    slot=1,
    stage_seconds=300.0,
    keep_seconds=0.5,
)


def any_value(kind: shape.Type) -> st.SearchStrategy:
    """Values of a field's type; fails by name on a type that is new here."""
    match kind:
        case shape.IntType(ge=least, le=most):
            least, most = (-(2**63), 2**64 - 1) if least is None else (least, most)
            return st.integers(least, most)
        case shape.FloatType():
            return st.floats(allow_nan=False, allow_infinity=False)
        case shape.StrType():
            # What is not UTF-8 cannot be sent at all.
            return st.text(st.characters(codec="utf-8"))
        case shape.BytesType():
            return st.binary()
        case shape.BoolType():
            return st.booleans()
        case shape.NoneType():
            return st.none()
        case shape.LiteralType(values=values):
            return st.sampled_from(values)
        case shape.UnionType(types=types):
            return st.one_of(*map(any_value, types))
        case shape.VarTupleType(item_type=item):
            return st.lists(any_value(item), max_size=3).map(tuple)
        case shape.TupleType(item_types=items):
            return st.tuples(*map(any_value, items))
        case shape.DictType(key_type=key, value_type=value):
            return st.dictionaries(any_value(key), any_value(value), max_size=3)
        case shape.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{f.name: any_value(f.type) for f in fields})
    raise NotImplementedError(f"no strategy for {kind}")


def over_json(message: Message) -> Any:
    """What arrives at the other end of a Dynamo endpoint."""
    return json.loads(json.dumps(to_wire(message)))


# --- messages -----------------------------------------------------------------


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=30)
@given(data=st.data())
def test_every_message_round_trips_through_json(
    kind: type[Message], data: st.DataObject
) -> None:
    message = data.draw(any_value(shape.type_info(kind)))
    got = from_wire(over_json(message), kind)
    assert type(got) is kind
    assert got == message


def test_every_message_belongs_to_a_conversation() -> None:
    spoken = {kind for union in UNIONS for kind in get_args(union)}
    assert set(MESSAGES) == spoken


@pytest.mark.parametrize("union", UNIONS, ids=str)
@settings(max_examples=30)
@given(data=st.data())
def test_a_union_tells_its_messages_apart(union: Any, data: st.DataObject) -> None:
    for kind in get_args(union):
        message = data.draw(any_value(shape.type_info(kind)))
        assert type(from_wire(over_json(message), union)) is kind


def test_what_is_on_the_wire() -> None:
    assert to_wire(ManifestReply(payload=b"\0\xff")) == {
        "type": "ManifestReply",
        "payload": "AP8=",
    }
    assert to_wire(GetStatus()) == {"type": "GetStatus"}


def changed(**fields: Any) -> dict[str, Any]:
    return to_wire(PREPARE) | fields


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (changed(type="Reboot"), "Reboot"),
        (changed(type="Vote"), "Vote"),
        (changed(version="5"), r"Expected `int`, got `str` - at `\$.version`"),
        (changed(version=None), r"got `null` - at `\$.version`"),
        (
            {"type": "Abort", "model": "m", "version": 5},
            "missing required field `epoch`",
        ),
        ({}, "missing required field `type`"),
        ([], "Expected `object`"),
        (None, "Expected `object`"),
    ],
)
def test_what_is_not_expected_is_refused_with_the_place(data: Any, why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        from_wire(data, WorkerRequest)


def test_fields_added_later_are_tolerated() -> None:
    assert from_wire(changed(added_later=[1, {}]), WorkerRequest) == PREPARE


# --- the handler of an endpoint -----------------------------------------------


async def replies_of(
    answer: Callable[[Any], Awaitable[Message]], data: Any
) -> list[Message]:
    """What an endpoint that answers worker requests with ``answer`` sends."""
    handler = unary(WorkerRequest, answer, "worker")
    sent = [json.loads(json.dumps(reply)) async for reply in handler(data)]
    return [from_wire(reply, WorkerReply | WorkerStatus) for reply in sent]


async def test_one_request_gets_one_reply() -> None:
    asked = []

    async def answer(request: Any) -> Message:
        asked.append(request)
        return Aborted(version=request.version)

    request = Abort(model="tiny", version=5, epoch=3, reason="superseded")
    assert await replies_of(answer, over_json(request)) == [Aborted(version=5)]
    assert asked == [request]


async def test_a_refit_error_is_a_refusal_with_its_cause() -> None:
    async def answer(request: Any) -> Message:
        raise LayoutRefused("2048 rows, 1024 read", tensor="lm_head.weight", rank=3)

    [reply] = await replies_of(answer, to_wire(PREPARE))
    assert isinstance(reply, Refused)
    failure = reply.failure
    assert (failure.kind, failure.message) == ("LayoutRefused", "2048 rows, 1024 read")
    assert (failure.stage, failure.tensor, failure.rank) == (
        "worker",
        "lm_head.weight",
        3,
    )


@pytest.mark.parametrize("data", [{"type": "Reboot"}, changed(slot="0"), None, 5])
async def test_a_malformed_request_is_a_refusal_and_is_not_carried_out(
    data: Any,
) -> None:
    async def answer(request: Any) -> Message:
        pytest.fail("carried out")

    [reply] = await replies_of(answer, data)
    assert isinstance(reply, Refused)
    assert reply.failure.kind == "ValidationError"
    assert "Invalid value" in reply.failure.message or "Expected" in (
        reply.failure.message
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [(ZeroDivisionError("by zero"), "by zero"), (KeyError(), "KeyError()")],
)
async def test_an_unexpected_error_is_a_refusal_and_is_logged(
    error: Exception, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(request: Any) -> Message:
        raise error

    with caplog.at_level("ERROR", logger="dynamo.refit.rpc"):
        [reply] = await replies_of(answer, to_wire(GetStatus()))
    assert isinstance(reply, Refused)
    assert reply.failure.kind == type(error).__name__
    assert (reply.failure.message, reply.failure.stage) == (message, "worker")
    [record] = caplog.records
    assert record.exc_info[1] is error


async def test_an_error_of_this_package_is_not_logged_as_a_bug(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def answer(request: Any) -> Message:
        raise PeerLost("no instance 7")

    await replies_of(answer, to_wire(GetStatus()))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("error", "fenced"), [(Fenced("restart it"), True), (PeerLost("gone"), False)]
)
async def test_a_refusal_says_whether_the_worker_is_fenced(
    error: RefitError, fenced: bool
) -> None:
    async def answer(request: Any) -> Message:
        raise error

    [reply] = await replies_of(answer, to_wire(GetStatus()))
    assert reply == Refused(failure=reply.failure, fenced=fenced)
