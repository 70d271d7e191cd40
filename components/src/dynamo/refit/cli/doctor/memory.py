# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Where would a worker stage versions of a model on this machine, and does it fit?

Loaded on use: it needs torch. Pure, but for :func:`look`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from dynamo.refit.cli.doctor.finding import Finding, failure, ok, warning
from dynamo.refit.cli.words import size
from dynamo.refit.errors import MemoryShort
from dynamo.refit.protocol import StagingChoice
from dynamo.refit.publish.checkpoint import TensorSize, checkpoint_sizes
from dynamo.refit.rank.memory import (
    HEADROOM,
    FreeMemory,
    choose,
    free_memory,
    room_for_cache,
)
from dynamo.refit.rank.plan import LIMITS

MEMORY = "memory plan"


@dataclass(frozen=True)
class Machine:
    """What each rank of a worker may take here, before its model is loaded.

    ``host`` bytes are its share of the free memory; ``device`` (``None``: it runs on
    the CPU) all bytes of its GPU.
    """

    host: int
    device: int | None


def look(ranks: int) -> Machine:
    """This machine, for a worker of so many ranks."""
    host = free_memory(torch.device("cpu"), ranks).host
    if not torch.cuda.is_available():
        return Machine(host, None)
    _, total = torch.cuda.mem_get_info()
    return Machine(host, total)


def check_memory(
    directory: Path, ranks: int, staging: StagingChoice, utilization: float
) -> list[Finding]:
    """The plan for a worker that is to be started here with the model in ``directory``.

    Raises:
        CheckpointInvalid: it is no checkpoint.
    """
    nbytes = rank_nbytes(checkpoint_sizes(directory).values(), ranks)
    return [plan(nbytes, ranks, staging, look(ranks), utilization)]


def rank_nbytes(tensors: Iterable[TensorSize], ranks: int) -> int:
    """About the bytes of one of ``ranks``' parameters: vectors are on every rank,
    everything else is cut. In the checkpoint's dtypes."""
    return sum(
        tensor.nbytes if len(tensor.shape) < 2 else math.ceil(tensor.nbytes / ranks)
        for tensor in tensors
    )


def plan(
    nbytes: int,
    ranks: int,
    staging: StagingChoice,
    machine: Machine,
    utilization: float,
) -> Finding:
    """Whether ``nbytes`` of parameters per rank can be staged, and where.

    Args:
        utilization: vLLM's share of the GPU: for weights, staging and KV cache.
    """
    where = "one rank" if ranks == 1 else f"each of {ranks} ranks"
    model = f"{size(nbytes)} of parameters on {where}"
    on_gpu = machine.device is not None
    scratch = 2 * LIMITS["cuda" if on_gpu else "cpu"].scratch
    remedy = "give the worker a host, or a container, with more memory"
    if on_gpu:
        remedy = "raise --gpu-memory-utilization of the worker, or use more ranks"
    try:
        free, beside = _room(nbytes, scratch, staging, machine, utilization)
        use = choose(staging, arena=nbytes, scratch=scratch, free=free)
    except MemoryShort as error:
        return failure(MEMORY, f"{model}: {error}", f"{remedy}, or use another mode")
    takes = (
        f"{model}: mode {use.mode} takes {size(use.device_nbytes)} of device and "
        f"{size(use.host_nbytes)} of host memory of each; {beside}"
    )
    if use.mode == "direct" and staging == "auto":
        return warning(
            MEMORY,
            f"{takes}. A shadow of the weights does not fit, so the pause holds the "
            "transfer and an install cannot be undone",
            remedy,
        )
    return ok(MEMORY, takes)


def _room(
    nbytes: int,
    scratch: int,
    staging: StagingChoice,
    machine: Machine,
    utilization: float,
) -> tuple[FreeMemory, str]:
    """What a rank finds when its model and its KV cache are there, and in words.

    Raises:
        MemoryShort: with the mode that is asked for nothing is left for the KV cache.
    """
    if machine.device is None:
        host = max(0, machine.host - nbytes)
        beside = f"{size(host)} of host memory are free beside the parameters"
        return FreeMemory(None, host), beside
    # As the worker does, but for vLLM's activations, which it measures.
    available = int(machine.device * utilization) - nbytes
    cache = room_for_cache(available, staging, arena=nbytes, scratch=scratch)
    left = machine.device - nbytes - max(0, cache) - HEADROOM
    beside = (
        f"{size(max(0, cache))} are left for KV cache and activations, and "
        f"{size(machine.host)} of host memory are free"
    )
    return FreeMemory(max(0, left), machine.host), beside
