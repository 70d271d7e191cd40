# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The publishing side: one process per trainer rank, with the product's own memory.

Each holds its rows of every tensor for two versions, on a GPU or in host memory, and
answers readers until it is closed.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import reduce_tensor

from dynamo.refit.manifest import Manifest
from dynamo.refit.publish.memory import Mode, RankMemory
from dynamo.refit.publish.merge import RankPart, merge
from dynamo.refit.publish.shard import LocalShard
from tests.benchmarks.gpu.model import empty, fill

#: The checkpoint's one file.
FILE = "model.safetensors"

#: A square bfloat16 matrix of 2 GiB that is lent for plain copies.
LENT_ROWS = 32768
LENT = "lent"

PROGRESS_SECONDS = 0.002

#: For a process that has closed its pipe to have an exit code.
EXIT_SECONDS = 10.0


class TrainerDied(RuntimeError):
    """A trainer rank's process ended before it had offered anything."""


@dataclass(frozen=True)
class Offer:
    """What one process has: its part of the manifest, a fingerprint per block and
    slot, what it measured, and the lent matrix: its own part, and a CUDA IPC handle."""

    part: RankPart
    blocks: list[np.ndarray]
    register_ms: float
    fold_gb_per_s: float
    lent: RankPart | None
    lent_blocks: np.ndarray | None
    handle: tuple | None


class Publishers:
    """The processes of one trainer.

    Args:
        config: of the model.
        devices: of each rank: ``cuda:N`` or ``cpu``.
        directory: where the first version is saved as a checkpoint, if anywhere.
        lend: whether rank 0 lends its matrix.

    Blocks until every rank has its versions in memory.

    Raises:
        TrainerDied: a rank did not get there. No process is left.
    """

    def __init__(
        self,
        config: Mapping,
        devices: Sequence[str],
        *,
        mode: Mode = "snapshot",
        directory: Path | None = None,
        lend: bool = False,
    ) -> None:
        self._devices = tuple(devices)
        self._pipes, self._processes = [], []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            self._start(config, mode, directory, lend)
            self.offers: list[Offer] = [
                self._receive(rank) for rank in range(len(devices))
            ]
            parts = {rank: offer.part for rank, offer in enumerate(self.offers)}
            merged = merge(parts)
            self.manifest: Manifest = merged.manifest
            #: Per slot one uint64 per tensor.
            self.fingerprints = [
                merged.add_up(
                    {rank: offer.blocks[slot] for rank, offer in enumerate(self.offers)}
                )
                for slot in range(self.manifest.slots)
            ]
            on_error.pop_all()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _start(
        self, config: Mapping, mode: Mode, directory: Path | None, lend: bool
    ) -> None:
        context = multiprocessing.get_context("spawn")
        devices = self._devices
        for rank, device in enumerate(devices):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(
                    dict(config),
                    device,
                    (rank, len(devices)),
                    mode,
                    directory if rank == 0 else None,
                    lend and rank == 0,
                    there,
                ),
                daemon=True,
            )
            process.start()
            # With a copy of it open here, a dead child's pipe would have no end.
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _receive(self, rank: int) -> Offer:
        try:
            return self._pipes[rank].recv()
        # An OSError where it ended in the middle of its offer.
        except (EOFError, OSError) as error:
            process = self._processes[rank]
            process.join(EXIT_SECONDS)
            raise TrainerDied(
                f"trainer rank {rank} of {len(self._devices)} on "
                f"{self._devices[rank]} ended with exit code {process.exitcode} "
                "before its offer; it has written why to stderr, unless it was killed"
            ) from error


def rows_of(
    weights: Mapping[str, torch.Tensor], rank: int, ranks: int
) -> list[LocalShard]:
    """As FSDP cuts them: along the first axis, the last part shorter."""
    shards = []
    for name, tensor in weights.items():
        step = -(-tensor.shape[0] // ranks)
        rows = tensor[rank * step : (rank + 1) * step]
        offset = (min(rank * step, tensor.shape[0]), *(0,) * (tensor.dim() - 1))
        if len(rows):
            shards.append(LocalShard(name, tuple(tensor.shape), offset, rows))
    return shards


def _serve(
    config: dict,
    device: str,
    place: tuple[int, int],
    mode: Mode,
    directory: Path | None,
    lend: bool,
    pipe: Connection,
) -> None:
    rank, ranks = place
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    weights = empty(config, device)
    name = f"trainer-{device.replace(':', '')}-{rank}-of-{ranks}-{mode}"
    began = time.perf_counter()
    memory = RankMemory(name, rows_of(weights, rank, ranks), mode, may_be_empty=False)
    took = time.perf_counter() - began
    blocks, fold_s = [], 0.0
    for slot in range(memory.slots):
        fill(weights, seed=slot)
        if directory is not None and slot == 0:
            save_file({n: t.cpu() for n, t in weights.items()}, directory / FILE)
        memory.write(slot)
        memory.fold(slot)
        began = time.perf_counter()
        blocks.append(memory.fold(slot))
        fold_s = time.perf_counter() - began
    part = memory.part("model")
    matrix, lent = None, None
    if lend and device.startswith("cuda"):
        matrix = torch.randint(
            -(1 << 15),
            1 << 15,
            (LENT_ROWS, LENT_ROWS),
            dtype=torch.int16,
            device=device,
        ).view(torch.bfloat16)
        lent = RankMemory(
            f"{name}-lent", {LENT: matrix}, "in_place", may_be_empty=False
        )
    pipe.send(
        Offer(
            part=part,
            blocks=blocks,
            register_ms=took * 1e3,
            fold_gb_per_s=sum(r.nbytes for r in part.source.slots[0]) / fold_s / 1e9,
            lent=lent and lent.part("model"),
            lent_blocks=lent and lent.fold(0),
            handle=None if matrix is None else reduce_tensor(matrix),
        )
    )
    if mode == "snapshot":
        # What is read are the copies.
        for tensor in weights.values():
            tensor.untyped_storage().resize_(0)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    while not pipe.poll(PROGRESS_SECONDS):
        for held in (memory, lent):
            if held is not None:
                held.progress()
