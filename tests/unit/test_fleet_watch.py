# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the coordinator's view of the fleet warns of."""

from __future__ import annotations

import logging

import msgspec
import pytest

from dynamo.refit.args import parse_args
from dynamo.refit.coordinator.fleet import FleetWatch
from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import WorkerStatus
from tests.support.fleet import member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class Workers:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: workers by their layout."""

    def __init__(self) -> None:
        self.layouts: dict[int, str] = {}
        self.stalled: set[int] = set()

    async def instances(self, path: str) -> list[int]:
        return list(self.layouts)

    async def call(self, path: str, instance: int, *_: object) -> WorkerStatus:
        if instance in self.stalled:
            raise RefitError("stalled")
        status = member(instance).status
        return msgspec.structs.replace(status, layout=self.layouts[instance])


async def test_unequal_layouts_are_warned_of_once_per_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    workers = Workers()
    watch = FleetWatch(workers, parse_args([]))

    async def warnings(**layouts: str) -> list[str]:
        """Of three looks at the workers with these layouts."""
        workers.layouts = {int(name[1:]): layout for name, layout in layouts.items()}
        caplog.clear()
        for _ in range(3):
            await watch.look()
        return [r.message for r in caplog.records if "layouts" in r.message]

    with caplog.at_level(logging.WARNING):
        assert await warnings() == []
        assert await warnings(w1="wide", w2="wide") == []
        # One that has not told has none that could differ.
        assert await warnings(w1="wide", w2="wide", w4="") == []
        [warning] = await warnings(w3="narrow", w2="wide", w1="wide")
        assert warning.startswith("workers of 2 layouts are in this fleet (1, 2 | 3): ")
        assert "reads every version from the trainer" in warning
        assert await warnings(w1="wide", w2="wide", w3="narrow") == []
        # The status that it last gave counts.
        workers.stalled = {3}
        assert await warnings(w1="wide", w2="wide", w3="") == []
        workers.stalled = set()
        [warning] = await warnings(w1="wide", w3="narrow", w5="narrow")
        assert "(1 | 3, 5)" in warning
        assert await warnings(w1="wide") == []
        # It has come to it anew.
        [warning] = await warnings(w1="wide", w6="narrow")
        assert "(1 | 6)" in warning
