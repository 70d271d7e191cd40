# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The arena on a real device: the version before is in pinned memory, and comes back
without more memory on the device."""

from __future__ import annotations

import pytest
import torch

from dynamo.refit.rank import buffers
from tests.support.device_arena import DeviceEngine, assert_is

pytestmark = [
    pytest.mark.unit,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("processed", [(), ("packed",)])
def test_two_versions_change_places(
    monkeypatch: pytest.MonkeyPatch, processed: tuple[str, ...]
) -> None:
    monkeypatch.setattr(buffers, "EXCHANGE_NBYTES", 1000)
    engine = DeviceEngine(torch.device("cuda"), *processed)
    for seed in (1, 2):
        engine.stage(seed)
        engine.install()
    allocated = torch.cuda.memory_allocated()
    for now, before in ((2, 1), (1, 2), (2, 1)):
        engine.arena.recall()
        assert_is(engine.live, now)
        assert_is(engine.arena.staged, before)
        assert_is(engine.arena.old, now)
        engine.install()
        assert_is(engine.live, before)
    assert torch.cuda.memory_allocated() == allocated
