# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A CPU engine on the plain layout computes what vLLM's packed one does, and follows
what is written into its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.platforms import current_platform

from dynamo.refit.errors import UnsupportedConfiguration
from dynamo.refit.rank import cpu_layout

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="packing of a CPU build"),
]

EXPERTS, HIDDEN, TOKENS, TOP = 4, 64, 5, 2


class Layer(nn.Module):
    """Experts as they are loaded, with ``size`` intermediate channels a rank."""

    def __init__(self, size: int, seed: int, bias: bool = False) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        shapes = {
            "w13_weight": (EXPERTS, 2 * size, HIDDEN),
            "w2_weight": (EXPERTS, HIDDEN, size),
        }
        if bias:
            shapes["w13_bias"] = (EXPERTS, 2 * size)
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=random).bfloat16()
            setattr(self, name, nn.Parameter(values, requires_grad=False))


def make_experts(size: int) -> CPUUnquantizedExperts:
    experts = object.__new__(CPUUnquantizedExperts)
    experts.moe_config = SimpleNamespace(
        intermediate_size_per_partition=size, activation=MoEActivation.SILU
    )
    experts.quant_config = SimpleNamespace(w1_bias=None, w2_bias=None)
    experts._use_zentorch = False
    return experts


def run(experts: CPUUnquantizedExperts, layer: Layer, apply: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(9)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).bfloat16()
    scores = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP)
    output = torch.zeros_like(hidden)
    apply(
        experts,
        output,
        hidden,
        layer.w13_weight,
        layer.w2_weight,
        topk_weights=scores.values,
        topk_ids=scores.indices.int(),
        activation=MoEActivation.SILU,
        global_num_experts=EXPERTS,
        expert_map=None,
        a1q_scale=None,
        a2_scale=None,
        workspace13=None,
        workspace2=None,
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return output


def run_as_vllm_does(size: int, seed: int) -> torch.Tensor:
    """Pad and pack in place, as vLLM's ``process_weights_after_loading`` does."""
    experts, layer = make_experts(size), Layer(size, seed)
    experts._pad_moe_intermediate(layer)
    for name in ("w13_weight", "w2_weight"):
        packed = cpu_prepack_moe_weight(getattr(layer, name), experts.isa)
        assert not torch.equal(packed, getattr(layer, name))
        setattr(layer, name, nn.Parameter(packed, requires_grad=False))
    return run(experts, layer, cpu_layout._apply_experts)


@pytest.mark.parametrize("size", [64, 48, 24])
def test_experts_follow_their_weights_and_equal_packed_ones(size: int) -> None:
    """48 and 24 are padded: the kernel works on multiples of 32."""
    experts, layer = make_experts(size), Layer(size, seed=1)
    cpu_layout.keep_experts(experts, layer)
    for seed in (1, 2, 3):
        expected = Layer(size, seed).state_dict()
        layer.load_state_dict(expected)
        output = run(experts, layer, cpu_layout.apply_plain_experts)
        assert output.abs().max() > 1
        assert torch.equal(output, run_as_vllm_does(size, seed))
        for name, values in layer.state_dict().items():
            assert torch.equal(values, expected[name])


def test_biases_that_would_be_padded_are_refused() -> None:
    cpu_layout.keep_experts(make_experts(64), Layer(64, seed=1, bias=True))
    with pytest.raises(UnsupportedConfiguration, match=r"biases .* \(48 per rank\)"):
        cpu_layout.keep_experts(make_experts(48), Layer(48, seed=1, bias=True))


@pytest.mark.parametrize("removes", [True, False])
def test_a_linear_layer_follows_its_weight(removes: bool) -> None:
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    place = layer.weight.data_ptr()
    cpu_layout.dispatch_plain(layer, remove_weight=removes)
    tokens = torch.randn(3, 64).bfloat16()
    for factor in (1.0, -2.0):
        layer.weight.data.mul_(factor)
        output = layer.cpu_linear(tokens, layer.weight, None)
        assert torch.equal(output, tokens @ layer.weight.T)
    assert layer.weight.data_ptr() == place
