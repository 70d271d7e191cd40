# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the devices and the wire do at best, and a pull of one tensor beside it.

No engine: the product's plan, arena and session read a matrix that the trainer lends,
whole or the half of its columns that a row-parallel layer of two ranks takes. Beside
them a plain copy of the same bytes over CUDA IPC. Run in a process of its own, since
what UCX says about its choices goes to its standard output.

    python3 -m tests.benchmarks.gpu.figures READER_DEVICE < pickled offer
"""

from __future__ import annotations

import json
import math
import pickle
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dynamo.refit.publish.merge import merge
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.limits import LIMITS, Limits
from dynamo.refit.rank.memory import choose, free_memory
from dynamo.refit.rank.plan import make_plan
from dynamo.refit.rank.session import Session
from dynamo.refit.rank.slices import ArenaLayout, Parameter, ReadSlice
from dynamo.refit.transport.nixl import NixlAgent
from tests.benchmarks.gpu.source import LENT, LENT_ROWS, Offer

REPEATS = 8


def device_copies(device: torch.device) -> dict[str, float]:
    """GB/s of payload within one device: one large copy, and one of many tensors."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"device_copy_gb_per_s": _rate(source.numel(), lambda: target.copy_(source))}


def plain_copies(lent: torch.Tensor, device: torch.device) -> dict[str, float]:
    """GB/s of payload of a copy from the trainer's process, without NIXL."""
    half = lent[:, : LENT_ROWS // 2]
    mine, mine_half = (
        torch.empty(t.shape, dtype=t.dtype, device=device) for t in (lent, half)
    )
    return {
        "plain_contiguous_gb_per_s": _rate(lent.nbytes, lambda: mine.copy_(lent)),
        "plain_row_parallel_gb_per_s": _rate(
            mine_half.nbytes, lambda: mine_half.copy_(half)
        ),
    }


def pulls(offer: Offer, lent: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Useful GB/s of the product's pull, fingerprint included."""
    figures = {}
    for name, columns, scratch in (
        ("contiguous", LENT_ROWS, LIMITS["cuda"].scratch),
        ("row_parallel", LENT_ROWS // 2, LIMITS["cuda"].scratch),
        ("row_parallel_half_scratch", LENT_ROWS // 2, LIMITS["cuda"].scratch // 2),
        ("row_parallel_twice_scratch", LENT_ROWS // 2, LIMITS["cuda"].scratch * 2),
    ):
        rates, wires = _pull(offer, lent, device, columns, Limits(scratch=scratch))
        figures[f"pull_{name}_gb_per_s"] = rates
        figures[f"wire_{name}_gb_per_s"] = wires
    return figures


def _pull(
    offer: Offer, lent: torch.Tensor, device: torch.device, columns: int, limits: Limits
) -> tuple[float, float]:
    manifest = merge({0: offer.lent}).manifest
    parameter = Parameter("weight", (LENT_ROWS, columns), "bfloat16")
    box = ((0, LENT_ROWS), (0, columns))
    read = ReadSlice(LENT, box, "weight", 0, (columns, 1))
    # A rank is asked for all that is published, and here the rest is not wanted.
    layout = ArenaLayout([parameter])
    plan = make_plan(manifest, [parameter], [read], rank=0, limits=limits, arena=layout)
    memory = choose(
        "device",
        arena=layout.nbytes,
        scratch=2 * limits.scratch,
        free=free_memory(device, 1),
    )
    agent, cycle = NixlAgent(f"figures-{uuid.uuid4().hex[:12]}"), Cycle()
    arena = Arena(agent, layout, memory, device, cycle)
    live = arena.shadows[0].by_name
    session = Session(agent, "-", plan, memory, arena, live, cycle)
    session.address(manifest, "-", cycle)
    limit = Limit(math.inf, lambda: False)

    def use_device() -> None:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))

    use_device()
    seconds, wires = [], []
    with ThreadPoolExecutor(1, initializer=use_device) as follower:
        for _ in range(REPEATS):
            cycle = Cycle()
            handover = session.hand_over()
            began = time.perf_counter()
            parts = session.pull(0, limit, follower.submit, cycle, handover)
            seconds.append(time.perf_counter() - began)
            wires.append(cycle.ms["wire"] / 1e3)
    if columns == LENT_ROWS:
        total = np.add.reduce(parts.astype(np.uint64))
        assert total == offer.lent_blocks[0], "other bytes than were lent"
    (staged,) = arena.staged.values()
    staged = staged.view(torch.int16)
    for first in range(0, LENT_ROWS, 4096):
        theirs = lent[first : first + 4096, :columns].contiguous().to(device)
        assert torch.equal(staged[first : first + 4096], theirs.view(torch.int16))
    session.close()
    arena.close()
    nbytes = plan.nbytes
    return (
        nbytes / statistics.median(seconds[2:]) / 1e9,
        nbytes / statistics.median(wires[2:]) / 1e9,
    )


def _rate(nbytes: int, copy: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return nbytes / min(seconds) / 1e9


def main() -> None:
    offer: Offer = pickle.load(sys.stdin.buffer)
    device = torch.device(sys.argv[1])
    torch.cuda.set_device(device)
    rebuild, arguments = offer.handle
    lent = rebuild(*arguments)
    figures = {
        **device_copies(device),
        **plain_copies(lent, device),
        **pulls(offer, lent, device),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
