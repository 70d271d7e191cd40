# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo.refit``: the coordinator of one namespace."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging

from dynamo.refit.args import CoordinatorConfig, parse_args
from dynamo.refit.coordinator.component import coordinate
from dynamo.refit.errors import RefitError

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
    """An error of this package is one line, and exit code 1."""
    try:
        uvloop.run(worker(parse_args()))
    except* RefitError as errors:
        for error in flatten(errors):
            logger.error("refit coordinator: ends: %s: %s", type(error).__name__, error)
        sys.exit(1)


def flatten(errors: BaseExceptionGroup) -> list[BaseException]:
    """The errors in a group and in the groups that it holds."""
    return [
        error
        for found in errors.exceptions
        for error in (
            flatten(found) if isinstance(found, BaseExceptionGroup) else [found]
        )
    ]


if __name__ == "__main__":
    main()
