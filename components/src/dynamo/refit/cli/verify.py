# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit verify``: are the live weights, now, those that are served?"""

from __future__ import annotations

import asyncio

import msgspec

from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.output import AsJson, Model, Namespace, complain
from dynamo.refit.cli.runtime import connect
from dynamo.refit.errors import RefitError, failure_from
from dynamo.refit.protocol import (
    FleetMember,
    Refused,
    VerifyWeights,
    WeightsVerified,
    to_wire,
)
from dynamo.refit.rpc import Caller

#: How long a worker may take to read all of its weights once.
VERIFY_SECONDS = 120.0


def verify(
    namespace: Namespace = "dynamo", model: Model = None, as_json: AsJson = False
) -> int:
    """Have every worker compare its live weights with the version it serves.

    Exits with 0 when all of them are what was published, byte for byte; with 1 when a
    worker says otherwise or does not answer, or where there is none.
    """
    replies = asyncio.run(_verify(namespace, model))
    for worker, reply in replies.items():
        if as_json:
            line = {"worker": worker, **to_wire(reply)}
            print(msgspec.json.encode(line).decode())
        elif isinstance(reply, Refused):
            complain(f"worker {worker}: {reply.failure}")
        else:
            print(
                f"worker {worker} serves version {reply.version}, fingerprint "
                f"{reply.fingerprint}"
            )
    return int(any(isinstance(reply, Refused) for reply in replies.values()))


async def _verify(
    namespace: str, model: str | None
) -> dict[int, WeightsVerified | Refused]:
    """What each worker answers.

    Raises:
        RefitError: there is no coordinator, or no worker.
    """
    caller = Caller(connect())
    fleet = await fetch_status(caller, namespace, model)
    if not fleet.members:
        raise RefitError(
            f"no worker of {fleet.model or 'any model'} in namespace {namespace!r}: "
            "nothing was verified"
        )
    asked = (_ask(caller, namespace, member) for member in fleet.members)
    replies = await asyncio.gather(*asked)
    workers = (member.worker for member in fleet.members)
    return dict(zip(workers, replies, strict=True))


async def _ask(
    caller: Caller, namespace: str, member: FleetMember
) -> WeightsVerified | Refused:
    """The worker's answer, or why there is none."""
    try:
        return await caller.call(
            f"{namespace}.{member.component}.refit",
            member.worker,
            VerifyWeights(),
            WeightsVerified | Refused,
            VERIFY_SECONDS,
        )
    except (RefitError, msgspec.ValidationError) as error:
        return Refused(
            failure=failure_from(error, stage="verify", worker=member.worker)
        )
