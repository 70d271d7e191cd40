# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Rank 0's decisions, as data: who is in, what is in which slot, how it ends."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit import manifest as manifest_module
from dynamo.refit.errors import (
    FingerprintMismatch,
    LeaseHeld,
    ManifestInvalid,
    PointerMoved,
    SourceLost,
    failure_from,
)
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import (
    Region,
    Shard,
    Source,
    TensorEntry,
    decode_manifest,
)
from dynamo.refit.publish.group import Group
from dynamo.refit.publish.handle import PublishedVersion, Release
from dynamo.refit.publish.job import JobState, OwnVersions, RankState, Report
from dynamo.refit.publish.merge import RankPart, merge
from dynamo.refit.publish.publication import KEPT
from dynamo.refit.publish.store import MAX_VALUE_BYTES, Generation, store_error

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

READY_SECONDS = 30.0

Rows = tuple[int, int]


def tensor(
    name: str, *blocks: Rows, rows: int = 4, dtype: str = "float32"
) -> TensorEntry:
    """``rows`` by 2, of which a rank holds the rows of ``blocks``."""
    shards = tuple(
        Shard(
            source=0,
            region=0,
            byte_offset=64 * number,
            offset=(start, 0),
            shape=(stop - start, 2),
        )
        for number, (start, stop) in enumerate(blocks)
    )
    return TensorEntry(name=name, dtype=dtype, shape=(rows, 2), shards=shards)


def part(*tensors: TensorEntry, agent: str = "agent", slots: int = 2) -> RankPart:
    regions = ((Region(0, 1024),),) * slots
    source = Source(agent=agent, metadata=b"", memory="DRAM", device=0, slots=regions)
    return RankPart(
        model="tiny",
        mode="snapshot",
        slots=slots,
        world_size=2,
        tensors=tensors,
        source=source if tensors else None,
    )


UPPER = part(tensor("w", (0, 3)), agent="upper")
LOWER = part(tensor("w", (3, 4)), agent="lower")


class Job:
    """A group and its ranks; ``now`` is the time."""

    def __init__(self, *parts: RankPart, in_place: bool = False) -> None:
        self.parts = parts or (UPPER, LOWER)
        self.now = 0.0
        self.group = Group(
            "life",
            world_size=len(self.parts),
            slots=self.parts[0].slots,
            in_place=in_place,
            ready_seconds=READY_SECONDS,
        )
        self.own = [OwnVersions() for _ in self.parts]
        self.handles: dict[tuple[int, str], PublishedVersion] = {}
        self.names = [f"rank-{rank}" for rank in range(len(self.parts))]

    def join(self, number: int, /, **changes: object) -> tuple[int, ...]:
        said = {"rank": number, "world_size": len(self.parts), **changes}
        name = said.get("member", self.names[number])
        part = msgspec.structs.replace(
            self.parts[number], world_size=said["world_size"]
        )
        self.group.join(name, said["rank"], part, self.now)
        self.group.member(name)
        self.own[number].after = self.group.state().since
        return self.group.missing()

    def restart(self, rank: int) -> None:
        self.names[rank] += "-again"
        self.own[rank] = OwnVersions()
        self.join(rank)

    def take(self, rank: int, version: int) -> PublishedVersion:
        """Its handle. Whatever a rank wants, it says more than once."""
        own, in_flight = self.own[rank], ("continue", "recompute")[rank % 2]
        publication, again = (
            self.group.take_slot(
                self.names[rank], version, own.after, self.now, in_flight
            )
            for _ in (1, 2)
        )
        assert publication is again
        handle = own.take(own.next_of(version, self.group.state().publications))
        self.handles[rank, handle.announcement_id] = handle
        return handle

    def wrote(self, rank: int, announcement_id: str, *values: int) -> None:
        blocks = self.parts[rank].blocks
        values = values or tuple(range(rank + 1, rank + 1 + blocks))
        fingerprints = np.array(values, dtype="<u8").tobytes()
        report = Report(announcement_id, fingerprints)
        self.group.report(self.names[rank], report, self.now)

    def publish(self, version: int) -> str:
        """By all ranks; returns the announcement."""
        taken = {
            self.take(rank, version).announcement_id for rank in range(len(self.parts))
        }
        (name,) = taken
        for rank in range(len(self.parts)):
            self.wrote(rank, name)
        return name

    def end(self, rank: int, announcement_id: str) -> Release | None:
        """How the rank's handle has ended; ``None`` while it has not.

        Raises:
            RefitError: the one it ended with.
        """
        self.own[rank].apply(self.group.state())
        try:
            return self.handles[rank, announcement_id].wait(0)
        except TimeoutError:
            return None

    def lease(
        self, announcement_id: str, seconds: float = 10.0, epoch: int = 1
    ) -> None:
        self.group.log.acquire(announcement_id, epoch, seconds, self.now)

    def release(
        self, announcement_id: str, outcome: str = "completed", epoch: int = 1
    ) -> None:
        log, detail = self.group.log, "so it went"
        log.release(announcement_id, epoch, outcome, detail, self.now)


