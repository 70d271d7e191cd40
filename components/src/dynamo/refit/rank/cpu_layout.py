# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Keep a CPU engine's weights in the layout they are loaded in.

vLLM's CPU build packs weights at load, so that nothing can be written into them
afterwards. Linear layers and ``lm_head`` compute with a packed copy (oneDNN, SGL or
ZenDNN) and drop or shadow the plain weight; experts are packed in place, in the shape
they are loaded in, where no check of shapes would notice. An engine that is to be
refitted keeps all of them plain: torch multiplies with the linear weights, and experts
are packed into temporary copies at each call, which gives the same bits and takes
longer. On any other platform this does nothing.

Convolutions (of linear-attention models) stay packed, in another shape, and are packed
again by every refit, see :mod:`conversion`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.logger import init_logger
from vllm.model_executor.layers import utils as gemm
from vllm.platforms import current_platform

from dynamo.refit.errors import UnsupportedConfiguration

try:
    from vllm.model_executor.kernels.linear.zentorch_utils import (
        is_zentorch_moe_supported,
    )
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts,
    )
except ImportError:
    # vLLM 0.24 has neither; it is supported on GPUs only.
    CPUUnquantizedExperts = None

logger = init_logger("vllm.dynamo_refit")

#: How a CPU engine holds its weights: ``plain`` (as loaded, the default) or ``packed``.
LAYOUT_VARIABLE = "DYN_REFIT_CPU_LAYOUT"

_dispatch_gemm = gemm.dispatch_cpu_unquantized_gemm
_apply_experts = getattr(CPUUnquantizedExperts, "apply", None)


def keep_plain_layout() -> None:
    """Turn weight packing off in this process; call it before the model loads.

    With ``DYN_REFIT_CPU_LAYOUT=packed`` it stays on, and every refit packs again,
    layer by layer, see :mod:`conversion`.

    Raises:
        UnsupportedConfiguration: the variable is neither ``plain`` nor ``packed``, or
            this vLLM is older than 0.31 and runs on a CPU.
    """
    layout = os.environ.get(LAYOUT_VARIABLE, "plain")
    if layout not in ("plain", "packed"):
        raise UnsupportedConfiguration(
            f"{LAYOUT_VARIABLE} is {layout!r}, and has to be plain or packed"
        )
    if not current_platform.is_cpu() or layout == "packed":
        return
    if CPUUnquantizedExperts is None:
        raise UnsupportedConfiguration("refits on a CPU need vLLM 0.31 or later")
    gemm.dispatch_cpu_unquantized_gemm = dispatch_plain
    # The classes for AMX, NEON and VSX inherit both.
    CPUUnquantizedExperts.process_weights_after_loading = keep_experts
    CPUUnquantizedExperts.apply = apply_plain_experts
    logger.warning(
        "dynamo-refit: CPU weight packing is off, since packed weights cannot be "
        "refitted: linear layers run on the plain layout with torch's kernels, and "
        "experts are packed again at every call."
    )


def dispatch_plain(layer: nn.Module, remove_weight: bool) -> None:
    """Instead of vLLM's: let ``layer`` compute with the weight as it is."""
    if layer.weight.ndim == 2:
        layer.cpu_linear = functional.linear
    else:
        _dispatch_gemm(layer, remove_weight)


def keep_experts(experts: CPUUnquantizedExperts, layer: nn.Module) -> None:
    """Instead of vLLM's: choose the kernel, and leave the weights of ``layer`` alone.

    Raises:
        UnsupportedConfiguration: the kernel wants biases that are padded.
    """
    experts._use_zentorch = is_zentorch_moe_supported(layer)
    if not experts._use_zentorch and _padding(experts) and hasattr(layer, "w13_bias"):
        raise UnsupportedConfiguration(
            "a refit worker on a CPU does not run experts that have biases and an "
            f"intermediate size ({experts.moe_config.intermediate_size_per_partition} "
            "per rank) that the kernel pads: use another tensor-parallel size, or "
            "python -m dynamo.vllm"
        )


def apply_plain_experts(
    experts: CPUUnquantizedExperts,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Instead of vLLM's ``apply``: with packed copies of ``w1`` and ``w2``.

    ``w1`` is ``[experts, 2 * intermediate, hidden]`` (gate, then up), ``w2``
    ``[experts, hidden, intermediate]``. ZenDNN's kernel takes them as they are.
    """
    if not experts._use_zentorch:
        padding = _padding(experts)
        if padding:
            halves = w1.unflatten(1, (2, -1))
            w1 = functional.pad(halves, (0, 0, 0, padding)).flatten(1, 2)
            w2 = functional.pad(w2, (0, padding))
        w1 = cpu_prepack_moe_weight(w1, experts.isa)
        w2 = cpu_prepack_moe_weight(w2, experts.isa)
    _apply_experts(experts, output, hidden_states, w1, w2, *args, **kwargs)


def _padding(experts: CPUUnquantizedExperts) -> int:
    """Zeros that the kernel wants behind each rank's intermediate dimension."""
    size = experts.moe_config.intermediate_size_per_partition
    return experts._padded_intermediate_size(experts.moe_config) - size
