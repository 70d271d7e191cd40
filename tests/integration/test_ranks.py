# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two real ranks, a real publisher, real NIXL between them: every live parameter
equals the golden path's, and the engine decodes while bytes move.

The model is wide (100 MB), and its vocabulary is padded unevenly over the ranks.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.events import StageProgress, WorkerRefitted
from dynamo.refit.publish.publisher import WeightPublisher
from dynamo.refit.worker import ranks as ranks_module
from dynamo.refit.worker.engine_process import mark_changes
from graphs.local import CPU_ENVIRONMENT
from graphs.tiny_model import make_checkpoint
from graphs.trainer import load_weights, train_into
from tests.support.replica import Replica

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

CACHE = Path(__file__).resolve().parents[2] / ".cache"
SHAPE = {"vocab_size": 4100, "intermediate_size": 16384}


class GoldenReplica(Replica):
    """A replica, and what its parameters must be for each checkpoint."""

    def __init__(self, llm: AsyncLLM, models: dict[str, Path]) -> None:
        super().__init__(llm)
        self.models = models
        self.golden: dict[str, list[dict[str, str]]] = {}

    async def live(self) -> list[dict[str, str]]:
        return await self.llm.collective_rpc("golden_digests")

    async def learn_golden(self) -> None:
        for name, model in self.models.items():
            await self.llm.collective_rpc("golden_scribble")
            file = str(model / "model.safetensors")
            await self.llm.collective_rpc("golden_load", args=(file,))
            self.golden[name] = await self.live()
        await self.llm.collective_rpc("golden_scribble")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica() -> AsyncIterator[GoldenReplica]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU_ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        models = {
            name: make_checkpoint(CACHE / "models" / f"wide-{seed}", seed=seed, **SHAPE)
            for name, seed in (("A", 1), ("B", 2), ("C", 3))
        }
        mark_changes()
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(models["A"]),
                tensor_parallel_size=2,
                enforce_eager=True,
                dtype="bfloat16",
                block_size=32,
                max_model_len=2048,
                max_num_seqs=4,
                max_num_batched_tokens=512,
                kv_cache_memory_bytes=64 << 20,
                worker_extension_cls="tests.support.golden.GoldenExtension",
            )
        )
        try:
            replica = GoldenReplica(llm, models)
            await replica.agent.start()
            await replica.learn_golden()
            yield replica
        finally:
            llm.shutdown()


@pytest.fixture(autouse=True)
def discovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")


async def test_golden_digests_tell_weights_apart(replica: GoldenReplica) -> None:
    a, b = replica.golden["A"], replica.golden["B"]
    assert len(a) == 2
    for rank in range(2):
        assert all(a[rank][name] != b[rank][name] for name in a[rank])
    # The ranks hold different parts of what is split.
    assert (
        a[0]["model.layers.0.mlp.down_proj.weight"]
        != (a[1]["model.layers.0.mlp.down_proj.weight"])
    )


@pytest.mark.parametrize("mode", ["snapshot", "in_place"])
async def test_every_live_parameter_equals_the_golden_path(
    replica: GoldenReplica, mode: str
) -> None:
    """Four cycles with changing weights, from two kinds of source buffers."""
    weights = load_weights(replica.models["A"])
    with WeightPublisher("wide", weights, mode=mode) as publisher:
        for cycle, name in enumerate(("B", "C", "A", "B")):
            train_into(weights, load_weights(replica.models[name]))
            asked = replica.trainers.asked
            published = publisher.publish(replica.version + 1)
            votes = await replica.refit(publisher.manifest, published.slot)
            assert await replica.live() == replica.golden[name], f"cycle {cycle}"
            for vote in votes:
                built = vote.counters
                assert (vote.session == "warm") == (cycle > 0)
                assert (built.descriptor_builds == 0) == (cycle > 0)
            # The manifest travels when it has changed, and not again.
            assert replica.trainers.asked - asked == (cycle == 0)
    assert len([e for e in replica.events if isinstance(e, WorkerRefitted)]) >= 4
    assert replica.handler.declared[-1]["weight_version"] == replica.version


async def test_ranks_tell_how_many_bytes_are_there(
    replica: GoldenReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every poll; the bytes of a rank only grow, up to those it votes for."""
    monkeypatch.setattr(ranks_module, "PROGRESS_SECONDS", 0.0)
    replica.events.clear()
    weights = load_weights(replica.models["B"])
    with WeightPublisher("wide", weights, mode="in_place") as publisher:
        votes = await replica.refit(publisher.manifest, 0)
    told = [e.ranks for e in replica.events if isinstance(e, StageProgress)]
    assert {len(ranks) for ranks in told} == {2}
    for vote in votes:
        seen = [ranks[vote.rank] for ranks in told]
        assert {rank.total_nbytes for rank in seen} <= {0, vote.nbytes}
        nbytes = [rank.nbytes for rank in seen]
        assert nbytes == sorted(nbytes)
        assert 0 < nbytes[-1] <= vote.nbytes
    assert any(0 < r.nbytes < r.total_nbytes for ranks in told for r in ranks)


async def test_tokens_flow_while_bytes_move(replica: GoldenReplica) -> None:
    """A stream goes on at a good part of its pace while the ranks pull 100 MB again
    and again: 40 versions are staged, each superseding the one before."""
    weights = load_weights(replica.models["C"])
    times: list[float] = []
    done = asyncio.Event()

    async def stream() -> None:
        params = SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True)
        prompt = {"prompt_token_ids": [5, 6, 7]}
        async for _ in replica.llm.generate(prompt, params, f"stream-{time.time()}"):
            times.append(time.time())
            if done.is_set():
                break

    with WeightPublisher("wide", weights, mode="in_place") as publisher:
        await replica.refit(publisher.manifest, 0)
        running = asyncio.create_task(stream())
        while len(times) < 60:
            await asyncio.sleep(0.01)
        undisturbed = len(times) / (times[-1] - times[0])
        votes = [await replica.stage(publisher.manifest, 0) for _ in range(40)]
        done.set()
        await running
    begin = votes[0][0].timings.started_at
    end = votes[-1][0].timings.finished_at
    pulling = sum(max(rank.timings.pull_ms for rank in vote) for vote in votes) / 1e3
    during = [t for t in times if begin < t < end]
    rate = len(during) / (end - begin)
    print(
        f"{end - begin:.2f} s, of which {pulling:.2f} s pulling: {rate:.1f} tokens/s, "
        f"undisturbed {undisturbed:.1f}"
    )
    assert sum(rank.nbytes for vote in votes for rank in vote) > 40 * 100e6
    assert pulling > 0.2 * (end - begin)
    assert rate > 0.2 * undisturbed
    assert await replica.live() == replica.golden["C"]
