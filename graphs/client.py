# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A client of the frontend that looks closely: token ids, exact log probabilities,
cached tokens, and the time of every token. With it, a load without a gap."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from graphs.references import Answer
from graphs.versions import TokenVersions

#: After a request that failed.
RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class Completion:
    """One finished request; ``times`` are monotonic seconds, one per token, and
    ``versions`` what made each token, if that was asked for."""

    answer: Answer
    finish_reason: str | None
    cached_tokens: int
    times: tuple[float, ...]
    error: str | None = None
    versions: tuple[int | None, ...] = ()


class Client:
    """Completions over HTTP from the OpenAI-compatible frontend."""

    def __init__(self, url: str, model: str) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        timeout = aiohttp.ClientTimeout(total=300)
        self._session = aiohttp.ClientSession(timeout=timeout)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, **fields: object
    ) -> Completion:
        """Stream one greedy completion of a token-id prompt to its end.

        An HTTP or stream error does not raise; it is the completion's ``error``.
        """
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
        tokens: list[int] = []
        logprobs: list[float] = []
        times: list[float] = []
        versions = TokenVersions()
        finish, cached, error = None, 0, None
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    raise aiohttp.ClientError(
                        f"HTTP {response.status}: {await response.text()}"
                    )
                async for line in response.content:
                    data = line.decode().strip()
                    if data.startswith("event: error") or data.startswith(": "):
                        error = data
                    if not data.startswith("data: {"):
                        continue
                    chunk = json.loads(data[len("data: ") :])
                    versions.add(chunk)
                    if usage := chunk.get("usage"):
                        cached = usage["prompt_tokens_details"]["cached_tokens"] or 0
                    for choice in chunk.get("choices", ()):
                        finish = choice.get("finish_reason") or finish
                        for step in (choice.get("logprobs") or {}).get(
                            "top_logprobs", ()
                        ):
                            ((token, logprob),) = step.items()
                            tokens.append(int(token.removeprefix("token_id:")))
                            logprobs.append(logprob)
                            times.append(time.monotonic())
                    if "error" in chunk or "code" in chunk:
                        error = json.dumps(chunk)
        except (TimeoutError, aiohttp.ClientError) as broken:
            error = f"{type(broken).__name__}: {broken}"
        answer = Answer(tuple(tokens), tuple(logprobs))
        made = tuple(versions.of())
        return Completion(answer, finish, cached, tuple(times), error, made)


@dataclass
class Load:
    """Streams that never pause: as one request ends, its stream starts the next.

    Args:
        client: where to.
        streams: concurrent requests.
        max_tokens: length of each; it is cut short if it gets less.
    """

    client: Client
    prompts: Sequence[Sequence[int]]
    streams: int = 2
    max_tokens: int = 64
    completions: list[Completion] = field(default_factory=list)
    _tasks: list[asyncio.Task] = field(default_factory=list)
    _stopping: bool = False

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._stream(number)) for number in range(self.streams)
        ]

    async def stop(self) -> None:
        """Let the running requests end, then stop."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    @property
    def failed(self) -> list[Completion]:
        return [c for c in self.completions if c.error is not None]

    @property
    def truncated(self) -> list[Completion]:
        return [
            c
            for c in self.completions
            if c.error is None
            and (len(c.answer.tokens) < self.max_tokens or c.finish_reason != "length")
        ]

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Every wait for a token: when it began and when it ended."""
        for completion in self.completions:
            yield from itertools.pairwise(completion.times)

    def longest_gap(self, since: float, until: float) -> float:
        """Seconds of the longest wait that touches the interval."""
        touching = [b - a for a, b in self.gaps() if b >= since and a <= until]
        return max(touching, default=0.0)

    def longest_gap_outside(self, intervals: Sequence[tuple[float, float]]) -> float:
        """Seconds of the longest wait that touches none of the intervals."""
        outside = [
            b - a
            for a, b in self.gaps()
            if not any(b >= since and a <= until for since, until in intervals)
        ]
        return max(outside, default=0.0)

    async def _stream(self, number: int) -> None:
        turn = number
        while not self._stopping:
            prompt = self.prompts[turn % len(self.prompts)]
            completion = await self.client.complete(
                prompt, self.max_tokens, ignore_eos=True
            )
            self.completions.append(completion)
            turn += self.streams
            if completion.error is not None:
                # A graph without a worker refuses thousands of them a second.
                await asyncio.sleep(RETRY_SECONDS)
