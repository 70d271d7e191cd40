# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Every token has the version that made it, in real engines under load: their tokens
are the numbers of versions. One schedules step by step, one ahead, as on GPUs."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.protocol import Install
from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.engine import RefitEngine
from dynamo.refit.worker.engine_process import mark_changes
from graphs.local import CPU_ENVIRONMENT
from graphs.tiny_model import make_checkpoint
from graphs.versions import ASK, TokenVersions
from tests.support.engine_parts import WORKER, FakeContext

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
]

CACHE = Path(__file__).resolve().parents[2] / ".cache"
LENGTH = 100
STREAMS = 6
INSTALLS = 60


class Handler:
    """Makes of an engine's outputs what Dynamo's handler makes of them."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.engine_client = llm

    async def generate(
        self, request: dict, context: FakeContext
    ) -> AsyncIterator[dict]:
        params = SamplingParams(
            n=request["n"],
            temperature=1.0,
            max_tokens=LENGTH,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": list(range(10, 40))}
        async for result in self.engine_client.generate(prompt, params, context.id()):
            for made in result.outputs:
                output = {"index": made.index, "token_ids": list(made.token_ids)}
                if made.finish_reason:
                    output["finish_reason"] = made.finish_reason
                yield output


@pytest.fixture(params=[1, 2])
async def llm(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AsyncLLM]:
    """With two pipeline stages, steps are scheduled ahead."""
    for name, value in CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    mark_changes()
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(make_checkpoint(CACHE / "models" / "qwen3-1", seed=1)),
            pipeline_parallel_size=request.param,
            enforce_eager=True,
            dtype="bfloat16",
            block_size=32,
            max_model_len=2048,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=64 << 20,
            worker_extension_cls="tests.support.telling.TellingExtension",
        )
    )
    assert llm.vllm_config.max_concurrent_batches == request.param
    try:
        yield llm
    finally:
        llm.shutdown()


async def test_every_token_is_the_number_of_its_version(llm: AsyncLLM) -> None:
    handler = Handler(llm)
    engine = RefitEngine(handler, WORKER, Tracer())
    await engine.call_ranks(Install(version=1, in_step=True))
    stop, draw = asyncio.Event(), random.Random(5)
    answers: list[tuple[list[int], list[int | None]]] = []

    async def stream(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            n = 1 + (number + turn) % 2
            tokens: dict[int, list[int]] = {}
            versions = TokenVersions()
            request = {"n": n, "nvext": ASK}
            context = FakeContext(f"{number}-{turn}")
            async for output in handler.generate(request, context):
                tokens.setdefault(output["index"], []).extend(output["token_ids"])
                versions.add({"nvext": {"engine_data": output["engine_data"]}})
                # Now and then outputs are read late.
                await asyncio.sleep(draw.choice([0, 0, 0.05]))
            answers.extend((tokens[index], versions.of(index)) for index in range(n))

    streams = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
    for version in range(2, INSTALLS):
        await asyncio.sleep(draw.uniform(0.0, 0.2))
        await engine.call_ranks(Install(version=version, in_step=True))
    stop.set()
    await asyncio.gather(*streams)
    for tokens, versions in answers:
        assert len(tokens) == LENGTH
        assert versions == tokens
    said = {version for _, versions in answers for version in versions}
    assert len(said) > INSTALLS / 2
    assert max(len(set(versions)) for _, versions in answers) > 5
