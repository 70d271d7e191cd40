# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Shows that the plan gives what vLLM's loader gives, before anything rests on it.

Three comparisons, bit for bit: the slices of made-up tensors with what the twin's own
``load_weights`` makes of them (a module of each kind); the slices of the start
checkpoint with the live parameters (all of them); and every other tensor of the live
model with the one that its construction made.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank.capture import refuse_tensors
from dynamo.refit.rank.layerwise import ProcessedLayers
from dynamo.refit.rank.session import piece_view
from dynamo.refit.rank.slices import Parameter, ReadSlice
from dynamo.refit.rank.twin import held_tensors, same_bits

#: Made-up numbers repeat after this many: a prime, so that no two rows are alike.
PERIOD = 1_000_003

#: Elements that are compared at a time, so that little of a checkpoint is on the
#: device at once.
COMPARED = 1 << 24

#: vLLM's name for a loader that processes a layer once it is whole.
ONLINE_LOADER = "online_process_loader"

#: What vLLM binds the memory of a layer's KV cache to.
_KV_CACHE = "kv_cache"


def _box_of(piece: ReadSlice, tensor: torch.Tensor) -> torch.Tensor:
    """What ``piece`` reads of the full ``tensor``; a view."""
    return tensor[tuple(slice(start, stop) for start, stop in piece.box)]


# Made-up tensors, through the slices and through the loader.


def rehearse(
    twin: nn.Module,
    tensors: Sequence[TensorEntry],
    parameters: Sequence[Parameter],
    slices: Sequence[ReadSlice],
) -> None:
    """Load made-up ``tensors`` into one module of each kind, by ``slices`` and by the
    loader of ``twin``, in host memory.

    Takes the memory of these modules' parameters twice, and one full tensor at a time.

    Raises:
        LayoutRefused: names the parameters that the loader makes something else of.
    """
    chosen = _one_of_each_kind(twin, parameters, slices)
    reads: dict[str, list[ReadSlice]] = {}
    for piece in slices:
        if piece.parameter in chosen:
            reads.setdefault(piece.tensor, []).append(piece)
    expected = {
        name: torch.zeros(p.shape, dtype=getattr(torch, p.dtype))
        for name, p in chosen.items()
    }

    def made_up() -> Iterator[tuple[str, torch.Tensor]]:
        numbers = _MadeUpNumbers()
        for number, tensor in enumerate(tensors):
            pieces = reads.get(tensor.name, ())
            if pieces:
                values = numbers.fill(tensor, start=number)
                for piece in pieces:
                    target = piece_view(piece, expected[piece.parameter])
                    target.copy_(_box_of(piece, values))
                yield tensor.name, values

    with torch.no_grad(), _made_real(twin, chosen) as loaded:
        try:
            twin.load_weights(made_up())
        except Exception as error:
            raise LayoutRefused(
                "the engine's loader fails on made-up tensors: "
                f"{type(error).__name__}: {error}"
            ) from error
        wrong = [name for name in chosen if not same_bits(loaded[name], expected[name])]
    if wrong:
        raise refuse_tensors(
            dict.fromkeys(wrong, "the loader makes other values than the slices do")
        )


def _one_of_each_kind(
    twin: nn.Module, parameters: Sequence[Parameter], slices: Sequence[ReadSlice]
) -> dict[str, Parameter]:
    """The parameters of one module of each kind, by name.

    Modules are of one kind if they are of one class and their parameters are of one
    form, filled by the same slices of tensors that differ in numbers in their names.
    """
    filled: dict[str, list[tuple]] = {}
    for piece in slices:
        source = re.sub(r"\d+", "#", piece.tensor)
        filled.setdefault(piece.parameter, []).append(
            (source, piece.box, piece.offset, piece.strides)
        )
    modules: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.name.rpartition(".")[0], []).append(parameter)
    kinds: dict[tuple, list[Parameter]] = {}
    for path, held in modules.items():
        forms = tuple(
            (p.name.rpartition(".")[2], p.shape, p.dtype, tuple(filled[p.name]))
            for p in held
        )
        kinds.setdefault((type(twin.get_submodule(path)), forms), held)
    return {p.name: p for held in kinds.values() for p in held}


