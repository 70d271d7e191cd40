# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit rollback``: the weights that were served before are served again.

The coordinator leads it, from the copies that the workers keep; this process only asks
how far it is. Where it ends before that (Ctrl-C, a timeout) the rollback goes on.
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from typing import Annotated

import msgspec
import typer

from dynamo.refit.cli.fleet import find_coordinator
from dynamo.refit.cli.output import AsJson, Namespace, complain
from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import InFlightPolicy, Refused, Rollback, RollbackStatus
from dynamo.refit.rpc import Caller, PeerLost, runtime_from_environment

#: Between two questions how far it is.
ASK_SECONDS = 0.5

#: How long the coordinator may take to look at its workers and answer.
ANSWER_SECONDS = 15.0

LOOK = "`dynamo-refit status` shows what each worker serves"


def rollback(
    version: Annotated[
        int | None,
        typer.Option(min=0, help="the new version's number; by default the next one"),
    ] = None,
    to: Annotated[
        int | None,
        typer.Option(min=0, help="refuse if the copies are not of this version"),
    ] = None,
    policy: Annotated[
        InFlightPolicy | None,
        typer.Option(help="what happens to running requests, if not the coordinator's"),
    ] = None,
    namespace: Namespace = "dynamo",
    timeout: Annotated[
        float, typer.Option(min=1, help="seconds to wait for the end of it")
    ] = 600.0,
    as_json: AsJson = False,
) -> int:
    """Serve the weights of the version before again, from the workers' own copies.

    They come as a new version, all or none like any other, and no trainer is needed. A
    second rollback brings back what the first one replaced. Exits with 0 when every
    worker serves them, and with 1 when it failed or there is nothing to go back to.
    """
    wish = Rollback(
        announcement=f"rollback-{uuid.uuid4().hex}",
        version=version,
        to=to,
        in_flight=policy,
    )
    following = _Following(wish, namespace, timeout, as_json)
    try:
        return following.report(asyncio.run(following.run()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        following.interrupted()
        return 130


class _Following:
    """One rollback, from the wish to its end."""

    def __init__(
        self, wish: Rollback, namespace: str, timeout: float, as_json: bool
    ) -> None:
        self._wish = wish
        self._namespace = namespace
        self._timeout = timeout
        self._as_json = as_json
        self._begun: RollbackStatus | None = None

    async def run(self) -> RollbackStatus:
        """Ask for it, and wait until it has ended.

        Raises:
            RefitError: there is nothing to go back to, no coordinator, or no end within
                the time.
        """
        # As in publish: a shell's background jobs begin with SIGINT ignored.
        cancel = asyncio.current_task().cancel
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, cancel)
        caller = Caller(runtime_from_environment())
        try:
            async with asyncio.timeout(self._timeout):
                status = await self._ask(caller)
                self._start(status)
                while status.outcome is None:
                    await asyncio.sleep(ASK_SECONDS)
                    status = await self._ask_again(caller, status)
        except TimeoutError:
            what = "the coordinator has not answered"
            if self._begun is not None:
                what = f"version {self._begun.version} has not ended"
            raise RefitError(
                f"{what} within {self._timeout:g} s, but may yet be installed: {LOOK}; "
                "a larger --timeout waits longer"
            ) from None
        return status

    async def _ask(self, caller: Caller) -> RollbackStatus:
        _, instance = await find_coordinator(caller, self._namespace)
        reply = await caller.call(
            f"{self._namespace}.refit.status",
            instance,
            self._wish,
            RollbackStatus | Refused,
            ANSWER_SECONDS,
        )
        if isinstance(reply, Refused):
            raise RefitError(reply.failure.message)
        return reply

    async def _ask_again(
        self, caller: Caller, status: RollbackStatus
    ) -> RollbackStatus:
        """A coordinator that comes after another one is told all there is to know."""
        try:
            return await self._ask(caller)
        except PeerLost:
            return status

    def _start(self, status: RollbackStatus) -> None:
        self._begun = status
        self._wish = msgspec.structs.replace(
            self._wish,
            version=status.version,
            to=status.restores,
            weights=status.weights,
        )
        if not self._as_json:
            print(
                f"version {status.version} brings back the weights of version "
                f"{status.restores}, fingerprint {status.weights}",
                flush=True,
            )

    def report(self, status: RollbackStatus) -> int:
        """Say how it ended; the exit code."""
        version, done = status.version, status.outcome == "completed"
        if self._as_json:
            end = {
                "version": version,
                "restores": status.restores,
                "weights": status.weights,
                "outcome": status.outcome,
                "detail": status.detail,
            }
            print(msgspec.json.encode(end).decode(), flush=True)
        elif done:
            print(f"version {version} is served", flush=True)
        if not done:
            complain(
                f"version {version} was not installed: {status.outcome}: "
                f"{status.detail or 'no cause given'}; {LOOK}"
            )
        return 0 if done else 1

    def interrupted(self) -> None:
        if self._begun is None:
            complain(f"interrupted; a rollback may have been begun: {LOOK}")
            return
        complain(
            f"interrupted; the coordinator goes on with version {self._begun.version}: "
            f"{LOOK}"
        )
