# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The publisher on a real runtime: manifest, leases, slots, announcements."""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from dynamo.runtime import DistributedRuntime
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span
from torch import nn

from dynamo.refit import manifest as manifest_module
from dynamo.refit.bus import EventSubscriber
from dynamo.refit.errors import (
    EventRefused,
    LeaseHeld,
    ManifestInvalid,
    SourceLost,
)
from dynamo.refit.events import Event, WeightVersionReady
from dynamo.refit.fingerprint import Part, version_fingerprint
from dynamo.refit.manifest import Manifest
from dynamo.refit.presence import LastingPublisher
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
from dynamo.refit.publish.publisher import (
    PublishedVersion,
    PublisherCounters,
    WeightPublisher,
)
from dynamo.refit.rpc import Caller

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(60),
]

PATH = "dynamo.trainer.weights"
REPLY = Done | Refused | ManifestReply | FingerprintsReply


@pytest.fixture
async def caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Caller]:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    caller = Caller(runtime)
    caller.runtime = runtime
    yield caller
    runtime.shutdown()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a": torch.zeros(8, 4), "b": torch.zeros(3)}


@pytest.fixture
def publisher(
    caller: Caller, weights: dict[str, torch.Tensor]
) -> Iterator[WeightPublisher]:
    with WeightPublisher("tiny", weights) as publisher:
        yield publisher


async def until_ready(caller: Caller, published: PublishedVersion) -> None:
    """A version can be leased as soon as it is fingerprinted."""
    request = GetFingerprints(announcement_id=published.announcement_id)
    while isinstance(await ask(caller, request), Refused):
        await asyncio.sleep(0.01)


async def ask(caller: Caller, request: object) -> object:
    (instance,) = await instances(caller)
    return await caller.call(PATH, instance, request, REPLY, 10)


async def instances(caller: Caller) -> list[int]:
    while not (found := await caller.instances(PATH)):
        await asyncio.sleep(0.01)
    return found


def lease(published: PublishedVersion, seconds: float = 60) -> AcquireLease:
    name = published.announcement_id
    return AcquireLease(model="tiny", epoch=1, announcement_id=name, seconds=seconds)


async def test_the_manifest_says_where_the_bytes_are(
    publisher: WeightPublisher, caller: Caller, weights: dict[str, torch.Tensor]
) -> None:
    weights["a"].fill_(1.5)
    published = publisher.publish(1)
    reply = await ask(
        caller, GetManifest(manifest_digest=publisher.manifest.fingerprint())
    )
    manifest = msgspec.msgpack.decode(reply.payload, type=Manifest)
    assert manifest == publisher.manifest
    address = manifest.shard_addresses(published.slot)[0]
    assert ctypes.string_at(address, 128) == weights["a"].numpy().tobytes()
    other = await ask(caller, GetManifest(manifest_digest="of another life"))
    assert other.failure.kind == "SourceLost"


async def test_what_is_announced_is_what_was_there(
    publisher: WeightPublisher, caller: Caller, weights: dict[str, torch.Tensor]
) -> None:
    """The version's fingerprint is of the bytes at the time of publish()."""
    topic = caller.runtime.endpoint("dynamo.refit.weight_versions")
    async with EventSubscriber(topic) as events:
        weights["a"].fill_(1.5)
        weights["b"].copy_(torch.tensor([1.0, 2.0, 3.0]))
        expected = [
            Part(tensor, tuple((0, size) for size in tensor.shape), tensor.shape).fold()
            for tensor in weights.values()
        ]
        published = publisher.publish(1)
        weights["a"].zero_()
        event = await anext(events)
    reply = await ask(
        caller, GetFingerprints(announcement_id=published.announcement_id)
    )
    assert np.frombuffer(reply.payload, "<u8").tolist() == expected
    assert event.fingerprint == version_fingerprint(np.array(expected, np.uint64))


async def test_an_announcement_carries_the_span_the_trainer_is_in(
    publisher: WeightPublisher, caller: Caller
) -> None:
    topic = caller.runtime.endpoint("dynamo.refit.weight_versions")
    context = SpanContext(0xA7, 0xB7, is_remote=False, trace_flags=TraceFlags(1))
    async with EventSubscriber(topic) as events:
        with use_span(NonRecordingSpan(context)):
            publisher.publish(1)
        first, repeat = await anext(events), await anext(events)
    assert first.traceparent == f"00-{0xA7:032x}-{0xB7:016x}-01"
    assert repeat.traceparent == first.traceparent


