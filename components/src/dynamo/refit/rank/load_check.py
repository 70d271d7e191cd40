# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Shows that the plan gives what vLLM's loader gives, before anything rests on it.

Three comparisons, bit for bit: the slices of made-up tensors with what the twin's own
``load_weights`` makes of them (a module of each kind); what the start checkpoint gives
with what is live (all of it); and every other tensor of the live model with the one
that its construction made.
"""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank.capture import refuse_tensors
from dynamo.refit.rank.conversion import Conversion, RuntimeForm
from dynamo.refit.rank.runtime_parts import piece_view
from dynamo.refit.rank.slices import Parameter, ReadSlice, whole
from dynamo.refit.rank.twin import held_tensors, made_real, same_bits

#: Made-up numbers repeat after this many: a prime, so that no two rows are alike.
PERIOD = 1_000_003

#: Elements that are compared at a time, so that little of a checkpoint is on the
#: device at once.
COMPARED = 1 << 24

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

    Takes the memory of these modules' ``parameters`` twice, and one full tensor at a
    time.

    Raises:
        LayoutRefused: names the parameters that the loader makes something else of.
    """
    chosen = _one_of_each_kind(twin, parameters, slices)
    reads: dict[str, list[ReadSlice]] = {}
    for piece in slices:
        if piece.parameter in chosen:
            reads.setdefault(piece.tensor, []).append(piece)
    expected = {name: _zeros(parameter) for name, parameter in chosen.items()}

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

    with torch.no_grad(), made_real(twin, chosen, torch.device("cpu")) as loaded:
        for tensor in loaded.values():
            tensor.data.zero_()
        try:
            twin.load_weights(made_up())
        except Exception as error:
            raise LayoutRefused(
                "the engine's loader fails on made-up tensors: "
                f"{type(error).__name__}: {error}"
            ) from error
        wrong = [
            name for name in chosen if not same_bits(loaded[name].data, expected[name])
        ]
    if wrong:
        raise refuse_tensors(
            dict.fromkeys(wrong, "the loader makes other values than the slices do")
        )


