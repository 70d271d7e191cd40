# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The conversation with a replica's ranks: all of them, or a failure.

Each call goes to every rank; one refusal fails the call and names the rank. Owns
what the ranks have been told (the manifest, the layout they agreed on), and knows
nothing of coordinators, epochs or pauses.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo.refit.errors import Failure, ManifestInvalid, RefitError
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    Describe,
    Described,
    Discard,
    Done,
    GetManifest,
    Install,
    Installed,
    ManifestReply,
    Message,
    Poll,
    Prepare,
    RankReply,
    RankRequest,
    RankVote,
    Refused,
    Restore,
    Running,
    Stage,
    Staged,
)
from dynamo.refit.rank.plan import check_extents

logger = logging.getLogger(__name__)

#: Between two polls of the ranks, at most: each one waits for the running step. A
#: small model is staged in a millisecond, so the first polls come quicker.
POLL_SECONDS = 0.02

#: How long the trainer may take to send its manifest.
MANIFEST_SECONDS = 60.0

#: How long ranks may take to let go of a stage that was cancelled.
DISCARD_SECONDS = 60.0


class RanksFailed(RefitError):
    """One or more ranks refused; carries the first one's failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class WeightsUnknown(RefitError):
    """An install was neither finished nor undone."""


class RankCaller(Protocol):
    """Calls every rank; see :class:`dynamo.refit.worker.engine.RefitEngine`."""

    async def call_ranks(self, request: RankRequest) -> list[RankReply]: ...


class Trainers(Protocol):
    """Reaches a trainer's endpoint; see :class:`dynamo.refit.rpc.Caller`."""

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any: ...


@dataclass(frozen=True)
class HeldManifest:
    """The trainer's manifest, encoded and decoded, and its two fingerprints."""

    fingerprint: str
    layout: str
    payload: bytes
    manifest: Manifest


class Ranks:
    """Stages, installs and restores on all ranks of one replica.

    Every method may raise :class:`OutOfStep`: nothing that the ranks say can be
    trusted then.
    """

    def __init__(self, caller: RankCaller, trainers: Trainers) -> None:
        self._caller = caller
        self._trainers = trainers
        self._manifest: HeldManifest | None = None
        self._ranks_manifest: str | None = None
        self._checked_layout: str | None = None

    async def describe(self) -> list[Described]:
        """Let every rank get ready to plan, and say who it is."""
        return await self._call(Describe())

    async def stage(self, request: Prepare) -> tuple[RankVote, ...]:
        """Have the version staged everywhere; returns when it is.

        Raises:
            RanksFailed: a rank, or the trainer, refused. LayoutRefused: all ranks
                together do not read every tensor whole. The others may still be
                staging: :meth:`discard` follows.
        """
        held = await self._fetch_manifest(request)
        fingerprint, layout = held.fingerprint, held.layout
        known = self._ranks_manifest == fingerprint
        self._ranks_manifest = None
        await self._call(
            Stage(
                version=request.version,
                manifest=fingerprint,
                slot=request.slot,
                seconds=request.stage_seconds,
                payload=None if known else held.payload,
                want_reads=layout != self._checked_layout,
            )
        )
        self._ranks_manifest = fingerprint
        staged = await self._poll(request.version)
        if layout != self._checked_layout:
            check_extents(held.manifest, (reply.reads for reply in staged))
            self._checked_layout = layout
        return tuple(reply.vote for reply in staged)

    async def _fetch_manifest(self, request: Prepare) -> HeldManifest:
        if self._manifest is None or self._manifest.fingerprint != request.manifest:
            reply = await self._trainers.call(
                request.endpoint,
                request.instance,
                GetManifest(manifest=request.manifest),
                ManifestReply | Refused,
                MANIFEST_SECONDS,
            )
            if isinstance(reply, Refused):
                raise RanksFailed(reply.failure)
            manifest = msgspec.msgpack.decode(reply.payload, type=Manifest)
            if manifest.fingerprint() != request.manifest:
                raise ManifestInvalid("it is not the one that was announced")
            manifest.validate()
            self._manifest = HeldManifest(
                fingerprint=request.manifest,
                layout=manifest.layout_fingerprint(),
                payload=reply.payload,
                manifest=manifest,
            )
        return self._manifest

    async def _poll(self, version: int) -> list[Staged]:
        """Wait until every rank has ended; the ranks keep their own deadline."""
        wait = POLL_SECONDS / 16
        while True:
            replies = await self._caller.call_ranks(Poll(version=version))
            if not any(isinstance(reply, Running) for reply in replies):
                return _all_or_raise(replies)
            if any(isinstance(reply, Refused) for reply in replies):
                # One has failed: the others need not finish.
                _all_or_raise([r for r in replies if not isinstance(r, Running)])
            await asyncio.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS)

    async def discard(self, version: int) -> None:
        """Stop the ranks' stage and forget it.

        Raises:
            RefitError: a rank does not let go.
        """
        deadline = time.monotonic() + DISCARD_SECONDS
        while True:
            replies = await self._caller.call_ranks(Discard(version=version))
            if all(isinstance(reply, Done) for reply in replies):
                return
            if time.monotonic() > deadline:
                raise RefitError(f"a rank does not let go of version {version}")
            await asyncio.sleep(POLL_SECONDS)

    async def install(self, version: int) -> int:
        """Install, and once more if that fails: the staged copy is intact.

        Returns how often it was repeated; raises :class:`RanksFailed`.
        """
        try:
            await self._call(Install(version=version))
        except RanksFailed as error:
            logger.warning("installing version %d again: %s", version, error.failure)
            await self._call(Install(version=version))
            return 1
        return 0

    async def restore(self, version: int, cause: RanksFailed) -> None:
        """Undo an install that failed on some rank.

        Raises:
            WeightsUnknown: a rank could not.
        """
        replies = await self._caller.call_ranks(Restore(version=version))
        for reply in replies:
            if not isinstance(reply, Installed):
                raise WeightsUnknown(
                    f"version {version} was installed on some ranks only "
                    f"({cause.failure}) and could not be undone ({reply})"
                ) from cause

    async def _call(self, request: RankRequest) -> list:
        return _all_or_raise(await self._caller.call_ranks(request))


def _all_or_raise(replies: list[RankReply]) -> list:
    for reply in replies:
        if isinstance(reply, Refused):
            raise RanksFailed(reply.failure)
    return replies