@pytest.fixture
def job() -> Job:
    job = Job()
    assert job.join(0) == (1,)
    assert job.join(1) == ()
    return job


# One manifest of all parts.


def test_disjoint_blocks_make_a_tensor_up() -> None:
    merged = merge({1: LOWER, 0: UPPER})
    manifest = merged.manifest
    assert [source.agent for source in manifest.sources] == ["upper", "lower"]
    (entry,) = manifest.tensors
    assert [(s.source, s.box) for s in entry.shards] == [
        (0, ((0, 3), (0, 2))),
        (1, ((3, 4), (0, 2))),
    ]


def test_equal_blocks_are_replicas_and_count_once() -> None:
    both = part(tensor("norm", (0, 4)), tensor("w", (0, 2), (2, 4)))
    third = part(tensor("late", (0, 4)), tensor("w", (2, 4)))
    merged = merge({0: both, 1: both, 2: third})
    assert [t.name for t in merged.manifest.tensors] == ["norm", "w", "late"]
    assert [len(t.shards) for t in merged.manifest.tensors] == [2, 5, 1]
    top = 2**64 - 1
    written = {0: [5, top, 7], 1: [5, top, 7], 2: [11, 7]}
    totals = merged.add_up({r: np.array(v, np.uint64) for r, v in written.items()})
    assert totals.tolist() == [5, 6, 11]


def test_a_rank_without_anything_is_no_source() -> None:
    merged = merge({0: part(), 1: UPPER, 2: LOWER})
    assert [source.agent for source in merged.manifest.sources] == ["upper", "lower"]
    assert [s.source for s in merged.manifest.tensors[0].shards] == [0, 1]
    nothing = np.zeros(0, np.uint64)
    one, two = np.array([1], np.uint64), np.array([2], np.uint64)
    assert merged.add_up({0: nothing, 1: one, 2: two}).tolist() == [3]


@pytest.mark.parametrize(
    ("second", "message", "rank"),
    [
        (tensor("w", (3, 4), dtype="bfloat16"), "bfloat16 (4, 2) on trainer rank 1", 1),
        (tensor("w", (3, 5), rows=5), "float32 (5, 2) on trainer rank 1, float32", 1),
        (tensor("w", (2, 4)), "overlap (rank 0 holds ((0, 3), (0, 2)); rank 1", 1),
        (tensor("other", (0, 4)), "hold 6 of 8 elements", 0),
    ],
)
def test_ranks_that_disagree_are_named(
    second: TensorEntry, message: str, rank: int
) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        merge({0: UPPER, 1: part(second)})
    assert message in str(caught.value)
    assert (caught.value.tensor, caught.value.rank) == ("w", rank)


def test_replicas_with_different_bytes_are_named() -> None:
    both = part(tensor("norm", (0, 4)), tensor("w", (0, 4)))
    merged = merge({0: both, 1: both, 2: both})
    same, other = np.array([1, 2], np.uint64), np.array([1, 3], np.uint64)
    with pytest.raises(FingerprintMismatch, match="ranks 0 and 2") as caught:
        merged.add_up({0: same, 1: same, 2: other})
    assert (caught.value.tensor, caught.value.rank) == ("w", 2)


# Who is in.


def test_a_join_may_be_repeated(job: Job) -> None:
    merged = job.group.merged
    assert job.join(1) == job.join(0) == ()
    assert job.group.merged is merged


