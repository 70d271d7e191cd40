# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One NIXL READ between two agents of this process, compared byte by byte: the child
of ``dynamo-refit doctor``, ``python -m dynamo.refit.cli.loopback``."""

from __future__ import annotations

import time

import numpy as np

from dynamo.refit.errors import TransferFailed
from dynamo.refit.transport.nixl import NixlAgent, Read

NBYTES = 64 << 20

#: The first of the reads also connects, within READ_SECONDS.
READS, READ_SECONDS = 3, 20.0


def main() -> None:
    source = np.random.default_rng().integers(0, 256, NBYTES, dtype=np.uint8)
    target = np.zeros_like(source)
    here, there = NixlAgent("doctor-here"), NixlAgent("doctor-there")
    rows = [
        np.array([[memory.ctypes.data, NBYTES]], dtype=np.uint64)
        for memory in (target, source)
    ]
    registrations = [
        agent.register([(memory.ctypes.data, NBYTES)], "DRAM", 0)
        for agent, memory in ((here, target), (there, source))
    ]
    peer = here.connect(there.metadata())
    read = here.prepare_read(peer, (rows[0], "DRAM", 0), (rows[1], "DRAM", 0))
    seconds = min(_seconds(read, there) for _ in range(READS))
    if not np.array_equal(source, target):
        raise TransferFailed("other bytes arrived than were sent")
    read.release()
    here.disconnect(peer)
    for agent, registration in zip((here, there), registrations, strict=True):
        agent.deregister(registration)
    rate = NBYTES / seconds / 1e9
    print(f"{NBYTES >> 20} MiB read and compared, at {rate:.1f} GB/s", flush=True)


def _seconds(read: Read, there: NixlAgent) -> float:
    began = time.perf_counter()
    read.post()
    while not read.done():
        if time.perf_counter() - began > READ_SECONDS:
            raise TransferFailed(f"a read has not ended within {READ_SECONDS:g} s")
        # The other side answers when it is polled.
        there.progress()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
