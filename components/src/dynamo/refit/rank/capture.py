# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What this rank's loader reads, learned from the loader itself.

A twin of the model on the meta device (no bytes) is built once, before serving.
ModelExpress's placeholders then go through the twin's own ``load_weights`` and
record which slice of which tensor lands where: there is no table per model. The
live model is never touched. The only file that imports modelexpress.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from modelexpress.refit.reshard import (
    UnsupportedReshard,
    build_lazy_weights,
    capture_weights,
)
from modelexpress.refit.reshard.slice_plan import resolve_slice
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import set_default_torch_dtype

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import Manifest, TensorEntry
from dynamo.refit.rank.plan import Parameter, ReadSlice
from dynamo.refit.rank.runtime_layout import find_layout


def build_twin(vllm_config: VllmConfig) -> nn.Module:
    """The engine's model with this rank's shapes, on the meta device.

    Sets process-wide state (default dtype, current vLLM config) while it runs,
    so it is called on the thread that runs the model, and not during a step.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    # The layers of the twin must not replace the live ones in vLLM's registry.
    config.compilation_config.static_forward_context = {}
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        torch.device("meta"),
    ):
        return initialize_model(config)


def describe_parameters(twin: nn.Module, live: nn.Module) -> list[Parameter]:
    """The parameters to fill, as they are loaded, in the model's order; aliases once.

    Raises:
        RefitError: the live model holds one of them in a way that no version could
            be installed into; see :func:`find_layout`.
    """
    placeholders = find_layout(twin, live).placeholders
    unloaded = _vocabulary_padding(twin)
    return [
        Parameter(
            name=name,
            shape=tuple(planned.shape),
            dtype=str(planned.dtype).removeprefix("torch."),
            unloaded=unloaded.get(name, 0),
        )
        for name, planned in twin.named_parameters()
        if name not in placeholders
    ]


def capture_slices(twin: nn.Module, manifest: Manifest) -> list[ReadSlice]:
    """Every slice that ``twin``'s loader copies out of the published tensors.

    Raises:
        LayoutRefused: the loader rejects a tensor, or reads it in a way that is
            not a box of it.
    """
    shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
    slices = []
    for read in _capture(twin, manifest.tensors):
        try:
            box, strides = resolve_slice(read, shapes[read.src_name])
        except UnsupportedReshard as error:
            raise LayoutRefused(str(error), tensor=read.src_name) from error
        slices.append(
            ReadSlice(
                tensor=read.src_name,
                box=tuple((int(lo), int(hi)) for lo, hi in box),
                parameter=read.param_name,
                offset=int(read.dest_offset),
                strides=tuple(int(stride) for stride in strides),
            )
        )
    return slices


def _capture(twin: nn.Module, tensors: Sequence[TensorEntry]) -> list:
    try:
        result = _run_loader(twin, tensors)
    except Exception as error:
        # The loaders raise whatever they like (mostly bare assertions), without
        # the tensor's name: find it by loading one tensor at a time.
        raise _blame(twin, tensors, error) from error
    if result.unsupported:
        name = result.unsupported[0]
        raise LayoutRefused(
            f"{len(result.unsupported)} tensors are read in a way that is not a slice; "
            f"the first: {result.unsupported_reasons.get(name, 'unknown')}",
            tensor=name,
        )
    if result.unattributed:
        raise LayoutRefused(
            f"{result.unattributed} copies of the loader do not go to a parameter"
        )
    return result.copies


def _run_loader(twin: nn.Module, tensors: Sequence[TensorEntry]):
    lazy = build_lazy_weights(
        [(t.name, getattr(torch, t.dtype), t.shape) for t in tensors]
    )
    return capture_weights(twin, lazy, default_weight_loader=default_weight_loader)


def _blame(
    twin: nn.Module, tensors: Sequence[TensorEntry], cause: Exception
) -> LayoutRefused:
    for tensor in tensors:
        try:
            _run_loader(twin, [tensor])
        except Exception as error:
            return LayoutRefused(
                f"published with shape {tensor.shape} as {tensor.dtype}; the engine's "
                f"loader rejects it: {type(error).__name__}: {error}",
                tensor=tensor.name,
            )
    return LayoutRefused(
        f"the engine's loader rejects the tensors together: "
        f"{type(cause).__name__}: {cause}"
    )


def _vocabulary_padding(twin: nn.Module) -> dict[str, int]:
    """Elements of the embedding parameters that only pad the vocabulary."""
    padding: dict[str, int] = {}
    for prefix, module in twin.named_modules():
        shard = getattr(module, "shard_indices", None)
        if shard is None:
            continue
        rows = shard.num_org_vocab_padding + shard.num_added_vocab_padding
        for name, parameter in module.named_parameters(recurse=False):
            row = parameter.numel() // parameter.shape[0]
            padding[f"{prefix}.{name}"] = rows * row
    return padding