async def test_a_warm_publication_builds_nothing(
    publisher: WeightPublisher, caller: Caller
) -> None:
    manifest = publisher.manifest
    for version in range(6):
        await until_ready(caller, publisher.publish(version))
    assert publisher.manifest is manifest
    assert publisher.counters == PublisherCounters(
        registrations=1,
        fingerprint_batches=2,
        manifests_built=1,
        manifests_sent=0,
        published=6,
    )


async def test_tensors_that_have_moved_end_the_version(
    caller: Caller, weights: dict[str, torch.Tensor]
) -> None:
    weights["a"] = nn.Parameter(weights["a"])
    with WeightPublisher("tiny", weights, mode="in_place") as publisher:
        weights["a"].data = torch.ones(8, 4)
        with pytest.raises(ManifestInvalid, match="storage was replaced"):
            publisher.publish(1)


async def test_the_end_of_the_publisher_ends_its_handles(
    caller: Caller, weights: dict[str, torch.Tensor]
) -> None:
    with WeightPublisher("tiny", weights) as publisher:
        published = publisher.publish(1)
        waiting = asyncio.create_task(published.released())
        await asyncio.sleep(0)
        waiting.cancel()
    for _ in range(2):
        with pytest.raises(SourceLost, match="closed before the release"):
            await published.released()
    with pytest.raises(SourceLost, match="publisher is closed"):
        publisher.publish(2)
    publisher.close()


async def test_a_leased_slot_is_not_written_again(
    publisher: WeightPublisher, caller: Caller
) -> None:
    first = publisher.publish(1)
    await until_ready(caller, first)
    assert await ask(caller, lease(first)) == Done()
    publisher.publish(2)
    with pytest.raises(LeaseHeld, match="version 1 is still being read from slot 0"):
        publisher.publish(3)
    release = ReleaseLease(
        model="tiny",
        epoch=1,
        announcement_id=first.announcement_id,
        outcome="completed",
    )
    assert await ask(caller, release) == Done()
    assert first.wait(5).outcome == "completed"
    publisher.publish(4)
    assert publisher.publish(5).slot == 0


async def test_a_lease_ends_by_itself(
    publisher: WeightPublisher, caller: Caller
) -> None:
    """Its holder died: the trainer goes on."""
    first = publisher.publish(1)
    await until_ready(caller, first)
    await ask(caller, lease(first, seconds=0.05))
    publisher.publish(2)
    await asyncio.sleep(0.1)
    assert publisher.publish(3).slot == first.slot


async def test_an_overwritten_version_cannot_be_leased(
    publisher: WeightPublisher, caller: Caller
) -> None:
    """Nobody came for it; its buffer holds another version now."""
    first = publisher.publish(1)
    publisher.publish(2)
    third = publisher.publish(3)
    assert third.slot == first.slot
    refused = await ask(caller, lease(first))
    assert isinstance(refused, Refused)
    assert refused.failure.kind == "SourceLost"
    release = await first.released()
    assert release.outcome == "superseded"
    assert "version 3" in release.detail
    await until_ready(caller, third)
    assert await ask(caller, lease(third)) == Done()


async def test_a_version_that_nobody_heard_of_ends_with_the_one_after_it(
    publisher: WeightPublisher, caller: Caller
) -> None:
    """A trainer with two buffers waits for it before it publishes the third."""
    first, second = publisher.publish(1), publisher.publish(2)
    await until_ready(caller, second)
    assert await ask(caller, lease(second)) == Done()
    with pytest.raises(TimeoutError):
        first.wait(0.1)
    done = ReleaseLease(
        model="tiny",
        epoch=1,
        announcement_id=second.announcement_id,
        outcome="completed",
    )
    assert await ask(caller, done) == Done()
    assert (await asyncio.wait_for(first.released(), 5)).outcome == "superseded"
    assert (await second.released()).outcome == "completed"
    assert publisher.publish(3).slot == first.slot


