# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit verify`` says yes only where every worker has said so."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest

from dynamo.refit import cli
from dynamo.refit.protocol import (
    FleetStatus,
    GetStatus,
    Message,
    Refused,
    VerifyWeights,
    WeightsVerified,
)
from dynamo.refit.rpc import PeerLost
from tests.support.fleet import failure, member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

GOOD = WeightsVerified(version=5, fingerprint="9f" * 32)
WRONG = Refused(failure=failure(2, "rank 1 holds other bytes"))


class Workers:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: a coordinator, and what each
    worker answers."""

    answers: dict[int, Message | Exception]

    def __init__(self, runtime: None) -> None:
        pass

    async def instances(self, path: str) -> list[int]:
        return [99]

    async def call(self, path: str, instance: int, request: Message, *_: object) -> Any:
        if isinstance(request, GetStatus):
            return FleetStatus(
                model="tiny",
                epoch=1,
                desired=5,
                completed=5,
                under_way=None,
                members=tuple(member(worker, 5) for worker in self.answers),
            )
        assert isinstance(request, VerifyWeights)
        answer = self.answers[instance]
        if isinstance(answer, Exception):
            raise answer
        return answer


def verify(
    monkeypatch: pytest.MonkeyPatch, answers: dict[int, Any], *words: str
) -> int:
    module = importlib.import_module("dynamo.refit.cli.verify")
    monkeypatch.setattr(Workers, "answers", answers, raising=False)
    monkeypatch.setattr(module, "Caller", Workers)
    monkeypatch.setattr(module, "connect", lambda: None)
    monkeypatch.setattr(sys, "argv", ["dynamo-refit", "verify", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_where_all_are_right_it_is_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert verify(monkeypatch, {1: GOOD, 2: GOOD}) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:5] for line in out] == [
        ["worker", "1", "serves", "version", "5,"],
        ["worker", "2", "serves", "version", "5,"],
    ]


def test_where_there_is_no_worker_it_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert verify(monkeypatch, {}) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dynamo-refit: no worker of tiny")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_everybody_is_asked_and_whoever_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: tuple
) -> None:
    lost = PeerLost("instance 1 of dynamo.backend.refit did not answer")
    assert verify(monkeypatch, {1: lost, 2: WRONG, 3: GOOD, 4: lost}, *words) == 1
    said = capsys.readouterr()
    if words:
        lines = [json.loads(line) for line in said.out.splitlines()]
        assert [(line["worker"], line["type"]) for line in lines] == [
            (1, "Refused"), (2, "Refused"), (3, "WeightsVerified"), (4, "Refused"),
        ]  # fmt: skip
        return
    errors = said.err.splitlines()
    assert [line.split(":")[1].strip() for line in errors] == [
        "worker 1",
        "worker 2",
        "worker 4",
    ]
    assert "PeerLost" in errors[0] and "rank 1 holds other bytes" in errors[1]
    assert said.out.startswith("worker 3 serves version 5")
