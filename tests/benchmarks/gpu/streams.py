# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the clients of an engine see: streams, and the gaps between their tokens."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

#: Of a stream's request: more than a run takes, since a new one is a gap for all.
MAX_TOKENS = 8000

PROMPT = [785, 3974, 13876, 38835]


class Streams:
    """Requests that decode without end; token times by stream, Unix seconds."""

    def __init__(self, llm: AsyncLLM, count: int) -> None:
        self._llm = llm
        self.times: list[list[float]] = [[] for _ in range(count)]
        self._tasks: list[asyncio.Task] = []
        self._stopping = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(t)) for t in self.times]
        while not all(len(times) > 20 for times in self.times):
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def tokens(self, since: float, until: float) -> int:
        return sum(since < t < until for times in self.times for t in times)

    def longest_gap_ms(self, since: float, until: float) -> float:
        """Of any stream, among the gaps that touch the interval."""
        gaps = [
            later - earlier
            for times in self.times
            for earlier, later in itertools.pairwise(times)
            if later >= since and earlier <= until
        ]
        return max(gaps, default=0.0) * 1e3

    def median_gap_ms(self, since: float, until: float) -> float:
        gaps = [
            later - earlier
            for times in self.times
            for earlier, later in itertools.pairwise(times)
            if since < earlier and later < until
        ]
        return statistics.median(gaps) * 1e3

    async def _run(self, times: list[float]) -> None:
        number = 0
        while not self._stopping:
            # Deltas: whole answers would cost this process more at every token.
            params = SamplingParams(
                max_tokens=MAX_TOKENS,
                temperature=1.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            request = f"s{id(times)}-{number}-{time.time()}"
            number += 1
            prompt = {"prompt_token_ids": [*PROMPT, len(times) % 1000 + 10]}
            async for _ in self._llm.generate(prompt, params, request):
                times.append(time.time())
                if self._stopping:
                    break


async def greedy(llm: AsyncLLM, tokens: int = 32) -> tuple[list[int], int]:
    """Greedy tokens of a prompt longer than a block, and how many were cached."""
    params = SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
    prompt = {"prompt_token_ids": PROMPT * 20}
    async for output in llm.generate(prompt, params, f"greedy-{time.time()}"):
        last = output
    return list(last.outputs[0].token_ids), last.num_cached_tokens or 0


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }
