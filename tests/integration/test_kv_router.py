# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""After a refit, Dynamo's KV router finds a tenant's blocks: vLLM's own publisher of KV
events, Dynamo's publisher and its router, without an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from dynamo.llm import (
    KvEventPublisher,
    KvRouter,
    KvRouterConfig,
    ModelInput,
    ModelRuntimeConfig,
    ModelType,
    WorkerType,
    register_model,
)
from dynamo.runtime import DistributedRuntime
from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

from dynamo.refit.worker.kv_epoch import hiding_epochs, with_epoch
from dynamo.refit.worker.torchvision_stub import stand_in_if_missing
from graphs.local import free_port
from graphs.tiny_model import make_checkpoint

stand_in_if_missing()

from dynamo.vllm import handlers  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(90),
]

BLOCK = 4
TOKENS = [1, 2, 3, 4, 5, 6, 7, 8]
TOPIC = "kv-events"
SECONDS = 30.0


@pytest.fixture
def engine() -> Iterator[ZmqEventPublisher]:
    """What an engine publishes its KV events with."""
    publisher = ZmqEventPublisher(0, endpoint=f"tcp://*:{free_port()}", topic=TOPIC)
    yield publisher
    publisher.shutdown()


@pytest.fixture
async def router(
    runtime: DistributedRuntime, engine: ZmqEventPublisher, tmp_path: Path
) -> AsyncIterator[KvRouter]:
    """A router of one worker, whose engine this is."""

    async def generate(_: dict) -> AsyncIterator[dict]:
        yield {}

    endpoint = runtime.endpoint("routed.backend.generate")
    serving = asyncio.ensure_future(endpoint.serve_endpoint(generate))
    config = ModelRuntimeConfig()
    config.enable_local_indexer = True
    await register_model(
        ModelInput.Tokens,
        ModelType.Completions,
        endpoint,
        str(make_checkpoint(tmp_path / "model", seed=1)),
        "tiny",
        worker_type=WorkerType.Aggregated,
        kv_cache_block_size=BLOCK,
        runtime_config=config,
    )
    port = engine.get_publisher_config().endpoint.rpartition(":")[2]
    events = KvEventPublisher(
        endpoint,
        kv_block_size=BLOCK,
        zmq_endpoint=f"tcp://127.0.0.1:{port}",
        zmq_topic=TOPIC,
        enable_local_indexer=True,
    )
    yield KvRouter(endpoint, BLOCK, KvRouterConfig())
    events.shutdown()
    serving.cancel()


def prefill(salt: str | None) -> KVEventBatch:
    """An engine's event of a request with ``salt``."""
    event = BlockStored(
        block_hashes=[11, 12],
        parent_block_hash=None,
        token_ids=TOKENS,
        block_size=BLOCK,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[(salt,) if salt else None, None],
        group_idx=0,
    )
    return KVEventBatch(ts=time.time(), events=[event])


async def overlap(router: KvRouter, tenant: str | None) -> int:
    """Blocks of a request of ``tenant`` that the router knows to be cached."""
    scores = await router.get_overlap_scores(TOKENS, cache_namespace=tenant)
    return sum(worker["device_blocks"] for worker in scores["workers"])


@pytest.mark.parametrize("epoch", ["", "5-0123abcd"])
@pytest.mark.parametrize(("tenant", "other"), [("alice", None), (None, "alice")])
async def test_a_tenant_s_blocks_are_found(
    engine: ZmqEventPublisher,
    router: KvRouter,
    epoch: str,
    tenant: str | None,
    other: str | None,
) -> None:
    prompt: dict = {"prompt_token_ids": TOKENS}
    handlers._apply_nvext_cache_salt({"nvext": {"cache_salt": tenant}}, prompt)
    publish = hiding_epochs(engine.publish)
    async with asyncio.timeout(SECONDS):
        # Events are lost until the two have connected.
        while await overlap(router, tenant) < len(TOKENS) // BLOCK:
            publish(prefill(with_epoch(prompt.get("cache_salt"), epoch)))
            await asyncio.sleep(0.1)
    assert await overlap(router, other) == 0
