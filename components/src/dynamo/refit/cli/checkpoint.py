# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish``: a checkpoint on disk becomes the served version.

This process is the trainer: it maps the files, announces the version, and is read from
until the coordinator says how the version ended. That word decides; the events on the
way are only shown. Where it ends before that word (Ctrl-C, SIGTERM, a timeout) it
takes the announcement back by closing the publisher: nobody can lease the version any
more, reads from here fail, and the coordinator reports the version as failed.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.output import complain, time_of
from dynamo.refit.cli.words import describe
from dynamo.refit.errors import RefitError
from dynamo.refit.events import (
    REFIT_EVENTS,
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitSuperseded,
)
from dynamo.refit.protocol import FleetStatus, InFlightPolicy
from dynamo.refit.publish.checkpoint import CheckpointInvalid, checkpoint_shards
from dynamo.refit.publish.publisher import PublishedVersion, Release, WeightPublisher
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.rpc import Caller, runtime_from_environment

#: The Dynamo component that this process shows up as.
COMPONENT = "checkpoint"

#: The last event may come this much later than the trainer's release.
LAST_EVENT_SECONDS = 1.0

LOOK = "`dynamo-refit status` shows what each worker serves"


@dataclass(frozen=True)
class Publication:
    """The command's arguments; ``timeout`` in seconds."""

    directory: Path
    version: int
    model: str | None
    in_flight: InFlightPolicy | None
    namespace: str
    timeout: float
    as_json: bool


def run(publication: Publication) -> int:
    """Publish and wait; the exit code.

    Raises:
        RefitError: it cannot be published, or did not end in time.
    """
    try:
        shards = checkpoint_shards(publication.directory)
    except CheckpointInvalid as error:
        complain(error)
        return 2
    report = _Report(publication)
    try:
        return asyncio.run(_publish(publication, shards, report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.interrupted()
        return 130


async def _publish(
    publication: Publication, shards: Sequence[LocalShard], report: _Report
) -> int:
    # A shell's background jobs begin with SIGINT ignored, and asyncio leaves it so.
    cancel = asyncio.current_task().cancel
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, cancel)
    runtime = runtime_from_environment()
    namespace = publication.namespace
    fleet = await fetch_status(Caller(runtime), namespace)
    _check_number(publication.version, fleet)
    model = _model(publication, fleet)
    topic = runtime.endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
    async with EventSubscriber(topic) as events:
        # It blocks this loop, which has nothing else to do yet: an interrupt waits
        # until there is something that can be closed.
        with WeightPublisher(
            model, shards, mode="in_place", namespace=namespace, component=COMPONENT
        ) as publisher:
            published = publisher.publish(
                publication.version, in_flight=publication.in_flight
            )
            report.announced(model, shards, fleet)
            release = await _end(published, events, publication, report)
    return report.ended(model, release)


def _check_number(version: int, fleet: FleetStatus) -> None:
    """Refuse a number that would end as completed without a byte being read."""
    serving = {member.status.version for member in fleet.members}
    if serving == {version}:
        raise RefitError(
            f"every worker serves a version {version} already, and nothing would be "
            "installed: give a higher --version"
        )


def _model(publication: Publication, fleet: FleetStatus) -> str:
    model = publication.model or fleet.model
    if not model:
        raise RefitError(
            "the coordinator has seen no worker yet and does not know the model: give "
            "--model NAME, or start a worker first"
        )
    return model


async def _end(
    published: PublishedVersion,
    events: EventSubscriber,
    publication: Publication,
    report: _Report,
) -> Release:
    """How the version ended; what happens until then is reported."""
    showing = asyncio.create_task(_show_events(events, publication.version, report))
    try:
        async with asyncio.timeout(publication.timeout):
            release = await published.released()
        await asyncio.wait([showing], timeout=LAST_EVENT_SECONDS)
    except TimeoutError:
        raise RefitError(
            f"version {publication.version} had not ended after "
            f"{publication.timeout:g} s and is withdrawn: {LOOK}; a larger --timeout "
            "waits longer"
        ) from None
    finally:
        showing.cancel()
    return release


async def _show_events(events: EventSubscriber, version: int, report: _Report) -> None:
    """Until the version's last event."""
    async for event in events:
        if isinstance(event, Event) and getattr(event, "version", None) == version:
            report.event(event)
            if _is_last(event):
                return


def _is_last(event: Event) -> bool:
    match event:
        case RefitCompleted() | RefitSuperseded() | RefitRefused():
            return True
        case RefitFailed(epoch=epoch):
            # A worker's own failure (epoch 0) is followed by the coordinator's word.
            return epoch > 0
    return False


class _Report:
    """Says what happens, for people or as JSON, and keeps what the end needs."""

    def __init__(self, publication: Publication) -> None:
        self._version = publication.version
        self._directory = publication.directory
        self._as_json = publication.as_json
        self._announced = False

    def announced(
        self, model: str, shards: Sequence[LocalShard], fleet: FleetStatus
    ) -> None:
        self._announced = True
        if self._as_json:
            return
        mib = sum(shard.tensor.nbytes for shard in shards) / 2**20
        print(
            f"{self._directory}: {len(shards)} tensors, {mib:.1f} MiB, publishing as "
            f"version {self._version} of {model!r}",
            flush=True,
        )
        if not fleet.members:
            print("there is no worker yet: waiting for one", flush=True)

    def event(self, event: Event) -> None:
        if self._as_json:
            print(msgspec.json.encode(event).decode(), flush=True)
        elif line := describe(event):
            print(f"{time_of(event)}  {line}", flush=True)

    def ended(self, model: str, release: Release) -> int:
        """Say how it ended; the exit code."""
        if self._as_json:
            end = {
                "model": model,
                "version": self._version,
                "outcome": release.outcome,
                "detail": release.detail,
            }
            print(msgspec.json.encode(end).decode(), flush=True)
        if release.outcome == "completed":
            if not self._as_json:
                print(f"version {self._version} is served", flush=True)
            return 0
        complain(
            f"version {self._version} was not installed: {release.outcome}: "
            f"{release.detail or 'no cause given'}; {LOOK}"
        )
        return 1

    def interrupted(self) -> None:
        if not self._announced:
            complain("interrupted; nothing was announced")
            return
        complain(
            f"interrupted; version {self._version} is withdrawn, but a worker that "
            f"held all of it already may install it: {LOOK}"
        )
