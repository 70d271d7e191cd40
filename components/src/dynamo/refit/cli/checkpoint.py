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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.output import cancel_on_signals, complain
from dynamo.refit.cli.report import LOOK, Report
from dynamo.refit.cli.runtime import connect
from dynamo.refit.cli.words import count, size
from dynamo.refit.errors import RefitError
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import FleetStatus, InFlightPolicy
from dynamo.refit.publish.checkpoint import CheckpointInvalid, checkpoint_shards
from dynamo.refit.publish.handle import PublishedVersion, Release
from dynamo.refit.publish.publisher import WeightPublisher
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.rpc import Caller

#: The Dynamo component that this process shows up as.
COMPONENT = "checkpoint"


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
    report = Report(publication.version, publication.as_json)
    try:
        return asyncio.run(_publish(publication, shards, report))
    except (KeyboardInterrupt, asyncio.CancelledError):
        report.interrupted()
        return 130


async def _publish(
    publication: Publication, shards: Sequence[LocalShard], report: Report
) -> int:
    cancel_on_signals()
    runtime = connect(alone_on_terminal=report.in_place)
    namespace = publication.namespace
    caller = Caller(runtime)
    fleet = await fetch_status(caller, namespace, publication.model)
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
            report.announced(_told(publication, model, shards), fleet)
            async with report.following(events, caller, namespace, model):
                release = await _end(published, publication)
                await report.last_event()
    return report.ended(model, release.outcome, release.detail)


def _told(publication: Publication, model: str, shards: Sequence[LocalShard]) -> str:
    nbytes = sum(shard.tensor.nbytes for shard in shards)
    return (
        f"{publication.directory}: {count(len(shards), 'tensor')}, {size(nbytes)}, "
        f"publishing as version {publication.version} of {model!r}"
    )


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


async def _end(published: PublishedVersion, publication: Publication) -> Release:
    try:
        async with asyncio.timeout(publication.timeout):
            return await published.released()
    except TimeoutError:
        raise RefitError(
            f"version {publication.version} had not ended after "
            f"{publication.timeout:g} s and is withdrawn: {LOOK}; a larger --timeout "
            "waits longer"
        ) from None
