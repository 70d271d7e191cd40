# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of every architecture of the survey, made by transformers.

Random weights: no tensor of one seed has the values of another seed's, so that a
tensor that a refit leaves as it was is seen. ``tests/survey`` judges them all,
``tests/integration/test_architectures.py`` some.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from graphs.tiny_model import build_tokenizer

CHECKPOINTS = Path(__file__).resolve().parents[2] / ".cache" / "architectures"

#: Raise it when the same architecture and seed come to mean other bytes.
RECIPE = 1


@dataclass(frozen=True)
class Architecture:
    """Names of the classes in transformers, and the fields of the config."""

    config: str
    model: str
    settings: Mapping[str, Any]


#: Two layers; grouped queries; a vocabulary that vLLM pads.
DENSE = {
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "vocab_size": 500,
}
TIED = {**DENSE, "tie_word_embeddings": True}
#: For configs whose ``head_dim`` is computed.
WITHOUT_HEAD_DIM = {key: DENSE[key] for key in DENSE if key != "head_dim"}

# Configs differ in how they call the number of experts, and their size.
EXPERTS = {
    **DENSE,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
LOCAL_EXPERTS = {**DENSE, "num_experts_per_tok": 2, "num_local_experts": 4}
ROUTED_EXPERTS = {
    **DENSE,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "topk_group": 1,
}
#: Keys and values that are kept compressed.
LATENT = {
    "head_dim": 32,
    "kv_lora_rank": 64,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
MAMBA2 = {
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_expand": 2,
    "mamba_n_groups": 2,
    "mamba_n_heads": 8,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
}
#: Four wide: vLLM's kernel for a CPU has no other.
SHORT_CONVOLUTION = {
    "conv_L_cache": 4,
    "conv_dim": 128,
    "layer_types": ["conv", "full_attention"],
}
#: Of the models before Llama, whose fields have other names.
_TOKENS = {key: DENSE[key] for key in ("bos_token_id", "dtype", "eos_token_id")}
GPT = {
    **_TOKENS,
    "n_embd": 128,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 1024,
    "vocab_size": 500,
}
STATE_SPACE = {
    **_TOKENS,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "state_size": 32,
    "tie_word_embeddings": False,
    "vocab_size": 500,
}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 32,
}


def _text(prefix: str, settings: Mapping[str, Any], **more: Any) -> Architecture:
    """A language model whose classes are called as most are."""
    return Architecture(f"{prefix}Config", f"{prefix}ForCausalLM", {**settings, **more})


ARCHITECTURES: Mapping[str, Architecture] = {
    # Dense, as most are: norms, fused projections, a gated MLP.
    "apertus": _text("Apertus", DENSE),
    "arcee": _text("Arcee", DENSE),
    "bitnet": _text("BitNet", WITHOUT_HEAD_DIM),
    "cohere": _text("Cohere", TIED, use_qk_norm=True),
    "cohere2": _text("Cohere2", TIED, **SLIDING),
    "cwm": _text("Cwm", DENSE, **SLIDING),
    "diffllama": _text("DiffLlama", DENSE),
    "ernie45": _text("Ernie4_5", DENSE),
    "exaone4": _text("Exaone4", DENSE, **SLIDING),
    "gemma": _text("Gemma", TIED),
    "gemma2": _text("Gemma2", TIED, **SLIDING),
    "gemma3": Architecture(
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**TIED, **SLIDING}
    ),
    "gemma3n": Architecture(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **TIED,
            **SLIDING,
            "activation_sparsity_pattern": [0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 500,
        },
    ),
    "gemma4": Architecture(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **TIED,
            **SLIDING,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 500,
        },
    ),
    "glm": _text("Glm", DENSE, attention_bias=True),
    "glm4": _text("Glm4", DENSE),
    "granite": _text("Granite", DENSE),
    "graniteswa": _text("GraniteSWA", DENSE, **SLIDING),
    "helium": _text("Helium", DENSE),
    "hunyuandense": _text("HunYuanDenseV1", DENSE),
    "hyperclovax": _text("HyperCLOVAX", DENSE),
    "jais2": _text("Jais2", DENSE),
    "llama": _text("Llama", DENSE),
    "minicpm3": _text("MiniCPM3", {**DENSE, **LATENT}),
    "ministral": _text("Ministral", DENSE, **SLIDING),
    "ministral3": _text("Ministral3", DENSE),
    "mistral": _text("Mistral", DENSE),
    "nanochat": _text("NanoChat", WITHOUT_HEAD_DIM),
    "nemotron": _text("Nemotron", DENSE),
    "olmo": _text("Olmo", WITHOUT_HEAD_DIM),
    "olmo2": _text("Olmo2", WITHOUT_HEAD_DIM),
    "olmo3": _text("Olmo3", WITHOUT_HEAD_DIM, **SLIDING),
    "phi": _text("Phi", WITHOUT_HEAD_DIM, intermediate_size=512, num_key_value_heads=4),
    "phi3": _text("Phi3", WITHOUT_HEAD_DIM),
    "qwen2": _text("Qwen2", DENSE),
    "qwen3": _text("Qwen3", DENSE),
    "seedoss": _text("SeedOss", DENSE),
    "smollm3": _text("SmolLM3", WITHOUT_HEAD_DIM),
    "stablelm": _text("StableLm", WITHOUT_HEAD_DIM, use_qkv_bias=True),
    "starcoder2": _text("Starcoder2", WITHOUT_HEAD_DIM),
    "vaultgemma": _text("VaultGemma", TIED, **SLIDING),
    "youtu": _text("Youtu", {**DENSE, **LATENT}),
    # Older ones: learned positions, query, key and value in one tensor.
    "bloom": _text(
        "Bloom", {**_TOKENS, "hidden_size": 128, "vocab_size": 500}, n_head=4
    ),
    "falcon": _text("Falcon", WITHOUT_HEAD_DIM),
    "falcon-new-decoder": _text(
        "Falcon", WITHOUT_HEAD_DIM, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gpt2": Architecture("GPT2Config", "GPT2LMHeadModel", GPT),
    "gptbigcode": _text("GPTBigCode", GPT),
    "gptj": _text("GPTJ", GPT, rotary_dim=16),
    "gptneox": _text("GPTNeoX", WITHOUT_HEAD_DIM),
    "mpt": _text(
        "Mpt",
        {**_TOKENS, "vocab_size": 500},
        d_model=128,
        max_seq_len=1024,
        n_heads=4,
        n_layers=2,
    ),
    "opt": _text("OPT", WITHOUT_HEAD_DIM, ffn_dim=256, word_embed_proj_dim=128),
    "persimmon": _text("Persimmon", WITHOUT_HEAD_DIM),
    # Experts.
    "afmoe": _text("Afmoe", EXPERTS, **SLIDING, num_shared_experts=1),
    "axk1": _text("AXK1", {**ROUTED_EXPERTS, **LATENT}, topk_method="noaux_tc"),
    "cohere2moe": _text(
        "Cohere2Moe", {**EXPERTS, **SLIDING, "tie_word_embeddings": True}
    ),
    "dbrx": _text(
        "Dbrx",
        {**_TOKENS, "vocab_size": 500},
        attn_config={"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4},
        d_model=128,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        max_seq_len=1024,
        n_heads=4,
        n_layers=2,
    ),
    "deepseekv2": _text("DeepseekV2", {**ROUTED_EXPERTS, **LATENT}),
    "deepseekv3": _text(
        "DeepseekV3", {**ROUTED_EXPERTS, **LATENT}, topk_method="noaux_tc"
    ),
    "dots1": _text("Dots1", ROUTED_EXPERTS),
    "ernie45moe": _text(
        "Ernie4_5_Moe",
        DENSE,
        moe_intermediate_size=64,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
    ),
    "exaonemoe": _text(
        "ExaoneMoe",
        EXPERTS,
        layer_types=["full_attention"] * 2,
        num_shared_experts=1,
    ),
    "flexolmo": _text("FlexOlmo", DENSE, num_experts=4, num_experts_per_tok=2),
    "glm4moe": _text("Glm4Moe", ROUTED_EXPERTS),
    "glm4moelite": _text("Glm4MoeLite", {**ROUTED_EXPERTS, **LATENT}),
    "gptoss": _text("GptOss", LOCAL_EXPERTS, **SLIDING),
    "granitemoe": _text("GraniteMoe", LOCAL_EXPERTS),
    "granitemoeshared": _text(
        "GraniteMoeShared", LOCAL_EXPERTS, shared_intermediate_size=64
    ),
    "hunyuanmoe": _text("HunYuanMoEV1", DENSE, moe_topk=2, num_experts=4),
    "hyv3": _text("HYV3", EXPERTS, expert_hidden_dim=64),
    "laguna": _text("Laguna", EXPERTS, shared_expert_intermediate_size=64),
    "llama4": Architecture(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {**LOCAL_EXPERTS, "intermediate_size_mlp": 256, "num_experts_per_tok": 1},
    ),
    "longcatflash": _text(
        "LongcatFlash",
        {**DENSE, **LATENT},
        expert_ffn_hidden_size=64,
        ffn_hidden_size=256,
        moe_topk=2,
        n_routed_experts=4,
        num_layers=1,
        zero_expert_num=2,
        zero_expert_type="identity",
    ),
    "mellum": _text("Mellum", EXPERTS, **SLIDING),
    "mimov2flash": _text("MiMoV2Flash", ROUTED_EXPERTS, **SLIDING, v_head_dim=32),
    "minimaxm2": _text(
        "MiniMaxM2",
        LOCAL_EXPERTS,
        rotary_dim=16,
        scoring_func="sigmoid",
        use_routing_bias=True,
    ),
    "mixtral": _text("Mixtral", LOCAL_EXPERTS),
    "olmoe": _text("Olmoe", DENSE, num_experts=4, num_experts_per_tok=2),
    "phimoe": _text("Phimoe", LOCAL_EXPERTS),
    "qwen2moe": _text("Qwen2Moe", EXPERTS, shared_expert_intermediate_size=64),
    "qwen3moe": _text("Qwen3Moe", EXPERTS),
    "solaropen": _text("SolarOpen", ROUTED_EXPERTS),
    # Recurrent layers, with attention between them or alone.
    "bamba": _text("Bamba", {**DENSE, **MAMBA2}, attn_layer_indices=[1]),
    "falconh1": _text("FalconH1", {**DENSE, **MAMBA2}, mamba_d_ssm=256),
    "falconmamba": _text("FalconMamba", STATE_SPACE),
    "granitemoehybrid": _text(
        "GraniteMoeHybrid",
        {**LOCAL_EXPERTS, **MAMBA2},
        layer_types=["mamba", "attention"],
        shared_intermediate_size=64,
    ),
    "jamba": _text(
        "Jamba",
        EXPERTS,
        attn_layer_offset=1,
        attn_layer_period=2,
        mamba_d_state=16,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "kimilinear": _text(
        "KimiLinear",
        {**LOCAL_EXPERTS, **LATENT},
        layer_types=["linear_attention", "full_attention"],
        linear_head_dim=32,
        linear_num_heads=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        q_lora_rank=None,
    ),
    "lfm2": _text("Lfm2", TIED, **SHORT_CONVOLUTION, block_dim=128, block_ff_dim=256),
    "lfm2moe": _text(
        "Lfm2Moe",
        {**EXPERTS, **SHORT_CONVOLUTION, "tie_word_embeddings": True},
        num_dense_layers=1,
    ),
    "mamba": _text("Mamba", STATE_SPACE),
    "mamba2": _text("Mamba2", STATE_SPACE, head_dim=32, n_groups=1, num_heads=8),
    "minimax": _text(
        "MiniMax", LOCAL_EXPERTS, layer_types=["linear_attention", "full_attention"]
    ),
    "nemotronh": _text(
        "NemotronH",
        {key: DENSE[key] for key in DENSE if key != "num_hidden_layers"},
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_head_dim=32,
        mamba_num_heads=8,
        n_groups=2,
        ssm_state_size=32,
    ),
    "olmohybrid": _text("OlmoHybrid", WITHOUT_HEAD_DIM, **LINEAR_ATTENTION),
    "qwen3next": _text(
        "Qwen3Next",
        {**EXPERTS, **LINEAR_ATTENTION},
        shared_expert_intermediate_size=64,
    ),
    "qwen35": Architecture(
        "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**DENSE, **LINEAR_ATTENTION}
    ),
    "qwen35moe": Architecture(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 64},
    ),
    "zamba2": _text(
        "Zamba2",
        DENSE,
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=32,
        n_mamba_heads=8,
        use_mamba_kernels=False,
    ),
}


def checkpoint(name: str, seed: int, **changes: Any) -> Path:
    """A directory with the weights of ``seed``; made once.

    ``changes`` are fields of the config.
    """
    architecture = ARCHITECTURES[name]
    settings = {**architecture.settings, **changes}
    recipe = hashlib.sha256(
        repr((RECIPE, architecture, sorted(changes.items()))).encode()
    ).hexdigest()
    directory = CHECKPOINTS / f"{name}-{recipe[:12]}-{seed}"
    if directory.is_dir():
        return directory
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    config = getattr(transformers, architecture.config)(**settings)
    model_class = getattr(transformers, architecture.model)
    # transformers initialises from the global generator; the caller's stays untouched.
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
    _randomise(model, seed)
    with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as workspace:
        complete = Path(workspace, "complete")
        model.save_pretrained(complete)
        build_tokenizer().save_pretrained(complete)
        # Another process may have made the same one meanwhile.
        if not directory.is_dir():
            complete.rename(directory)
    return directory


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Give every tensor that is saved values of ``seed``, in bf16; a router's
    correction stays in fp32, as in the published checkpoints.

    Gains, biases and the rest of one dimension are between 0.5 and 1.5, so that none
    is what its construction made.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict().keys()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if name not in saved or not tensor.is_floating_point():
            continue
        if tensor.dim() <= 1:
            values = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            gain = 1.5 / tensor.shape[-1] ** 0.5
            values = gain * torch.randn(tensor.shape, generator=generator)
        dtype = torch.float32 if "e_score_correction" in name else torch.bfloat16
        tensor.data = values.to(dtype)
    model.tie_weights()
