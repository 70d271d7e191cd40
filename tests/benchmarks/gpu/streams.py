# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the clients of an engine see: streams, and the gaps between their tokens."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

#: Of a stream's request: more than a run takes, since a new one is a gap for all.
MAX_TOKENS = 8000

PROMPT = [785, 3974, 13876, 38835]


@dataclass(frozen=True)
class Span:
    """One cycle, Unix seconds: nothing happens from ``quiet`` to ``began``, then it
    stages, and commits from ``staged`` to ``done``."""

    quiet: float
    began: float
    staged: float
    done: float


@dataclass(frozen=True)
class Seen:
    """One cycle as the clients saw it; milliseconds, tokens per second.

    ``quiet_gap_ms`` is the longest gap that touches an undisturbed interval as long as
    the commit, or as half of the quiet time where that is less.
    """

    median_gap_ms: float
    quiet_gap_ms: float
    stall_ms: float
    tokens_per_s: float
    tokens_per_s_staging: float


class Streams:
    """Requests that decode without end; token times by stream, Unix seconds."""

    def __init__(self, llm: AsyncLLM, count: int) -> None:
        self._llm = llm
        self.times: list[list[float]] = [[] for _ in range(count)]
        self._tasks: list[asyncio.Task] = []
        self._stopping = False

    async def start(self) -> None:
        """Returns when all of them decode; raises what one of them died of."""
        self._tasks = [asyncio.create_task(self._run(t)) for t in self.times]
        while not all(len(times) > 20 for times in self.times):
            self._check()
            await asyncio.sleep(0.01)

    async def go_on(self, since: float) -> None:
        """Returns when every stream has a token after ``since``; raises what one of
        them died of. Looks at the last tokens only, so that it takes no time."""
        while not all(times[-1] > since for times in self.times):
            self._check()
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def tokens(self, since: float, until: float) -> int:
        return sum(
            max(0, bisect_left(times, until) - bisect_right(times, since))
            for times in self.times
        )

    def longest_gap_ms(self, since: float, until: float) -> float:
        """Of any stream, among the gaps that touch the interval."""
        gaps: list[float] = []
        for times in self.times:
            # From the last token before it to the first one after it.
            first = max(0, bisect_left(times, since) - 1)
            last = bisect_right(times, until)
            gaps += _gaps(times[first : last + 1])
        return max(gaps, default=0.0) * 1e3

    def median_gap_ms(self, since: float, until: float) -> float:
        gaps: list[float] = []
        for times in self.times:
            first, last = bisect_right(times, since), bisect_left(times, until)
            gaps += _gaps(times[first:last])
        return statistics.median(gaps) * 1e3

    def see(self, span: Span) -> Seen:
        """To be called when the cycles are over: a scan holds up the event loop, and
        so the next stage and the tokens' times."""
        quiet, staging = span.began - span.quiet, span.staged - span.began
        # Within the quiet time on both sides: a gap may reach out of its interval.
        half = min(span.done - span.staged, quiet / 2) / 2
        middle = span.quiet + quiet / 2
        return Seen(
            median_gap_ms=self.median_gap_ms(span.quiet, span.began),
            quiet_gap_ms=self.longest_gap_ms(middle - half, middle + half),
            stall_ms=self.longest_gap_ms(span.staged, span.done),
            tokens_per_s=self.tokens(span.quiet, span.began) / quiet,
            tokens_per_s_staging=self.tokens(span.began, span.staged) / staging,
        )

    def _check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

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


def _gaps(times: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def summary(cycles: Sequence[Seen]) -> dict:
    """Over ``cycles``, each beside what was undisturbed right before it: the context
    grows all the time, and with it the time of a step."""
    return {
        "median_gap_ms": statistics.median(seen.median_gap_ms for seen in cycles),
        "quiet_ms": spread([seen.quiet_gap_ms for seen in cycles]),
        "stall_ms": spread([seen.stall_ms for seen in cycles]),
        "stall_over_median_ms": spread(
            [seen.stall_ms - seen.median_gap_ms for seen in cycles]
        ),
        "tokens_per_s": statistics.median(seen.tokens_per_s for seen in cycles),
        "tokens_per_s_staging": statistics.median(
            seen.tokens_per_s_staging for seen in cycles
        ),
        "staging_share": statistics.median(
            seen.tokens_per_s_staging / seen.tokens_per_s for seen in cycles
        ),
        "cycles": [asdict(seen) for seen in cycles],
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }
