# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The arena on a real device: the version before is in pinned memory, and comes back
without more memory on the device."""

from __future__ import annotations

import pytest
import torch

from tests.support.device_arena import DeviceEngine, assert_is

pytestmark = [
    pytest.mark.unit,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_an_install_is_undone_from_pinned_memory() -> None:
    engine = DeviceEngine(torch.device("cuda"))
    for seed in (1, 2):
        engine.stage(seed)
        engine.install()
        engine.keep()
    allocated = torch.cuda.memory_allocated()
    for seed in (3, 4):
        engine.stage(seed)
        engine.install()
        assert_is(engine.live, seed)
        assert_is(engine.arena.old, 2)
        engine.restore()
        assert_is(engine.live, 2)
    assert torch.cuda.memory_allocated() == allocated
