# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker's place in routing: whether routers see it, and under which labels.

Owns the worker's ``generate`` instance in discovery, the ``weights=`` taint on its
model card, and the admission before both. It holds what should be so (admitted,
withdrawn, the label), and :meth:`WorkerRouting.watch` keeps discovery at it, also when
a stall has lost every record (:mod:`dynamo.refit.presence`).

It never looks at weights: the agent says when they are the fleet's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Literal

from dynamo.llm import update_model_taints
from dynamo.runtime import DistributedRuntime, Endpoint

from dynamo.refit.presence import (
    CALL_SECONDS,
    Seen,
    attempt,
    put_back_what_is_missing,
)

logger = logging.getLogger(__name__)

Admission = Literal["coordinator", "immediate"]
"""Who lets a worker that starts serve: the coordinator, or nobody need."""

#: The taint that names the version, and its value when nobody knows it.
LABEL = "weights="
UNKNOWN = "unknown"

#: How often a worker that waits for its admission says so.
REMIND_SECONDS = 10.0

#: The bounds on registering a model, which reads files, and on a change's arrival in
#: what this process sees of discovery.
MODEL_SECONDS = 30.0
SEEN_SECONDS = 1.0


class WorkerRouting:
    """Shows this worker to routers, or not.

    Args:
        runtime: whose health a worker that is fenced or lost sets. Dynamo 1.6 does not
            look at it where endpoints have health checks, as a worker's have: what
            takes a fenced worker out is leaving discovery, and its end.
        generate: the endpoint that routers send requests to.
        commands: the agent's endpoint, which is in discovery from the start.
        others: what else the worker serves once admitted; read when needed.
        admission: ``immediate`` to serve without being admitted.
        asleep: whether Dynamo's sleep route has taken the worker out of routing.
        stopping: set when the process is told to end.
        put_back: awaited after a stall's losses were registered again, for what else
            the process had in discovery; says whether that is there again.
    """

    def __init__(
        self,
        runtime: DistributedRuntime,
        generate: Endpoint,
        commands: Endpoint,
        *,
        others: Sequence[Endpoint],
        admission: Admission,
        asleep: Callable[[], bool],
        stopping: asyncio.Event,
        put_back: Callable[[], Awaitable[bool]],
    ) -> None:
        self._runtime = runtime
        self._generate = generate
        self._commands = commands
        self._others = others
        self._asleep = asleep
        self._stopping = stopping
        self._also_put_back = put_back
        self._also_due = False
        self._opened = False
        self._admitted = admission == "immediate"
        self._withdrawn = False
        self._fenced = False
        self._may_register = asyncio.Event()
        self._register: Callable[[], Awaitable[None]] | None = None
        self._label: str | None = None
        self._user_taints: frozenset[str] = frozenset()
        self._taints_due = False
        # One change of the card at a time: the last one is what it says.
        self._labelling = asyncio.Lock()
        self._instances: dict[Endpoint, Seen] = {}
        # One change of discovery at a time.
        self._changing = asyncio.Lock()

    # --- admission ------------------------------------------------------------

    @property
    def admitted(self) -> bool:
        """It may serve. Stays so: a worker that was let in is withdrawn, or fenced."""
        return self._admitted

    def open(self) -> None:
        """Its ranks can be refitted: it may register its model, once admitted."""
        self._opened = True
        self._open_or_close()

    def admit(self) -> None:
        """Let it register its model and serve; once is enough."""
        if not self._admitted:
            logger.info("admitted: this worker registers its model and serves")
        self._admitted = True
        self._open_or_close()

    def _open_or_close(self) -> None:
        if self._opened and self._admitted and not self._withdrawn and not self._fenced:
            self._may_register.set()
        else:
            self._may_register.clear()

    async def register(self, register: Callable[[], Awaitable[None]]) -> None:
        """Register the model once the worker is admitted, with its labels.

        Returns before ``generate`` is served, so no router sees it unlabelled.

        Raises:
            SystemExit: the process was told to end before.
        """
        await self._admission()
        await register()
        self._register = register
        if self._taints():
            await self._apply_taints()

    async def _admission(self) -> None:
        stopping = asyncio.ensure_future(self._stopping.wait())
        allowed = asyncio.ensure_future(self._may_register.wait())
        try:
            while not allowed.done() and not stopping.done():
                if not self._admitted:
                    self._say_who_is_waited_for()
                await asyncio.wait(
                    [allowed, stopping],
                    timeout=REMIND_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
        finally:
            stopping.cancel()
            allowed.cancel()
        if self._stopping.is_set():
            # There are no requests to wait for, and no endpoints yet to shut down.
            logger.info("told to end before it was admitted")
            await attempt(
                self._commands.unregister_endpoint_instance(), "leave discovery"
            )
            raise SystemExit(0)

    def _say_who_is_waited_for(self) -> None:
        logger.info(
            "not admitted: this worker serves nobody until the coordinator (python -m "
            "dynamo.refit, in the same namespace) has seen that its weights are the "
            "fleet's, or has brought it up to date. To serve the weights that it "
            "started with at once: --refit-admission immediate"
        )

    # --- labels ---------------------------------------------------------------

    async def label(self, version: int) -> None:
        """Put ``weights=<version>`` on the model card, beside the user's own taints.

        Before the registration: as soon as there is a card. When discovery does not
        take it, :meth:`watch` tries again: a fleet must not fall with its discovery.
        Not that of a worker that is fenced.
        """
        if self._fenced:
            return
        self._label = str(version)
        if self._register is not None:
            await self._apply_taints()

    async def set_user_taints(self, endpoint: Endpoint, taints: Iterable[str]) -> None:
        """Stands in for Dynamo's ``update_model_taints``, which replaces the whole set.

        All of a worker's taints are written through it by its own process, so that
        what the user wants is known here, and there is nothing to read back.

        Raises:
            Exception: Dynamo's, or TimeoutError, if the card was not updated now.
        """
        own = {taint for taint in taints if taint.startswith(LABEL)}
        if own:
            logger.warning("%s: taints %s* are the worker's own", sorted(own), LABEL)
        self._user_taints = frozenset(taints) - own
        if self._register is not None:
            async with self._labelling, asyncio.timeout(CALL_SECONDS):
                await update_model_taints(endpoint, self._taints())

    def _taints(self) -> set[str]:
        label = {f"{LABEL}{self._label}"} if self._label is not None else set()
        return set(self._user_taints) | label

    async def _apply_taints(self) -> None:
        async with self._labelling:
            update = update_model_taints(self._generate, self._taints())
            self._taints_due = not await attempt(update, "label the model card")

    # --- in and out of routing ------------------------------------------------

    async def withdraw(self) -> None:
        """Let routers send nothing new; running requests go on."""
        if self._withdrawn:
            return
        self._withdrawn = True
        self._open_or_close()
        if self._register is None:
            return
        async with self._changing:
            await self._leave_routing()
        await self._until_seen(False)

    async def restore(self) -> None:
        """Let routers send again; not to a worker that is fenced."""
        if self._fenced or not self._withdrawn:
            return
        self._withdrawn = False
        self._open_or_close()
        if self._register is None or self._asleep():
            return
        async with self._changing:
            # It may be fenced by now.
            if not self._withdrawn:
                await attempt(
                    self._generate.register_endpoint_instance(), "return to routing"
                )
        await self._until_seen(True)

    async def fence(self) -> None:
        """Leave for good: within a few seconds, whatever hangs."""
        self._fenced = True
        self._withdrawn = True
        self._label = UNKNOWN
        self._open_or_close()
        self._runtime.set_health_status(False)
        if self._register is not None:
            await asyncio.gather(self._leave_routing(), self._apply_taints())

    async def _leave_routing(self) -> None:
        await attempt(self._generate.unregister_endpoint_instance(), "leave routing")

    # --- what is in discovery -------------------------------------------------

    async def watch(self) -> None:
        """Keep discovery as it should be, until the process is told to end."""
        await put_back_what_is_missing(
            self._missing, self._put_back, self._report_lost, self._stopping
        )

    def _report_lost(self, seconds: float) -> None:
        self._runtime.set_health_status(False)
        # Dynamo's log shows CRITICAL as INFO.
        logger.error(
            "this worker has been missing in discovery for %.0f s and cannot be put "
            "back: nobody finds it. Check the discovery service, or restart the "
            "worker; it goes on trying",
            seconds,
        )

    async def _missing(self) -> bool:
        """Whether something is not there; what should not be there is taken out."""
        if self._withdrawn and await self._seen(self._generate):
            async with self._changing:
                # It was withdrawn just before it was served for the first time, or
                # discovery is slow and it may have returned.
                if self._withdrawn:
                    await self._leave_routing()
        if not await self._seen(self._commands) or self._taints_due or self._also_due:
            return True
        should_serve = self._register is not None and not self._withdrawn
        return (
            should_serve and not self._asleep() and not await self._seen(self._generate)
        )

    async def _put_back(self) -> None:
        async with self._changing:
            await self._register_again()
        self._also_due = not await self._also_put_back()

    async def _register_again(self) -> None:
        """All that should be there, the card before routers see the worker."""
        await attempt(self._commands.register_endpoint_instance(), "register")
        if self._register is None:
            return
        await self._apply_taints()
        if self._taints_due:
            # The card is gone too.
            await attempt(self._register(), "register the model", MODEL_SECONDS)
            await self._apply_taints()
        for endpoint in self._others:
            if endpoint is not self._generate:
                await attempt(endpoint.register_endpoint_instance(), "register")
        if not self._withdrawn and not self._asleep():
            await attempt(
                self._generate.register_endpoint_instance(), "return to routing"
            )

    async def _seen(self, endpoint: Endpoint) -> bool:
        """Whether this worker's instance is in discovery."""
        return await self._instances.setdefault(endpoint, Seen(endpoint)).look()

    async def _until_seen(self, seen: bool) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEEN_SECONDS):
                while await self._seen(self._generate) != seen:
                    await asyncio.sleep(0.005)
