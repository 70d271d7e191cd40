# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica goes back to the version before from what its ranks kept: byte for byte,
with no source there, and never to anything else. Real ranks without engines, real NIXL.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from dynamo.refit.errors import Failure, NoWayBack
from dynamo.refit.protocol import Poll, RankReply, RankVote, Recall, Refused, Running
from dynamo.refit.worker.ranks import RanksFailed
from tests.support.agent_half import Offer, built, offer
from tests.support.ordered_rank import OrderedRanks
from tests.support.peers import PeerHalf
from tests.support.rank_group import STAGE_SECONDS
from tests.support.raw_sources import Held, RawSources
from tests.support.variants import TELLING, checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(240),
]

WARM = ("warm", 0, 0, 0)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawSources]:
    with RawSources(3, tmp_path_factory.mktemp("trainer")) as sources:
        yield sources


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrderedRanks]:
    with OrderedRanks(2, tmp_path_factory.mktemp("ranks")) as group:
        yield group


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrderedRanks]:
    with OrderedRanks(1, tmp_path_factory.mktemp("reader")) as group:
        yield group


class Replica(PeerHalf):
    """A replica that has just loaded checkpoint A, and what it is to be refitted to."""

    def __init__(
        self, group: OrderedRanks, served: str = "qwen3", staging: str = "auto"
    ) -> None:
        group.load(checkpoint(served, "A"), staging)
        super().__init__(group, staging)
        self.served = served
        #: Name and fingerprint of what each version is.
        self.versions: dict[int, tuple[str, str]] = {}

    def come_to(self, held: Held, name: str, slot: int = 0) -> None:
        offered = offer(held.write(slot, checkpoint(self.served, name)))
        self.refit(offered)
        self.note(name, offered)

    def note(self, name: str, offered: Offer) -> None:
        self.versions[self.version] = name, offered.weights
        self.assert_serves(name)

    def go_back(self, to: int) -> list[RankVote]:
        """Recall what version ``to`` was, and install it."""
        name, weights = self.versions[to]
        votes = self.recall(to, weights)
        self.take_over()
        self.versions[self.version] = name, weights
        self.assert_serves(name)
        return votes

    def refused(self, to: int) -> str:
        """Why it cannot go back."""
        with pytest.raises((NoWayBack, RanksFailed)) as refused:
            self.recall(to, self.versions[to][1])
        return str(refused.value)

    def assert_serves(self, name: str) -> None:
        golden = self.group.golden(checkpoint(self.served, name))
        assert self.group.digests() == golden


@pytest.mark.parametrize("served", TELLING)
def test_it_goes_back_and_forth_without_a_source(
    group: OrderedRanks, trainer: RawSources, served: str
) -> None:
    """Back to B, and from there to C again, which B replaced; then on as before, with
    the sessions that were there."""
    replica = Replica(group, served)
    held = trainer.hold(checkpoint(served, "A"), 3)
    replica.come_to(held, "B", 0)
    assert replica.kept is None
    replica.come_to(held, "C", 1)
    assert replica.kept == 1
    held.release()
    for to in (1, 2, 3, 4):
        votes = replica.go_back(to)
        assert replica.kept == replica.version - 1
        assert built(votes) == [WARM] * 2
        assert [vote.nbytes for vote in votes] == [0, 0]
        assert all(vote.timings.fingerprint_ms > 0 for vote in votes)

    again = trainer.hold(checkpoint(served, "A"), 3)
    for slot, name in enumerate("AB"):
        replica.come_to(again, name, slot)
    replica.go_back(replica.kept)
    again.release()


def test_weights_of_another_layout_come_back(
    group: OrderedRanks, trainer: RawSources
) -> None:
    """The trainer was cut otherwise when they came; its session is gone by now."""
    replica = Replica(group)
    for shards, name in ((2, "B"), (3, "C"), (1, "A")):
        held = trainer.hold(checkpoint("qwen3", "A"), shards)
        replica.come_to(held, name)
        held.release()
        # The check closes the session before.
        assert replica.verify() == 0
    assert replica.go_back(2)
    held = trainer.hold(checkpoint("qwen3", "A"), 3)
    for name in "BA":
        replica.come_to(held, name)
    replica.go_back(replica.kept)
    held.release()


