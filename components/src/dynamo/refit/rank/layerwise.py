# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Install into layers that compute with something else than their weights as loaded.

For each such layer a scratch copy is made of its twin, which is as vLLM builds it
before a load; it is given real tensors with the staged bytes, and processed as after
a first load. What the processing made is then copied into the tensors that the live
layer holds, whose addresses do not change. The live layer is not touched until all of
that has succeeded, so a layer that fails goes on as it was.

vLLM's own layerwise reload is not used: it works on the live layer (a failure leaves
it half processed), skips steps that its methods take at a first load only (experts on
a CPU are not packed again), loads each tied tensor into one of its owners (the output
layer of a tied model keeps its old packed copy), and rebinds bare tensors.
"""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from dynamo.refit.errors import RefitError, UnsupportedConfiguration
from dynamo.refit.rank.runtime_layout import (
    MLA_DERIVED,
    ProcessedLayer,
    find_layout,
    quantization_method,
)
from dynamo.refit.rank.twin import same_bits

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SCALARS = (bool, int, float, complex, str, type(None), enum.Enum, torch.dtype)
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    functools.partial,
)
_MISSING = object()
#: Where kernels keep their tensors; not their configs, nor other layers.
_KERNELS = "vllm.model_executor."


class LayerFailed(RefitError):
    """A layer could not be processed; it goes on with the weights that it had."""


class ProcessedLayers:
    """The layers of a live model that a version cannot just be copied into.

    Every kind of them is processed once at construction, with made-up weights and
    without writing, so that what cannot be installed is refused here and not by an
    install. Where the quantization method talks to the other ranks (scales of
    quantization at load), all ranks have to construct this, and install, together.

    Args:
        model: the live model.
        twin: the same model on the meta device, as built; it is not changed.
        config: what the model was built with.

    Raises:
        UnsupportedConfiguration: names the layer, and what could not be installed.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, config: VllmConfig) -> None:
        layout = find_layout(twin, model)
        self.plain = layout.plain
        self.layers = layout.processed
        self._attention = layout.attention
        self._config = config
        #: The parameters that a copy alone does not install.
        self.names = frozenset(
            name for layer in self.layers for name in layer.parameters.values()
        )
        #: The live tensors that an install processes anew.
        self.derived: frozenset[str] = frozenset(
            f"{name}.{leaf}" for name, _ in self._attention for leaf in MLA_DERIVED
        )
        if self.names or self._attention:
            self._rehearse(model)

    def install(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Process ``staged`` and write it into the layers, one after another.

        Blocks this thread, which must be the one that runs the model, between two
        steps. ``staged`` is only read; installing it again gives the same.

        Raises:
            LayerFailed: names the layer. It has its old weights, and so have the
                layers after it; the ones before it have the new.
        """
        if not self.layers:
            return
        with self._as_after_a_load():
            for layer in self.layers:
                weights = {
                    leaf: staged[name] for leaf, name in layer.parameters.items()
                }
                with _failing(layer.name):
                    update = _process(layer, weights)
                update.write()
                # Its memory is the next layer's.
                del update

    def find_differences(
        self, layer: ProcessedLayer, staged: Mapping[str, torch.Tensor]
    ) -> list[str]:
        """The live tensors of ``layer`` that an install of ``staged``, all of its
        parameters, would change; nothing is written.

        Raises:
            LayerFailed: the layer cannot be processed.
        """
        weights = {leaf: staged[name] for leaf, name in layer.parameters.items()}
        with self._as_after_a_load(), _failing(layer.name):
            return _process(layer, weights).differences()

    def find_stale_attention(self) -> list[str]:
        """MLA's copies that are not what its live ``kv_b_proj`` gives."""
        if not self._attention:
            return []
        dtype = self._config.model_config.dtype
        stale = []
        with self._as_after_a_load():
            for name, layer in self._attention:
                with _failing(name):
                    stale += _derive(layer, dtype, name).differences()
        return stale

    def refresh_attention(self) -> None:
        """Make MLA's copies of ``kv_b_proj`` again, once that is installed.

        Raises:
            LayerFailed: names the layer, which keeps its old copies.
        """
        if not self._attention:
            return
        with self._as_after_a_load():
            for name, layer in self._attention:
                with _failing(name):
                    update = _derive(layer, self._config.model_config.dtype, name)
                update.write()

    def _rehearse(self, model: nn.Module) -> None:
        compiled = _is_compiled(model)
        kinds: dict[tuple, list[ProcessedLayer]] = {}
        for layer in self.layers:
            kinds.setdefault(_kind(layer), []).append(layer)
        with self._as_after_a_load():
            for layer, *others in kinds.values():
                with _refusing(layer.name):
                    update = _process(layer, _made_up(layer))
                self.derived |= {
                    f"{alike.name}.{path}"
                    for alike in (layer, *others)
                    for path, _, _ in update.copies
                }
                if update.functions and compiled:
                    raise UnsupportedConfiguration(
                        f"{layer.name} keeps packed weights in a function, which "
                        "compiled code may have inlined: start the worker with "
                        "--enforce-eager"
                    )
            for name, attention in self._attention[:1]:
                with _refusing(name):
                    _derive(attention, self._config.model_config.dtype, name)

    @contextmanager
    def _as_after_a_load(self) -> Iterator[None]:
        """What vLLM's methods find around them when they process a loaded layer."""
        with (
            torch.no_grad(),
            set_current_vllm_config(self._config),
            set_default_torch_dtype(self._config.model_config.dtype),
        ):
            yield


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UnsupportedConfiguration(
            f"weights of {name} cannot be refitted: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _failing(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise LayerFailed(
            f"{name} cannot be processed: {type(error).__name__}: {error}; it goes on "
            "with the weights that it had",
            tensor=getattr(error, "tensor", None) or name,
        ) from error


def _kind(layer: ProcessedLayer) -> tuple:
    shapes = (
        (leaf, tuple(planned.shape), planned.dtype)
        for leaf, planned in layer.twin._parameters.items()
        if planned is not None
    )
    return type(layer.live), type(quantization_method(layer.live)), *shapes


def _made_up(layer: ProcessedLayer) -> dict[str, torch.Tensor]:
    """Ones for every parameter of ``layer``: no scale of them is zero or infinite."""
    planned = layer.twin._parameters
    return {
        leaf: torch.ones((), dtype=torch.float32)
        .to(planned[leaf].dtype)
        .expand(planned[leaf].shape)
        for leaf in layer.parameters
    }


def _is_compiled(model: nn.Module) -> bool:
    return not torch._dynamo.config.disable and any(
        getattr(module, "do_not_compile", True) is False for module in model.modules()
    )


# Processing, beside the live layer.


def _process(layer: ProcessedLayer, weights: Mapping[str, torch.Tensor]) -> _Update:
    """What ``weights`` make of ``layer``, not yet written."""
    device = _device(layer.live)
    scratch = _copy_of(layer.twin)
    for leaf, staged in weights.items():
        with device:
            parameter = materialize_meta_tensor(layer.twin._parameters[leaf])
        parameter.data.copy_(staged)
        scratch._parameters[leaf] = parameter
    filled = weights.keys() | _lend(layer.live, scratch)
    method = _copy_of_method(scratch)
    before, before_method = dict(_attributes(scratch)), dict(_attributes(method))
    method.process_weights_after_loading(scratch)

    # What was filled in is new to the live layer, also where it was left as it is.
    before = {name: held for name, held in before.items() if name not in filled}
    update = _Update(layer.name, seen={id(scratch), id(method)})
    update.compare(layer.live, scratch, before)
    live_method = quantization_method(layer.live)
    update.compare(live_method, method, before_method, prefix="quant_method.")
    return update


def _derive(layer: nn.Module, dtype: torch.dtype, name: str) -> _Update:
    """What an MLA layer makes of its ``kv_b_proj``, not yet written."""
    scratch = _copy_of(layer)
    held = {}
    for leaf in MLA_DERIVED:
        held[leaf] = getattr(layer, leaf)
        for table in (scratch.__dict__, scratch._parameters, scratch._buffers):
            table.pop(leaf, None)
    for table in (scratch._buffers, scratch.__dict__):
        for leaf, value in table.items():
            # Its scales, which processing sets and which do not depend on weights.
            if isinstance(value, torch.Tensor) and "scale" in leaf:
                table[leaf] = value.clone()
    scratch.process_weights_after_loading(dtype)
    update = _Update(name)
    for leaf in MLA_DERIVED:
        update.pair(held[leaf], getattr(scratch, leaf, None), leaf)
    return update


def _device(layer: nn.Module) -> torch.device:
    for tensor in (*layer._parameters.values(), *layer._buffers.values()):
        if tensor is not None:
            return tensor.device
    raise LayerFailed("it holds no tensor any more")


def _copy_of(source: Any) -> Any:
    """A shallow copy whose own tables can be changed."""
    copied = object.__new__(type(source))
    copied.__dict__.update(source.__dict__)
    for table in _TABLES:
        if table in copied.__dict__:
            copied.__dict__[table] = copy.copy(copied.__dict__[table])
    return copied


def _copy_of_method(scratch: nn.Module) -> Any:
    """Give ``scratch`` a quantization method, and kernels, of its own."""
    method = _copy_of(quantization_method(scratch))
    for name, value in list(method.__dict__.items()):
        hook = getattr(value, "process_weights_after_loading", None)
        if hook is not None and not isinstance(value, type):
            method.__dict__[name] = _copy_of(value)
    scratch.quant_method = method
    return method


def _lend(live: nn.Module, scratch: nn.Module) -> set[str]:
    """Copies of the live layer's other tensors: the twin's may have no bytes.

    A map of experts, for example, is computed when the model is built. Returns their
    names, since processing may write into them.
    """
    lent = set()
    for planned, current in (
        (scratch._buffers, live._buffers),
        (scratch.__dict__, live.__dict__),
    ):
        for name, tensor in planned.items():
            found = current.get(name)
            if not isinstance(tensor, torch.Tensor):
                continue
            if isinstance(found, torch.Tensor) and tensor.shape == found.shape:
                planned[name] = found.clone()
                lent.add(name)
    return lent


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """Everything that ``holder`` holds under a name, as attribute access finds it."""
    for name, value in holder.__dict__.items():
        if name in ("_parameters", "_buffers"):
            yield from value.items()
        elif name not in _TABLES:
            yield name, value


# Writing, into what the live layer holds.


@dataclass
class _Update:
    """Copies into live tensors, and functions to replace; complete before a write."""

    layer: str
    copies: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    functions: list[tuple[Any, str, Any]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def compare(
        self, live: Any, new: Any, before: Mapping[str, Any], prefix: str = ""
    ) -> None:
        """Take over each attribute of ``new`` that is not what it was ``before``."""
        held = dict(_attributes(live))
        for name, value in _attributes(new):
            if value is before.get(name, _MISSING):
                continue
            current = held.get(name, _MISSING)
            if isinstance(value, _FUNCTIONS):
                self._pair_functions(live, name, value)
            else:
                self.pair(current, value, f"{prefix}{name}")

    def pair(self, live: Any, new: Any, path: str) -> None:
        """Match what the live layer holds at ``path`` with what was made anew.

        Raises:
            LayerFailed: the new cannot be written into the live.
        """
        if live is new or id(new) in self.seen:
            return
        if isinstance(new, torch.Tensor):
            self._pair_tensors(live, new, path)
        elif isinstance(new, _SCALARS):
            if live is _MISSING or not _equal(live, new):
                raise self._mismatch(path, live, new)
        elif type(live) is not type(new):
            raise self._mismatch(path, live, new)
        else:
            self.seen.add(id(new))
            self._pair_parts(live, new, path)

    def differences(self) -> list[str]:
        """The live tensors that :meth:`write` would change."""
        return [
            f"{self.layer}.{path}"
            for path, live, new in self.copies
            if not same_bits(live.data, new.data)
        ]

    def write(self) -> None:
        for _, live, new in self.copies:
            live.data.copy_(new)
        for holder, name, function in self.functions:
            setattr(holder, name, function)

    def _pair_tensors(self, live: Any, new: torch.Tensor, path: str) -> None:
        if not isinstance(live, torch.Tensor) or new.is_meta:
            raise self._mismatch(path, live, new)
        if live.shape != new.shape or live.dtype != new.dtype:
            raise self._mismatch(path, live, new)
        self.copies.append((path, live, new))

    def _pair_parts(self, live: Any, new: Any, path: str) -> None:
        if isinstance(new, dict):
            live_parts, new_parts = live, new
        elif isinstance(new, list | tuple):
            live_parts, new_parts = dict(enumerate(live)), dict(enumerate(new))
        elif _is_kernel(new):
            live_parts, new_parts = vars(live), vars(new)
        else:
            return
        for key, part in new_parts.items():
            # Numbers of a kernel's configuration may differ between two builds of it;
            # floats are what is computed from weights.
            setting = isinstance(part, _SCALARS) and not isinstance(part, float)
            if not setting and not isinstance(part, (*_FUNCTIONS, type)):
                self.pair(live_parts.get(key, _MISSING), part, f"{path}.{key}")

    def _pair_functions(self, live: Any, name: str, new: Any) -> None:
        """A function that holds tensors takes the old one's place: only on a CPU,
        where no graph has captured what it holds."""
        closed_over = getattr(new, "__closure__", None) or getattr(new, "args", None)
        if isinstance(new, types.MethodType) or not closed_over:
            return
        if not current_platform.is_cpu():
            raise self._mismatch(name, vars(live).get(name, _MISSING), new)
        self.functions.append((live, name, new))

    def _mismatch(self, path: str, live: Any, new: Any) -> LayerFailed:
        return LayerFailed(
            f"{path} is {_form(live)} in the engine and would be {_form(new)}",
            tensor=f"{self.layer}.{path}".strip("."),
        )


def _is_kernel(value: Any) -> bool:
    return (
        type(value).__module__.startswith(_KERNELS)
        and not isinstance(value, nn.Module)
        and hasattr(value, "__dict__")
    )


def _equal(live: Any, new: Any) -> bool:
    not_a_number = live != live and new != new
    return not_a_number or (type(live) is type(new) and live == new)


def _form(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value) if isinstance(value, _SCALARS) else type(value).__name__
