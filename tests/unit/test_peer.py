# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica as a source: what it tells readers, how long, and what it refuses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest

from dynamo.refit import manifest as manifest_module
from dynamo.refit.errors import Failure, PeerUnsuitable, SourceLost
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import Manifest, Region, Source, decode_manifest
from dynamo.refit.protocol import (
    Done,
    GetFingerprints,
    GetManifest,
    HeldTensor,
    Offered,
    ReleaseLease,
    ServeWeights,
    WeightsServed,
)
from dynamo.refit.worker.peer import PeerSource, as_sources
from dynamo.refit.worker.ranks import HeldVersion, RanksFailed

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

PARTS = np.array([11, 22], dtype=np.uint64)


def source(rank: int, address: int = 0, slots: int = 2) -> Source:
    first = (1 << 30) * (rank + 1) + address
    return Source(
        agent=f"refit-{rank}",
        metadata=b"m",
        memory="DRAM",
        device=0,
        slots=tuple((Region(first + (slot << 20), 4096),) for slot in range(slots)),
    )


#: Of both ranks, in the order of memory.
TENSORS = (
    HeldTensor("norm", "float32", (5,), 0),
    HeldTensor("w", "bfloat16", (4, 3), 256),
)


def parts_of(version: int, rank: int) -> np.ndarray:
    return PARTS + np.uint64(100 * version + 1000 * rank)


@dataclass
class FakeRanks:
    """A test fake of :class:`dynamo.refit.worker.ranks.Ranks` of two ranks.

    ``slot`` is per rank where a version is.
    """

    versions: list[HeldVersion] = field(default_factory=list)
    slot: list[int] = field(default_factory=lambda: [0, 0])
    address: int = 0
    slots: list[int] = field(default_factory=lambda: [2, 2])
    refusal: Exception | None = None
    withdrawn: list[int] = field(default_factory=list)

    def hold(self, version: int) -> ServeWeights:
        """Hold one more version; the request for it."""
        weights = f"published as {version}"
        self.versions.append(HeldVersion("tiny", version, weights))
        return ServeWeights(
            model="tiny", version=version, fingerprint=weights, epoch=1, seconds=30.0
        )

    def held(self, version: int, weights: str) -> HeldVersion:
        for held in self.versions:
            if (held.version, held.fingerprint) == (version, weights):
                return held
        raise PeerUnsuitable("not held here")

    async def offer(self, held: HeldVersion, seconds: float) -> list[Offered]:
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        return [
            Offered(
                rank=rank,
                slot=self.slot[rank],
                source=source(rank, self.address, self.slots[rank]),
                tensors=TENSORS,
                parts=parts_of(held.version, rank).astype("<u8").tobytes(),
                layout=f"form of rank {rank}",
            )
            for rank in range(2)
        ]

    async def withdraw(self, version: int) -> None:
        self.withdrawn.append(version)


@pytest.fixture
def ranks() -> FakeRanks:
    return FakeRanks()


@pytest.fixture
def there(ranks: FakeRanks) -> PeerSource:
    return PeerSource(ranks)


def manifest_of(there: PeerSource, served: WeightsServed) -> Manifest:
    reply = there.manifest(GetManifest(manifest_digest=served.manifest_digest))
    manifest = decode_manifest(reply.payload)
    assert manifest.fingerprint() == served.manifest_digest
    manifest.validate()
    return manifest


def ended(there: PeerSource, served: WeightsServed) -> ReleaseLease:
    return ReleaseLease(
        model="tiny",
        epoch=1,
        announcement_id=served.announcement_id,
        outcome="completed",
    )


async def test_what_a_reader_is_told(ranks: FakeRanks, there: PeerSource) -> None:
    """The images of all ranks, each for the same rank of the reader, and what their
    bytes come to; the version keeps the trainer's name."""
    served = await there.serve(ranks.hold(3))
    manifest = manifest_of(there, served)
    assert manifest.model == "tiny"
    assert [
        (tensor.name, tensor.dtype, tensor.shape, s.source, s.region, s.byte_offset)
        for tensor in manifest.tensors
        for s in tensor.shards
    ] == [
        ("rank 0: norm", "float32", (5,), 0, 0, 0),
        ("rank 0: w", "bfloat16", (4, 3), 0, 0, 256),
        ("rank 1: norm", "float32", (5,), 1, 0, 0),
        ("rank 1: w", "bfloat16", (4, 3), 1, 0, 256),
    ]
    assert manifest.sources == (source(0), source(1))
    assert manifest.layouts == ("form of rank 0", "form of rank 1")
    assert served.slot == 0
    reply = there.fingerprints(GetFingerprints(announcement_id=served.announcement_id))
    parts = np.frombuffer(reply.payload, dtype="<u8")
    assert parts.tolist() == [311, 322, 1311, 1322]
    assert version_fingerprint(parts) == served.runtime_fingerprint


async def test_versions_take_turns_in_one_manifest(
    ranks: FakeRanks, there: PeerSource
) -> None:
    seen = []
    for version in range(4):
        ranks.slot = [version % 2] * 2
        seen.append(await there.serve(ranks.hold(version)))
    assert [served.slot for served in seen] == [0, 1, 0, 1]
    assert len({served.manifest_digest for served in seen}) == 1
    assert len({served.runtime_fingerprint for served in seen}) == 4


