# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which layers compute with their weights as loaded, and which with something else.

vLLM hands every layer to its quantization method after the load. Some methods leave
the weights alone; others pack, transpose or quantize them, some of them in place and
in the same shape, so that shapes prove nothing. A layer counts as *plain* only where
it is known that its method leaves the weights alone on this platform; every other
layer is *processed*. What could be neither written nor processed again is refused by
name. This module looks and never writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from dynamo.refit.errors import PackedWeights, UnsupportedConfiguration

#: Backends for unquantized experts that read ``w13_weight`` and ``w2_weight`` as
#: loaded. FlashInfer's and AITER's swap, pad or shuffle them, in the same shape.
PLAIN_EXPERT_BACKENDS = frozenset({"TRITON", "BATCHED_TRITON"})

#: What MLA keeps beside ``kv_b_proj``: two bare copies, transposed for decoding.
MLA_DERIVED = ("W_UV", "W_UK_T")

_ATTENTION = "vllm.model_executor.layers.attention."
#: Their ``process_weights_after_loading`` sets scales that no weight enters.
_HARMLESS_ATTENTION = frozenset(
    {f"{_ATTENTION}attention", f"{_ATTENTION}mm_encoder_attention"}
)
_MLA = f"{_ATTENTION}mla_attention"
#: Not imported: what it replaces is in vLLM's CPU build only.
_CPU_LAYOUT = "dynamo.refit.rank.cpu_layout"
_BASE_IMPL = "vllm.v1.attention.backend"
#: Ways of MLA that keep other copies (quantized, packed, gathered over ranks).
_MLA_OTHER_WAYS = (
    "is_amx_bmm_enabled",
    "is_aiter_triton_fp4_bmm_enabled",
    "is_aiter_triton_fp8_bmm_enabled",
    "dcp_q_replicate",
)


@dataclass(frozen=True)
class ProcessedLayer:
    """A layer that computes with something else than its weights as loaded.

    Args:
        name: its path in the model.
        live: the layer that serves.
        twin: the same layer of the meta twin: as it was before the load.
        parameters: which parameter of the plan is loaded under which of its own names.
        attention: for ``kv_b_proj``, the MLA layer that keeps copies of it, and its
            path.
        views: tensors of other modules that are views of this layer's parameters as
            they are loaded: path, the parameter's own name, and size, stride and offset
            in it.
    """

    name: str
    live: nn.Module
    twin: nn.Module
    parameters: dict[str, str]
    attention: tuple[str, nn.Module] | None = None
    views: tuple[tuple[str, str, tuple], ...] = ()


@dataclass(frozen=True)
class RuntimeLayout:
    """How the live model holds what is loaded into it.

    Args:
        plain: the live tensors that are laid out as loaded, by parameter.
        processed: the layers that are not, or of which others keep copies, in the
            model's order.
        placeholders: parameters that exist during a load only (scales of a KV cache).
    """

    plain: dict[str, nn.Parameter]
    processed: tuple[ProcessedLayer, ...]
    placeholders: frozenset[str]


def find_layout(twin: nn.Module, live: nn.Module) -> RuntimeLayout:
    """Compare the live model with its twin, layer by layer; milliseconds.

    Raises:
        PackedWeights: a parameter is not laid out as loaded, and no quantization
            method could process it again.
        UnsupportedConfiguration: weights that a refit would leave stale; names them.
    """
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    there = dict(live.named_modules(remove_duplicate=False))
    attention = {
        id(module.kv_b_proj): (name, module)
        for name, module in _derived_attention(live)
    }
    views = _views_by_storage(twin)
    plain: dict[str, nn.Parameter] = {}
    held: dict[str, nn.Parameter | None] = {}
    processed, placeholders = [], set()
    for path, planned in twin.named_modules():
        own = {
            leaf: names[id(parameter)]
            for leaf, parameter in planned._parameters.items()
            if parameter is not None
        }
        if not own:
            continue
        layer = there.get(path)
        if layer is None:
            raise UnsupportedConfiguration(f"the engine has no layer {path}")
        method = quantization_method(planned)
        if isinstance(method, BaseKVCacheMethod):
            placeholders.update(own.values())
            continue
        current = {name: layer._parameters.get(leaf) for leaf, name in own.items()}
        held.update(current)
        if _is_plain(planned, layer) and id(layer) not in attention:
            plain.update(current)
        elif method is None:
            raise _packed(planned, layer, own)
        else:
            _check_method(path, method, layer)
            processed.append(
                ProcessedLayer(
                    name=path,
                    live=layer,
                    twin=planned,
                    parameters=own,
                    attention=attention.get(id(layer)),
                    views=tuple(
                        (name, leaf, view)
                        for leaf in own
                        for name, view in views.get(_storage(planned, leaf), ())
                    ),
                )
            )
    _check_ties(held)
    return RuntimeLayout(
        plain=plain,
        processed=tuple(processed),
        placeholders=frozenset(placeholders),
    )


def _storage(module: nn.Module, leaf: str) -> int:
    return module._parameters[leaf].untyped_storage()._cdata


def _views_by_storage(twin: nn.Module) -> dict[int, list[tuple[str, tuple]]]:
    """The buffers of ``twin``, by the storage that they are in; a parameter's may be
    among them."""
    found: dict[int, list[tuple[str, tuple]]] = {}
    for name, buffer in twin.named_buffers():
        view = tuple(buffer.shape), buffer.stride(), buffer.storage_offset()
        found.setdefault(buffer.untyped_storage()._cdata, []).append((name, view))
    return found


