# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``python -m dynamo.refit``: the coordinator of one namespace."""

from __future__ import annotations

import uvloop
from dynamo.runtime import DistributedRuntime, dynamo_worker
from dynamo.runtime.logging import configure_dynamo_logging

from dynamo.refit.args import CoordinatorConfig, parse_args
from dynamo.refit.coordinator.component import coordinate

configure_dynamo_logging()


@dynamo_worker()
async def worker(runtime: DistributedRuntime, config: CoordinatorConfig) -> None:
    await coordinate(runtime, config)


def main() -> None:
    uvloop.run(worker(parse_args()))


if __name__ == "__main__":
    main()