@pytest.mark.parametrize("first", [0, 1])
async def test_ranks_that_are_a_turn_apart(
    ranks: FakeRanks, there: PeerSource, first: int
) -> None:
    """The slot that is announced is on every rank the one with the version."""
    manifests = set()
    for turn in (first, 1 - first, first):
        ranks.slot = [turn, 1 - turn]
        served = await there.serve(ranks.hold(turn))
        sources = manifest_of(there, served).sources
        assert [s.slots[served.slot] for s in sources] == [
            source(0).slots[turn],
            source(1).slots[1 - turn],
        ]
        manifests.add(served.manifest_digest)
    assert len(manifests) == 1


async def test_ranks_that_keep_different_numbers_of_versions(
    ranks: FakeRanks, there: PeerSource
) -> None:
    ranks.slots = [2, 1]
    with pytest.raises(PeerUnsuitable, match=r"rank 1 keeps 1 .* rank 0 keeps 2") as no:
        await there.serve(ranks.hold(1))
    assert no.value.rank == 1
    assert ranks.withdrawn == [1]


async def test_new_memory_is_another_manifest(
    ranks: FakeRanks, there: PeerSource
) -> None:
    """Readers of the old one still find it."""
    before = await there.serve(ranks.hold(1))
    ranks.address = 1 << 16
    after = await there.serve(ranks.hold(2))
    assert before.manifest_digest != after.manifest_digest
    assert manifest_of(there, before).sources[0] == source(0)
    assert manifest_of(there, after).sources[0] == source(0, 1 << 16)


async def test_a_manifest_that_nobody_would_read(
    ranks: FakeRanks, there: PeerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks hear that nobody reads."""
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(PeerUnsuitable, match="workers read at most 100"):
        await there.serve(ranks.hold(1))
    assert ranks.withdrawn == [1]


async def test_a_rank_that_refuses(ranks: FakeRanks, there: PeerSource) -> None:
    """What the others have promised is taken back, unless it was promised before."""
    request = ranks.hold(1)
    ranks.refusal = RanksFailed(Failure(kind="PeerUnsuitable", message="", stage="-"))
    with pytest.raises(RanksFailed):
        await there.serve(request)
    assert ranks.withdrawn == [1]

    ranks.refusal, refusal = None, ranks.refusal
    served = await there.serve(request)
    ranks.refusal = refusal
    with pytest.raises(RanksFailed):
        await there.serve(request)
    assert ranks.withdrawn == [1]
    assert there.fingerprints(GetFingerprints(announcement_id=served.announcement_id))


async def test_each_version_ends_with_its_last_reader(
    ranks: FakeRanks, there: PeerSource
) -> None:
    requests = [ranks.hold(1), ranks.hold(2)]
    one, two, three = await asyncio.gather(
        there.serve(requests[0]), there.serve(requests[0]), there.serve(requests[1])
    )
    assert len({one.announcement_id, two.announcement_id, three.announcement_id}) == 3
    assert await there.release(ended(there, one)) == Done()
    assert ranks.withdrawn == []
    await there.release(ended(there, one))
    assert ranks.withdrawn == []
    await there.release(ended(there, three))
    assert ranks.withdrawn == [2]
    await there.release(ended(there, two))
    assert ranks.withdrawn == [2, 1]


async def test_a_lease_ends_by_itself(ranks: FakeRanks, there: PeerSource) -> None:
    request = ranks.hold(1)
    short = msgspec.structs.replace(request, seconds=0.05)
    late, reader = await there.serve(short), await there.serve(request)
    await asyncio.sleep(0.1)
    with pytest.raises(SourceLost, match="has ended here"):
        there.fingerprints(GetFingerprints(announcement_id=late.announcement_id))
    await there.release(ended(there, reader))
    assert ranks.withdrawn == [1]


async def test_a_version_that_was_given_up(ranks: FakeRanks, there: PeerSource) -> None:
    served = await there.serve(ranks.hold(1))
    ranks.versions.clear()
    with pytest.raises(PeerUnsuitable, match="not held here"):
        there.fingerprints(GetFingerprints(announcement_id=served.announcement_id))


async def test_what_nobody_was_promised(ranks: FakeRanks, there: PeerSource) -> None:
    with pytest.raises(SourceLost, match="no manifest abc is served here"):
        there.manifest(GetManifest(manifest_digest="abc"))
    with pytest.raises(SourceLost):
        there.fingerprints(GetFingerprints(announcement_id="never"))
    done = await there.release(
        ReleaseLease(model="tiny", epoch=1, announcement_id="never", outcome="failed")
    )
    assert done == Done()
    assert ranks.withdrawn == []


def test_one_slot_is_one_slot() -> None:
    """On a device there is one shadow."""
    offered = [
        Offered(
            rank=rank,
            slot=0,
            source=source(rank, slots=1),
            tensors=(),
            parts=b"",
            layout="",
        )
        for rank in range(2)
    ]
    assert as_sources(offered) == (0, (source(0, slots=1), source(1, slots=1)))


async def test_the_next_version_ends_every_lease() -> None:
    """Also those that a coordinator that is gone has never given back."""
    ranks = FakeRanks()
    source = PeerSource(ranks)
    leases = [await source.serve(ranks.hold(version)) for version in (5, 5, 6)]
    await source.end()
    assert sorted(ranks.withdrawn) == [5, 6]
    for lease in leases:
        with pytest.raises(SourceLost):
            source.fingerprints(GetFingerprints(announcement_id=lease.announcement_id))
    await source.end()
    assert sorted(ranks.withdrawn) == [5, 6]
