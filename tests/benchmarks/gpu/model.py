# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The shapes of Qwen3 models, and weights for them that any process can make again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.benchmarks.shapes import tensors

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
CONFIGS = {
    "4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "tie_word_embeddings": True,
    },
    "8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}

#: Elements that weights are made of; odd, so that no two rows are alike.
FILL_BLOCK = (1 << 22) + 1


def empty(config: Mapping, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name."""
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device=device)
        for name, shape in tensors(config)
    }


@torch.no_grad()
def fill(weights: Mapping[str, torch.Tensor], seed: int) -> None:
    """Random weights of a scale with which the model neither dies nor explodes; the
    same for the same seed on every device of a kind."""
    device = next(iter(weights.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    # A block of them again and again: a host takes minutes for billions of normals.
    block = torch.empty(FILL_BLOCK, dtype=torch.bfloat16, device=device)
    block.normal_(0, 0.02, generator=generator)
    for tensor in weights.values():
        if tensor.dim() == 1:
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            for part in tensor.view(-1).split(FILL_BLOCK):
                part.copy_(block[: len(part)])