@contextmanager
def _made_real(
    twin: nn.Module, chosen: Iterable[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """The ``chosen`` parameters of ``twin`` hold zeros in host memory, for a while."""
    names = set(chosen)
    planned = {n: p for n, p in twin.named_parameters() if n in names}
    real = {name: materialize_meta_tensor(p) for name, p in planned.items()}
    for parameter in real.values():
        if hasattr(parameter, "weight_loader"):
            parameter.weight_loader = _without_processing(parameter.weight_loader)
    of = {id(parameter): name for name, parameter in planned.items()}
    places = [
        (table, key, tensor)
        for _, table, key, tensor in held_tensors(twin)
        if id(tensor) in of
    ]
    for table, key, tensor in places:
        table[key] = real[of[id(tensor)]]
    try:
        yield {name: parameter.data.zero_() for name, parameter in real.items()}
    finally:
        for table, key, tensor in places:
            table[key] = tensor


def _without_processing(loader: Callable) -> Callable:
    """The loader that vLLM has wrapped where a layer is quantized as soon as its last
    tensor is loaded."""
    while getattr(loader, "__name__", "") == ONLINE_LOADER:
        loader = loader.__wrapped__
    return loader


class _MadeUpNumbers:
    """Tensors in which no row, column or block is like another."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._floats = torch.rand(PERIOD, generator=generator) + 0.5
        self._integers = torch.randint(0, 100, (PERIOD,), generator=generator)

    def fill(self, tensor: TensorEntry, start: int) -> torch.Tensor:
        """``tensor`` with values; another ``start`` gives it others."""
        dtype = getattr(torch, tensor.dtype)
        numbers = self._floats if dtype.is_floating_point else self._integers
        numbers = numbers.roll(-start * 7919).to(dtype)
        made = torch.empty(tensor.shape, dtype=dtype)
        flat = made.view(-1)
        for block in flat.split(PERIOD):
            block.copy_(numbers[: block.numel()])
        return made


# The start checkpoint, through the slices, beside what is live.


class StartCheckpoint:
    """The tensors of the directory that the engine was started with.

    Args:
        config: the engine's.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._model = config.model_config
        load = copy.copy(config.load_config)
        load.use_tqdm_on_load = False
        loader = get_model_loader(load)
        #: Whether the live model was loaded from them, with vLLM's usual loader.
        self.is_live = type(loader) is DefaultModelLoader
        if not self.is_live:
            load.load_format, load.model_loader_extra_config = "auto", {}
            loader = DefaultModelLoader(load)
        self._loader = loader

    def entries(self, model: nn.Module) -> tuple[TensorEntry, ...]:
        """Names, dtypes and shapes; empty where no file says them.

        What vLLM has not loaded it may not have on this machine, unless it is in a
        directory.
        """
        if not self.is_live and not os.path.isdir(self._model.model):
            return ()
        try:
            return tuple(
                TensorEntry(
                    name=name,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    shards=(),
                )
                for name, tensor in self.tensors(model)
            )
        except Exception:
            if self.is_live:
                raise
            # A directory with a config alone is enough for vLLM's dummy weights.
            return ()

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name, as vLLM's loader hands them to ``model``."""
        return self._loader.get_all_weights(self._model, model)


def compare_with_live(
    tensors: Iterable[tuple[str, torch.Tensor]],
    slices: Sequence[ReadSlice],
    layers: ProcessedLayers,
) -> None:
    """Show that ``slices`` of ``tensors`` are the live parameters of ``layers``' model.

    Reads each tensor once; layers that vLLM processes are put together in host memory
    and processed beside the live ones. Blocks.

    Raises:
        LayoutRefused: names the live tensors that are something else.
    """
    reads: dict[str, list[ReadSlice]] = {}
    for piece in slices:
        reads.setdefault(piece.tensor, []).append(piece)
    processed = _LayersInParts(slices, layers)
    wrong: dict[str, None] = {}
    for name, tensor in tensors:
        for piece in reads.get(name, ()):
            live = layers.plain.get(piece.parameter)
            if live is None:
                wrong |= dict.fromkeys(processed.add(piece, tensor))
            elif not _same_part(
                piece_view(piece, live.detach()), _box_of(piece, tensor)
            ):
                wrong[piece.parameter] = None
    wrong |= dict.fromkeys(layers.find_stale_attention())
    if wrong:
        raise refuse_tensors(
            dict.fromkeys(
                wrong, "the start checkpoint's slices are not what the engine has"
            )
        )


def _same_part(live: torch.Tensor, source: torch.Tensor) -> bool:
    """Compare a part of a live parameter, piece by piece, on its device."""
    if live.dim() == 0:
        return same_bits(live, source.to(live.device, live.dtype))
    rows = max(1, COMPARED * live.shape[0] // max(live.numel(), 1))
    return all(
        same_bits(mine, theirs.to(live.device, live.dtype))
        for mine, theirs in zip(live.split(rows), source.split(rows), strict=True)
    )


class _LayersInParts:
    """Puts the parameters of processed layers together, until a layer is whole."""

    def __init__(self, slices: Sequence[ReadSlice], layers: ProcessedLayers) -> None:
        self._layers = layers
        self._layer_of = {
            name: layer for layer in layers.layers for name in layer.parameters.values()
        }
        self._missing: dict[str, int] = {}
        for piece in slices:
            if layer := self._layer_of.get(piece.parameter):
                self._missing[layer.name] = self._missing.get(layer.name, 0) + 1
        self._staged: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, piece: ReadSlice, tensor: torch.Tensor) -> list[str]:
        """The live tensors that are found to differ, now that ``piece`` is there."""
        layer = self._layer_of[piece.parameter]
        staged = self._staged.setdefault(layer.name, {})
        if not staged:
            for leaf, name in layer.parameters.items():
                planned = layer.twin._parameters[leaf]
                staged[name] = torch.zeros(planned.shape, dtype=planned.dtype)
        piece_view(piece, staged[piece.parameter]).copy_(_box_of(piece, tensor))
        self._missing[layer.name] -= 1
        if self._missing[layer.name]:
            return []
        return self._layers.find_differences(layer, self._staged.pop(layer.name))


# What no version fills.


def check_other_tensors(
    live: nn.Module, twin: nn.Module, layers: ProcessedLayers
) -> None:
    """Every tensor that a module of ``live`` holds is one that a refit writes or
    processes, a view of one, memory of a KV cache, or what the construction of
    ``twin`` made.

    Raises:
        LayoutRefused: names the others, which would stay as they are under new weights.
    """
    covered = {id(tensor) for tensor in layers.plain.values()}
    held = list(held_tensors(live))
    written = [
        tensor
        for name, _, _, tensor in held
        if id(tensor) in covered or name in layers.derived
    ]
    storages = {tensor.untyped_storage().data_ptr() for tensor in written}
    planned = {name: tensor for name, _, _, tensor in held_tensors(twin)}
    stale = {
        name: "it depends on weights in a way that a refit does not follow"
        for name, _, key, tensor in held
        if tensor.numel()
        and key != _KV_CACHE
        and tensor.untyped_storage().data_ptr() not in storages
        and not _as_constructed(tensor, planned.get(name))
    }
    if stale:
        raise refuse_tensors(stale)


def _as_constructed(live: torch.Tensor, planned: torch.Tensor | None) -> bool:
    if planned is None or planned.is_meta:
        return False
    return planned is live or same_bits(live.detach(), planned.detach())
