# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""KV that another worker computed is shared only if it is of the same version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from tests.support.engine_parts import (
    FakeOutputProcessor,
    engine_request,
    refit_engine,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class Llm:
    """Notes the salts it is asked with; ends every request with a handover."""

    def __init__(self) -> None:
        self.engine_core = self
        self.output_processor = FakeOutputProcessor()
        self.salts: list[str | None] = []
        self.closed = 0
        self.inputs_ready = asyncio.Event()
        self.inputs_ready.set()

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.salts.append(request.cache_salt)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[Any]:
        await self.inputs_ready.wait()
        request = engine_request(prompt, sampling_params, request_id)
        await self.engine_core.add_request_async(request)
        try:
            yield SimpleNamespace(kv_transfer_params=None)
            yield SimpleNamespace(kv_transfer_params={"do_remote_prefill": True})
        finally:
            self.closed += 1


class Worker:
    def __init__(self, *versions: int) -> None:
        self.llm = Llm()
        self.engine = refit_engine(self.llm)
        for version in versions:
            self.engine.begin_epoch(version)

    def ask(self, transfer: dict | None) -> AsyncIterator[Any]:
        extra = None if transfer is None else {"kv_transfer_params": transfer}
        params = SamplingParams(max_tokens=1, extra_args=extra)
        return self.llm.generate({"prompt_token_ids": [1]}, params, "id")

    async def prefill(self) -> dict:
        outputs = [o async for o in self.ask({"do_remote_decode": True})]
        return outputs[-1].kv_transfer_params

    async def decode_twice(self, transfer: dict | None) -> list[str | None]:
        for _ in range(2):
            async for _ in self.ask(transfer):
                pass
        return self.llm.salts[-2:]


@pytest.mark.parametrize("versions", [(), (1,), (1, 2)])
async def test_kv_of_the_same_version_is_shared(versions: tuple[int, ...]) -> None:
    handover = await Worker(*versions).prefill()
    decode = Worker(*versions)
    first, second = await decode.decode_twice(handover)
    assert first == second == (await decode.decode_twice(None))[0]


@pytest.mark.parametrize(
    ("prefilled", "decoding"), [((), (1,)), ((1,), ()), ((1,), (1, 2)), ((2,), (1,))]
)
async def test_kv_of_another_version_is_the_requests_own(
    prefilled: tuple[int, ...], decoding: tuple[int, ...]
) -> None:
    handover = await Worker(*prefilled).prefill()
    decode = Worker(*decoding)
    salts = await decode.decode_twice(handover)
    assert len({*salts, *await decode.decode_twice(None)}) == 3


async def test_kv_of_a_stock_prefill_worker_is_the_requests_own() -> None:
    first, second = await Worker(1).decode_twice({"do_remote_prefill": True})
    assert first != second


async def test_a_prefill_across_an_install_is_of_no_version() -> None:
    prefill, decode = Worker(1), Worker(2)
    asked = prefill.ask({"do_remote_decode": True})
    await anext(asked)
    prefill.engine.begin_epoch(2)
    handover = (await anext(asked)).kv_transfer_params
    first, second = await decode.decode_twice(handover)
    assert first != second


async def test_a_prefill_held_before_an_install_is_of_the_version_after_it() -> None:
    """Its inputs are prepared for seconds: it reaches the engine with new weights."""
    prefill, decode = Worker(1), Worker(2)
    prefill.llm.inputs_ready.clear()
    asked = asyncio.create_task(prefill.prefill())
    await asyncio.sleep(0)
    prefill.engine.begin_epoch(2)
    prefill.llm.inputs_ready.set()
    first, second = await decode.decode_twice(await asked)
    assert first == second == (await decode.decode_twice(None))[0]


async def test_a_prefill_given_up_is_closed() -> None:
    worker = Worker(1)
    asked = worker.ask({"do_remote_decode": True})
    await anext(asked)
    await asked.aclose()
    assert worker.llm.closed == 1