def test_parts_that_do_not_fit_are_everybodys_error() -> None:
    job = Job(UPPER, UPPER, UPPER)
    job.join(0)
    job.join(1)
    with pytest.raises(ManifestInvalid, match="hold 6 of 8"):
        job.join(2)
    for rank in (0, 1, 2, 1):
        with pytest.raises(ManifestInvalid, match="hold 6 of 8"):
            job.group.member(job.names[rank])
    assert "hold 6 of 8" in job.group.state().failure.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 3}, "world_size is 3 on trainer rank 1 and 2 on rank 0"),
        ({"rank": 2}, "there is no trainer rank 2 of 2"),
    ],
)
def test_a_rank_out_of_place_is_everybodys_error(changes: dict, message: str) -> None:
    job = Job()
    job.join(0)
    with pytest.raises(ManifestInvalid, match=message):
        job.join(1, **changes)
    with pytest.raises(ManifestInvalid, match=message):
        job.group.member(job.names[0])


def test_a_manifest_that_workers_would_not_read_is_everybodys_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = merge({0: UPPER, 1: LOWER}).encoded
    assert decode_manifest(encoded) == merge({0: UPPER, 1: LOWER}).manifest
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", len(encoded))
    assert merge({0: UPPER, 1: LOWER}).encoded == encoded
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", len(encoded) - 1)
    with pytest.raises(ManifestInvalid, match="are read"):
        decode_manifest(encoded)
    job = Job()
    job.join(0)
    says = rf"1 tensors in 2 blocks has {len(encoded)} bytes.*: publish larger blocks"
    with pytest.raises(ManifestInvalid, match=says):
        job.join(1)
    with pytest.raises(ManifestInvalid, match=says):
        job.group.member(job.names[0])


def test_settings_must_be_alike() -> None:
    with pytest.raises(ManifestInvalid, match="slots is 1 on trainer rank 1 and 2"):
        merge({0: UPPER, 1: part(tensor("w", (3, 4)), slots=1)})


def test_a_restarted_rank_ends_what_is_out(job: Job) -> None:
    ready = job.publish(1)
    half = job.take(0, 2).announcement_id
    zombie = job.names[1]
    before = job.group.merged.manifest
    job.parts = (UPPER, part(tensor("w", (3, 4)), agent="lower again"))
    job.restart(1)
    for name in (ready, half):
        assert job.end(0, name).outcome == "failed"
        assert job.end(0, name).detail == "trainer rank 1 was restarted"
        with pytest.raises(SourceLost):
            job.lease(name)
    assert job.group.merged.manifest.fingerprint() != before.fingerprint()
    assert job.group.merged.manifest.sources[1].agent == "lower again"
    with pytest.raises(SourceLost, match="another process has joined"):
        job.group.member(zombie)
    assert job.group.state().refused[zombie].kind == "SourceLost"
    third = job.publish(3)
    assert [p.announcement_id for p in job.group.log.to_announce()] == [third]


def test_a_restarted_rank_that_does_not_fit_leaves_the_others_alone(job: Job) -> None:
    ready = job.publish(1)
    job.parts = (UPPER, part(tensor("w", (3, 4), dtype="float16")))
    with pytest.raises(ManifestInvalid):
        job.join(1, member="rank-1-again")
    assert job.group.member("rank-1").rank == 1
    assert set(job.group.state().refused) == {"rank-1-again"}
    job.lease(ready)


def test_a_leased_version_of_a_restarted_rank_ends_with_the_lease(job: Job) -> None:
    """With ``in_place`` the others' tensors are still being read."""
    for outcome in ("completed", "failed"):
        name = job.publish(1)
        job.lease(name)
        job.restart(1)
        assert job.end(0, name) is None
        with pytest.raises(SourceLost):
            job.lease(name)
        job.release(name, outcome)
        assert job.end(0, name).outcome == outcome
    name = job.publish(1)
    job.lease(name, seconds=10)
    job.restart(1)
    job.now = 11
    assert job.group.expire(job.now)
    assert job.end(0, name).detail == "trainer rank 1 was restarted"


def test_a_rank_that_leaves_takes_its_memory_along(job: Job) -> None:
    name = job.publish(1)
    job.group.leave(job.names[1], job.now)
    assert job.end(0, name).detail == "trainer rank 1 was closed"
    with pytest.raises(SourceLost):
        job.lease(name)
    later = job.take(0, 2).announcement_id
    job.wrote(0, later)
    job.restart(1)
    assert job.end(0, later).outcome == "failed"


# Slots.


def test_all_ranks_write_a_version_into_one_slot(job: Job) -> None:
    for version, slot in ((1, 0), (2, 1), (3, 0)):
        first, other = job.take(1, version), job.take(0, version)
        assert first.announcement_id == other.announcement_id
        assert first.slot == other.slot == slot


