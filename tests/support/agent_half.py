# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The agent's half of a refit over ranks without an engine: the product's
:class:`dynamo.refit.worker.ranks.Ranks`, a :class:`RankGroup` to call, and a trainer
that says whatever a test wants it to.

    half = AgentHalf(group)
    half.refit(offer(held.write(0, checkpoint)))
    failure = half.refuse(offer(version, manifest=broken))
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from dynamo.refit.errors import Failure, failure_from
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    Message,
    Poll,
    Prepare,
    RankReply,
    RankRequest,
    RankVote,
    Stage,
    StagingChoice,
)
from dynamo.refit.worker.ranks import Ranks, RanksFailed
from tests.support.rank_group import STAGE_SECONDS, RankGroup
from tests.support.raw_sources import RawVersion


@dataclass(frozen=True)
class Offer:
    """What a trainer announces (``announced``, ``slot``, ``weights``), and what it
    answers when it is asked for its manifest and its fingerprints."""

    announced: str
    slot: int
    fingerprint: str
    manifest: bytes
    fingerprints: bytes
    runtime_fingerprint: str = ""


def offer(
    version: RawVersion,
    *,
    manifest: Manifest | None = None,
    slot: int | None = None,
    fingerprints: np.ndarray | None = None,
) -> Offer:
    """``version`` as an honest trainer offers it, but for what is given."""
    manifest = version.manifest if manifest is None else manifest
    if fingerprints is None:
        fingerprints = version.fingerprints
    return Offer(
        announced=manifest.fingerprint(),
        slot=version.slot if slot is None else slot,
        fingerprint=version_fingerprint(fingerprints),
        manifest=msgspec.msgpack.encode(manifest),
        fingerprints=fingerprints.astype("<u8").tobytes(),
    )


class OfferingTrainer:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: answers with one offer, and
    counts how often its manifest was asked for."""

    def __init__(self) -> None:
        self.offer: Offer | None = None
        self.manifests_sent = 0

    async def instances(self, path: str) -> list[int]:
        return [0]

    async def call(
        self, path: str, instance: int, request: Message, *_: object
    ) -> Message:
        match request:
            case GetManifest():
                self.manifests_sent += 1
                return ManifestReply(payload=self.offer.manifest)
            case GetFingerprints():
                return FingerprintsReply(payload=self.offer.fingerprints)
        raise AssertionError(request)


class GroupCaller:
    """Calls a :class:`RankGroup` from a thread, as an engine's RPC would.

    ``on_stage`` is called when the ranks have been asked to stage, ``on_poll`` after
    every poll, in the same thread. A small stage may have ended at its first poll.
    """

    def __init__(self, group: RankGroup) -> None:
        self.group = group
        self.calls: list[RankRequest] = []
        self.on_stage: Callable[[], None] = lambda: None
        self.on_poll: Callable[[], None] = lambda: None

    async def call_ranks(self, request: RankRequest) -> list[RankReply]:
        self.calls.append(request)
        return await asyncio.to_thread(self._call, request)

    def _call(self, request: RankRequest) -> list[RankReply]:
        replies = self.group.call(request)
        match request:
            case Stage():
                self.on_stage()
            case Poll():
                self.on_poll()
        return replies


class AgentHalf:
    """Stages, installs and verifies offers, one after the other; every call blocks."""

    def __init__(self, group: RankGroup, staging: StagingChoice = "auto") -> None:
        self.group = group
        self.caller = GroupCaller(group)
        self.trainer = OfferingTrainer()
        self._ranks = Ranks(self.caller, self.trainer, staging)
        self._runner = asyncio.Runner()
        self._version = 0
        self._runner.run(self._ranks.describe())

    def stage(self, offered: Offer, seconds: float = STAGE_SECONDS) -> list[RankVote]:
        """Prepare the next version; every rank's vote.

        Raises:
            RefitError: refused; the ranks have let go of it, as after an agent's.
        """
        self._version += 1
        self.trainer.offer = offered
        prepare = Prepare(
            model="tiny",
            version=self._version,
            epoch=1,
            announcement_id=f"a{self._version}",
            endpoint="-",
            instance=0,
            manifest_digest=offered.announced,
            slot=offered.slot,
            fingerprint=offered.fingerprint,
            runtime_fingerprint=offered.runtime_fingerprint,
            stage_seconds=seconds,
            keep_seconds=STAGE_SECONDS,
        )
        try:
            return list(self._runner.run(self._ranks.stage(prepare)))
        except Exception:
            self._runner.run(self._ranks.discard(self._version))
            raise

    def refuse(self, offered: Offer, seconds: float = STAGE_SECONDS) -> Failure:
        """The failure that an agent answers a prepare with, which must fail."""
        try:
            votes = self.stage(offered, seconds)
        except RanksFailed as error:
            return error.failure
        # As at the agent's process boundary: whatever it is becomes a failure.
        except Exception as error:
            return failure_from(error, stage="stage", version=self._version)
        raise AssertionError(f"it was staged: {votes}")

    def install(self) -> None:
        """Make the staged version live on every rank; it must work at once."""
        assert self._runner.run(self._ranks.install(self._version)) == 0

    def verify(self) -> None:
        """Compare what is live with the staged version."""
        self._runner.run(self._ranks.verify(self._version))

    def refit(self, offered: Offer) -> list[RankVote]:
        """Stage an offer, scribble over the live parameters, install and verify it."""
        votes = self.stage(offered)
        self.group.scribble()
        self.install()
        self.verify()
        return votes

    def close(self) -> None:
        self._runner.close()


def built(votes: Sequence[RankVote]) -> list[tuple[str, int, int, int]]:
    """Per rank, how its session came about and what it had to build."""
    return [
        (
            vote.session,
            vote.counters.allocations,
            vote.counters.registrations,
            vote.counters.descriptor_builds,
        )
        for vote in votes
    ]
