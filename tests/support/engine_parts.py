# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What stands around a RefitEngine in tests without a vLLM engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreRequest


def fake_handler(llm: Any) -> SimpleNamespace:
    """A Dynamo handler whose ``generate`` is that of ``llm``, one chunk per output."""

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        async for output in llm.generate(*request):
            yield output

    return SimpleNamespace(engine_client=llm, generate=generate)


def engine_request(prompt: dict, params: Any, request_id: str) -> EngineCoreRequest:
    """What vLLM makes of a call of ``generate``, and sends to its engine."""
    return EngineCoreRequest(
        request_id=f"{request_id}-internal",
        prompt_token_ids=prompt["prompt_token_ids"],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=prompt.get("cache_salt"),
        data_parallel_rank=None,
        external_req_id=request_id,
    )
