# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The conversation with a replica's ranks: all of them, or a failure.

Each call goes to every rank; one refusal fails the call and names the rank. Owns
what the ranks have been told (the manifest, the layout they agreed on), and knows
nothing of coordinators, epochs or pauses.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, get_args

import numpy as np

from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    InstallUndone,
    LayoutRefused,
    ManifestInvalid,
    PeerUnsuitable,
    RefitError,
    TransferFailed,
    failure_from,
)
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import CheckedManifest, Manifest, check_manifest
from dynamo.refit.protocol import (
    Describe,
    Described,
    Discard,
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    Install,
    Installed,
    ManifestReply,
    Message,
    Offer,
    Offered,
    Poll,
    Prepare,
    RankProgress,
    RankReply,
    RankRequest,
    RankVote,
    Refused,
    Reserve,
    Restore,
    Running,
    Stage,
    Staged,
    StagingChoice,
    StagingMode,
    Verify,
    Withdraw,
)
from dynamo.refit.worker.proof import Proof, Reads
from dynamo.refit.worker.source import SourceWatch, Trainers

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

Report = Callable[[tuple[RankProgress, ...]], object]
"""Is told how far each rank is."""

#: Between two polls of the ranks, at most: each one waits for the running step. A
#: small model is staged in a millisecond, so the first polls come quicker.
POLL_SECONDS = 0.02

#: For this share of what the last warm stage took the ranks are left alone: before it
#: answers a poll, a tensor-parallel engine ends the steps that it has begun.
QUIET_SHARE = 0.8

#: Between two reports of how far a stage is; one that ends sooner makes none.
PROGRESS_SECONDS = 0.25

#: Milliseconds for which conversions may keep the model's thread at a time.
CONVERT_MS = 1.0

#: How long the trainer may take to send its manifest, or a version's fingerprints.
TRAINER_SECONDS = 60.0

#: How long after its own deadline a rank that still works counts as hung.
HANG_SECONDS = 60.0

#: How long ranks may take to let go of a stage that was cancelled.
DISCARD_SECONDS = 60.0

#: How long ranks may take to compare a copy with what was staged.
OFFER_SECONDS = 60.0


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


@dataclass(frozen=True)
class HeldVersion:
    """A version of ``model`` that was proven here, with this ``fingerprint``."""

    model: str
    version: int
    fingerprint: str


@dataclass(frozen=True)
class _Proven:
    """What each rank reads of a layout, and the proof that rests on it."""

    layout: str
    reads: list[Reads]
    proof: Proof


