# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish --from-trainer``: what a running trainer holds is announced
once more.

The trainer is asked, and is read from; this process only waits. How the version ended
is the coordinator's word, from its history. Where this ends before that, nothing is
taken back.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.cli.fleet import fetch_history, fetch_status
from dynamo.refit.cli.output import cancel_on_signals
from dynamo.refit.cli.report import LOOK, Report
from dynamo.refit.cli.runtime import connect
from dynamo.refit.errors import RefitError
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import (
    AnnounceAgain,
    Announced,
    FindGroup,
    InFlightPolicy,
    OtherGroup,
    RefitRecord,
    Refused,
)
from dynamo.refit.rpc import Caller, PeerLost

#: How long a trainer may take to answer.
TRAINER_SECONDS = 10.0

#: How long trainers may take to be found.
FIND_SECONDS = 5.0

#: Between two questions for how the version ended.
HISTORY_SECONDS = 0.5


@dataclass(frozen=True)
class Repetition:
    """The command's arguments; ``timeout`` in seconds."""

    component: str
    version: int | None
    in_flight: InFlightPolicy | None
    namespace: str
    timeout: float
    as_json: bool


def run(repetition: Repetition) -> int:
    """Ask the trainer and wait; the exit code.

    Raises:
        RefitError: there is no one trainer, it holds nothing, or the version did not
            end in time.
    """
    report = Report(-1, repetition.as_json)
    try:
        return asyncio.run(_announce(repetition, report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.interrupted("stays announced")
        return 130


async def _announce(repetition: Repetition, report: Report) -> int:
    cancel_on_signals()
    runtime = connect(alone_on_terminal=report.in_place)
    namespace, caller = repetition.namespace, Caller(runtime)
    fleet = await fetch_status(caller, namespace)
    path = f"{namespace}.{repetition.component}.weights"
    trainer = await _find(caller, path, repetition.component)
    topic = runtime.endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
    async with EventSubscriber(topic) as events:
        announced = await _ask(caller, path, trainer, repetition)
        report.version = announced.version
        report.announced(
            f"{repetition.component}: version {announced.version} of "
            f"{announced.model!r} is announced",
            fleet,
        )
        async with report.following(events, caller, namespace):
            record = await _end(caller, announced, repetition)
            await report.last_event()
    return report.ended(announced.model, record.outcome, record.detail)


async def _find(caller: Caller, path: str, component: str) -> int:
    """The one trainer that lives; the killed are in discovery for some seconds."""
    deadline = asyncio.get_running_loop().time() + FIND_SECONDS
    while True:
        found = await caller.instances(path)
        answers = await asyncio.gather(*(_lives(caller, path, i) for i in found))
        alive = [i for i, lives in zip(found, answers, strict=True) if lives]
        if len(alive) == 1:
            return alive[0]
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.1)
    if alive:
        raise RefitError(
            f"{len(alive)} trainers run as component {component!r}: stop all but one, "
            "or give each WeightPublisher a component of its own, and --trainer"
        )
    raise RefitError(
        f"no trainer runs as component {component!r}: start it, or give the component "
        "of its WeightPublisher with --trainer"
    )


async def _lives(caller: Caller, path: str, instance: int) -> bool:
    # Whatever the name: that it answers at all is the answer.
    ping = FindGroup(group="")
    try:
        await caller.call(path, instance, ping, OtherGroup | Refused, TRAINER_SECONDS)
    except PeerLost:
        return False
    return True


async def _ask(
    caller: Caller, path: str, trainer: int, repetition: Repetition
) -> Announced:
    request = AnnounceAgain(version=repetition.version, in_flight=repetition.in_flight)
    reply = await caller.call(
        path, trainer, request, Announced | Refused, TRAINER_SECONDS
    )
    if isinstance(reply, Refused):
        raise RefitError(f"the trainer refuses: {reply.failure.message}")
    return reply


async def _end(
    caller: Caller, announced: Announced, repetition: Repetition
) -> RefitRecord:
    """The coordinator's record of the announcement, when it has ended."""
    try:
        async with asyncio.timeout(repetition.timeout):
            while True:
                past = await fetch_history(caller, repetition.namespace)
                for record in past.records:
                    same = record.announcement == announced.announcement
                    if same and record.ended_at is not None:
                        return record
                await asyncio.sleep(HISTORY_SECONDS)
    except TimeoutError:
        raise RefitError(
            f"version {announced.version} had not ended after {repetition.timeout:g} s "
            f"and stays announced: {LOOK}; a larger --timeout waits longer"
        ) from None
