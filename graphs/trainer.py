# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a trainer: one process whose weights become those of checkpoints.

    python -m graphs.trainer --model-name tiny --initial DIR [--mode in_place]
    torchrun --nproc-per-node 2 -m graphs.trainer ...   # sharded by FSDP2

Reads a line of JSON per "training step" from standard input,
``{"version": 2, "checkpoint": "DIR"}``, changes its tensors to that checkpoint's
and publishes them; answers on standard output when the version is released.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dynamo.refit.publish.publisher import WeightPublisher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--initial", type=Path, required=True)
    parser.add_argument("--mode", choices=("snapshot", "in_place"), default="snapshot")
    options = parser.parse_args()

    say = answer_channel()
    weights = load_weights(options.initial)
    # torchrun's variables, for a trainer of several ranks.
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        dist.init_process_group("gloo")
        weights = shard(weights)
    with WeightPublisher(
        options.model_name, weights, mode=options.mode, rank=rank, world_size=ranks
    ) as publisher:
        say(ready=True)
        for line in sys.stdin:
            step = json.loads(line)
            train_into(weights, load_weights(Path(step["checkpoint"])))
            handle = publisher.publish(step["version"], in_flight=step.get("in_flight"))
            say(published=step["version"])
            release = handle.wait()
            say(
                released=step["version"], outcome=release.outcome, detail=release.detail
            )


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory by name."""
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def shard(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as FSDP2 keeps them: this rank's rows of each, as DTensors."""
    names = list(weights)
    module = nn.ParameterList(nn.Parameter(weights[name]) for name in names)
    fully_shard(module)
    return dict(zip(names, module.parameters(), strict=True))


@torch.no_grad()
def train_into(
    weights: dict[str, torch.Tensor], target: dict[str, torch.Tensor]
) -> None:
    """An optimizer step: the same tensors, other values."""
    for name, tensor in weights.items():
        full = target[name]
        if isinstance(tensor, DTensor):
            # Every rank has read the whole checkpoint: nothing to send around.
            full = distribute_tensor(
                full, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.copy_(full)


def answer_channel() -> Callable[..., None]:
    """Keep standard output for answers; what libraries print goes to the errors."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(**message: object) -> None:
        print(json.dumps(message), file=channel)

    return say


if __name__ == "__main__":
    main()