class Ranks:
    """Stages, installs, restores and verifies on all ranks of one replica.

    Every method may raise :class:`OutOfStep`: nothing that the ranks say can be
    trusted then.

    Args:
        staging: where versions wait; see :mod:`dynamo.refit.rank.memory`.
    """

    def __init__(
        self, caller: RankCaller, trainers: Trainers, staging: StagingChoice
    ) -> None:
        self._caller = caller
        self._trainers = trainers
        #: The mode of all ranks, from :meth:`describe` on.
        self.staging = staging
        self._manifest: CheckedManifest | None = None
        #: That manifest, encoded.
        self._payload = b""
        self._ranks_manifest: str | None = None
        self._proven: _Proven | None = None
        self._staged: HeldVersion | None = None
        self._live: HeldVersion | None = None
        #: Fingerprint of the form in which all ranks compute, from :meth:`describe` on.
        self.layout = ""
        self._previous: HeldVersion | None = None
        #: An install of what was staged last can be undone.
        self.can_undo = True
        self._quiet_seconds = 0.0

    async def describe(self) -> list[Described]:
        """Let every rank get ready, with the memory for a version, and say who it is.

        From here on all ranks stage in one mode, the one that has room on each: a
        version that is undone on some ranks only would be a mixture.
        """
        described = await self._call(Describe(staging=self.staging))
        layouts = ",".join(reply.layout for reply in described)
        self.layout = hashlib.sha256(layouts.encode()).hexdigest()
        modes = get_args(StagingMode)
        self.staging = max((reply.memory.mode for reply in described), key=modes.index)
        await self._call(Reserve(staging=self.staging))
        return described

    async def stage(
        self, request: Prepare, report: Report = lambda progress: None
    ) -> tuple[RankVote, ...]:
        """Have the version staged everywhere, and prove it; returns when it is.

        ``report`` hears of the progress every :data:`PROGRESS_SECONDS`.

        Raises:
            RanksFailed: a rank, or the trainer, refused. LayoutRefused: all ranks
                together do not read every tensor once. FingerprintMismatch: they
                hold other bytes than were published. The others may still be
                staging: :meth:`discard` follows.
        """
        self._staged = None
        held = await self._fetch_manifest(request)
        known = self._ranks_manifest == held.digest
        proven = None
        if self._proven is not None and self._proven.layout == held.layout:
            # A rank that plans this layout anew says once what it reads. If the stage
            # fails on another rank that answer is lost, and what is known is stale.
            proven, self._proven = self._proven, None
        self._ranks_manifest = None
        await self._call(
            Stage(
                version=request.version,
                manifest=held.digest,
                slot=request.slot,
                staging=self.staging,
                seconds=request.stage_seconds,
                payload=None if known else self._payload,
                want_reads=proven is None,
            )
        )
        self._ranks_manifest = held.digest
        published = await self._fetch_fingerprints(request, held.manifest)
        source = SourceWatch(self._trainers, request.endpoint, request.instance)
        staged = await self._poll(request.version, report, source)
        self._proven = _prove(held, staged, proven)
        self.can_undo = all(reply.vote.can_undo for reply in staged)
        parts = [np.frombuffer(reply.parts, dtype="<u8") for reply in staged]
        self._proven.proof.check(published, parts)
        self._staged = HeldVersion(
            held.manifest.model, request.version, request.fingerprint
        )
        return tuple(reply.vote for reply in staged)

    async def _fetch_manifest(self, request: Prepare) -> CheckedManifest:
        if self._manifest is None or self._manifest.digest != request.manifest_digest:
            ask = GetManifest(manifest_digest=request.manifest_digest)
            reply = await self._ask_trainer(request, ask, ManifestReply)
            # The engine's requests go through this loop, too.
            self._manifest = await asyncio.to_thread(
                check_manifest, reply.payload, request.manifest_digest
            )
            self._payload = reply.payload
        slots = self._manifest.manifest.slots
        if not 0 <= request.slot < slots:
            raise ManifestInvalid(
                f"slot {request.slot} was announced, and the sources have {slots} slots"
            )
        return self._manifest

    async def _fetch_fingerprints(
        self, request: Prepare, manifest: Manifest
    ) -> np.ndarray:
        """One uint64 per tensor; they are what the announcement stands for."""
        ask = GetFingerprints(announcement_id=request.announcement_id)
        reply = await self._ask_trainer(request, ask, FingerprintsReply)
        expected = 8 * len(manifest.tensors)
        if len(reply.payload) != expected:
            raise FingerprintMismatch(
                f"the trainer sent {len(reply.payload)} bytes of fingerprints, "
                f"{len(manifest.tensors)} tensors have {expected}"
            )
        published = np.frombuffer(reply.payload, dtype="<u8")
        expected = request.runtime_fingerprint or request.fingerprint
        if version_fingerprint(published) != expected:
            raise FingerprintMismatch(
                "the trainer's fingerprints are not the ones it announced: it holds "
                "another version now"
            )
        return published

    async def _ask_trainer(
        self, request: Prepare, ask: Message, expected: type[M]
    ) -> M:
        reply = await self._trainers.call(
            request.endpoint,
            request.instance,
            ask,
            expected | Refused,
            TRAINER_SECONDS,
        )
        if isinstance(reply, Refused):
            raise RanksFailed(reply.failure)
        return reply

    async def _poll(self, version: int, report: Report, source: SourceWatch) -> list:
        """Wait until every rank has ended, or their source is gone; the ranks keep
        their own deadline."""
        began = time.monotonic()
        quiet, self._quiet_seconds = self._quiet_seconds, 0.0
        await asyncio.sleep(min(quiet, PROGRESS_SECONDS))
        wait = POLL_SECONDS / 16
        due = began + PROGRESS_SECONDS
        conversions = ConversionSteps()
        while True:
            poll = Poll(version=version, convert=conversions.before)
            replies = await self._caller.call_ranks(poll)
            if not any(isinstance(reply, Running) for reply in replies):
                staged = _all_or_raise(replies)
                if all(reply.vote.session == "warm" for reply in staged):
                    self._quiet_seconds = QUIET_SHARE * (time.monotonic() - began)
                return staged
            if any(isinstance(reply, Refused) for reply in replies):
                # One has failed: the others need not finish.
                _all_or_raise([r for r in replies if not isinstance(r, Running)])
            if time.monotonic() >= due:
                due = time.monotonic() + PROGRESS_SECONDS
                report(_progress(replies))
                if await source.is_gone():
                    raise RanksFailed(_source_gone(version, source, replies))
            if conversions.go_on(replies):
                wait = POLL_SECONDS / 16
                continue
            await asyncio.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS)

    async def discard(self, version: int) -> None:
        """Stop the ranks' stage and forget it.

        Raises:
            RefitError: a rank does not let go.
        """
        if self._staged is not None and self._staged.version == version:
            self._staged = None
        deadline = time.monotonic() + DISCARD_SECONDS
        while True:
            replies = await self._caller.call_ranks(Discard(version=version))
            if all(isinstance(reply, Done) for reply in replies):
                return
            if time.monotonic() > deadline:
                raise RefitError(f"a rank does not let go of version {version}")
            await asyncio.sleep(POLL_SECONDS)

    async def install(self, version: int, *, in_step: bool = False) -> int:
        """Install in one call, and once more if that fails: it may be repeated.

        With ``in_step`` while serving, between two steps, on all ranks or none. Returns
        how often it was repeated.

        Raises:
            RanksFailed: a rank failed twice. With ``in_step`` every rank has its old
                weights.
        """
        request = Install(version=version, in_step=in_step)
        try:
            await self._call(request)
        except RanksFailed as error:
            logger.warning("installing version %d again: %s", version, error.failure)
            await self._call(request)
            self._now_live()
            return 1
        self._now_live()
        return 0

    def _now_live(self) -> None:
        if self._live is not self._staged:
            self._previous, self._live = self._live, self._staged

    async def verify(self, version: int) -> float:
        """Compare the live weights of every rank with ``version``, while serving; the
        milliseconds that the slowest rank's device wrote for the install.

        Raises:
            RanksFailed: those of a rank are something else. WeightsUnknown: the check
                does not end.
        """
        replies = await self._caller.call_ranks(Verify(version=version))
        wait = POLL_SECONDS / 16
        limit = time.monotonic() + HANG_SECONDS
        # The ranks may only have started.
        while any(isinstance(reply, Running) for reply in replies):
            if time.monotonic() > limit:
                raise WeightsUnknown(
                    f"the check of version {version} does not end on some rank"
                )
            await asyncio.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS)
            polled = await self._caller.call_ranks(Poll(version=version))
            replies = [
                now if isinstance(before, Running) else before
                for before, now in zip(replies, polled, strict=True)
            ]
        verified = _all_or_raise(replies)
        return max(reply.copy_ms for reply in verified)

    async def restore(self, version: int, cause: RanksFailed) -> None:
        """Undo an install that failed on some rank.

        Raises:
            WeightsUnknown: a rank could not.
        """
        replies = await self._caller.call_ranks(Restore(version=version))
        for reply in replies:
            if not isinstance(reply, Installed):
                why = reply.failure if isinstance(reply, Refused) else reply
                raise WeightsUnknown(
                    f"version {version} was installed in part ({cause.failure}) and "
                    f"could not be undone ({why})"
                ) from cause
        if self._live is not None and self._live is self._staged:
            self._live = self._previous

    # --- what others read ----------------------------------------------------

    def held(self, version: int, fingerprint: str) -> HeldVersion:
        """The version with this ``fingerprint``, live or staged here.

        Raises:
            PeerUnsuitable: it is neither.
        """
        for held in (self._live, self._staged):
            if held is not None and (held.version, held.fingerprint) == (
                version,
                fingerprint,
            ):
                return held
        here = [
            f"version {held.version} is {how} ({held.fingerprint})"
            for held, how in ((self._live, "live"), (self._staged, "staged"))
            if held is not None
        ]
        raise PeerUnsuitable(
            f"version {version} with the fingerprint {fingerprint} is not held here: "
            f"{' and '.join(here) or 'nothing was staged since the start'}; read from "
            "another replica, or from the trainer"
        )

    async def offer(self, held: HeldVersion, seconds: float) -> list[Offered]:
        """Let others read ``held`` from every rank for ``seconds``, while serving.

        Raises:
            RanksFailed: a rank cannot; the others may still be read:
                :meth:`withdraw` follows.
        """
        live = held is self._live
        request = Offer(version=held.version, live=live, seconds=seconds)
        deadline = time.monotonic() + OFFER_SECONDS
        while True:
            replies = await self._call(request)
            if not any(isinstance(reply, Running) for reply in replies):
                return replies
            if time.monotonic() > deadline:
                raise PeerUnsuitable(
                    f"the ranks did not compare their copies of version {held.version} "
                    f"with what was staged within {OFFER_SECONDS:g} s: ask again"
                )
            await asyncio.sleep(POLL_SECONDS)

    async def withdraw(self, version: int) -> None:
        """Nobody reads ``version`` from the ranks any more."""
        await self._call(Withdraw(version=version))

    async def _call(self, request: RankRequest) -> list:
        return _all_or_raise(await self._caller.call_ranks(request))


