# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a loader does to the tensors of the meta twin, seen while it runs: the copies of
placeholders, every other write, and which tensors make up what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from modelexpress.refit.reshard import LazyWeight, UnsupportedReshard
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamo.refit.rank.twin import held_tensors

ZEROED = "the loader sets a part of it to zero"
REPLACED = "the loader puts another tensor in its place"


def vocabulary_padding(twin: nn.Module) -> dict[str, int]:
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


class LoadRecorder:
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
        self._names = _names_by_storage(twin)
        self._laid_out: dict[int, bool] = {}
        for name, parameter in twin.named_parameters():
            storage = _storage(parameter)
            self._laid_out[storage] = (
                self._names[storage] == name
                and parameter.storage_offset() == 0
                and parameter.is_contiguous()
            )

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
                self.computed.setdefault(name, REPLACED)

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
            self.computed.setdefault(name, ZEROED)
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
    """Meta storages have no address: the storage object tells them apart."""
    return tensor.untyped_storage()._cdata


def _named_tensors(twin: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What modules of ``twin`` hold, parameters first."""
    yield from twin.named_parameters()
    for name, _, _, tensor in held_tensors(twin):
        yield name, tensor


def _names_by_storage(twin: nn.Module) -> dict[int, str]:
    """By storage, the first name of what ``twin`` holds in it."""
    names: dict[int, str] = {}
    for name, tensor in _named_tensors(twin):
        names.setdefault(_storage(tensor), name)
    return names


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

    def __init__(self, recorder: LoadRecorder) -> None:
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

    def __init__(self, recorder: LoadRecorder) -> None:
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


class SourceTrace(TorchDispatchMode):
    """Follows which of the ``sources``, on the meta device, make up what is written
    into the tensors of ``twin``: ``written``, by name. ``elements`` is how many a
    tensor has, but for padding."""

    def __init__(
        self, twin: nn.Module, sources: Sequence[tuple[str, torch.Tensor]]
    ) -> None:
        super().__init__()
        self.written: dict[str, set[str]] = {}
        self.elements: dict[str, int] = {}
        self._names = _names_by_storage(twin)
        padding = vocabulary_padding(twin)
        for name, tensor in _named_tensors(twin):
            if self._names[_storage(tensor)] == name:
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
