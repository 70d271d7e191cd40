# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What this package relies on NIXL for, between two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.rank.bounce import Bounce, BouncedRead
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.transport.nixl import NixlAgent, Read, bindings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]

NBYTES = 8 << 20

SOURCE = """
import sys, threading, time, torch
from dynamo.refit.transport.nixl import NixlAgent

agent = NixlAgent(sys.argv[1])
memory = torch.full((int(sys.argv[2]),), 1, dtype=torch.uint8)
agent.register([(memory.data_ptr(), memory.numel())], "DRAM", 0)
print("source", memory.data_ptr(), agent.metadata().hex(), flush=True)


def fill():
    for line in sys.stdin:
        memory.fill_(int(line))
        print("filled", flush=True)


threading.Thread(target=fill, daemon=True).start()
while True:
    agent.progress()
    time.sleep(0.002)
"""


class Source:
    """A process whose memory can be read."""

    def __init__(self, name: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", SOURCE, name, str(NBYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in self._child.stdout:
            if line.startswith("source "):
                _, address, metadata = line.split()
                self.address, self.metadata = int(address), bytes.fromhex(metadata)
                return
        raise RuntimeError("the source did not start")

    def fill(self, value: int) -> None:
        self._child.stdin.write(f"{value}\n")
        self._child.stdin.flush()
        assert self._child.stdout.readline() == "filled\n"

    def send(self, number: int) -> None:
        os.kill(self._child.pid, number)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source("source")
    yield source
    source.kill()


@pytest.fixture
def reader() -> NixlAgent:
    return NixlAgent("reader")


def prepare(agent: NixlAgent, source: Source, target: torch.Tensor) -> Read:
    agent.register([(target.data_ptr(), target.numel())], "DRAM", 0)
    peer = agent.connect(source.metadata)
    return agent.prepare_read(
        peer,
        (np.array([[target.data_ptr(), target.numel()]]), "DRAM", 0),
        (np.array([[source.address, target.numel()]]), "DRAM", 0),
    )


def finish(read: Read | BouncedRead, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not read.done():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_prepared_read_sees_the_bytes_of_each_post(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = prepare(reader, source, target)
    for value in (1, 7, 9):
        source.fill(value)
        read.post()
        finish(read)
        assert target.unique().tolist() == [value]
    read.release()


def test_memory_that_is_not_registered_is_refused(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(4096, dtype=torch.uint8)
    reader.register([(target.data_ptr(), target.numel())], "DRAM", 0)
    peer = reader.connect(source.metadata)
    local = (np.array([[target.data_ptr(), 4096]]), "DRAM", 0)
    outside = (np.array([[source.address + NBYTES, 4096]]), "DRAM", 0)
    with pytest.raises(TransferFailed, match="cannot prepare a read from 'source'"):
        reader.prepare_read(peer, local, outside)


def test_a_killed_source_is_an_error_at_the_next_post(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = prepare(reader, source, target)
    read.post()
    finish(read)
    source.kill()
    time.sleep(0.2)
    with pytest.raises(TransferFailed, match="source"):
        read.post()
        finish(read)
    assert not read.active
    read.release()


def test_a_source_killed_while_a_read_waits_for_it(
    source: Source, reader: NixlAgent
) -> None:
    source.send(signal.SIGSTOP)
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = prepare(reader, source, target)
    read.post()
    assert not read.done()
    source.kill()
    with pytest.raises(TransferFailed, match="broke off"):
        finish(read)
    assert not read.active


def test_a_read_cannot_be_called_back(source: Source, reader: NixlAgent) -> None:
    """Why buffers of a pull that was given up are kept out of use: its bytes land
    when the source comes back, at a poll that is about something else."""
    source.send(signal.SIGSTOP)
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = prepare(reader, source, target)
    read.post()
    assert not read.done()
    with pytest.raises(TransferFailed, match="still active"):
        read.release()
    reader.disconnect("source")
    source.send(signal.SIGCONT)
    deadline = time.monotonic() + 20
    while target[-1] == 0 and time.monotonic() < deadline:
        reader.progress()
    assert target.unique().tolist() == [1]


def test_peers_are_counted(source: Source, reader: NixlAgent) -> None:
    """Two sessions may read from one peer; the first one's end is not the other's."""
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = prepare(reader, source, target)
    reader.connect(source.metadata)
    reader.disconnect("source")
    read.post()
    finish(read)
    assert target.unique().tolist() == [1]
    read.release()
    reader.disconnect("source")


def registered_anew(metadata: bytes) -> bytes:
    """As after a registration of the same region with another remote key.

    Only InfiniBand gives another key for the same memory, so the key's last byte but
    eleven is changed here; NIXL compares keys as they are.
    """
    changed = bytearray(metadata)
    changed[-12] ^= 1
    return bytes(changed)


def test_nixl_refuses_another_key_of_a_known_region_and_then_the_peer(
    source: Source, reader: NixlAgent
) -> None:
    """Why a peer that registered its memory anew is forgotten before it is loaded."""
    agent = reader._agent
    agent.add_remote_agent(source.metadata)
    with pytest.raises(bindings.nixlNotAllowedError):
        agent.add_remote_agent(registered_anew(source.metadata))
    agent.remove_remote_agent("source")
    for metadata in (source.metadata, registered_anew(source.metadata)):
        with pytest.raises(bindings.nixlInvalidParamError):
            agent.add_remote_agent(metadata)


def test_a_peer_that_registered_its_memory_anew_can_be_read(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    before = prepare(reader, source, target)
    before.post()
    finish(before)

    peer = reader.connect(registered_anew(source.metadata))
    assert before.stale
    with pytest.raises(TransferFailed):
        before.post()
    source.fill(7)
    again = prepare(reader, source, target)
    again.post()
    finish(again)
    assert not again.stale
    assert bool((target == 7).all())

    # Whoever used the peer before lets go of it; the others still read from it.
    before.release()
    reader.disconnect(peer)
    reader.disconnect(peer)
    source.fill(9)
    again.post()
    finish(again)
    assert bool((target == 9).all())


def test_a_peer_is_not_loaded_anew_under_an_active_read(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    source.send(signal.SIGSTOP)
    read = prepare(reader, source, target)
    read.post()
    assert read.active
    with pytest.raises(TransferFailed, match="has not ended"):
        reader.connect(registered_anew(source.metadata))
    source.send(signal.SIGCONT)
    finish(read)
    assert not read.stale
    assert bool((target == 1).all())
    reader.connect(registered_anew(source.metadata))
    assert read.stale


def through_slots(
    agent: NixlAgent, source: Source, target: torch.Tensor
) -> BouncedRead:
    """All of ``source`` in two runs that change places, through slots that no run
    ends with."""
    peer = agent.connect(source.metadata)
    half = NBYTES // 2
    return Bounce(agent, Cycle(), slots=2, slot_nbytes=3_000_000).prepare_read(
        peer,
        0,
        np.array([source.address, source.address + half]),
        np.array([0, 0]),
        target,
        np.array([half, 0]),
        np.array([half, half]),
    )


def test_a_read_through_slots_sees_the_bytes_of_each_post(
    source: Source, reader: NixlAgent
) -> None:
    target = torch.zeros(NBYTES, dtype=torch.uint8)
    read = through_slots(reader, source, target)
    for value in (1, 7, 9):
        source.fill(value)
        read.post()
        finish(read)
        assert target.unique().tolist() == [value]
    read.release()


def test_a_source_killed_while_a_read_through_slots_waits_for_it(
    source: Source, reader: NixlAgent
) -> None:
    source.send(signal.SIGSTOP)
    read = through_slots(reader, source, torch.zeros(NBYTES, dtype=torch.uint8))
    read.post()
    assert not read.done()
    source.kill()
    with pytest.raises(TransferFailed, match="broke off"):
        finish(read)


READER = """
import sys, time, numpy, torch
from dynamo.refit.transport import ucx
from dynamo.refit.transport.nixl import NixlAgent

ucx.show_reads()
agent = NixlAgent("reader")
target = torch.zeros(int(sys.argv[1]), dtype=torch.uint8)
agent.register([(target.data_ptr(), target.numel())], "DRAM", 0)
sides = [(numpy.array([[int(address), target.numel()]]), "DRAM", 0)
         for address in (target.data_ptr(), sys.argv[2])]
read = agent.prepare_read(agent.connect(bytes.fromhex(sys.argv[3])), *sides)
read.post()
while not read.done():
    time.sleep(0.001)
"""


def test_ucx_says_what_a_rank_reads_with(source: Source) -> None:
    rank = [sys.executable, "-c", READER, str(NBYTES), str(source.address)]
    done = subprocess.run(
        [*rank, source.metadata.hex()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    _, _, table = done.stdout.partition("remote memory read")
    assert "into host memory from host" in table
    assert "zero-copy" in table
    assert "cma" in table
    # Reads alone, and no other word of UCX.
    assert "active message" not in done.stdout