def test_a_rank_may_publish_a_version_twice(job: Job) -> None:
    assert job.publish(1) != job.publish(1)


def test_a_slow_rank_takes_part_in_what_the_others_have_left(job: Job) -> None:
    ahead = [job.take(0, version) for version in (1, 2, 3)]
    behind = [job.take(1, version) for version in (1, 2, 3)]
    assert [h.announcement_id for h in behind] == [h.announcement_id for h in ahead]
    job.wrote(1, behind[0].announcement_id)
    job.wrote(0, ahead[0].announcement_id)
    assert job.group.log.to_announce() == []
    assert job.end(1, behind[0].announcement_id).detail == (
        "its buffer was taken for version 3"
    )


def test_a_leased_slot_is_refused_to_every_rank_once(job: Job) -> None:
    first = job.publish(1)
    job.lease(first)
    second = job.publish(2)
    for rank in (1, 0):
        with pytest.raises(LeaseHeld, match="version 1 is still being read"):
            job.take(rank, 3)
    # It is the next slot's turn, as it is for a publisher of one rank.
    assert job.take(0, 4).slot == 1
    assert job.end(0, second).outcome == "superseded"
    job.release(first)
    assert job.take(0, 5).slot == 0


def test_a_refusal_stands_though_the_lease_has_ended_meanwhile(job: Job) -> None:
    first = job.publish(1)
    job.lease(first)
    job.publish(2)
    with pytest.raises(LeaseHeld):
        job.take(0, 3)
    job.release(first)
    again = job.take(0, 3)
    with pytest.raises(LeaseHeld):
        job.take(1, 3)
    assert job.take(1, 3).announcement_id == again.announcement_id


def test_many_refusals_do_not_push_out_what_is_there(job: Job) -> None:
    leased = [job.publish(1), job.publish(2)]
    for name in leased:
        job.lease(name)
    for _ in range(3 * KEPT):
        with pytest.raises(LeaseHeld):
            job.take(0, 3)
    assert len(list(job.group.log)) <= KEPT + len(leased)
    for name in leased:
        job.lease(name)


def test_old_publications_are_forgotten(job: Job) -> None:
    names = [job.publish(version) for version in range(3 * KEPT)]
    assert len(list(job.group.log)) <= KEPT + 3
    with pytest.raises(SourceLost, match="not held on rank 0 any more"):
        job.end(1, names[0])
    assert job.end(1, names[-3]).outcome == "superseded"


# Ready.


def test_a_version_is_ready_when_all_ranks_have_written(job: Job) -> None:
    name = job.take(0, 7).announcement_id
    job.take(1, 7)
    job.wrote(1, name, 2**63)
    job.wrote(1, name, 2**63)
    with pytest.raises(SourceLost):
        job.lease(name)
    assert job.group.log.to_announce() == []
    job.wrote(0, name, 2**63 + 5)
    (ready,) = job.group.log.to_announce()
    totals = np.array([5], dtype="<u8")
    assert (ready.version, ready.announcement_id) == (7, name)
    assert ready.fingerprint == version_fingerprint(totals)
    assert job.group.log.readable(name).fingerprints == totals.tobytes()
    assert ready.in_flight == "continue"  # rank 0's, though rank 1 came first
    job.wrote(0, name, 1)
    assert job.group.log.readable(name).fingerprints == totals.tobytes()
    assert job.group.log.to_announce() == []


def repeated(job: Job) -> list[str]:
    return [p.announcement_id for p in job.group.log.to_repeat(job.now)]


def test_the_newest_is_announced_again_and_what_somebody_has_leased(job: Job) -> None:
    first, second = job.publish(1), job.publish(2)
    ready = job.group.log.to_announce()
    assert [p.announcement_id for p in ready] == [first, second]
    assert repeated(job) == [second]
    job.lease(first, seconds=10)
    assert repeated(job) == [first, second]
    job.now = 11
    assert repeated(job) == [second]
    job.release(second)
    assert repeated(job) == []


