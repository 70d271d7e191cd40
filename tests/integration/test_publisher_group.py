# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainer jobs of several rank processes, over a real runtime and real NIXL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from dynamo.runtime import DistributedRuntime

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.errors import SourceLost, StoreMissing
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.fingerprint import Part, version_fingerprint
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    AcquireLease,
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    Refused,
    ReleaseLease,
)
from dynamo.refit.publish import publisher as publisher_module
from dynamo.refit.publish.publisher import WeightPublisher
from dynamo.refit.rpc import Caller
from dynamo.refit.transport.nixl import NixlAgent
from tests.support.trainer_rank import SHAPES, RankProcess, values

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(180),
]

REPLY = Done | Refused | ManifestReply | FingerprintsReply
Start = Callable[..., RankProcess]


@pytest.fixture
async def runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[DistributedRuntime]:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    yield runtime
    runtime.shutdown()


@pytest.fixture
async def events(runtime: DistributedRuntime) -> AsyncIterator[EventSubscriber]:
    topic = runtime.endpoint("dynamo.refit.weight_versions")
    async with EventSubscriber(topic) as events:
        yield events


@pytest.fixture
def store() -> dist.TCPStore:
    """Of the job, and of a process that outlives every rank."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def start(runtime: DistributedRuntime, store: dist.TCPStore) -> Iterator[Start]:
    ranks: list[RankProcess] = []

    def start(kind: str, rank: int, **options: Any) -> RankProcess:
        ranks.append(RankProcess(kind, rank, **{"port": store.port, **options}))
        return ranks[-1]

    yield start
    for rank in ranks:
        rank.kill()


async def hear(rank: RankProcess, what: str) -> Any:
    return await asyncio.to_thread(rank.hear, what)


async def started(*ranks: RankProcess) -> None:
    for rank in ranks:
        await hear(rank, "ready")


async def published(version: int, *ranks: RankProcess) -> list[Any]:
    for rank in ranks:
        rank.order(version)
    return [await hear(rank, "published") for rank in ranks]


class Fleet:
    """What workers and the coordinator do with an announced version."""

    def __init__(self, runtime: DistributedRuntime, events: EventSubscriber) -> None:
        self._caller = Caller(runtime)
        self._events = events
        self._agent = NixlAgent("reader")
        self._peers: dict[str, str] = {}

    async def announced(self, version: int) -> WeightVersionReady:
        async with asyncio.timeout(60):
            async for event in self._events:
                if event.version == version:
                    return event

    async def ask(self, ready: WeightVersionReady, request: Any) -> Any:
        return await self._caller.call(
            ready.endpoint, ready.instance, request, REPLY, 10
        )

    async def lease(self, ready: WeightVersionReady) -> Any:
        request = AcquireLease(
            model="tiny", epoch=1, announcement_id=ready.announcement_id, seconds=60
        )
        return await self.ask(ready, request)

    async def release(self, ready: WeightVersionReady) -> Any:
        request = ReleaseLease(
            model="tiny",
            epoch=1,
            announcement_id=ready.announcement_id,
            outcome="completed",
        )
        return await self.ask(ready, request)

    async def manifest(self, ready: WeightVersionReady) -> Manifest:
        reply = await self.ask(
            ready, GetManifest(manifest_digest=ready.manifest_digest)
        )
        return msgspec.msgpack.decode(reply.payload, type=Manifest)

    async def assert_holds(self, ready: WeightVersionReady, manifest: Manifest) -> None:
        """Every byte of every shard, replicas too, is the version's."""
        for number, tensor in enumerate(manifest.tensors):
            expected = values(tensor.name, ready.version)
            assert tensor.shape == tuple(expected.shape)
            for shard in tensor.shards:
                address = (
                    manifest.sources[shard.source]
                    .slots[ready.slot][shard.region]
                    .address
                )
                cut = tuple(slice(*side) for side in shard.box)
                found = await self._read(
                    manifest.sources[shard.source],
                    address + shard.byte_offset,
                    expected[cut].shape,
                )
                assert torch.equal(found, expected[cut]), (number, tensor.name, shard)
        await self._assert_fingerprints(ready, manifest)

    async def _read(self, source: Any, address: int, shape: Any) -> torch.Tensor:
        """As many float32 as ``shape`` says, from ``source``, over NIXL."""
        if source.agent not in self._peers:
            self._peers[source.agent] = self._agent.connect(source.metadata)
        target = torch.full(shape, float("nan"))
        kept = self._agent.register([(target.data_ptr(), target.nbytes)], "DRAM", 0)
        read = self._agent.prepare_read(
            self._peers[source.agent],
            (np.array([[target.data_ptr(), target.nbytes]]), "DRAM", 0),
            (np.array([[address, target.nbytes]]), "DRAM", 0),
        )
        read.post()
        async with asyncio.timeout(20):
            while not read.done():
                await asyncio.sleep(0.001)
        read.release()
        self._agent.deregister(kept)
        return target

    async def _assert_fingerprints(
        self, ready: WeightVersionReady, manifest: Manifest
    ) -> None:
        request = GetFingerprints(announcement_id=ready.announcement_id)
        reply = await self.ask(ready, request)
        expected = []
        for tensor in manifest.tensors:
            whole = tuple((0, size) for size in tensor.shape)
            full = values(tensor.name, ready.version)
            expected.append(Part(full, whole, tensor.shape).fold())
        assert np.frombuffer(reply.payload, "<u8").tolist() == expected
        assert ready.fingerprint == version_fingerprint(np.array(expected, np.uint64))