def test_a_recalled_version_that_is_given_up_can_be_recalled_again(
    group: OrderedRanks, trainer: RawSources
) -> None:
    """Before its install, and after an install that was undone."""
    replica = Replica(group)
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    replica.come_to(held, "B")
    replica.come_to(held, "C")
    weights = replica.versions[1][1]
    replica.recall(1, weights)
    replica.discard()
    replica.assert_serves("C")

    replica.recall(1, weights)
    replica.install()
    replica.assert_serves("B")
    cause = Failure(kind="StagingCancelled", message="sent back", stage="barrier")
    replica.restore(RanksFailed(cause))
    replica.discard()
    replica.assert_serves("C")

    # A rank fails, twice, before anything is written and after all was.
    replica.recall(1, weights)
    group.order(1, times=2, after_install="broken")
    with pytest.raises(RanksFailed) as failed:
        replica.install()
    replica.restore(failed.value)
    replica.discard()
    replica.assert_serves("C")
    assert replica.kept == 1

    replica.go_back(1)
    replica.go_back(2)
    held.release()


def test_what_another_stage_has_overwritten_is_refused(
    group: OrderedRanks, trainer: RawSources
) -> None:
    """Also a stage that failed; by the worker, and by each rank on its own."""
    replica = Replica(group)
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    replica.come_to(held, "B")
    replica.come_to(held, "C")
    version = held.write(0, checkpoint("qwen3", "A"))
    failure = replica.refuse(offer(version, fingerprints=version.fingerprints + 1))
    assert failure.kind == "FingerprintMismatch"

    assert replica.kept is None
    assert "no copy of version 1" in replica.refused(1)
    recall = Recall(version=9, restores=1, seconds=STAGE_SECONDS)
    group.call(recall)
    for rank, reply in enumerate(_polled(group, 9)):
        assert isinstance(reply, Refused)
        assert (reply.failure.kind, reply.failure.rank) == ("NoWayBack", rank)
        assert "(kept: nothing)" in reply.failure.message
    replica.assert_serves("C")

    # From the next version on there is a way back again.
    replica.come_to(held, "A")
    replica.go_back(2)
    held.release()


def test_a_copy_that_was_changed_is_refused(
    group: OrderedRanks, trainer: RawSources
) -> None:
    replica = Replica(group)
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    replica.come_to(held, "B")
    replica.come_to(held, "C")
    group.spoil_copy(1, "model.norm.weight")
    with pytest.raises(RanksFailed) as refused:
        replica.recall(1, replica.versions[1][1])
    failure = refused.value.failure
    assert (failure.kind, failure.rank) == ("FingerprintMismatch", 1)
    assert failure.tensor == "model.norm.weight"
    assert "the copy of version 1" in failure.message
    replica.assert_serves("C")
    assert replica.kept is None
    held.release()


def test_only_the_version_before_and_only_with_its_fingerprint(
    group: OrderedRanks, trainer: RawSources
) -> None:
    replica = Replica(group)
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    for name in "BCA":
        replica.come_to(held, name)
    assert "kept: version 2" in replica.refused(1)
    replica.versions[2] = "C", replica.versions[1][1]
    assert "kept: version 2" in replica.refused(2)
    replica.assert_serves("A")
    held.release()


def test_direct_staging_keeps_nothing(group: OrderedRanks, trainer: RawSources) -> None:
    replica = Replica(group, staging="direct")
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    for name in "BC":
        offered = offer(held.write(0, checkpoint("qwen3", name)))
        replica.stage(offered)
        replica.install()
        replica.note(name, offered)
    assert replica.kept is None
    assert "no copy of version 1" in replica.refused(1)
    group.call(Recall(version=9, restores=1, seconds=STAGE_SECONDS))
    for reply in _polled(group, 9):
        assert reply.failure.kind == "NoWayBack"
        assert "direct staging keeps no copy" in reply.failure.message
    replica.assert_serves("C")
    held.release()


def test_others_read_a_recalled_version(
    group: OrderedRanks, reader: OrderedRanks, trainer: RawSources
) -> None:
    """Staged and live: so come those along that have no copy of their own."""
    replica, joiner = Replica(group), Replica(reader)
    held = trainer.hold(checkpoint("qwen3", "A"), 2)
    replica.come_to(held, "B")
    replica.come_to(held, "C")
    held.release()
    weights = replica.versions[1][1]
    replica.recall(1, weights)
    replica._weights[replica.version] = weights
    joiner.refit(replica.serve())
    joiner.assert_serves("B")
    replica.release()
    replica.take_over()
    replica.assert_serves("B")
    joiner.refit(replica.serve())
    joiner.assert_serves("B")
    replica.release()


def _polled(group: OrderedRanks, version: int) -> list[RankReply]:
    deadline = time.monotonic() + STAGE_SECONDS
    while True:
        replies = group.call(Poll(version=version))
        if not any(isinstance(reply, Running) for reply in replies):
            return replies
        assert time.monotonic() < deadline, "a rank works for ever"
        time.sleep(0.01)
