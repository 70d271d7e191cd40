# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker without an engine, whose tokens have versions as a real one's have.

``labelled_worker.py CHECKPOINT MODEL``: it serves ``generate`` of ``labelled.backend``,
and prints its instance id. Every request makes ``max_tokens`` tokens for each choice;
the version is 1 for the first two of them and 2 for the others. A worker whose
environment has ``REFIT_TEST_DIES_AFTER`` ends after so many outputs.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.runtime import Context

from dynamo.refit.rpc import runtime_from_environment
from dynamo.refit.worker.token_versions import RequestVersions, asks_for_versions

TOKEN = 100


async def main(checkpoint: str, model: str) -> None:
    runtime = runtime_from_environment()
    endpoint = runtime.endpoint("labelled.backend.generate")
    worker = endpoint.connection_id()
    left = int(os.environ.get("REFIT_TEST_DIES_AFTER", 1 << 30))

    async def generate(request: dict, context: Context) -> AsyncIterator[Any]:
        nonlocal left
        made, asked = RequestVersions(worker), asks_for_versions(request)
        tokens = request["stop_conditions"]["max_tokens"]
        choices = request["sampling_options"]["n"] or 1
        for index in range(choices):
            made.change(index, 0, 1)
            made.change(index, 2, 2)
        for number in range(tokens):
            for index in range(choices):
                left -= 1
                if left < 0:
                    os._exit(1)
                output: dict[str, Any] = {"index": index, "token_ids": [TOKEN]}
                if number == tokens - 1:
                    output["finish_reason"] = "length"
                if asked:
                    made.add_to(output)
                yield output
            # What it says must have left when it dies.
            await asyncio.sleep(0.05)

    await register_model(
        ModelInput.Tokens,
        ModelType.Chat | ModelType.Completions,
        endpoint,
        checkpoint,
        model,
        worker_type=WorkerType.Aggregated,
    )
    print(worker, flush=True)
    await endpoint.serve_endpoint(generate)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