@pytest.fixture
def fleet(runtime: DistributedRuntime, events: EventSubscriber) -> Fleet:
    return Fleet(runtime, events)


async def test_fsdp_ranks_publish_what_each_of_them_has(
    fleet: Fleet, start: Start
) -> None:
    """Three versions, read byte for byte; the second and third build nothing."""
    ranks = [start("fsdp", rank) for rank in (0, 1)]
    await started(*ranks)
    manifests = set()
    for version in (1, 2, 3):
        slots = await published(version, *ranks)
        ready = await fleet.announced(version)
        assert slots == [ready.slot] * 2 == [(version - 1) % 2] * 2
        assert await fleet.lease(ready) == Done()
        if ready.manifest_digest not in manifests:
            manifest = await fleet.manifest(ready)
            manifests.add(ready.manifest_digest)
        await fleet.assert_holds(ready, manifest)
        assert await fleet.release(ready) == Done()
        for rank in ranks:
            assert (await hear(rank, "released"))["outcome"] == "completed"
    assert {t.name: t.shape for t in manifest.tensors} == SHAPES
    boxes = {t.name: [s.box[0] for s in t.shards] for t in manifest.tensors}
    assert boxes == {
        "up.weight": [(0, 4), (4, 7)],
        "down.weight": [(0, 3), (3, 5)],
        "last.weight": [(0, 1)],
    }
    for rank, built in ((ranks[0], 1), (ranks[1], 0)):
        rank.order("counters")
        assert await hear(rank, "counters") == {
            "registrations": 1,
            "fingerprint_batches": 2,
            "manifests_built": built,
            "manifests_sent": built,
            "published": 3,
        }


@pytest.mark.parametrize("mode", ["snapshot", "in_place"])
async def test_replicas_and_a_rank_with_nothing(
    fleet: Fleet, start: Start, mode: str
) -> None:
    ranks = [
        start(kind, rank, world_size=3, mode=mode)
        for rank, kind in enumerate(("replicas", "replicas", "idle"))
    ]
    await started(*ranks)
    await published(1, *ranks)
    ready = await fleet.announced(1)
    manifest = await fleet.manifest(ready)
    assert len(manifest.sources) == 2
    assert all(len(tensor.shards) == 2 for tensor in manifest.tensors)
    await fleet.assert_holds(ready, manifest)