def quantization_method(layer: nn.Module) -> QuantizeMethodBase | None:
    """What processes ``layer`` after a load: vLLM's own rule."""
    method = getattr(layer, "quant_method", None)
    return method if isinstance(method, QuantizeMethodBase) else None


def _is_plain(planned: nn.Module, layer: nn.Module) -> bool:
    for leaf, expected in planned._parameters.items():
        if expected is not None and not _same_form(
            expected, layer._parameters.get(leaf)
        ):
            return False
    method = quantization_method(layer)
    # Exact types: a subclass may process what its parent leaves alone.
    kind = type(method)
    if method is None:
        return True
    if kind is UnquantizedLinearMethod or kind is UnquantizedEmbeddingMethod:
        return current_platform.is_cuda() or _cpu_gemm_is_plain(layer)
    if kind is UnquantizedFusedMoEMethod:
        if current_platform.is_cuda():
            return method.unquantized_backend.name in PLAIN_EXPERT_BACKENDS
        return _cpu_experts_are_plain(method)
    return False


def _same_form(expected: torch.Tensor, found: torch.Tensor | None) -> bool:
    return (
        found is not None
        and found.shape == expected.shape
        and found.dtype == expected.dtype
        and found.is_contiguous()
    )


def _cpu_gemm_is_plain(layer: nn.Module) -> bool:
    """Whether a CPU layer multiplies with ``weight`` itself.

    Packed weights live in the closure of ``cpu_linear``; torch's own has none.
    """
    gemm = getattr(layer, "cpu_linear", None)
    return (
        current_platform.is_cpu()
        and gemm is not None
        and getattr(gemm, "__closure__", None) is None
        and not getattr(gemm, "__defaults__", None)
    )


def _cpu_experts_are_plain(method: UnquantizedFusedMoEMethod) -> bool:
    """Whether :mod:`cpu_layout` has replaced the packing of experts after a load."""
    if not current_platform.is_cpu() or getattr(method, "moe_kernel", None) is None:
        return False
    pack = type(method.moe_kernel.fused_experts).process_weights_after_loading
    return pack.__module__ == _CPU_LAYOUT


def _packed(
    planned: nn.Module, layer: nn.Module, names: dict[str, str]
) -> PackedWeights:
    leaf = next(
        leaf
        for leaf in names
        if not _same_form(planned._parameters[leaf], layer._parameters.get(leaf))
    )
    expected, found = planned._parameters[leaf], layer._parameters.get(leaf)
    form = "gone" if found is None else f"{tuple(found.shape)} {found.dtype}"
    return PackedWeights(
        f"loaded as {tuple(expected.shape)} {expected.dtype}, but the engine holds it "
        f"as {form}: start the worker with `python -m dynamo.refit.worker`, which "
        "keeps the plain layout",
        tensor=names[leaf],
    )


def _check_method(name: str, planned: QuantizeMethodBase, layer: nn.Module) -> None:
    method = quantization_method(layer)
    if type(method) is not type(planned):
        raise UnsupportedConfiguration(
            f"{name} was created with {type(planned).__name__} and runs with "
            f"{type(method).__name__}, so its weights cannot be processed again"
        )


def _check_ties(held: dict[str, nn.Parameter | None]) -> None:
    """vLLM ties an output layer whose weights were loaded equal to the embedding's."""
    seen: dict[int, str] = {}
    for name, tensor in held.items():
        if tensor is None or tensor.numel() == 0:
            continue
        other = seen.setdefault(tensor.data_ptr(), name)
        if other != name:
            raise UnsupportedConfiguration(
                f"{other} and {name} were equal at load and share memory since then, "
                "but a new version may tell them apart: set tie_word_embeddings to "
                "what the trainer does, in the model's config.json"
            )


def _derived_attention(live: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLA layers; anything else that derives tensors from weights is refused.

    MLA multiplies with ``W_UV`` and ``W_UK_T``, which its
    ``process_weights_after_loading`` makes of ``kv_b_proj``: they can be made again in
    a copy of the layer and written where they are. Other ways of MLA and backends
    with a hook of their own keep tensors where no such copy reaches.
    """
    for name, module in live.named_modules():
        hook = getattr(type(module), "process_weights_after_loading", None)
        if hook is None or isinstance(module, QuantizeMethodBase):
            continue
        known = hook.__module__ in _HARMLESS_ATTENTION or hook.__module__ == _MLA
        if not known or _backend_derives(module):
            backend = type(getattr(module, "impl", module)).__name__
            raise UnsupportedConfiguration(
                f"{name or type(module).__name__} ({backend}) derives tensors from "
                "weights after a load, and a refit does not know how to make them "
                "again: use another attention backend, or python -m dynamo.vllm"
            )
        if hook.__module__ == _MLA:
            yield name, module


def _backend_derives(module: nn.Module) -> bool:
    if any(getattr(module, way, False) for way in _MLA_OTHER_WAYS):
        return True
    impl = getattr(module, "impl", None)
    hook = getattr(type(impl), "process_weights_after_loading", None)
    if hook is None or hook.__module__ == _BASE_IMPL:
        return False
    # FlashInfer's (and backends made of it): a float32 copy of the sinks, if any.
    return not (hasattr(impl, "sinks") and impl.sinks is None)
