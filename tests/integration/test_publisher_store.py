# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The store over which a trainer's ranks meet: who is in which generation, what stays
in it, and what happens when its process stalls or dies."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dynamo.refit.errors import ManifestInvalid, SourceLost
from dynamo.refit.publish.handle import Release
from dynamo.refit.publish.publisher import WeightPublisher
from tests.support.trainer_rank import RankProcess

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(180),
]

STORE = """
import sys
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""

CLOSED = "the publisher of rank 0 was closed before the release"


@pytest.fixture(autouse=True)
def planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_DISCOVERY_BACKEND", "file")
    monkeypatch.setenv("DYN_FILE_KV", str(tmp_path / "discovery"))
    monkeypatch.setenv("DYN_REQUEST_PLANE", "tcp")
    monkeypatch.setenv("DYN_EVENT_PLANE", "zmq")


class StoreProcess:
    """A store in a process that can be stopped and killed."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", STORE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._child.stdout.readline())

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


@pytest.fixture
def store() -> Iterator[StoreProcess]:
    store = StoreProcess()
    yield store
    store.kill()


@pytest.fixture
def ranks(store: StoreProcess) -> Iterator[list[RankProcess]]:
    """Two that have published version 1."""
    ranks = [RankProcess("rows", rank, port=store.port) for rank in (0, 1)]
    try:
        for rank in ranks:
            rank.hear("ready")
        assert published(1, ranks) == [0, 0]
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def published(version: int, ranks: list[RankProcess]) -> list[Any]:
    for rank in ranks:
        rank.order(version)
    return [rank.hear("published") for rank in ranks]


def seconds_of(wait: Callable[[], object]) -> float:
    begun = time.monotonic()
    wait()
    return time.monotonic() - begun


# --- rank 0's end -----------------------------------------------------------------


def test_rank_0_lingers_until_the_others_know_how_it_ended(
    ranks: list[RankProcess],
) -> None:
    ranks[1].child.send_signal(signal.SIGSTOP)
    closing = threading.Thread(target=ranks[0].close)
    closing.start()
    closing.join(2.5)
    assert ranks[0].child.poll() is None
    ranks[1].child.send_signal(signal.SIGCONT)
    assert seconds_of(lambda: closing.join(30)) < 3
    assert ranks[0].child.poll() == 0
    assert ranks[1].hear("released")["message"] == CLOSED


def test_rank_0_waits_for_a_moment_only(ranks: list[RankProcess]) -> None:
    ranks[1].child.send_signal(signal.SIGSTOP)
    assert 4 < seconds_of(ranks[0].close) < 12
    ranks[1].child.send_signal(signal.SIGCONT)
    assert ranks[1].hear("released")["message"] == CLOSED


# --- a store that stalls or dies ----------------------------------------------------


def test_a_store_that_stalls_for_a_moment_delays_a_version(
    ranks: list[RankProcess], store: StoreProcess
) -> None:
    store.send(signal.SIGSTOP)
    for rank in ranks:
        rank.order(2)
    assert seconds_of(lambda: ranks[0].hear("published")) < 5
    time.sleep(5)
    store.send(signal.SIGCONT)
    assert ranks[1].hear("published") == 1
    assert published(3, ranks) == [0, 0]
    for rank in ranks:
        assert rank.hear("released") == {
            "outcome": "superseded",
            "detail": "its buffer was taken for version 3",
        }


def test_a_store_that_is_stopped_ends_every_handle_and_may_come_back(
    ranks: list[RankProcess], store: StoreProcess
) -> None:
    store.send(signal.SIGSTOP)
    ranks[1].order(2)
    refused = ranks[1].hear("published")
    assert refused["kind"] == "SourceLost"
    assert "rank 0 of this trainer job does not answer" in refused["message"]
    assert ranks[1].hear("released") == refused
    failed = {"outcome": "failed", "detail": "trainer rank 1 does not answer"}
    assert ranks[0].hear("released") == failed
    store.send(signal.SIGCONT)
    time.sleep(2)
    slots = published(3, ranks)
    assert slots[0] == slots[1] in (0, 1)


