# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The contract of the bus, on the real event plane: file discovery and ZMQ.

Version 0 marks a probe: it is published until a subscriber hears it, since a
publisher's first events are lost until it is discovered, and is left out of what
is compared. The bus sits on a class made for metrics, so this also is what tells
that another release of Dynamo still carries it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from dynamo.runtime import DistributedRuntime, Endpoint

from dynamo.refit import bus, events
from dynamo.refit.bus import (
    DETAIL_CHARACTERS,
    EventPlaneUnavailable,
    EventPublisher,
    EventSubscriber,
    Item,
    RejectedPayload,
)
from dynamo.refit.errors import EventRefused, Failure
from dynamo.refit.events import (
    MAX_EVENT_BYTES,
    SCHEMA,
    RefitFailed,
    RefitSuperseded,
    WeightVersionReady,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(90),
]

ENDPOINT = "bus.refit.refit_events"
PROBE = 0
SECONDS = 20.0


@pytest.fixture
def endpoint(runtime: DistributedRuntime) -> Endpoint:
    return runtime.endpoint(ENDPOINT)


@pytest.fixture
async def subscriber(endpoint: Endpoint) -> AsyncIterator[EventSubscriber]:
    async with EventSubscriber(endpoint) as subscriber:
        yield subscriber


@pytest.fixture
async def publisher(endpoint: Endpoint) -> AsyncIterator[EventPublisher]:
    async with EventPublisher(endpoint, "here", epoch=7) as publisher:
        yield publisher


class Peer:
    """Another process that publishes: see ``bus_peer.py``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, publisher: str, epoch: int = 0) -> Peer:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("bus_peer.py")),
            ENDPOINT,
            publisher,
            str(epoch),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        peer = cls(process)
        assert await peer.answer() == "ready"
        return peer

    async def answer(self) -> str:
        line = await asyncio.wait_for(self.process.stdout.readline(), SECONDS)
        return line.decode().strip()

    async def publish(self, first: int, count: int) -> int:
        """Publish ``count`` versions from ``first``; the last event's ``sequence``."""
        self.process.stdin.write(f"{first} {count}\n".encode())
        return int(await self.answer())

    async def probe(self) -> None:
        await self.publish(PROBE, 1)

    async def stop(self) -> int:
        self.process.stdin.close()
        return await asyncio.wait_for(self.process.wait(), SECONDS)

    async def kill(self) -> int:
        self.process.send_signal(signal.SIGKILL)
        return await asyncio.wait_for(self.process.wait(), SECONDS)


@pytest.fixture
async def peers(
    runtime: DistributedRuntime,
) -> AsyncIterator[Callable[..., Awaitable[Peer]]]:
    started: list[Peer] = []

    async def start(publisher: str, epoch: int = 0) -> Peer:
        started.append(await Peer.start(publisher, epoch))
        return started[-1]

    yield start
    for peer in started:
        if peer.process.returncode is None:
            await peer.kill()


def superseded(version: int) -> RefitSuperseded:
    return RefitSuperseded(version=version, by=version + 1)


def is_probe(item: Item) -> bool:
    return isinstance(item, RefitSuperseded) and item.version == PROBE


async def take(subscriber: EventSubscriber, count: int) -> list[Item]:
    """The next ``count`` items that are no probes."""

    async def collect() -> list[Item]:
        items: list[Item] = []
        while len(items) < count:
            item = await anext(subscriber)
            if not is_probe(item):
                items.append(item)
        return items

    return await asyncio.wait_for(collect(), SECONDS)


async def hear(
    subscriber: EventSubscriber, publisher: str, probe: Callable[[], Awaitable[None]]
) -> None:
    """Probe until the subscriber has discovered ``publisher``."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        await probe()
        try:
            item = await asyncio.wait_for(anext(subscriber), 0.1)
        except TimeoutError:
            continue
        if is_probe(item) and item.sender == publisher:
            return
    pytest.fail(f"{publisher} was not discovered within {SECONDS} s")


async def hear_here(subscriber: EventSubscriber, publisher: EventPublisher) -> None:
    async def probe() -> None:
        publisher.publish(superseded(PROBE))

    await hear(subscriber, "here", probe)


async def until(condition: Callable[[], bool]) -> bool:
    """Wait for ``condition``; whether it came true."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return condition()


