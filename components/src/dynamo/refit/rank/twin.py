# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The meta twin: the engine's model once more, with shapes and without weights.

The engine's own loader runs on the twin and never on the live model. All parameters are
on the meta device. What the model computes when it is built (rotary tables, scales,
maps of experts) is real, so that the live model's can be compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload.meta import (
    materialize_meta_tensor,
    to_meta_tensor,
)
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from dynamo.refit.errors import UnsupportedConfiguration

#: Tensors of more elements than this are on the meta device, however they are made.
LARGEST_REAL = 1 << 22

#: vLLM's name for a loader that processes a layer once it is whole.
ONLINE_LOADER = "online_process_loader"

#: Constructors whose result has no values yet, or random ones.
_WITHOUT_VALUES = frozenset(
    {
        torch.empty,
        torch.empty_permuted,
        torch.empty_strided,
        torch.rand,
        torch.randn,
        torch.randint,
        torch.randperm,
    }
)

#: By size in bytes, a dtype that can stand for any of that size.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _RealWhereComputed(TorchFunctionMode):
    """Makes small tensors that have values on ``device``, inside a meta context."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            planned = func(*args, **{**kwargs, "device": "meta"})
            if func in _WITHOUT_VALUES or planned.numel() > LARGEST_REAL:
                return planned
            kwargs = {**kwargs, "device": self._device}
        return func(*args, **kwargs)


def build_twin(vllm_config: VllmConfig, live: nn.Module) -> nn.Module:
    """The engine's model with this rank's shapes; what is not on the meta device is on
    that of the ``live`` model.

    Sets process-wide state (default dtype, current vLLM config) while it runs, so it
    is called on the thread that runs the model, and not during a step.

    Raises:
        UnsupportedConfiguration: the model cannot be built without weights.
    """
    config = copy.copy(vllm_config)
    config.compilation_config = copy.copy(vllm_config.compilation_config)
    # The layers of the twin must not replace the live ones in vLLM's registry.
    config.compilation_config.static_forward_context = {}
    device = next(live.parameters()).device
    try:
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            torch.device("meta"),
            _RealWhereComputed(device),
        ):
            twin = initialize_model(config)
    except Exception as error:
        raise UnsupportedConfiguration(
            f"{type(live).__name__} cannot be built without memory for its weights, so "
            f"that what its loader does stays unknown: {type(error).__name__}: {error}"
        ) from error
    _forget_values(twin, live)
    return twin


def _forget_values(twin: nn.Module, live: nn.Module) -> None:
    """Put the parameters that were made with values (ones, zeros) on the meta device:
    what a loader computes from them must fail, and not be taken for a constant. Their
    values are kept beside them, for :func:`made_real`."""
    # Layers may be shared with the live model, such as rotary embeddings.
    kept = {id(parameter) for parameter in live.parameters()}
    emptied: dict[int, torch.Tensor] = {}
    for _, table, key, tensor in list(held_tensors(twin)):
        if isinstance(tensor, nn.Parameter) and id(tensor) not in kept:
            if id(tensor) not in emptied:
                emptied[id(tensor)] = planned = (
                    tensor if tensor.is_meta else to_meta_tensor(tensor)
                )
                if planned is not tensor:
                    planned.initial_value = tensor.detach()
            table[key] = emptied[id(tensor)]


@contextmanager
def made_real(
    twin: nn.Module, names: Iterable[str], device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of ``twin`` with these ``names`` are real for a while, on ``device``,
    with the values that they were constructed with, or zeros.
    """
    planned = {name: tensor for name, _, _, tensor in held_tensors(twin)}
    planned |= dict(twin.named_parameters())
    wanted = {name: planned[name] for name in names}
    with device:
        real = {name: _with_initial_value(p) for name, p in wanted.items()}
    of = {id(tensor): name for name, tensor in wanted.items()}
    places = [
        (table, key, tensor)
        for _, table, key, tensor in held_tensors(twin)
        if id(tensor) in of
    ]
    for table, key, tensor in places:
        table[key] = real[of[id(tensor)]]
    try:
        yield real
    finally:
        for table, key, tensor in places:
            table[key] = tensor


def _with_initial_value(planned: torch.Tensor) -> torch.Tensor:
    """A tensor of the class and with the attributes of ``planned``."""
    real = materialize_meta_tensor(planned)
    initial = (
        planned if not planned.is_meta else getattr(planned, "initial_value", None)
    )
    if initial is None:
        real.data.zero_()
    else:
        real.data.copy_(initial)
    if hasattr(real, "weight_loader"):
        real.weight_loader = _without_processing(real.weight_loader)
    return real


def _without_processing(loader: Callable) -> Callable:
    """The loader that vLLM has wrapped where a layer is quantized as soon as its last
    tensor is loaded."""
    while getattr(loader, "__name__", "") == ONLINE_LOADER:
        loader = loader.__wrapped__
    return loader


def held_tensors(
    model: nn.Module,
) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """Every tensor that a module of ``model`` holds: its name, the module's table, its
    key there, and the tensor.

    Parameters, buffers and bare attributes, such as a kernel's workspace or what MLA
    derives from its weights. A tied tensor comes under every name.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers, module.__dict__):
            for key, value in table.items():
                if isinstance(value, torch.Tensor):
                    yield f"{prefix}.{key}".lstrip("."), table, key, value


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, also where they are not
    numbers; blocks."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    bits = BITS.get(one.dtype.itemsize)
    if bits is not None and not one.dtype.is_complex:
        one, other = one.view(bits), other.view(bits)
    return torch.equal(one, other.to(one.device))
