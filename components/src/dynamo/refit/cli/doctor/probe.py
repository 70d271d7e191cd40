# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The child of :mod:`trial`: tries something, and answers on standard output.

python -m dynamo.refit.cli.doctor.probe plane NAMESPACE
python -m dynamo.refit.cli.doctor.probe nixl BYTES
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
import uuid

import msgspec

from dynamo.refit.bus import EventPublisher, EventSubscriber
from dynamo.refit.cli.doctor.trial import PlaneReport
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.errors import RefitError
from dynamo.refit.events import RefitSuperseded
from dynamo.refit.rpc import Caller, runtime_from_environment

#: How long an event may take to arrive, discovery included.
ARRIVAL_SECONDS = 10.0

#: Between two tries: a publisher's first events are lost until it is discovered.
RETRY_SECONDS = 0.05


def answer(report: msgspec.Struct) -> None:
    print(msgspec.json.encode(report).decode(), flush=True)


async def try_plane(namespace: str) -> PlaneReport:
    """Publish until an event arrives, on an endpoint that nobody else knows."""
    report = PlaneReport()
    try:
        runtime = runtime_from_environment()
        report = msgspec.structs.replace(report, runtime=True)
        answer(report)
        topic = runtime.endpoint(f"{namespace}.refit.doctor_{uuid.uuid4().hex[:12]}")
        async with (
            EventSubscriber(topic) as events,
            EventPublisher(topic, "doctor") as publisher,
        ):
            report = msgspec.structs.replace(report, connected=True)
            answer(report)
            received = await _first_event(events, publisher)
            report = msgspec.structs.replace(report, received_ms=received)
    # Dynamo raises plain Exceptions for what the environment has wrong.
    except Exception as error:
        return msgspec.structs.replace(report, error=str(error))
    answer(report)
    return await _with_fleet(report, Caller(runtime), namespace)


async def _first_event(
    events: EventSubscriber, publisher: EventPublisher
) -> float | None:
    """Milliseconds until it was there."""
    began = time.perf_counter()
    hearing = asyncio.ensure_future(anext(events))
    try:
        while not hearing.done():
            if time.perf_counter() - began > ARRIVAL_SECONDS:
                return None
            publisher.publish(RefitSuperseded(version=0, by=0))
            await asyncio.wait([hearing], timeout=RETRY_SECONDS)
    finally:
        hearing.cancel()
    return (time.perf_counter() - began) * 1e3


async def _with_fleet(
    report: PlaneReport, caller: Caller, namespace: str
) -> PlaneReport:
    try:
        fleet = await fetch_status(caller, namespace)
    except (RefitError, msgspec.ValidationError) as error:
        return msgspec.structs.replace(report, fleet_error=str(error))
    return msgspec.structs.replace(report, fleet=fleet)


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "plane":
        answer(asyncio.run(try_plane(*arguments)))
    else:
        # Loaded on use: torch and NIXL take seconds, and may not be there.
        loopback = importlib.import_module("dynamo.refit.cli.doctor.loopback")
        answer(loopback.try_nixl(int(arguments[0])))


if __name__ == "__main__":
    main()