@pytest.mark.parametrize("outcome", ["completed", "failed", "superseded"])
def test_what_nobody_has_taken_up_ends_with_the_newer_one(
    job: Job, outcome: str
) -> None:
    """The coordinator was not there for it, and refuses it from now on."""
    first, second = job.publish(1), job.publish(2)
    job.group.log.to_announce()
    job.lease(second)
    assert job.end(0, first) is None
    job.release(second, outcome)
    assert job.end(0, second).outcome == outcome
    for rank in (0, 1):
        assert job.end(rank, first) == Release(
            outcome="superseded", detail=f"version 2 was {outcome} before it"
        )
    assert repeated(job) == []


def test_who_did_not_hear_of_a_release_is_asked_again(job: Job) -> None:
    """The call that gave the lease of an older one back was lost."""
    first, second = job.publish(1), job.publish(2)
    job.group.log.to_announce()
    job.lease(first)
    job.lease(second)
    job.release(second)
    assert job.end(0, first) is None
    assert repeated(job) == [first]
    job.release(first, "superseded")
    assert job.end(0, first).detail == "so it went"
    assert repeated(job) == []


def test_a_lease_that_runs_out_ends_no_handle_by_itself(job: Job) -> None:
    first, second = job.publish(1), job.publish(2)
    job.group.log.to_announce()
    job.lease(first, seconds=1)
    job.release(second)
    job.now = 2.0
    assert repeated(job) == [first]


def test_a_refused_one_says_nothing_about_those_before_it(job: Job) -> None:
    """It was refused for itself: an unsafe policy, say."""
    first, second = job.publish(1), job.publish(2)
    job.group.log.to_announce()
    job.release(second, "refused")
    assert job.end(0, first) is None
    assert repeated(job) == [first]


def test_a_report_of_another_size_is_refused(job: Job) -> None:
    name = job.take(0, 1).announcement_id
    job.take(1, 1)
    job.wrote(0, name, 1, 2)
    for rank in (0, 1):
        with pytest.raises(ManifestInvalid, match="rank 0 reports 2 fingerprints of 1"):
            job.end(rank, name)


def test_a_rank_that_does_not_write_is_named_in_time(job: Job) -> None:
    job.now = 100.0
    name = job.take(0, 1).announcement_id
    job.wrote(0, name)
    job.now += READY_SECONDS - 1
    assert not job.group.expire(job.now)
    assert job.end(0, name) is None
    job.now += 1
    assert job.group.expire(job.now)
    assert not job.group.expire(job.now)
    with pytest.raises(SourceLost, match=r"version 1: trainer ranks \[1\] have not"):
        job.end(0, name)
    job.wrote(1, name)
    assert job.group.log.to_announce() == []
    assert job.publish(2)


def test_a_failed_write_ends_it_for_every_rank(job: Job) -> None:
    name = job.take(0, 1).announcement_id
    job.take(1, 1)
    failure = failure_from(PointerMoved("moved", tensor="w", rank=1), stage="publish")
    job.group.report(job.names[1], Report(name, failure=failure), job.now)
    job.wrote(0, name)
    for rank in (0, 1, 0):
        with pytest.raises(PointerMoved, match="moved") as caught:
            job.end(rank, name)
        assert (caught.value.tensor, caught.value.rank) == ("w", 1)


def test_replicas_that_differ_are_not_announced() -> None:
    whole = part(tensor("w", (0, 4)))
    job = Job(whole, whole)
    job.join(0), job.join(1)
    name = job.take(0, 1).announcement_id
    job.take(1, 1)
    job.wrote(0, name, 1)
    job.wrote(1, name, 2)
    assert job.group.log.to_announce() == []
    with pytest.raises(SourceLost):
        job.lease(name)
    for rank in (0, 1):
        with pytest.raises(FingerprintMismatch, match="ranks 0 and 1"):
            job.end(rank, name)


# Leases and ends.


def test_every_rank_hears_the_same_end(job: Job) -> None:
    name = job.publish(1)
    job.lease(name)
    assert job.end(0, name) is job.end(1, name) is None
    job.release(name, "failed")
    job.release(name, "completed")
    expected = Release(outcome="failed", detail="so it went")
    assert job.end(0, name) == job.end(1, name) == job.end(1, name) == expected


def test_a_released_snapshot_can_be_leased_until_its_slot_is_taken(job: Job) -> None:
    name = job.publish(1)
    job.release(name)
    job.lease(name)
    assert job.end(1, name).outcome == "completed"
    job.release(name)
    job.publish(2)
    job.lease(name, seconds=1)
    job.now = 2.0
    job.take(1, 3)
    with pytest.raises(SourceLost):
        job.lease(name)


