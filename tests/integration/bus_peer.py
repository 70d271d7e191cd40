# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A process with one EventPublisher, driven over its stdin.

``bus_peer.py ENDPOINT PUBLISHER EPOCH`` answers ``ready`` once it can publish. Each
line ``FIRST COUNT`` publishes ``RefitSuperseded(version=v, by=v + 1)`` for ``COUNT``
versions from ``FIRST`` and answers with the last ``sequence``. The end of stdin closes
the publisher. The planes come from the environment.
"""

from __future__ import annotations

import asyncio
import os
import sys

from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventPublisher
from dynamo.refit.events import RefitSuperseded


async def main(endpoint: str, publisher: str, epoch: str) -> None:
    runtime = DistributedRuntime(
        asyncio.get_running_loop(),
        os.environ["DYN_DISCOVERY_BACKEND"],
        os.environ["DYN_REQUEST_PLANE"],
    )
    async with EventPublisher(runtime.endpoint(endpoint), publisher, int(epoch)) as bus:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            first, count = map(int, line.split())
            for version in range(first, first + count):
                sent = bus.publish(RefitSuperseded(version=version, by=version + 1))
            print(sent.sequence, flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