# --- what arrives -----------------------------------------------------------


async def test_events_of_another_process_arrive_equal_and_in_order(
    subscriber: EventSubscriber, peers: Callable[..., Awaitable[Peer]]
) -> None:
    peer = await peers("trainer-0", epoch=3)
    await hear(subscriber, "trainer-0", peer.probe)

    before = time.time()
    last = await peer.publish(1, 500)
    got = await take(subscriber, 500)

    assert [msgspec.structs.replace(event, at=0.0) for event in got] == [
        RefitSuperseded(
            version=n, by=n + 1, sender="trainer-0", sequence=last - 500 + n, epoch=3
        )
        for n in range(1, 501)
    ]
    assert all(before <= event.at <= time.time() for event in got)
    assert subscriber.dropped == 0
    assert await peer.stop() == 0


async def test_publish_returns_what_arrives(
    subscriber: EventSubscriber, publisher: EventPublisher
) -> None:
    await hear_here(subscriber, publisher)
    failure = Failure(
        kind="TransferFailed",
        message="\0 first\0byte\0 \U0001f4a5 \u202e Größe " + "x" * 100_000,
        stage="stage",
        tensor="model.layers.0.mlp.down_proj.weight",
        rank=1,
    )
    sent = [
        publisher.publish(event)
        for event in (
            RefitFailed(version=5, failure=failure, serving=((1, None), (2, 4))),
            WeightVersionReady(
                model="tiny",
                version=6,
                announcement_id="a" * 32,
                endpoint="ns.trainer.weights",
                instance=2**53 - 1,
                manifest_digest="0123abcd",
                slot=1,
                fingerprint="feedbeef",
                in_flight="recompute",
            ),
        )
    ]

    assert await take(subscriber, 2) == sent
    assert [(event.sender, event.epoch) for event in sent] == [("here", 7)] * 2
    assert sent[1].sequence == sent[0].sequence + 1


async def test_seq_starts_at_one(publisher: EventPublisher) -> None:
    assert [publisher.publish(superseded(n)).sequence for n in (1, 2, 3)] == [1, 2, 3]


async def test_two_publishers_keep_their_own_order(
    subscriber: EventSubscriber,
    publisher: EventPublisher,
    peers: Callable[..., Awaitable[Peer]],
) -> None:
    peer = await peers("there")
    await hear(subscriber, "there", peer.probe)
    await hear_here(subscriber, publisher)

    there = asyncio.create_task(peer.publish(1, 200))
    for version in range(1001, 1201):
        publisher.publish(superseded(version))
        await asyncio.sleep(0)
    got = await take(subscriber, 400)
    last = {
        "there": await there,
        "here": publisher.publish(superseded(PROBE)).sequence - 1,
    }

    for name, first in (("there", 1), ("here", 1001)):
        own = [event for event in got if event.sender == name]
        assert [event.version for event in own] == list(range(first, first + 200))
        assert [event.sequence for event in own] == list(
            range(last[name] - 199, last[name] + 1)
        )


async def test_a_late_subscriber_sees_nothing_old(
    endpoint: Endpoint, subscriber: EventSubscriber, publisher: EventPublisher
) -> None:
    await hear_here(subscriber, publisher)
    old = [publisher.publish(superseded(n)) for n in range(1, 11)]
    assert await take(subscriber, 10) == old

    async with EventSubscriber(endpoint) as late:
        await hear_here(late, publisher)
        new = publisher.publish(superseded(11))
        assert await take(late, 1) == [new]