def test_released_tensors_cannot_be_leased() -> None:
    """``in_place``: some rank may be writing them."""
    job = Job(part(tensor("w", (0, 4)), slots=1), in_place=True)
    job.join(0)
    name = job.publish(1)
    job.lease(name)
    job.release(name)
    with pytest.raises(SourceLost, match="may be writing it"):
        job.lease(name)


def test_the_end_of_rank_0_is_told(job: Job) -> None:
    first, second = job.publish(1), job.publish(2)
    job.release(first)
    job.lease(second)
    job.group.close("rank 0 was closed")
    assert job.end(1, first).outcome == "completed"
    with pytest.raises(SourceLost, match="rank 0 was closed"):
        job.end(1, second)
    with pytest.raises(SourceLost, match="rank 0 was closed"):
        job.take(1, 3)
    assert job.group.state().failure.message == "rank 0 was closed"


# Any order.

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["publish", "report", "repeat", "lease", "release", "restart"]),
        st.integers(0, 1),
        st.integers(0, 4),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, in_place=st.booleans())
def test_leased_bytes_never_change(steps: list, in_place: bool) -> None:
    """Whatever comes late, twice or never: what is leased is what each rank holds.

    Each rank writes versions in order, and reports them some time later.
    """
    slots = 1 if in_place else 2
    job = Job(
        part(tensor("w", (0, 3)), slots=slots),
        part(tensor("w", (3, 4)), slots=slots),
        in_place=in_place,
    )
    job.join(0), job.join(1)
    held: list[dict[int, str]] = [{}, {}]
    reports: list[list[str]] = [[], []]
    versions = [0, 0]
    known: list[str] = []
    leased: set[str] = set()

    def publish(rank: int) -> None:
        versions[rank] += 1
        try:
            taken = job.take(rank, versions[rank])
        except LeaseHeld:
            return
        for name in leased:
            assert held[rank].get(taken.slot) != name, "a leased slot is overwritten"
        held[rank][taken.slot] = taken.announcement_id
        reports[rank].append(taken.announcement_id)
        known.append(taken.announcement_id)

    for step, rank, which in steps:
        if step == "publish":
            publish(rank)
        elif step in ("report", "repeat") and reports[rank]:
            name = reports[rank][min(which, len(reports[rank]) - 1)]
            job.wrote(rank, name)
            if step == "report":
                reports[rank].remove(name)
        elif step == "restart":
            job.restart(rank)
            held[rank], reports[rank] = {}, []
            versions[rank] = max(versions)
            # Its bytes are gone: those who read them find out.
            leased.clear()
            for name in known[-4:]:
                job.release(name, "failed")
        elif step == "lease" and known:
            name = known[-1 - which % len(known)]
            try:
                job.lease(name, seconds=1e9)
            except SourceLost:
                continue
            leased.add(name)
            assert all(name in held[rank].values() for rank in (0, 1))
        elif step == "release" and leased:
            name = sorted(leased)[0]
            leased.discard(name)
            job.release(name)


# --- two coordinators -----------------------------------------------------------


@pytest.mark.parametrize("outcome", ["failed", "superseded", "refused"])
def test_an_older_coordinator_ends_nothing_under_a_newer_one_that_reads(
    job: Job, outcome: str
) -> None:
    """As in a rolling update of its pod: both hear the announcement."""
    name = job.publish(5)
    job.lease(name, epoch=100)
    job.lease(name, epoch=200)
    job.release(name, outcome, epoch=100)
    assert job.end(0, name) is None
    assert job.group.log.find(name).leased(job.now)
    job.release(name, "completed", epoch=200)
    assert job.end(0, name).outcome == "completed"


def test_one_that_never_had_a_lease_ends_nothing_either(job: Job) -> None:
    name = job.publish(5)
    job.lease(name, epoch=200)
    job.release(name, "failed", epoch=100)
    assert job.end(0, name) is None


def test_a_newer_coordinator_s_word_ends_a_killed_one_s_lease(job: Job) -> None:
    """Nobody would give it back for minutes."""
    name = job.publish(5)
    job.lease(name, seconds=500, epoch=100)
    job.lease(name, epoch=200)
    job.release(name, "completed", epoch=200)
    assert job.end(0, name).outcome == "completed"
    assert not job.group.log.find(name).leased(job.now)


# --- what is kept in the store ----------------------------------------------------