async def test_no_rank_writes_a_leased_slot(fleet: Fleet, start: Start) -> None:
    ranks = [start("rows", rank, mode="in_place") for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    ready = await fleet.announced(1)
    assert await fleet.lease(ready) == Done()
    # ``in_place`` has one slot; rank 1 comes first, though rank 0 decides.
    for refused in await published(2, *reversed(ranks)):
        assert refused["kind"] == "LeaseHeld"
        assert "version 1 is still being read from slot 0" in refused["message"]
    assert await fleet.release(ready) == Done()
    for rank in ranks:
        assert (await hear(rank, "released"))["outcome"] == "completed"
    assert (await fleet.lease(ready)).failure.kind == "SourceLost"
    assert await published(3, *ranks) == [0, 0]
    assert (await fleet.announced(3)).slot == 0


async def test_a_rank_that_never_writes(fleet: Fleet, start: Start) -> None:
    ranks = [start("rows", rank, ready_seconds=1.0) for rank in (0, 1)]
    await started(*ranks)
    await published(1, ranks[0])
    lost = await hear(ranks[0], "released")
    assert lost["kind"] == "SourceLost"
    assert "trainer ranks [1] have not written it within 1 s" in lost["message"]
    # The slow rank hears it too, and the next version is whole.
    await published(1, ranks[1])
    assert await hear(ranks[1], "released") == lost
    await published(2, *ranks)
    ready = await fleet.announced(2)
    await fleet.assert_holds(ready, await fleet.manifest(ready))


async def test_a_rank_that_restarts(fleet: Fleet, start: Start) -> None:
    ranks = [start("rows", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    before = await fleet.announced(1)
    ranks[1].kill()
    ranks[1] = start("rows", 1)
    await started(ranks[1])
    failed = await hear(ranks[0], "released")
    assert failed == {"outcome": "failed", "detail": "trainer rank 1 was restarted"}
    assert (await fleet.lease(before)).failure.kind == "SourceLost"
    await published(2, *ranks)
    ready = await fleet.announced(2)
    assert ready.manifest_digest != before.manifest_digest
    await fleet.assert_holds(ready, await fleet.manifest(ready))
    ranks[0].order("counters")
    assert (await hear(ranks[0], "counters"))["manifests_built"] == 2


async def test_replicas_that_have_diverged(start: Start) -> None:
    ranks = [start("diverged", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    for rank in ranks:
        refused = await hear(rank, "released")
        assert (refused["kind"], refused["tensor"]) == (
            "FingerprintMismatch",
            "down.weight",
        )
        assert "ranks 0 and 1 hold different bytes" in refused["message"]


async def test_ranks_that_do_not_fit_are_refused_everywhere(start: Start) -> None:
    """Rank 0 has rows of what rank 1 has as a whole."""
    ranks = [start("rows", 0), start("replicas", 1)]
    for rank in ranks:
        refused = await hear(rank, "refused")
        assert (refused["kind"], refused["tensor"]) == ("ManifestInvalid", "up.weight")
        assert "overlap" in refused["message"]


async def test_rank_0_dies(start: Start, fleet: Fleet) -> None:
    ranks = [start("rows", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    ranks[0].kill()
    async with asyncio.timeout(60):
        lost = await hear(ranks[1], "released")
    assert lost["kind"] == "SourceLost"
    assert "does not answer" in lost["message"]


async def test_a_rank_dies(fleet: Fleet, start: Start) -> None:
    """Rank 0 goes on, and with another process in that place it publishes again."""
    ranks = [start("rows", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    ranks[1].kill()
    expected = {"outcome": "failed", "detail": "trainer rank 1 does not answer"}
    async with asyncio.timeout(60):
        assert await hear(ranks[0], "released") == expected
        await published(2, ranks[0])
        assert await hear(ranks[0], "released") == expected
    ranks[1] = start("rows", 1)
    await started(ranks[1])
    await published(3, *ranks)
    ready = await fleet.announced(3)
    await fleet.assert_holds(ready, await fleet.manifest(ready))


async def test_versions_go_out_while_a_process_group_is_made(
    fleet: Fleet, start: Start
) -> None:
    """Rank 0's trainer waits in the default store, which the publishers use, too."""
    ranks = [start("fsdp", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    ready = await fleet.announced(1)
    ranks[0].order("group")
    await asyncio.sleep(1)
    async with asyncio.timeout(10):
        assert await fleet.lease(ready) == Done()
        await fleet.release(ready)
        assert (await hear(ranks[1], "released"))["outcome"] == "completed"
        assert (await hear(ranks[0], "released"))["outcome"] == "completed"
        # Rank 0 decides where, though its trainer has not come to this version.
        ranks[1].order("alone")
        assert await hear(ranks[1], "published") == 1
    ranks[1].order("group")
    for rank in ranks:
        assert await hear(rank, "group") == 2
    ranks[0].order("alone")
    assert await hear(ranks[0], "published") == 1
    assert (await fleet.announced(2)).slot == 1


async def test_rank_0_ends_when_the_others_know_how(fleet: Fleet, start: Start) -> None:
    ranks = [start("rows", rank) for rank in (0, 1)]
    await started(*ranks)
    await published(1, *ranks)
    ready = await fleet.announced(1)
    await fleet.release(ready)
    await published(2, *ranks)
    await asyncio.to_thread(ranks[0].close)
    ends = [await hear(ranks[1], "released") for _ in (1, 2)]
    assert [end.get("outcome", end.get("kind")) for end in ends] == [
        "completed",
        "SourceLost",
    ]


async def test_another_job_is_not_mistaken_for_ours(
    fleet: Fleet, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has another store, and the same model and component."""
    yesterday = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other = start("replicas", 0, world_size=1, port=yesterday.port)
    await started(other)
    # Rank 1 is first, and sees nobody.
    late = start("rows", 1)
    await asyncio.sleep(3)
    ranks = [start("rows", 0), late]
    await started(*ranks)
    await published(5, *ranks)
    ready = await fleet.announced(5)
    assert len((await fleet.manifest(ready)).sources) == 2

    monkeypatch.setattr(publisher_module, "START_SECONDS", 1.0)
    with pytest.raises(SourceLost, match=r"trainer ranks \[0\] of 2 have not joined"):
        await asyncio.to_thread(
            WeightPublisher, "tiny", {}, rank=1, world_size=2, store=yesterday
        )


def test_several_ranks_need_a_store() -> None:
    with pytest.raises(StoreMissing, match=r"init_process_group.* first, or pass"):
        WeightPublisher("tiny", {"w": torch.zeros(4)}, world_size=2)
