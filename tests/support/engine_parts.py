# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What stands around a RefitEngine in tests without a vLLM engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.engine import RefitEngine

WORKER = 7


class FakeContext:
    """A request's context in Dynamo."""

    def __init__(self, request_id: str, headers: dict | None = None) -> None:
        self._request_id = request_id
        self._headers = headers

    def id(self) -> str:
        return self._request_id

    def trace_headers(self) -> dict | None:
        return self._headers


class FakeOutputProcessor:
    """vLLM's, of an engine that has no request."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def process_outputs(self, outputs: list) -> None:
        """There is nobody who waits for them."""

    def get_num_unfinished_requests(self) -> int:
        return len(self.request_states)


def refit_engine(llm: Any) -> RefitEngine:
    """Over ``llm`` and a handler."""
    return RefitEngine(fake_handler(llm), WORKER, Tracer())


def fake_handler(llm: Any) -> SimpleNamespace:
    """A Dynamo handler whose ``generate`` is that of ``llm``, one chunk per output;
    the arguments are the request's ``call``."""

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        async for output in llm.generate(*request["call"]):
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