class ConversionSteps:
    """How many conversions the ranks carry out at the next poll: all of them the same
    ones, and no more than take :data:`CONVERT_MS`, unless one alone does."""

    def __init__(self) -> None:
        #: The number of the first one that they do not.
        self.before = 0
        self._step = 1

    def go_on(self, replies: list[RankReply]) -> bool:
        """Whether there is something to be carried out, after these replies.

        Raises:
            LayoutRefused: the ranks have different conversions, in which each would
                wait for another one.
        """
        running = [reply for reply in replies if isinstance(reply, Running)]
        if not running or any(reply.conversions is None for reply in running):
            return False
        if len({reply.conversions for reply in running}) > 1:
            raise LayoutRefused(
                "the ranks convert different numbers of layers: "
                f"{[reply.conversions for reply in running]}"
            )
        took = max(reply.convert_ms for reply in running)
        done = min(reply.converted for reply in running)
        if done == self.before and done:
            share = CONVERT_MS / max(took, CONVERT_MS / 2)
            self._step = max(1, int(self._step * share))
        ready = min(reply.ready for reply in running)
        self.before = min(ready, done + self._step)
        return self.before > done


def _prove(
    held: CheckedManifest, staged: list[Staged], before: _Proven | None
) -> _Proven:
    """What the ranks' parts are of; made anew if a rank has a new plan for the layout
    that was proven ``before``.

    Raises:
        LayoutRefused: all ranks together do not read every tensor once.
    """
    reads = [reply.reads for reply in staged]
    if before is not None:
        if not any(reads):
            return before
        reads = [new or old for new, old in zip(reads, before.reads, strict=True)]
    return _Proven(held.layout, reads, Proof(held.manifest, reads))


def _progress(replies: list[Running | Staged]) -> tuple[RankProgress, ...]:
    """How far each rank is; one that is done has what it voted for."""
    return tuple(
        RankProgress(rank=rank, nbytes=reply.nbytes, total_nbytes=reply.total_nbytes)
        if isinstance(reply, Running)
        else RankProgress(
            rank=rank, nbytes=reply.vote.nbytes, total_nbytes=reply.vote.nbytes
        )
        for rank, reply in enumerate(replies)
    )


def _source_gone(
    version: int, source: SourceWatch, replies: list[Running | Staged]
) -> Failure:
    rank = next(r for r, reply in enumerate(replies) if isinstance(reply, Running))
    error = TransferFailed(
        f"{source}, from which {replies[rank].nbytes} of {replies[rank].total_nbytes} "
        "bytes had been read, is gone from discovery: publish the version again"
    )
    return failure_from(error, stage="stage", rank=rank, version=version)


def _all_or_raise(replies: list[RankReply]) -> list:
    failures = [reply.failure for reply in replies if isinstance(reply, Refused)]
    if failures:
        # A rank that only followed another one's failure is not the cause.
        undone = InstallUndone.__name__
        raise RanksFailed(min(failures, key=lambda failure: failure.kind == undone))
    return replies