def rehearse_conversions(conversions: Iterable[Conversion], form: RuntimeForm) -> None:
    """Carry out a conversion of each kind on made-up tensors, where the loader takes
    part: what comes of it must fit what is live.

    Raises:
        LayoutRefused: names the live tensor that it does not fit.
        LayerFailed: a conversion does not work.
    """
    seen = set()
    numbers = _MadeUpNumbers()
    for conversion in conversions:
        if not conversion.sources or conversion.kind in seen:
            continue
        seen.add(conversion.kind)
        inputs = {
            parameter.name: numbers.fill(parameter, start=number)
            for number, parameter in enumerate(conversion.inputs)
        }
        made = form.convert(conversion, inputs).tensors
        live = form.live(conversion.loaded)
        for name in conversion.outputs:
            here, new = Parameter.of(name, live[name]), Parameter.of(name, made[name])
            if here != new:
                raise LayoutRefused(
                    f"the loader makes {new.dtype} {new.shape} of it, and the engine "
                    f"holds {here.dtype} {here.shape}",
                    tensor=name,
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


class _MadeUpNumbers:
    """Tensors in which no row, column or block is like another."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._floats = torch.rand(PERIOD, generator=generator) + 0.5
        self._integers = torch.randint(0, 100, (PERIOD,), generator=generator)

    def fill(self, tensor: TensorEntry | Parameter, start: int) -> torch.Tensor:
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
    conversions: Sequence[Conversion],
    form: RuntimeForm,
) -> None:
    """Show that ``slices`` and ``conversions`` of ``tensors`` are what is live.

    Reads each tensor once; what a conversion takes in is put together in host memory.
    Blocks the thread that runs the model.

    Raises:
        LayoutRefused: names the live tensors that are something else.
        LayerFailed: a conversion does not work.
    """
    reads: dict[str, list[ReadSlice]] = {}
    for piece in slices:
        reads.setdefault(piece.tensor, []).append(piece)
    intake = _Intake(slices, conversions)
    live = form.live(name for each in conversions for name in each.loaded)
    wrong: dict[str, None] = {}
    for name, tensor in tensors:
        for piece in reads.get(name, ()):
            if piece.parameter not in intake.names and not _same_part(
                piece_view(piece, live[piece.parameter]), _box_of(piece, tensor)
            ):
                wrong[piece.parameter] = None
        for conversion, inputs in intake.add(name, tensor, reads.get(name, ())):
            made = form.convert(conversion, inputs).tensors
            wrong |= {
                n: None for n in conversion.outputs if not _same(live[n], made[n])
            }
    if wrong:
        raise refuse_tensors(
            dict.fromkeys(wrong, "the start checkpoint does not give what is live")
        )


def _same(live: torch.Tensor, made: torch.Tensor) -> bool:
    return same_bits(live, made.to(live.device))


def _same_part(live: torch.Tensor, source: torch.Tensor) -> bool:
    """Compare a part of a live parameter, piece by piece, on its device."""
    if live.dim() == 0:
        return same_bits(live, source.to(live.device, live.dtype))
    rows = max(1, COMPARED * live.shape[0] // max(live.numel(), 1))
    return all(
        same_bits(mine, theirs.to(live.device, live.dtype))
        for mine, theirs in zip(live.split(rows), source.split(rows), strict=True)
    )


class _Intake:
    """Puts together what conversions take in, until one has all of it."""

    def __init__(
        self, slices: Sequence[ReadSlice], conversions: Sequence[Conversion]
    ) -> None:
        self._of: dict[str, Conversion] = {}
        self._forms: dict[str, Parameter] = {}
        for conversion in conversions:
            for parameter in conversion.inputs:
                self._of[parameter.name] = conversion
                self._forms[parameter.name] = parameter
        #: What does not go straight to the live model.
        self.names = self._of.keys()
        self._missing: Counter[Conversion] = Counter()
        for conversion in conversions:
            self._missing[conversion] += len(conversion.sources)
        for piece in slices:
            if piece.parameter in self._of:
                self._missing[self._of[piece.parameter]] += 1
        self._inputs: dict[Conversion, dict[str, torch.Tensor]] = {}

    def add(
        self, name: str, tensor: torch.Tensor, pieces: Sequence[ReadSlice]
    ) -> Iterator[tuple[Conversion, dict[str, torch.Tensor]]]:
        """What is complete, now that the published ``tensor`` is there."""
        for piece in pieces:
            if piece.parameter in self._of:
                conversion = self._of[piece.parameter]
                form = self._forms[piece.parameter]
                target = self._inputs_of(conversion).setdefault(
                    piece.parameter, _zeros(form)
                )
                piece_view(piece, target).copy_(_box_of(piece, tensor))
                yield from self._take(conversion)
        if conversion := self._of.get(whole(name)):
            # A view of a file that may be closed before the rest is there.
            self._inputs_of(conversion)[whole(name)] = tensor.clone()
            yield from self._take(conversion)

    def _inputs_of(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        return self._inputs.setdefault(conversion, {})

    def _take(
        self, conversion: Conversion
    ) -> Iterator[tuple[Conversion, dict[str, torch.Tensor]]]:
        self._missing[conversion] -= 1
        if not self._missing[conversion]:
            yield conversion, self._inputs.pop(conversion)


def _zeros(parameter: Parameter) -> torch.Tensor:
    return torch.zeros(parameter.shape, dtype=getattr(torch, parameter.dtype))


# What no version fills.


def check_other_tensors(
    live: nn.Module, twin: nn.Module, filled: Iterable[torch.Tensor]
) -> None:
    """Every tensor that a module of ``live`` holds is one of the ``filled`` ones or a
    view of one, memory of a KV cache, or what the construction of ``twin`` made.

    Raises:
        LayoutRefused: names the others, which would stay as they are under new weights.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in filled}
    planned = {name: tensor for name, _, _, tensor in held_tensors(twin)}
    stale = {
        name: "no version fills it, and it is not what the model is constructed with"
        for name, _, key, tensor in held_tensors(live)
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
