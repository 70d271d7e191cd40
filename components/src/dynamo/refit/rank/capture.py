# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What this rank's loader reads, learned from the loader itself.

ModelExpress's placeholders go through the meta twin's own ``load_weights`` and record
which slice of which tensor lands where: there is no table per model. Whatever else the
loader writes is recorded, too. Where it does more than copy slices, it runs once more
on tensors of the meta device, and it is followed which of them make up what it writes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from modelexpress.refit.reshard import (
    LazyWeight,
    UnsupportedReshard,
    build_lazy_weights,
    capture_weights,
)
from modelexpress.refit.reshard.slice_plan import resolve_slice
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank import boxes
from dynamo.refit.rank.plan import Parameter, ReadSlice
from dynamo.refit.rank.runtime_layout import find_layout
from dynamo.refit.rank.twin import held_tensors

logger = init_logger("vllm.dynamo_refit")

#: Characters of a loader's own message that a refusal repeats: vLLM's may list every
#: parameter of a module.
LONGEST_CAUSE = 300

#: Tensors that a refusal names.
MOST_NAMES = 8

_ZEROED = "the loader sets a part of it to zero"
_REPLACED = "the loader puts another tensor in its place"


def describe_parameters(twin: nn.Module, live: nn.Module) -> list[Parameter]:
    """The parameters to fill, as they are loaded, in the model's order; aliases once.

    Raises:
        RefitError: the live model holds one of them in a way that no version could
            be installed into; see :func:`find_layout`.
    """
    placeholders = find_layout(twin, live).placeholders
    unloaded = _vocabulary_padding(twin)
    return [
        Parameter.of(name, planned, unloaded.get(name, 0))
        for name, planned in twin.named_parameters()
        if name not in placeholders
    ]


@dataclass(frozen=True)
class LoadGeometry:
    """What this rank's loader makes of published tensors.

    ``slices`` are the copies of boxes that fill the *sliced* parameters. ``loaded``
    are the other tensors of the model that the loader writes, parameters and buffers:
    by name, the published tensors that each of them is made of. Of some of these
    ``unfilled`` elements are not made of anything.
    """

    slices: tuple[ReadSlice, ...]
    loaded: Mapping[str, frozenset[str]]
    unfilled: Mapping[str, int] = field(default_factory=dict)


def capture_load(twin: nn.Module, tensors: Sequence[TensorEntry]) -> LoadGeometry:
    """What ``twin``'s loader copies, and what it computes, of ``tensors``.

    A parameter is sliced if all that the loader does to it is to copy boxes of tensors
    that no loaded tensor is made of.

    Raises:
        LayoutRefused: the loader rejects a tensor, or needs its values to know what
            to do with it; names the tensors.
    """
    recorder = _LoadRecorder(twin)
    copies, unread, at_once = _run_with_placeholders(twin, tensors, recorder)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    computed = recorder.computed
    slices = []
    for copy in copies:
        try:
            box, strides = resolve_slice(copy, shapes[copy.src_name])
        except UnsupportedReshard as error:
            computed.setdefault(copy.param_name, str(error))
            continue
        slices.append(
            ReadSlice(
                tensor=copy.src_name,
                box=tuple((int(lo), int(hi)) for lo, hi in box),
                parameter=copy.param_name,
                offset=int(copy.dest_offset),
                strides=tuple(int(stride) for stride in strides),
            )
        )
    _forget_padding(computed, recorder.zeroed, _vocabulary_padding(twin))
    if at_once and not (computed or unread or recorder.copies_elsewhere):
        return LoadGeometry(tuple(slices), {})
    trace = _trace_sources(twin, tensors)
    made_of = trace.written
    filled: Counter[str] = Counter()
    for piece in slices:
        filled[piece.parameter] += boxes.volume(piece.box)
    for name in made_of:
        # A loader that waits for several tensors may keep a placeholder back.
        if filled[name] != trace.filled(name):
            computed.setdefault(name, "the loader does more than copy slices to it")
    if replaced := {
        name: reason
        for name, reason in computed.items()
        if name not in made_of or reason == _REPLACED
    }:
        raise refuse_tensors(replaced)
    loaded = _close(set(computed), unread, made_of)
    unfilled = {
        name: trace.elements[name] - trace.filled(name) for name in sorted(loaded)
    }
    return LoadGeometry(
        slices=tuple(piece for piece in slices if piece.parameter not in loaded),
        loaded={name: frozenset(made_of[name]) for name in sorted(loaded)},
        unfilled={name: number for name, number in unfilled.items() if number > 0},
    )


