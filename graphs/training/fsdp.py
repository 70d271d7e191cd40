# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The loop of :mod:`graphs.training.plain`, sharded by FSDP2 over torchrun's ranks.

    torchrun --standalone --nproc-per-node 2 -m graphs.training.fsdp --model DIR

Every rank publishes its own shards and nothing is gathered. The publishers meet in the
store of the default process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynamo.refit.publish.publisher import WeightPublisher
from graphs.training.plain import read_arguments, train


def main() -> int:
    options = read_arguments(__doc__, "graphs.training.fsdp")
    # On GPUs: "nccl", and torch.cuda.set_device(LOCAL_RANK) before it.
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with WeightPublisher(
        options.model_name,
        dict(model.named_parameters()),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    ) as publisher:
        code = train(options, model, publisher, lambda path: save(model, path))
    dist.destroy_process_group()
    return code


def save(model: PreTrainedModel, directory: Path) -> None:
    """A whole checkpoint, gathered on rank 0 and written by it."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        model.save_pretrained(directory, state_dict=weights)


if __name__ == "__main__":
    sys.exit(main())
