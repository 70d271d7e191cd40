# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Start event publishers while futures of Dynamo's complete, as a worker does when it
starts. Prints "done"; run as a process, since where it stands still it cannot be
stopped otherwise."""

from __future__ import annotations

import asyncio
import os

from dynamo.llm import WorkerMetricsPublisher, WorkerType

from dynamo.refit.bus import EventPublisher
from dynamo.refit.rpc import runtime_from_environment

ROUNDS = 25


async def main() -> None:
    runtime = runtime_from_environment()
    kept = []
    for number in range(ROUNDS):
        endpoint = runtime.endpoint(f"race.worker{number}.generate")
        metrics = WorkerMetricsPublisher()
        events = EventPublisher(runtime.endpoint(f"race.refit.{number}"), "race")
        kept += [metrics, events]
        others = [
            asyncio.ensure_future(metrics.create_endpoint(endpoint)),
            asyncio.ensure_future(endpoint.first_token_source(WorkerType.Aggregated)),
        ]
        await asyncio.sleep(0)
        await events.start()
        kept += await asyncio.gather(*others)
    print("done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
