# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What vLLM's processing after a load makes of a layer, beside the live one, and where
that belongs in what the live one holds."""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.platforms import current_platform

from dynamo.refit.errors import RefitError
from dynamo.refit.rank.runtime_layout import (
    MLA_DERIVED,
    ProcessedLayer,
    quantization_method,
)

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
    """A layer could not be made of what was published; nothing live has changed."""


@dataclass(frozen=True)
class Function:
    """A function that holds tensors, to be the attribute ``name`` of ``holder``; with
    ``_MISSING`` for it, the attribute is to be deleted."""

    holder: Any
    name: str
    function: Any

    def install(self) -> Function:
        """Set it; gives what was there."""
        there = vars(self.holder).get(self.name, _MISSING)
        if self.function is not _MISSING:
            setattr(self.holder, self.name, self.function)
        elif there is not _MISSING:
            delattr(self.holder, self.name)
        return Function(self.holder, self.name, there)


def process(
    layer: ProcessedLayer,
    weights: Mapping[str, torch.Tensor],
    filled: Mapping[int, torch.Tensor],
) -> tuple[nn.Module, Update]:
    """A copy of ``layer`` that ``weights`` were loaded into, processed, and what of it
    the live layer has to take over.

    ``filled`` are buffers that the loader has filled, by the live one's ``id``.
    """
    device = _device(layer.live)
    scratch = _copy_of(layer.twin)
    for leaf, staged in weights.items():
        with device:
            parameter = materialize_meta_tensor(layer.twin._parameters[leaf])
        parameter.data.copy_(staged)
        scratch._parameters[leaf] = parameter
    given = weights.keys() | _lend(layer.live, scratch, filled)
    # Before its kernels are copied: each copy is new, also where it is set up in place.
    before_method = dict(_attributes(quantization_method(scratch)))
    method = _copy_of_method(scratch)
    before = dict(_attributes(scratch))
    method.process_weights_after_loading(scratch)

    # What was filled in is new to the live layer, also where it was left as it is.
    before = {name: held for name, held in before.items() if name not in given}
    update = Update(layer.name, seen={id(scratch), id(method)})
    update.compare(layer.live, scratch, before)
    live_method = quantization_method(layer.live)
    update.compare(live_method, method, before_method, prefix="quant_method.")
    return scratch, update


def derive_attention(
    layer: nn.Module, dtype: torch.dtype, processed: nn.Module
) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """What an MLA layer makes of a ``processed`` ``kv_b_proj``: by its own names, the
    live tensors and the new ones."""
    scratch = _copy_of(layer)
    scratch._modules["kv_b_proj"] = processed
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
    return [(leaf, held[leaf], getattr(scratch, leaf, None)) for leaf in MLA_DERIVED]


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


def _lend(
    live: nn.Module, scratch: nn.Module, filled: Mapping[int, torch.Tensor]
) -> set[str]:
    """Copies of the live layer's other tensors, or of what has been ``filled`` for
    them: the twin's may have no bytes.

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
                planned[name] = filled.get(id(found), found).clone()
                lent.add(name)
    return lent


def _attributes(holder: Any) -> Iterator[tuple[str, Any]]:
    """Everything that ``holder`` holds under a name, as attribute access finds it."""
    for name, value in holder.__dict__.items():
        if name in ("_parameters", "_buffers"):
            yield from value.items()
        elif name not in _TABLES:
            yield name, value


# Where it belongs in what the live layer holds.


@dataclass
class Update:
    """By name, the live tensors and what is to be copied into them; functions."""

    layer: str
    copies: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)
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

    def add(
        self, layer: str, pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]]
    ) -> None:
        """Match tensors of another ``layer``, by its own names."""
        other = Update(layer)
        for path, live, new in pairs:
            other.pair(live, new, path)
        self.copies += other.copies

    def _pair_tensors(self, live: Any, new: torch.Tensor, path: str) -> None:
        if not isinstance(live, torch.Tensor) or new.is_meta:
            raise self._mismatch(path, live, new)
        if live.shape != new.shape or live.dtype != new.dtype:
            raise self._mismatch(path, live, new)
        self.copies.append((f"{self.layer}.{path}", live.detach(), new.detach()))

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
        self.functions.append(Function(live, name, new))

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