async def test_a_killed_publisher_is_replaced_without_restarting_the_subscriber(
    subscriber: EventSubscriber,
    peers: Callable[..., Awaitable[Peer]],
    short_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", str(short_tmp))
    first = await peers("coordinator-a", epoch=1)
    await hear(subscriber, "coordinator-a", first.probe)
    await first.publish(1, 5)
    assert [event.version for event in await take(subscriber, 5)] == [1, 2, 3, 4, 5]
    assert await first.kill() == -signal.SIGKILL
    assert list(short_tmp.iterdir()) == []

    second = await peers("coordinator-b", epoch=2)
    await hear(subscriber, "coordinator-b", second.probe)
    await second.publish(6, 5)
    got = await take(subscriber, 5)

    assert [event.version for event in got] == [6, 7, 8, 9, 10]
    assert {(event.sender, event.epoch) for event in got} == {("coordinator-b", 2)}


# --- what is refused --------------------------------------------------------


def misbehave(
    publisher: EventPublisher, payload: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Send bytes that :func:`encode` would never make, by the same way."""
    with monkeypatch.context() as patch:
        patch.setattr(bus, "encode", lambda event: payload)
        publisher.publish(superseded(1))


def foreign_payloads() -> dict[str, bytes]:
    good = events.encode(superseded(1))
    return {
        "random": bytes(range(255, -1, -1)) * 4,
        "nul": b"\0",
        "empty": b"",
        "text": b'{"event": "RefitSuperseded", "version": 1, "by": 2}',
        "truncated": good[:-1],
        "trailing": good + b"\0",
        "other type": msgspec.msgpack.encode({"event": "Rebooted", "version": 1}),
        "long tag": good.replace(
            b"\xafRefitSuperseded", b"\xda\xff\xff" + b"x" * (2**16 - 1)
        ),
        "no utf-8": good.replace(b"RefitSuperseded", b"RefitSupersede\xff"),
        "deeply nested": b"\x91" * 100_000,
    }


@pytest.mark.parametrize("kind", foreign_payloads())
async def test_foreign_bytes_are_reported_and_the_stream_goes_on(
    subscriber: EventSubscriber,
    publisher: EventPublisher,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    payload = foreign_payloads()[kind]
    await hear_here(subscriber, publisher)

    misbehave(publisher, payload, monkeypatch)
    sent = publisher.publish(superseded(2))
    rejected, event = await take(subscriber, 2)

    assert isinstance(rejected, RejectedPayload)
    assert (rejected.reason, rejected.nbytes) == ("malformed_event", len(payload))
    assert 0 < len(rejected.detail) <= DETAIL_CHARACTERS
    assert event == sent


async def test_oversized_is_refused_on_both_sides(
    subscriber: EventSubscriber,
    publisher: EventPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await hear_here(subscriber, publisher)
    before = publisher.publish(superseded(1))
    with pytest.raises(EventRefused, match=f"at most {MAX_EVENT_BYTES}"):
        publisher.publish(
            RefitFailed(
                version=2,
                failure=Failure(kind="K", message="x" * MAX_EVENT_BYTES, stage="s"),
                serving=(),
            )
        )
    after = publisher.publish(superseded(3))
    misbehave(publisher, b"\xc0" * (MAX_EVENT_BYTES + 1), monkeypatch)
    last = publisher.publish(superseded(4))

    assert after.sequence == before.sequence + 1
    got = await take(subscriber, 4)
    assert got[:2] == [before, after]
    assert (got[2].reason, got[2].nbytes) == ("oversized_event", MAX_EVENT_BYTES + 1)
    assert got[3] == last


async def test_another_schema_is_rejected(
    subscriber: EventSubscriber, publisher: EventPublisher
) -> None:
    await hear_here(subscriber, publisher)
    publisher.publish(RefitSuperseded(schema=SCHEMA + 1, version=1, by=2))
    [rejected] = await take(subscriber, 1)
    assert rejected.reason == "malformed_event"
    assert f"event schema {SCHEMA + 1}" in rejected.detail


# --- a consumer that is behind ----------------------------------------------


async def test_a_slow_consumer_loses_the_oldest_and_is_told_once_per_burst(
    endpoint: Endpoint,
    publisher: EventPublisher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(bus, "QUEUE_EVENTS", 10)
    caplog.set_level(logging.WARNING, logger=bus.__name__)
    async with EventSubscriber(endpoint) as slow:
        await hear_here(slow, publisher)
        for burst in (1, 2):
            publisher.publish(superseded(1))
            await take(slow, 1)
            sent = [publisher.publish(superseded(n)) for n in range(2, 52)]
            assert await until(lambda expected=40 * burst: slow.dropped == expected)
            assert await take(slow, 10) == sent[-10:]
            assert len(caplog.records) == burst


# --- coming and going -------------------------------------------------------


def own_tasks() -> list[str]:
    """The names of this process's libzmq threads, and its children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        # Dynamo's pool threads come and go meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name = (task / "comm").read_text().strip()
            if name.startswith("ZMQbg"):
                found.append(name)
            found.extend((task / "children").read_text().split())
    return found


@pytest.fixture
def short_tmp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty $TMPDIR; a socket's path has room for 107 bytes, pytest's has not."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        yield Path(directory)


async def test_close_leaves_nothing_behind(
    endpoint: Endpoint, tmp_path: Path, short_tmp: Path
) -> None:
    def discovered() -> list[Path]:
        return [p for p in (tmp_path / "discovery").rglob("*topic*") if p.is_file()]

    threads = set(threading.enumerate())
    assert own_tasks() == []
    subscriber, publisher = EventSubscriber(endpoint), EventPublisher(endpoint, "here")
    await subscriber.start()
    await publisher.start()
    await hear_here(subscriber, publisher)
    assert len(set(threading.enumerate()) - threads) == 1
    assert len(discovered()) == 1

    for _ in range(2):
        publisher.close()
        subscriber.close()

    assert set(threading.enumerate()) == threads
    assert own_tasks() == []
    assert list(short_tmp.iterdir()) == []
    assert str(short_tmp) not in Path("/proc/net/unix").read_text()
    assert await until(lambda: discovered() == [])
    assert [event async for event in subscriber] == []
    with pytest.raises(EventPlaneUnavailable, match="closed"):
        publisher.publish(superseded(1))


@pytest.mark.parametrize(("count", "nbytes"), [(900, 10), (300, 20_000)])
async def test_close_passes_on_what_was_published(
    subscriber: EventSubscriber, endpoint: Endpoint, count: int, nbytes: int
) -> None:
    """More than the relay keeps up with, less than the 1024 a subscriber buffers."""
    failure = Failure(kind="K", message="x" * nbytes, stage="s")
    async with EventPublisher(endpoint, "here") as publisher:
        await hear_here(subscriber, publisher)
        sent = [
            publisher.publish(RefitFailed(version=n, failure=failure, serving=()))
            for n in range(1, count + 1)
        ]
    assert await take(subscriber, count) == sent


class SlowRelay:
    """A relay that subscribes at once and reads when it is told to."""

    def __init__(self, endpoint: Endpoint, address: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.rcvtimeo = int(SECONDS * 1000)
        self.socket.connect(address)
        self.socket.subscribe(b"")

    def read(self, count: int) -> list[list[bytes]]:
        return [self.socket.recv_multipart() for _ in range(count)]

    def shutdown(self) -> None:
        self.context.destroy(linger=0)


async def test_a_burst_waits_for_a_slow_relay(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    relays: list[SlowRelay] = []

    def relay(endpoint: Endpoint, address: str) -> SlowRelay:
        relays.append(SlowRelay(endpoint, address))
        return relays[-1]

    monkeypatch.setattr(bus, "FpmEventRelay", relay)
    async with EventPublisher(endpoint, "here") as publisher:
        sent = [publisher.publish(superseded(n)) for n in range(1, 20_001)]
        got = relays[0].read(20_000)
    assert got == [
        [b"", event.sequence.to_bytes(8, "big"), events.encode(event)] for event in sent
    ]


async def test_close_wakes_the_consumer(endpoint: Endpoint) -> None:
    subscriber = EventSubscriber(endpoint)
    await subscriber.start()
    waiting = asyncio.create_task(anext(subscriber, "ended"))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    subscriber.close()
    assert await asyncio.wait_for(waiting, SECONDS) == "ended"


async def test_close_right_after_start(endpoint: Endpoint) -> None:
    threads = set(threading.enumerate())
    for _ in range(20):
        async with EventSubscriber(endpoint):
            pass
    assert set(threading.enumerate()) == threads


async def test_the_end_of_the_runtime_ends_the_iteration(
    runtime: DistributedRuntime, subscriber: EventSubscriber, publisher: EventPublisher
) -> None:
    """With an error: whoever iterates has not closed it."""
    await hear_here(subscriber, publisher)
    runtime.shutdown()
    rest: list[Item] = []

    async def read_on() -> None:
        async for item in subscriber:
            rest.append(item)

    with pytest.raises(EventPlaneUnavailable, match="ended by itself"):
        await asyncio.wait_for(read_on(), SECONDS)
    assert all(map(is_probe, rest))


class EndingSource:
    """A stand-in for Dynamo's subscriber whose stream ends by itself: each one made
    brings the next payload of ``payloads``, if there is one, and ends."""

    payloads: Iterator[bytes]
    made = 0

    def __init__(self, endpoint: Endpoint) -> None:
        type(self).made += 1

    def recv(self) -> bytes | None:
        payload, self.recv = next(self.payloads, None), lambda: None
        return payload

    def shutdown(self) -> None:
        """Its stream has ended."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> type[EndingSource]:
    monkeypatch.setattr(bus, "FpmEventSubscriber", EndingSource)
    monkeypatch.setattr(bus, "RESUBSCRIBE_SECONDS", 0.01)
    EndingSource.made, EndingSource.payloads = 0, iter(())
    return EndingSource


async def test_a_subscription_that_ends_by_itself_is_made_again(
    endpoint: Endpoint, ending: type[EndingSource], caplog: pytest.LogCaptureFixture
) -> None:
    sent = [superseded(n) for n in (1, 2, 3)]
    ending.payloads = iter([events.encode(event) for event in sent])
    async with EventSubscriber(endpoint) as subscriber:
        assert await take(subscriber, 3) == sent
    assert "subscribing again" in caplog.text


async def test_a_subscription_that_cannot_be_made_again_is_an_error(
    endpoint: Endpoint, ending: type[EndingSource]
) -> None:
    async with EventSubscriber(endpoint) as subscriber:
        for _ in range(2):
            with pytest.raises(EventPlaneUnavailable, match="DYN_EVENT_PLANE"):
                await asyncio.wait_for(anext(subscriber), SECONDS)
    assert ending.made == bus.SHORT_SUBSCRIPTIONS


async def test_close_ends_a_subscriber_that_subscribes_again(
    endpoint: Endpoint, ending: type[EndingSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "RESUBSCRIBE_SECONDS", 1000.0)
    threads = set(threading.enumerate())
    subscriber = EventSubscriber(endpoint)
    await subscriber.start()
    await asyncio.sleep(0.1)
    subscriber.close()
    assert set(threading.enumerate()) == threads
    assert [event async for event in subscriber] == []


class DeafRelay:
    """A relay that never subscribes."""

    down = False

    def __init__(self, endpoint: Endpoint, address: str) -> None:
        type(self).down = False
        assert Path(address.removeprefix("ipc://")).is_socket()

    def shutdown(self) -> None:
        type(self).down = True


async def test_start_gives_up_on_a_relay_that_does_not_subscribe(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, short_tmp: Path
) -> None:
    monkeypatch.setattr(bus, "FpmEventRelay", DeafRelay)
    monkeypatch.setattr(bus, "RELAY_SECONDS", 0.2)
    publisher = EventPublisher(endpoint, "here")
    with pytest.raises(EventPlaneUnavailable, match=r"not subscribed within 0\.2 s"):
        await publisher.start()
    assert DeafRelay.down
    assert own_tasks() == []
    assert list(short_tmp.iterdir()) == []


async def test_a_wrong_call_order_is_refused(endpoint: Endpoint) -> None:
    publisher, subscriber = EventPublisher(endpoint, "here"), EventSubscriber(endpoint)
    with pytest.raises(EventPlaneUnavailable, match="not started"):
        publisher.publish(superseded(1))
    with pytest.raises(EventPlaneUnavailable, match="not started"):
        await anext(subscriber)
    async with publisher, subscriber:
        for part in (publisher, subscriber):
            with pytest.raises(EventPlaneUnavailable, match="started once"):
                await part.start()


async def test_it_starts_while_futures_of_the_runtime_complete(
    runtime: DistributedRuntime,
) -> None:
    assert await race() == "done"


async def test_two_threads_of_the_runtime_are_too_few(
    runtime: DistributedRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo 1.6 stands still with them. When it does not, we need not ask for more."""
    monkeypatch.setenv("DYN_RUNTIME_NUM_WORKER_THREADS", "2")
    for _ in range(8):
        if await race() == "stands still":
            return
    pytest.fail("eight times it did not stand still")


async def race() -> str:
    """What ``relay_race.py`` says, or that it stands still."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.relay_race", stdout=asyncio.subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 12)
        return out.decode().splitlines()[-1]
    except TimeoutError:
        process.kill()
        await process.wait()
        return "stands still"