def _close(
    loaded: set[str], sources: set[str], made_of: Mapping[str, set[str]]
) -> set[str]:
    """``loaded``, and whatever else is made of the same tensors or of ``sources``: a
    tensor is read whole or in slices, not both."""
    sources = sources.union(*(made_of[name] for name in loaded))
    while more := {
        name
        for name, parts in made_of.items()
        if name not in loaded and not parts.isdisjoint(sources)
    }:
        loaded = loaded | more
        sources = sources.union(*(made_of[name] for name in more))
    return loaded


def refuse_tensors(reasons: Mapping[str, str]) -> LayoutRefused:
    """The refusal of tensors that a refit would get wrong, with the first's reason."""
    names = list(reasons)
    listed = ", ".join(names[:MOST_NAMES])
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return LayoutRefused(
        f"not just copies of slices of what is published: {listed}{more}; "
        f"{names[0]}: {_shorten(reasons[names[0]])}",
        tensor=names[0],
    )


class _CountedLoader:
    """As much of ``twin`` as ModelExpress uses; counts the calls of its loader."""

    def __init__(self, twin: nn.Module) -> None:
        self.calls = 0
        self.named_parameters = twin.named_parameters
        self._load = twin.load_weights

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.calls += 1
        self._load(weights)


def _run_with_placeholders(
    twin: nn.Module, tensors: Sequence[TensorEntry], recorder: _LoadRecorder
) -> tuple[Sequence[Any], set[str], bool]:
    """The copies of placeholders; the tensors with which the loader does what a
    placeholder cannot; and whether it took all of them at once."""
    loader = _CountedLoader(twin)
    lazy = build_lazy_weights(
        [(t.name, getattr(torch, t.dtype), t.shape) for t in tensors]
    )
    try:
        with recorder.recording():
            result = capture_weights(
                loader, lazy, default_weight_loader=default_weight_loader
            )
    except Exception as error:
        # Of a tensor that the loader rejects, or of a placeholder only: whoever loads
        # them without placeholders finds out.
        logger.debug("dynamo-refit: placeholders cannot be loaded: %s", error)
        return (), {tensor.name for tensor in tensors}, False
    return result.copies, set(result.unsupported), loader.calls == 1