def test_what_a_rank_says_is_taken_in_once(job: Job) -> None:
    """Its state is read again with every heartbeat, and a payload may be."""
    name = job.take(0, 1).announcement_id
    wants = RankState("rank-1", wants=(1, 0))
    for _ in (1, 2):
        job.group.take_in(1, wants, {}, job.now)
    reported = RankState("rank-1", payloads=("report",))
    report = Report(name, np.array([3], dtype="<u8").tobytes())
    for payloads in ({"report": report}, {"report": report}, {}):
        job.group.take_in(1, reported, payloads, job.now)
    assert len(job.group.state().publications) == 1
    job.wrote(0, name)
    assert job.group.log.readable(name).version == 1


def test_a_report_of_something_forgotten_does_not_hide_what_a_rank_wants(
    job: Job,
) -> None:
    state = RankState("rank-1", wants=(1, 0), payloads=("report",))
    job.group.take_in(1, state, {"report": Report("old")}, job.now)
    assert [p.version for p in job.group.state().publications] == [1]


def test_a_rank_that_does_not_answer_ends_what_is_out_and_may_come_back(
    job: Job,
) -> None:
    job.now = 100.0
    job.group.take_in(1, RankState("rank-1"), {}, job.now)
    job.group.take_in(2, RankState("nobody"), {}, 0.0)
    name = job.publish(1)
    job.now += 20
    assert not job.group.expire(job.now)
    job.now += 0.1
    assert job.group.expire(job.now)
    expected = Release("failed", "trainer rank 1 does not answer")
    assert job.end(0, name) == job.end(1, name) == expected
    job.group.take_in(1, RankState("rank-1"), {}, job.now)
    assert not job.group.expire(job.now)
    job.lease(job.publish(2))


def generation() -> tuple[dist.HashStore, Generation]:
    store = dist.HashStore()
    return store, Generation.begin(store)


@pytest.mark.parametrize("size", [0, 1, MAX_VALUE_BYTES, 2 * MAX_VALUE_BYTES + 1])
def test_what_is_large_goes_through_the_store_in_pieces(size: int) -> None:
    store, job = generation()
    before = set(store.list_keys())
    report = Report("life-1", bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    job.put("report/rank-1", report)
    new = set(store.list_keys()) - before
    assert max(len(store.get(key)) for key in new) <= MAX_VALUE_BYTES
    assert job.holds("report/rank-1")
    assert job.payload("report/rank-1") == report
    job.delete("report/rank-1")
    assert not job.holds("report/rank-1")
    assert set(store.list_keys()) == before


def test_a_state_is_written_when_it_changes_and_as_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, zero = generation()
    one = Generation(store, zero.number, 1)
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    assert zero.read(range(1, 3), RankState) == {}
    state = RankState("rank-1", wants=(5, 2), payloads=("report/x",))
    for _ in (1, 2):
        one.write(state)
    first = msgspec.structs.replace(state, beat=1)
    assert zero.read(range(1, 3), RankState) == {1: first}
    now += 1.0
    one.write(state)
    assert zero.read(range(1, 3), RankState)[1].beat == 2
    one.write(RankState("rank-1", left=True))
    assert zero.read(range(1, 3), RankState)[1] == RankState("rank-1", 3, left=True)
    zero.write(JobState(missing=(2,)))
    assert one.read(range(1), JobState) == {0: JobState(beat=1, missing=(2,))}


def test_a_place_is_free_when_its_rank_has_died_and_not_when_it_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, zero = generation()
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    before, again = (Generation(store, zero.number, 1) for _ in (1, 2))
    assert again.has_place()
    before.write(RankState("rank-1"))
    assert not again.has_place()
    now += 2.9
    before.write(RankState("rank-1"))
    assert not again.has_place()
    now += 2.9
    assert not again.has_place()
    now += 0.2
    assert again.has_place()
    before.write(RankState("rank-1", left=True))
    assert not again.has_place()
    now += 60
    assert not again.has_place()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Broken pipe\nat 0x1"), "Broken pipe; start"),
        # Such as the CancelledError of a loop that has ended.
        (RuntimeError(), "RuntimeError; start"),
    ],
)
def test_what_ends_the_use_of_a_store_is_said_in_one_line(
    error: Exception, said: str
) -> None:
    lost = store_error(error)
    assert isinstance(lost, SourceLost)
    assert f"does not answer: {said}" in str(lost)
    assert "\n" not in str(lost)