async def test_it_announces_until_the_version_has_ended(
    publisher: WeightPublisher, caller: Caller
) -> None:
    topic = caller.runtime.endpoint("dynamo.refit.weight_versions")
    async with EventSubscriber(topic) as events:
        published = publisher.publish(1)
        heard: list[WeightVersionReady] = []
        async for event in events:
            heard.append(event)
            if len(heard) == 2:
                break
        assert {event.announcement_id for event in heard} == {published.announcement_id}
        assert heard[0].sequence < heard[1].sequence
        assert heard[0].manifest_digest == publisher.manifest.fingerprint()
        name = published.announcement_id
        done = ReleaseLease(
            model="tiny", epoch=1, announcement_id=name, outcome="refused", detail="no"
        )
        await ask(caller, done)
        assert (await published.released()).detail == "no"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                async for event in events:
                    raise AssertionError(f"announced again: {event}")


@pytest.mark.parametrize(
    ("version", "error"),
    [
        (-1, ValueError),
        (2**63, ValueError),
        ("5", TypeError),
        (5.0, TypeError),
        (True, TypeError),
    ],
)
def test_what_is_no_version_number_is_refused_and_takes_no_turn(
    publisher: WeightPublisher, version: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        publisher.publish(version)
    assert publisher.counters.published == 0


async def test_a_number_of_numpy_is_announced_as_any_other(
    caller: Caller, publisher: WeightPublisher
) -> None:
    topic = caller.runtime.endpoint("dynamo.refit.weight_versions")
    async with EventSubscriber(topic) as events:
        publisher.publish(np.int64(5))
        heard = await asyncio.wait_for(anext(events), 30)
        again = await asyncio.wait_for(anext(events), 30)
    assert (type(heard.version), heard.version, again.version) == (int, 5, 5)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("model", "", "1 to 1024 characters"),
        ("model", "m" * 1025, "1 to 1024 characters"),
        ("mode", "in-place", "snapshot, in_place"),
        ("namespace", "a.b", "without dots"),
        ("component", "", "without dots"),
        ("component", "c" * 201, "1 to 200 characters"),
        ("rank", -1, "from 0 to 0"),
        ("rank", 1, "from 0 to 0"),
        ("world_size", 0, "above 0"),
        ("ready_seconds", float("nan"), "above 0"),
        ("ready_seconds", -1.0, "above 0"),
        ("ready_seconds", float("inf"), "above 0"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_at_once(
    weights: dict[str, torch.Tensor], setting: str, value: object, allowed: str
) -> None:
    """No runtime is made for it: there is no fixture of one."""
    settings = {"model": "tiny", "tensors": weights, setting: value}
    with pytest.raises(ValueError, match=f"{setting}=.*{allowed}"):
        WeightPublisher(**settings)


def test_a_manifest_that_workers_would_not_read_is_refused_at_once(
    caller: Caller, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ManifestInvalid, match="at most 100: publish larger blocks"):
        WeightPublisher("tiny", weights)


async def test_two_threads_may_publish(
    publisher: WeightPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each version takes a slot of its own, though one thread's request is slow."""
    take = publisher._side.take

    def slowly(version: int, *arguments: object) -> PublishedVersion:
        if version == 1:
            time.sleep(0.5)
        return take(version, *arguments)

    monkeypatch.setattr(publisher._side, "take", slowly)
    published = await asyncio.gather(
        *(asyncio.to_thread(publisher.publish, version) for version in (1, 2))
    )
    assert {handle.version for handle in published} == {1, 2}
    assert {handle.slot for handle in published} == {0, 1}


def test_an_unknown_in_flight_policy_is_refused_and_takes_no_turn(
    publisher: WeightPublisher,
) -> None:
    """The coordinator would take its announcements for malformed ones."""
    with pytest.raises(ValueError, match=r"'Drain'.*continue, recompute, drain"):
        publisher.publish(1, in_flight="Drain")
    assert publisher.counters.published == 0


async def test_a_part_of_rank_0_that_fails_ends_every_handle_with_its_error(
    publisher: WeightPublisher, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: LastingPublisher, event: Event) -> Event:
        raise EventRefused(f"version {event.version} does not fit into an event")

    published = [publisher.publish(version) for version in (1, 2)]
    await until_ready(caller, published[1])
    monkeypatch.setattr(LastingPublisher, "publish", refuse)
    for handle in published:
        with pytest.raises(SourceLost, match=r"EventRefused: version \d does not fit"):
            await asyncio.wait_for(handle.released(), 10)
    with pytest.raises(SourceLost, match=r"publisher is closed|rank 0 failed"):
        publisher.publish(3)
    publisher.close()
