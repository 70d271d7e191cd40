# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer of two ranks, sharded by FSDP2, refits the live replica."""

from __future__ import annotations

import asyncio

import pytest

from dynamo.refit.events import WorkerStaged
from graphs.local import free_port
from tests.e2e.conftest import Bench
from tests.support.processes import Trainer

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_faults"),
]


async def test_two_fsdp_ranks_make_every_version(bench: Bench) -> None:
    """Each rank publishes its rows; what is served is a fresh engine's, bit for bit."""
    job = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    # Rank 1 first: rank 0 is ready when all are in.
    with (
        Trainer(bench.graph, bench.models["A"], RANK="1", **job) as other,
        Trainer(bench.graph, bench.models["A"], RANK="0", **job) as trainer,
    ):
        other.hear("ready")
        for cycle, name in enumerate(("B", "C", "A")):
            version = next(bench.versions)
            other.publish(version, bench.models[name])
            refitted = await asyncio.to_thread(
                bench.refit, trainer, name, version=version
            )
            assert other.released()["outcome"] == "completed"
            staged = bench.events.find(WorkerStaged, refitted.version)
            for rank in staged.ranks:
                assert (rank.session == "warm") == (cycle > 0)
            await bench.assert_serves(name)
