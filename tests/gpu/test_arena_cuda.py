# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The arena on a device: one shadow there, and the version before in pinned memory."""

from __future__ import annotations

import pytest
import torch

from dynamo.refit.protocol import MemoryUse
from dynamo.refit.rank import buffers
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.rank.slices import ArenaLayout, Parameter
from tests.support.fake_nixl import FakeNixlAgent
from tests.support.layouts import one_slice, whole

pytestmark = [
    pytest.mark.unit,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LAYOUT = ArenaLayout(
    [
        Parameter("plain", (1000, 3), "float32"),
        Parameter("packed", (17, 129), "bfloat16"),
    ]
)
SHAPES = [parameter.shape for parameter in LAYOUT.parameters]
DTYPES = [getattr(torch, parameter.dtype) for parameter in LAYOUT.parameters]


def version(seed: int, device: str) -> list[torch.Tensor]:
    """The parameters of a version, random but for their seed."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.rand(shape, generator=draw).to(dtype).to(device)
        for shape, dtype in zip(SHAPES, DTYPES, strict=True)
    ]


class Engine:
    """What a rank's stager does with an arena, without a transfer; ``processed``
    parameters cannot be read from what is live."""

    def __init__(self, *processed: str) -> None:
        self.processed = frozenset(processed)
        self.can_copy_out = not processed
        self.live = version(0, "cuda")
        memory = MemoryUse(mode="device", device_nbytes=0, host_nbytes=0)
        self.arena = Arena(
            FakeNixlAgent(one_slice((4,), whole((4,))).manifest),
            LAYOUT,
            memory,
            torch.device("cuda"),
            Cycle(),
        )

    def copy_to(self, backup: list[torch.Tensor]) -> None:
        names = [parameter.name for parameter in LAYOUT.parameters]
        for name, kept, live in zip(names, backup, self.live, strict=True):
            if name not in self.processed:
                kept.copy_(live)

    def stage(self, seed: int) -> None:
        self.arena.begin(self.processed)
        self.arena.preserve(self)
        for place, tensor in zip(self.arena.staged, version(seed, "cuda"), strict=True):
            place.copy_(tensor)

    def install(self) -> None:
        self._take(self.arena.staged)
        self.arena.installed()

    def restore(self) -> None:
        self._take(self.arena.old)
        self.arena.restored()

    def _take(self, tensors: list[torch.Tensor]) -> None:
        for live, tensor in zip(self.live, tensors, strict=True):
            live.copy_(tensor)


def assert_is(tensors: list[torch.Tensor], seed: int) -> None:
    for tensor, expected in zip(tensors, version(seed, "cpu"), strict=True):
        assert torch.equal(tensor.cpu(), expected)


@pytest.fixture(params=[(), ("packed",)], ids=["plain", "processed"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Serves version 2, and served 1 before. Buffers are exchanged in many pieces."""
    monkeypatch.setattr(buffers, "EXCHANGE_NBYTES", 1000)
    engine = Engine(*request.param)
    for seed in (1, 2):
        engine.stage(seed)
        engine.install()
    return engine


def test_the_two_versions_change_places(engine: Engine) -> None:
    allocated = torch.cuda.memory_allocated()
    for now, before in ((2, 1), (1, 2), (2, 1)):
        for _ in range(2):
            engine.arena.recall()
            assert_is(engine.live, now)
            assert_is(engine.arena.staged, before)
            assert_is(engine.arena.old, now)
        engine.install()
        assert_is(engine.live, before)
    assert torch.cuda.memory_allocated() == allocated
    assert engine.arena.live == 0


def test_it_is_undone_and_done_again(engine: Engine) -> None:
    for _ in range(2):
        engine.arena.recall()
        engine.install()
        engine.restore()
        assert_is(engine.live, 2)
    engine.arena.recall()
    assert_is(engine.arena.staged, 1)


def test_another_version_after_it_has_its_way_back(engine: Engine) -> None:
    """Given up before its install, or installed."""
    engine.arena.recall()
    engine.stage(3)
    assert_is(engine.arena.old, 2)
    engine.install()
    assert_is(engine.live, 3)
    engine.arena.recall()
    assert_is(engine.arena.staged, 2)
    engine.install()
    engine.stage(4)
    assert_is(engine.arena.old, 2)
