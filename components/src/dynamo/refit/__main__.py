# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo.refit``: the coordinator of one namespace."""

from __future__ import annotations

import asyncio
import logging
import signal

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging

from dynamo.refit.args import CoordinatorConfig, parse_args
from dynamo.refit.coordinator.component import coordinate

configure_dynamo_logging()
logger = logging.getLogger(__name__)


@dynamo_worker()
async def worker(runtime: DistributedRuntime, config: CoordinatorConfig) -> None:
    """Coordinate until SIGTERM or SIGINT; then its last events and spans leave, and it
    is gone from discovery at once."""
    work = asyncio.ensure_future(coordinate(runtime, config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        logger.info("refit coordinator: told to end")
    finally:
        runtime.shutdown()


def main() -> None:
    uvloop.run(worker(parse_args()))


if __name__ == "__main__":
    main()
