# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A process of many workers: the product's agents on real endpoints and a real bus,
each over a runtime of its own; engines are fakes.

    python -m tests.benchmarks.scale_agents COUNT

Prints "ready"; for every line that it reads, the calls since the last one, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from typing import Any

import msgspec
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventPublisher
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import GetStatus, Message, WorkerRequest, to_wire
from dynamo.refit.rpc import Caller, serve, unary
from dynamo.refit.worker.agent import RefitAgent
from tests.support.fake_replica import FakeEngine
from tests.support.fake_routing import FakeRouting

NAMESPACE = "scale"


class Counted:
    """Calls, and the bytes of their requests and replies, by kind of request."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.nbytes: Counter[str] = Counter()

    def note(self, request: Message, reply: Message) -> None:
        if isinstance(request, GetStatus):
            # Asked all the time, whatever is under way.
            return
        name = type(request).__name__
        self.calls[name] += 1
        self.nbytes[name] += sum(
            len(msgspec.json.encode(to_wire(message))) for message in (request, reply)
        )

    def take(self) -> dict[str, dict[str, int]]:
        taken = {"calls": dict(self.calls), "nbytes": dict(self.nbytes)}
        self.calls.clear()
        self.nbytes.clear()
        return taken


async def start_agent(runtime: DistributedRuntime, counted: Counted) -> None:
    endpoint = runtime.endpoint(f"{NAMESPACE}.backend.refit")
    worker = endpoint.connection_id()
    topic = runtime.endpoint(f"{NAMESPACE}.refit.{REFIT_EVENTS}")
    events = EventPublisher(topic, f"worker-{worker}")
    await events.start()
    agent = RefitAgent(
        FakeEngine(),
        Caller(runtime),
        events.publish,
        FakeRouting(),
        lambda: os._exit(1),
        model="tiny",
        worker=worker,
    )
    await agent.start()

    async def answer(request: Any) -> Message:
        reply = await agent.answer(request)
        counted.note(request, reply)
        return reply

    await serve(endpoint, unary(WorkerRequest, answer, "worker"))


async def main(count: int) -> None:
    loop = asyncio.get_running_loop()
    counted = Counted()
    runtimes = [DistributedRuntime(loop, "file", "tcp") for _ in range(count)]
    serving = [asyncio.create_task(start_agent(r, counted)) for r in runtimes]
    await asyncio.sleep(1.0)
    assert not any(task.done() for task in serving)
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(counted.take()), flush=True)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
