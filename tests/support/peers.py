# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Replicas without engines that read from each other: the product's ``Ranks`` and
``PeerSource`` over a :class:`RankGroup`.

    a, b = PeerHalf(first), PeerHalf(second)
    a.refit(offer(held.write(0, checkpoint)))
    b.refit(a.serve())
"""

from __future__ import annotations

import os
import signal

from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import (
    GetFingerprints,
    GetManifest,
    RankVote,
    ReleaseLease,
    ServeWeights,
    StagingChoice,
    WeightsServed,
)
from dynamo.refit.worker.peer import PeerSource
from dynamo.refit.worker.ranks import RanksFailed
from tests.support.agent_half import AgentHalf, Offer
from tests.support.rank_group import STAGE_SECONDS, RankGroup

#: A reader's lease.
LEASE_SECONDS = 60.0


class MortalRanks(RankGroup):
    """A :class:`RankGroup` of processes that can be stopped in their tracks."""

    def stop(self) -> None:
        for child in self._children:
            os.kill(child.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        for child in self._children:
            child.kill()


class PeerHalf(AgentHalf):
    """A replica that others can read from. ``announcements`` are those it was asked to
    serve, the newest last."""

    def __init__(self, group: RankGroup, staging: StagingChoice = "auto") -> None:
        super().__init__(group, staging)
        self.peer = PeerSource(self._ranks)
        self.announcements: list[str] = []
        self._fingerprints: dict[int, str] = {}

    @property
    def version(self) -> int:
        """The number of the version that was staged last."""
        return self._version

    def stage(self, offered: Offer, seconds: float = STAGE_SECONDS) -> list[RankVote]:
        self._fingerprints[self._version + 1] = offered.fingerprint
        return super().stage(offered, seconds)

    def serve(
        self, version: int | None = None, seconds: float = LEASE_SECONDS
    ) -> Offer:
        """What this replica says of ``version`` (the newest) to somebody who asks."""
        version = self._version if version is None else version
        served = self.ask(version, self._fingerprints[version], seconds)
        self.announcements.append(served.announcement_id)
        manifest = self.peer.manifest(
            GetManifest(manifest_digest=served.manifest_digest)
        )
        return Offer(
            announced=served.manifest_digest,
            slot=served.slot,
            fingerprint=self._fingerprints[version],
            manifest=manifest.payload,
            fingerprints=self.fingerprints(served.announcement_id),
            runtime_fingerprint=served.runtime_fingerprint,
        )

    def ask(
        self, version: int, fingerprint: str, seconds: float = LEASE_SECONDS
    ) -> WeightsServed:
        request = ServeWeights(
            model="tiny",
            epoch=1,
            version=version,
            fingerprint=fingerprint,
            seconds=seconds,
        )
        return self._runner.run(self.peer.serve(request))

    def fingerprints(self, announcement_id: str) -> bytes:
        request = GetFingerprints(announcement_id=announcement_id)
        return self.peer.fingerprints(request).payload

    def release(self, announcement_id: str | None = None) -> None:
        """A reader (the newest) has ended."""
        announcement_id = announcement_id or self.announcements[-1]
        request = ReleaseLease(
            model="tiny", epoch=1, announcement_id=announcement_id, outcome="completed"
        )
        self._runner.run(self.peer.release(request))

    def unserved(self, version: int | None = None) -> tuple[str, str]:
        """The error (its kind and its words) of a serve, which must fail."""
        try:
            self.serve(version)
        except RanksFailed as error:
            return error.failure.kind, error.failure.message
        except RefitError as error:
            return type(error).__name__, str(error)
        raise AssertionError("it was served")

    def discard(self) -> None:
        """The coordinator has given the newest version up."""
        self._runner.run(self._ranks.discard(self._version))

    def restore(self, cause: RanksFailed) -> None:
        """Undo the newest install."""
        self._runner.run(self._ranks.restore(self._version, cause))