def _trace_sources(twin: nn.Module, tensors: Sequence[TensorEntry]) -> _Trace:
    """Which ``tensors`` each tensor of ``twin`` is made of.

    Raises:
        LayoutRefused: the loader rejects a tensor; names it.
    """
    planned = [
        (t.name, torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta"))
        for t in tensors
    ]
    trace = _Trace(twin, planned)
    try:
        with torch.no_grad(), trace:
            twin.load_weights(iter(planned))
    except Exception as error:
        # The loaders raise whatever they like (mostly bare assertions), without the
        # tensor's name: find it by loading one tensor at a time.
        raise _blame(twin, planned, error) from error
    return trace


def _blame(
    twin: nn.Module, planned: Sequence[tuple[str, torch.Tensor]], cause: Exception
) -> LayoutRefused:
    for name, tensor in planned:
        try:
            with torch.no_grad(), _Trace(twin, [(name, tensor)]):
                twin.load_weights(iter([(name, tensor)]))
        except Exception as error:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return LayoutRefused(
                f"published with shape {tuple(tensor.shape)} as {dtype}; the engine's "
                f"loader rejects it: {type(error).__name__}: {_shorten(str(error))}",
                tensor=name,
            )
    return LayoutRefused(
        f"the engine's loader rejects the tensors together: "
        f"{type(cause).__name__}: {_shorten(str(cause))}"
    )


def _shorten(message: str) -> str:
    message = " ".join(message.split())
    if len(message) <= LONGEST_CAUSE:
        return message
    return f"{message[:LONGEST_CAUSE]}..."


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


def _forget_padding(
    computed: dict[str, str],
    zeroed: Mapping[str, tuple[int, ...]],
    padding: Mapping[str, int],
) -> None:
    """Drop from ``computed`` what was only zeroed where it pads the vocabulary: the
    staging buffers are zero there, too."""
    for name, sizes in zeroed.items():
        if computed.get(name) == _ZEROED and max(sizes) <= padding.get(name, 0):
            del computed[name]


# What the loader does to the twin's tensors.


class _LoadRecorder:
    """Sees every write to a tensor of ``twin`` while its loader runs.

    ``computed`` are the tensors that were not only copied into, with the reason;
    ``zeroed`` the numbers of elements that were set to zero, call by call. With
    ``copies_elsewhere`` a placeholder was copied to a tensor that is not the twin's.
    """

    def __init__(self, twin: nn.Module) -> None:
        self.computed: dict[str, str] = {}
        self.zeroed: dict[str, tuple[int, ...]] = {}
        self.copies_elsewhere = False
        self._twin = twin
        # Meta storages have no address: the storage object tells them apart.
        self._names: dict[int, str] = {}
        self._laid_out: dict[int, bool] = {}
        for name, parameter in twin.named_parameters():
            storage = _storage(parameter)
            alone = self._names.setdefault(storage, name) == name
            self._laid_out[storage] = (
                alone and parameter.storage_offset() == 0 and parameter.is_contiguous()
            )
        for name, _, _, tensor in held_tensors(twin):
            self._names.setdefault(_storage(tensor), name)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While it is entered, the loader's copies are attributed to the parameter
        that they write into, and its other writes are recorded."""
        before = _forms(self._twin)
        with _Copies(self), _Writes(self):
            yield
        after = _forms(self._twin)
        for name in before.keys() | after.keys():
            if before.get(name) != after.get(name):
                self.computed.setdefault(name, _REPLACED)

    def parameter_of(self, tensor: torch.Tensor) -> str | None:
        """The parameter that ``tensor`` is a part of, if it is laid out as in a staging
        buffer: alone in its storage, from the first element on, without gaps."""
        storage = _storage(tensor)
        return self._names[storage] if self._laid_out.get(storage) else None

    def written(self, func: Any, tensor: torch.Tensor, args: Sequence[Any]) -> None:
        """An operation ``func`` writes into ``tensor``, without copying a source."""
        name = self._names.get(_storage(tensor))
        if name is None:
            return
        zero = func is torch.ops.aten.zero_.default or (
            func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor)
            and not isinstance(args[1], torch.Tensor)
            and args[1] == 0
        )
        if zero:
            self.zeroed[name] = (*self.zeroed.get(name, ()), tensor.numel())
            self.computed.setdefault(name, _ZEROED)
        else:
            self.computed[name] = f"the loader computes it with {func}"

    def copied_elsewhere(self, source: str, tensor: torch.Tensor) -> None:
        """A source is copied to something that is no parameter by itself."""
        name = self._names.get(_storage(tensor))
        if name is None:
            self.copies_elsewhere = True
        else:
            self.computed.setdefault(name, f"the loader copies {source} into it")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _forms(model: nn.Module) -> dict[str, tuple]:
    """What each tensor of ``model`` is, but for its values."""
    return {
        name: (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        for name, _, _, tensor in held_tensors(model)
    }


#: They take a list of tensors.
_JOINS = frozenset(
    {
        torch.cat,
        torch.concat,
        torch.concatenate,
        torch.stack,
        torch.hstack,
        torch.vstack,
    }
)


class _Copies(TorchFunctionMode):
    """Names the parameter that a placeholder is copied into by where the bytes go, and
    not by whose loader runs; takes an assignment to an index for the copy that it is.
    """

    def __init__(self, recorder: _LoadRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _JOINS and any(isinstance(t, LazyWeight) for t in args[0]):
            # ModelExpress's placeholders do not look into a list for each other.
            raise UnsupportedReshard(f"the loader joins tensors with {func.__name__}")
        if func is torch.Tensor.__setitem__ and isinstance(args[2], LazyWeight):
            self._copy(args[0][args[1]], args[2])
            return None
        if func is torch.Tensor.copy_:
            source = args[1] if len(args) > 1 else kwargs.get("src")
            if isinstance(source, LazyWeight):
                return self._copy(args[0], source)
        return func(*args, **kwargs)

    def _copy(self, target: torch.Tensor, source: LazyWeight) -> torch.Tensor:
        name = self._recorder.parameter_of(target)
        if name is None:
            self._recorder.copied_elsewhere(source._name, target)
            return target
        records = source._recorder
        stamped, records.current = records.current, name
        try:
            return torch.Tensor.copy_(target, source)
        finally:
            records.current = stamped


def _targets(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[torch.Tensor]:
    """The tensors among its arguments that operation ``func`` writes into."""
    if not func._schema.is_mutable:
        return
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for target in given if isinstance(given, list | tuple) else [given]:
                if isinstance(target, torch.Tensor):
                    yield target


class _Writes(TorchDispatchMode):
    """Hands every operation that writes into a tensor to the recorder."""

    def __init__(self, recorder: _LoadRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for target in _targets(func, args, kwargs):
            self._recorder.written(func, target, args)
        return func(*args, **kwargs)


class _Trace(TorchDispatchMode):
    """Follows which of the ``sources``, on the meta device, make up what is written
    into the tensors of ``twin``: ``written``, by name. ``elements`` is how many a
    tensor has, but for padding."""

    def __init__(
        self, twin: nn.Module, sources: Sequence[tuple[str, torch.Tensor]]
    ) -> None:
        super().__init__()
        self.written: dict[str, set[str]] = {}
        self.elements: dict[str, int] = {}
        self._names: dict[int, str] = {}
        padding = _vocabulary_padding(twin)
        held = ((name, tensor) for name, _, _, tensor in held_tensors(twin))
        for name, tensor in (*twin.named_parameters(), *held):
            if self._names.setdefault(_storage(tensor), name) == name:
                self.elements[name] = tensor.numel() - padding.get(name, 0)
        #: By name, the views through which it was filled: each counts once.
        self._views: dict[str, set[tuple]] = {}
        self._made_of = {_storage(tensor): {name} for name, tensor in sources}
        #: By storage, the tensors of the twin whose values went into it.
        self._read: dict[int, set[str]] = {
            storage: {name} for storage, name in self._names.items()
        }
        # What is freed meanwhile would give its number to another storage.
        self._kept: list[torch.UntypedStorage] = []

    def filled(self, name: str) -> int:
        """Elements of a tensor that were made of sources."""
        views = self._views.get(name, ())
        return min(sum(math.prod(size) for _, size, _ in views), self.elements[name])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        targets = list(_targets(func, args, kwargs))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        others = [t for t in given if not any(t is target for target in targets)]
        made_of, read = (
            self._look_up(given, self._made_of),
            self._look_up(others, self._read),
        )
        if func is torch.ops.aten.copy_.default and args[1].is_meta:
            # Its target may be a real buffer, into which nothing can be copied now.
            result = args[0]
        else:
            result = func(*args, **kwargs)
        for tensor in (*targets, *tree_leaves(result)):
            if isinstance(tensor, torch.Tensor):
                self._kept.append(tensor.untyped_storage())
                self._made_of.setdefault(_storage(tensor), set()).update(made_of)
                self._read.setdefault(_storage(tensor), set()).update(read)
        if not self._look_up(others, self._made_of):
            return result
        for target in targets:
            if name := self._names.get(_storage(target)):
                self.written.setdefault(name, set()).update(made_of)
                # What is computed of itself has to be filled already.
                if name not in read:
                    view = target.storage_offset(), target.shape, target.stride()
                    self._views.setdefault(name, set()).add(view)
        return result

    @staticmethod
    def _look_up(
        tensors: Sequence[torch.Tensor], table: Mapping[int, set[str]]
    ) -> set[str]:
        return set().union(*(table.get(_storage(tensor), ()) for tensor in tensors))
