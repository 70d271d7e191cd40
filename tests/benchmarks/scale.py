# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a version costs the control plane, by the number of replicas.

    python -m tests.benchmarks.scale --replicas 1 8 32 64

The coordinator, the agents, the bus and all endpoints are real, on file discovery and
ZMQ; engines and trainer are fakes, so nothing but messages takes time. All processes
share this machine's cores. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from dynamo.refit.bus import EventPublisher, EventSubscriber
from dynamo.refit.events import (
    REFIT_EVENTS,
    WEIGHT_VERSIONS,
    RefitCompleted,
    RefitFailed,
    WeightVersionReady,
    encode,
)
from dynamo.refit.protocol import (
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    Message,
    TrainerRequest,
)
from dynamo.refit.rpc import runtime_from_environment, serve, unary
from tests.benchmarks.scale_agents import NAMESPACE, Counted
from tests.support.fake_replica import fingerprints_of, manifest, weights_of

#: Agents of one process.
AGENTS = 16
VERSIONS = 6
#: Versions until all agents are in discovery.
TRIES = 30
SECONDS = 120.0


class FakeTrainer:
    """Has every version."""

    def __init__(self) -> None:
        self.manifest = manifest()
        self.payload = msgspec.msgpack.encode(self.manifest)
        self.counted = Counted()

    async def answer(self, request: TrainerRequest) -> Message:
        reply: Message = Done()
        if isinstance(request, GetManifest):
            reply = ManifestReply(payload=self.payload)
        if isinstance(request, GetFingerprints):
            version = int(request.announcement_id.removeprefix("a"))
            reply = FingerprintsReply(payload=fingerprints_of(version).tobytes())
        self.counted.note(request, reply)
        return reply


def start(stack: ExitStack, log: Path, *arguments: str) -> subprocess.Popen:
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


async def measure(replicas: int, directory: Path) -> dict[str, float]:
    os.environ |= {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(directory / f"discovery-{replicas}"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_NAMESPACE": NAMESPACE,
        "DYN_LOG": "error",
    }
    runtime = runtime_from_environment()
    trainer = FakeTrainer()
    endpoint = runtime.endpoint(f"{NAMESPACE}.trainer.weights")
    serving = asyncio.create_task(
        serve(endpoint, unary(TrainerRequest, trainer.answer, "trainer"))
    )
    prefix = f"{NAMESPACE}.refit"
    with ExitStack() as stack:
        agents = [
            start(
                stack,
                directory / "agents.log",
                "tests.benchmarks.scale_agents",
                str(min(AGENTS, replicas - first)),
            )
            for first in range(0, replicas, AGENTS)
        ]
        for process in agents:
            assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        start(stack, directory / "coordinator.log", "dynamo.refit")
        async with (
            EventSubscriber(runtime.endpoint(f"{prefix}.{REFIT_EVENTS}")) as events,
            EventPublisher(
                runtime.endpoint(f"{prefix}.{WEIGHT_VERSIONS}"), "trainer-0"
            ) as bus,
        ):
            rows: list[dict[str, float]] = []
            for version in itertools.count(1):
                ready = WeightVersionReady(
                    model="tiny",
                    version=version,
                    announcement_id=f"a{version}",
                    endpoint=f"{NAMESPACE}.trainer.weights",
                    instance=endpoint.connection_id(),
                    manifest_digest=trainer.manifest.fingerprint(),
                    slot=0,
                    fingerprint=weights_of(version),
                )
                workers, row = await one_version(events, bus, ready)
                row |= await count(agents, trainer)
                if workers == replicas:
                    rows.append(row)
                if len(rows) > VERSIONS:
                    break
                assert version < TRIES, f"{workers} of {replicas} workers"
        serving.cancel()
    # The first ones find the fleet.
    warm = rows[1:]
    return {name: statistics.median(row[name] for row in warm) for name in warm[0]}


async def one_version(
    events: EventSubscriber, bus: EventPublisher, ready: WeightVersionReady
) -> tuple[int, dict[str, float]]:
    """Announce until it is heard, as a trainer does, and wait for the completion; how
    many workers serve it, and what it cost."""
    began = time.monotonic()
    told = asyncio.create_task(announce(bus, ready))
    seen = nbytes = 0
    async with asyncio.timeout(SECONDS):
        async for event in events:
            if getattr(event, "version", None) != ready.version:
                continue
            seen += 1
            nbytes += len(encode(event))
            assert not isinstance(event, RefitFailed), event
            if isinstance(event, RefitCompleted):
                break
    wall = time.monotonic() - began
    told.cancel()
    return len(event.workers), {
        "wall_ms": wall * 1e3,
        "coordinator_ms": event.seconds * 1e3,
        "events": seen,
        "event_bytes": nbytes,
    }


async def announce(bus: EventPublisher, ready: WeightVersionReady) -> None:
    while True:
        bus.publish(ready)
        await asyncio.sleep(0.5)


async def count(
    agents: list[subprocess.Popen], trainer: FakeTrainer
) -> dict[str, float]:
    await asyncio.sleep(0.5)
    calls: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    taken = [trainer.counted.take()]
    for process in agents:
        process.stdin.write("\n")
        process.stdin.flush()
        taken.append(json.loads(await asyncio.to_thread(process.stdout.readline)))
    for each in taken:
        calls.update(each["calls"])
        nbytes.update(each["nbytes"])
    return {"calls": calls.total(), "call_bytes": nbytes.total()}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scale", description=__doc__
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 8, 32, 64])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="refit-scale-") as directory:
        rows = {
            replicas: asyncio.run(measure(replicas, Path(directory)))
            for replicas in options.replicas
        }
    table = Table(title="one warm version, by replicas (medians)")
    names = list(next(iter(rows.values())))
    for heading in ("replicas", *names):
        table.add_column(heading, justify="right")
    for replicas, row in rows.items():
        table.add_row(str(replicas), *(f"{row[name]:,.0f}" for name in names))
    Console().print(table)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
