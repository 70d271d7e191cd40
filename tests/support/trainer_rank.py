# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One rank of a trainer job as a process, and what its tensors hold in each version.

    python -m tests.support.trainer_rank '{"kind": "fsdp", "rank": 0, ...}'

``kind``: ``fsdp`` (a module under FSDP2, over gloo), ``rows`` (rank r has the rows
``ROWS[r]`` of every matrix), ``replicas`` (all ranks have everything), ``diverged``
(and rank 1 has other values in one tensor), ``idle`` (nothing). The ranks meet in the
store at ``port``. Each line on standard input is a version to publish, ``alone``
(version 2, without a step), ``group`` (a new process group) or ``counters``; answers
are lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dynamo.refit.errors import RefitError
from dynamo.refit.publish.publisher import PublishedVersion, WeightPublisher
from dynamo.refit.publish.shard import LocalShard
from graphs.trainer import answer_channel

#: Odd sizes, so that no shard is like another; ``last`` is all on rank 0.
SHAPES = {"up.weight": (7, 10), "down.weight": (5, 7), "last.weight": (1, 5)}
ROWS = {0: {7: (0, 4), 5: (0, 2), 1: (0, 1)}, 1: {7: (4, 7), 5: (2, 5), 1: (1, 1)}}


def values(name: str, version: int) -> torch.Tensor:
    """What the full tensor ``name`` holds in ``version``."""
    generator = torch.Generator().manual_seed(1000 * version + len(name))
    return torch.randn(SHAPES[name], generator=generator)


def job_store(port: int) -> dist.TCPStore:
    """The store that a test keeps for the ranks of a job."""
    return dist.TCPStore("127.0.0.1", port, is_master=False)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 7, bias=False)
        self.down = nn.Linear(7, 5, bias=False)
        self.last = nn.Linear(5, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.down(self.up(x)))


class Rank:
    """The tensors of one rank, and the publisher over them."""

    def __init__(self, kind: str, rank: int, world_size: int, **options: Any) -> None:
        self.kind, self.rank = kind, rank
        port = options.pop("port", None)
        if kind == "fsdp":
            dist.init_process_group(
                "gloo", store=job_store(port), rank=rank, world_size=world_size
            )
        elif port is not None:
            options["store"] = job_store(port)
        self.tensors = self._tensors()
        published = self._rows() if kind == "rows" else self.tensors
        self.publisher = WeightPublisher(
            "tiny", published, rank=rank, world_size=world_size, **options
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self.kind == "idle":
            return {}
        if self.kind != "fsdp":
            return {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.module = Module()
        fully_shard(self.module)
        return dict(self.module.named_parameters())

    def _rows(self) -> list[LocalShard]:
        blocks = []
        for name, tensor in self.tensors.items():
            start, stop = ROWS[self.rank][len(tensor)]
            if start < stop:
                block = tensor[start:stop]
                blocks.append(LocalShard(name, SHAPES[name], (start, 0), block))
        return blocks

    @torch.no_grad()
    def train(self, version: int) -> None:
        """An optimizer step, after which the tensors hold ``version``."""
        for name, tensor in self.tensors.items():
            full = values(name, version)
            if isinstance(tensor, DTensor):
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements)
            tensor.copy_(full)
            if self.kind == "diverged" and self.rank == 1 and name == "down.weight":
                tensor[4, 6] += 1

    def step(self, version: int) -> PublishedVersion:
        if self.kind == "fsdp":
            # FSDP2 sets itself up, and may move its shards, in the first pass.
            self.module(torch.ones(1, 10)).sum().backward()
        self.train(version)
        return self.publisher.publish(version)


class RankProcess:
    """A rank in a process of its own, as a test sees it."""

    def __init__(self, kind: str, rank: int, world_size: int = 2, **options) -> None:
        self.heard: list[dict] = []
        options = {"kind": kind, "rank": rank, "world_size": world_size, **options}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.support.trainer_rank", json.dumps(options)],
            env={**os.environ, "DYN_LOG": "error", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def order(self, line: object) -> None:
        self.child.stdin.write(f"{line}\n")
        self.child.stdin.flush()

    def hear(self, what: str) -> Any:
        """The next answer about ``what``; others are kept. Blocks."""
        for number, message in enumerate(self.heard):
            if what in message:
                return self.heard.pop(number)[what]
        while line := self.child.stdout.readline():
            message = json.loads(line)
            if what in message:
                return message[what]
            self.heard.append(message)
        raise EOFError(f"the rank ended before it said {what!r}: {self.heard}")

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    def close(self) -> None:
        """End it as a trainer ends."""
        self.child.stdin.close()
        self.child.wait(30)


def main() -> None:
    say = answer_channel()
    try:
        rank = Rank(**json.loads(sys.argv[1]))
    except RefitError as error:
        say(refused=_described(error))
        return
    say(ready=True)

    def tell_end(handle: PublishedVersion) -> None:
        try:
            say(released=asdict(handle.wait()))
        except RefitError as error:
            say(released=_described(error))

    waiting = []
    with rank.publisher:
        for line in sys.stdin:
            if line.strip() == "counters":
                say(counters=asdict(rank.publisher.counters))
                continue
            if line.strip() == "group":
                # Made over the default store, by all ranks.
                ones = torch.ones(1)
                dist.all_reduce(ones, group=dist.new_group())
                say(group=ones.item())
                continue
            try:
                if line.strip() == "alone":
                    handle = rank.publisher.publish(2)
                else:
                    handle = rank.step(int(line))
            except RefitError as error:
                say(published=_described(error))
                continue
            say(published=handle.slot)
            waiting = [thread for thread in waiting if thread.is_alive()]
            waiting.append(threading.Thread(target=tell_end, args=(handle,)))
            waiting[-1].start()
    for thread in waiting:
        thread.join()


def _described(error: RefitError) -> dict:
    kind = type(error).__name__
    return {"kind": kind, "message": str(error), "tensor": error.tensor}


if __name__ == "__main__":
    main()
