# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Models of a wanted size with the depth and the tensor count of real ones: their
configs, and the tensors that a checkpoint of them has, in its order.

Widths are scaled, and stay multiples of 128 as in the originals; what is left of the
size goes into the vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

#: bfloat16.
ITEMSIZE = 2

_COMMON = {
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "dtype": "bfloat16",
}

Tensor = tuple[str, tuple[int, ...]]


def dense(nbytes: int, *, tied: bool = True) -> dict:
    """A config of about ``nbytes`` like Qwen3-4B's: 36 layers, 398 tensors, tied."""
    scale = math.sqrt(nbytes / 8.05e9)
    kv_heads = max(1, math.floor(8 * scale))
    config = {
        **_COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": max(256, _width(2560 * scale)),
        "intermediate_size": max(256, _width(9728 * scale)),
        "num_hidden_layers": 36,
        "num_attention_heads": 4 * kv_heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }
    return _fill_up(config, nbytes)


def experts(nbytes: int) -> dict:
    """A config of about ``nbytes``: Qwen3's MoE with 64 experts in each of 16 layers,
    one tensor per expert and projection, 3 219 in all. Small ones are narrower."""
    hidden, heads = (512, 8) if nbytes >= 256 << 20 else (256, 4)
    per_expert = nbytes * 0.9 / (16 * 64) / ITEMSIZE
    config = {
        **_COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": 1024,
        "moe_intermediate_size": max(32, int(per_expert / 3 / hidden) // 32 * 32),
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 16,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "tie_word_embeddings": False,
    }
    return _fill_up(config, nbytes)


def tensors(config: dict) -> list[Tensor]:
    """Name and shape of every tensor of a checkpoint, in the model's order."""
    return list(_tensors(config))


def total(config: dict) -> int:
    """Bytes of a checkpoint."""
    return sum(math.prod(shape) * ITEMSIZE for _, shape in _tensors(config))


def write_config(config: dict, directory: Path) -> Path:
    """A model directory without weights, as ``load_format=dummy`` wants it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tensors(config: dict) -> Iterator[Tensor]:
    hidden, head = config["hidden_size"], config["head_dim"]
    q = config["num_attention_heads"] * head
    kv = config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}self_attn.q_proj.weight", (q, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, q)
        yield f"{prefix}self_attn.q_norm.weight", (head,)
        yield f"{prefix}self_attn.k_norm.weight", (head,)
        if "num_experts" in config:
            yield from _experts(f"{prefix}mlp.", config)
        else:
            yield from _mlp(f"{prefix}mlp.", config["intermediate_size"], hidden)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _experts(prefix: str, config: dict) -> Iterator[Tensor]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield f"{prefix}gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _mlp(f"{prefix}experts.{expert}.", width, hidden)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[Tensor]:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def _width(wanted: float) -> int:
    return int(wanted) // 128 * 128


def _fill_up(config: dict, nbytes: int) -> dict:
    layers = total({**config, "vocab_size": 0})
    tables = 1 if config["tie_word_embeddings"] else 2
    row = tables * config["hidden_size"] * ITEMSIZE
    rows = max(1024, (nbytes - layers) // row // 128 * 128)
    return {**config, "vocab_size": rows}