def test_a_rank_can_end_while_the_store_is_stopped(
    ranks: list[RankProcess], store: StoreProcess
) -> None:
    store.send(signal.SIGSTOP)
    time.sleep(1)
    for rank in ranks:
        assert seconds_of(rank.close) < 25
        assert rank.child.returncode == 0
        assert rank.hear("released")["message"].endswith("closed before the release")


def test_a_store_that_dies_ends_every_handle(
    ranks: list[RankProcess], store: StoreProcess
) -> None:
    store.kill()
    for rank in ranks:
        lost = rank.hear("released")
        assert lost["kind"] == "SourceLost"
        assert "the store of this trainer job" in lost["message"]
        rank.order(2)
        again = rank.hear("published")
        assert again["kind"] == "SourceLost"


# --- generations ------------------------------------------------------------------


def both(make: Callable[[int], Any]) -> list[Any]:
    """Of ranks 0 and 1, each in a thread."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, (0, 1)))


def publishers(store: dist.Store, model: str, **options: Any) -> list[WeightPublisher]:
    def publisher(rank: int) -> WeightPublisher:
        weights = {f"{model}.{rank}": torch.full((4,), float(rank))}
        return WeightPublisher(
            model, weights, rank=rank, world_size=2, store=store, **options
        )

    return both(publisher)


def test_a_rank_beyond_the_others_world_is_everybodys_error() -> None:
    store = dist.HashStore()

    def refused(rank: int) -> ManifestInvalid:
        weights = {f"w.{rank}": torch.zeros(4)}
        with pytest.raises(ManifestInvalid) as caught:
            WeightPublisher(
                "tiny", weights, rank=rank, world_size=3 if rank else 2, store=store
            )
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        for error in pool.map(refused, (0, 2)):
            assert "world_size is 3 on trainer rank 2 and 2 on rank 0" in str(error)


def test_two_publishers_in_one_job() -> None:
    """Of two models, and of one model twice; each has its own versions and end."""
    store = dist.HashStore()
    jobs = [publishers(store, model) for model in ("policy", "value", "policy")]
    handles = [both(lambda rank, job=job: job[rank].publish(1)) for job in jobs]
    names = [{handle.announcement_id for handle in pair} for pair in handles]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    manifests = [job[0].manifest for job in jobs]
    assert [m.model for m in manifests] == ["policy", "value", "policy"]
    both(lambda rank: jobs[0][rank].close())
    for handle in handles[0]:
        with pytest.raises(SourceLost, match="closed"):
            handle.wait(10)
    assert both(lambda rank: jobs[2][rank].publish(2).slot) == [1, 1]
    for job in jobs[1:]:
        both(lambda rank, job=job: job[rank].close())


@pytest.mark.parametrize("first", [0, 1])
def test_closed_and_opened_again(first: int) -> None:
    """Whichever rank is faster finds the other's new publisher, not its old one."""
    store = dist.HashStore()
    closing = publishers(store, "tiny")
    handles = both(lambda rank: closing[rank].publish(7))
    assert len({handle.announcement_id for handle in handles}) == 1

    def reopen(rank: int) -> WeightPublisher:
        time.sleep(0 if rank == first else 1)
        closing[rank].close()
        weights = {f"w.{rank}": torch.zeros(4)}
        return WeightPublisher("tiny", weights, rank=rank, world_size=2, store=store)

    job = both(reopen)
    with pytest.raises(SourceLost, match="closed before the release"):
        handles[first].wait(10)
    if first == 0:
        with pytest.raises(SourceLost, match="rank 0 was closed"):
            handles[1].wait(10)
    else:
        ended = handles[0].wait(10)
        assert ended == Release("failed", "trainer rank 1 was closed")
    assert both(lambda rank: job[rank].publish(8).slot) == [0, 0]
    both(lambda rank: job[rank].close())


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_nothing_of_a_version_stays_in_the_store(kind: str, tmp_path: Path) -> None:
    store = {
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(str(tmp_path / "store"), -1),
        "tcp": lambda: dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        ),
    }[kind]()
    job = publishers(store, "tiny", mode="snapshot")
    before = store.num_keys()
    for version in range(1, 5):
        both(lambda rank, v=version: job[rank].publish(v))
    deadline = time.monotonic() + 10
    while store.num_keys() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert store.num_keys() == before
    both(lambda rank: job[rank].close())
