# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One NIXL READ between two agents of this process, compared byte by byte."""

from __future__ import annotations

import time
import uuid

import msgspec
import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.transport.nixl import NixlAgent, Read

#: Bound on each read.
READ_SECONDS = 20.0

#: The first one also connects.
READS = 3


class LoopbackReport(msgspec.Struct, frozen=True, kw_only=True):
    """``equal``: what arrived is what was there; ``seconds`` of the quickest read."""

    nbytes: int
    equal: bool
    seconds: float
    error: str = ""


def try_nixl(nbytes: int) -> LoopbackReport:
    """Read ``nbytes`` of host memory from one agent into another one's."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    target = torch.zeros_like(source)
    try:
        seconds = _read(source, target)
    except TransferFailed as error:
        return LoopbackReport(nbytes=nbytes, equal=False, seconds=0, error=str(error))
    return LoopbackReport(
        nbytes=nbytes, equal=torch.equal(source, target), seconds=seconds
    )


def _read(source: torch.Tensor, target: torch.Tensor) -> float:
    name = uuid.uuid4().hex[:12]
    here, there = NixlAgent(f"doctor-here-{name}"), NixlAgent(f"doctor-there-{name}")
    regions = []
    for agent, tensor in ((there, source), (here, target)):
        region = [(tensor.data_ptr(), tensor.nbytes)]
        regions.append((agent, agent.register(region, "DRAM", 0)))
    peer = here.connect(there.metadata())
    read = here.prepare_read(peer, _rows(target), _rows(source))
    quickest = min(_timed(read, there) for _ in range(READS))
    read.release()
    here.disconnect(peer)
    for agent, registration in regions:
        agent.deregister(registration)
    return quickest


def _timed(read: Read, there: NixlAgent) -> float:
    began = time.perf_counter()
    read.post()
    while not read.done():
        if time.perf_counter() - began > READ_SECONDS:
            raise TransferFailed(f"a read has not ended within {READ_SECONDS:g} s")
        # The other side answers when it is polled.
        there.progress()
    return time.perf_counter() - began


def _rows(tensor: torch.Tensor) -> tuple[np.ndarray, str, int]:
    rows = np.array([[tensor.data_ptr(), tensor.nbytes]], dtype=np.uint64)
    return rows, "DRAM", 0
