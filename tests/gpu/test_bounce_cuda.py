# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Another process' host memory read into a GPU, through real NIXL."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from dynamo.refit.rank.bounce import Bounce
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.transport.nixl import NixlAgent
from tests.integration.test_nixl import NBYTES, Source

pytestmark = [
    pytest.mark.integration,
    pytest.mark.nightly,
    pytest.mark.gpu_1,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_every_post_brings_the_bytes_that_are_there() -> None:
    source, agent = Source("source"), NixlAgent("reader")
    try:
        target = torch.zeros(NBYTES, dtype=torch.uint8, device="cuda")
        bounce = Bounce(agent, Cycle(), slots=2, slot_nbytes=1_000_000)
        half = NBYTES // 2
        read = bounce.prepare_read(
            agent.connect(source.metadata),
            0,
            np.array([source.address, source.address + half]),
            np.array([0, 0]),
            target,
            np.array([half, 0]),
            np.array([half, half]),
        )
        for value in (1, 7, 9):
            source.fill(value)
            read.post()
            while not read.done():
                time.sleep(0.0001)
            assert target.unique().tolist() == [value]
        read.release()
    finally:
        source.kill()
