# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the engine computes with, made of what is published, beside the live model.

Most parameters are served as they are loaded, and are loaded as slices: those need
nothing. The others go through a *conversion*, while the version is staged. The loader
of the meta twin fills what slices cannot say. For a layer that vLLM processes after a
load, a copy is made of its twin, which is as vLLM builds it before a load; it is given
real tensors, and processed as after a first load. What comes of it waits in the shadow,
in the form in which the live layer holds it, so that an install only copies.

vLLM's own layerwise reload is not used: it works on the live layer (a failure leaves
it half processed), skips steps that its methods take at a first load only (experts on
a CPU are not packed again), loads each tied tensor into one of its owners (the output
layer of a tied model keeps its old packed copy), and rebinds bare tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.torch_utils import set_default_torch_dtype

from dynamo.refit.errors import LayoutRefused, UnsupportedConfiguration
from dynamo.refit.manifest import ITEMSIZE, TensorEntry
from dynamo.refit.rank.capture import LoadGeometry, describe_parameters
from dynamo.refit.rank.grouping import Group, group
from dynamo.refit.rank.processing import (
    Function,
    LayerFailed,
    Update,
    derive_attention,
    process,
)
from dynamo.refit.rank.runtime_layout import (
    ProcessedLayer,
    find_layout,
    quantization_method,
)
from dynamo.refit.rank.slices import Parameter, whole
from dynamo.refit.rank.twin import BITS, held_tensors, made_real


@dataclass(frozen=True, eq=False)
class Conversion:
    """What is made at once.

    ``sources`` are the published tensors that the loader gets, whole, and ``loaded``
    what it fills with them, by the twin's names. ``sliced`` are the other parameters of
    ``layers``, as they are loaded. ``outputs`` names what comes of all that.
    """

    sources: tuple[TensorEntry, ...]
    loaded: tuple[str, ...]
    sliced: tuple[Parameter, ...]
    layers: tuple[ProcessedLayer, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.layers[0].name if self.layers else self.loaded[0]

    @property
    def inputs(self) -> tuple[Parameter, ...]:
        """What it takes in."""
        sources = (
            Parameter(name=whole(t.name), shape=t.shape, dtype=t.dtype)
            for t in self.sources
        )
        return (*sources, *self.sliced)

    @property
    def kind(self) -> tuple:
        """Conversions of one kind do the same with other tensors."""
        sources = ((re.sub(r"\d+", "#", t.name), t.shape) for t in self.sources)
        layers = (_kind(layer) for layer in self.layers)
        forms = ((re.sub(r"\d+", "#", p.name), p.shape, p.dtype) for p in self.sliced)
        return tuple(sources), tuple(layers), tuple(forms)


@dataclass(frozen=True)
class Converted:
    """What a conversion made: by name, the tensors, laid out as the live ones."""

    tensors: dict[str, torch.Tensor]
    functions: tuple[Function, ...]


class RuntimeForm:
    """The tensors that a live model computes with, and how each of them is made.

    Every processed layer is processed once at construction, with made-up weights, so
    that what could not be made is refused here and not at a version. Where
    a quantization method talks to the other ranks (scales of quantization at load), all
    ranks have to construct this, and convert, together.

    Args:
        model: the live model.
        twin: the same model on the meta device, as built.
        config: what the model was built with.

    Raises:
        UnsupportedConfiguration: names the layer, and what could not be installed.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, config: VllmConfig) -> None:
        layout = find_layout(twin, model)
        #: By name, what is loaded.
        self.parameters = {p.name: p for p in describe_parameters(twin, model)}
        #: By name, the live tensors that are laid out as they are loaded.
        self.plain = {name: p.detach() for name, p in layout.plain.items()}
        self.layers = layout.processed
        self.model = model
        self.twin = twin
        self.config = config
        self._device = next(model.parameters()).device
        #: By name, every tensor that a module of the live model holds.
        self.held = {name: tensor for name, _, _, tensor in held_tensors(model)}
        #: By the layer's name, the names of what is made of it.
        self._made: dict[str, tuple[str, ...]] = {}
        #: By name, the live tensors that are made of a processed layer's weights.
        self.made: dict[str, torch.Tensor] = {}
        if self.layers:
            self._rehearse(model)

    def look_again(self) -> bool:
        """Whether all that versions fill is known to be where it was at construction;
        looks the other tensors of modules up again, such as KV caches."""
        before = self.held
        self.held = {name: tensor for name, _, _, tensor in held_tensors(self.model)}
        # What only a kernel holds is not looked up.
        return all(
            name in before
            and name in self.held
            and _place(self.held[name]) == _place(before[name])
            for name in (*self.plain, *self.made)
        )

    def live(self, loaded: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        """By name, every live tensor that a version fills, with its dimensions in the
        order of memory. ``loaded`` are the tensors that the loader fills.

        Raises:
            LayoutRefused: the engine has no such tensor.
        """
        found = self.plain | self.made
        of_layers = {n for layer in self.layers for n in layer.parameters.values()}
        for name in loaded:
            if name in found or name in of_layers:
                continue
            if name not in self.held:
                raise LayoutRefused(
                    "the loader fills it, and the engine does not have it any more",
                    tensor=name,
                )
            found[name] = _in_memory_order(self.held[name].detach())
        return found

    def taken_in(self) -> list[list[Parameter]]:
        """What each processed layer is made of, where slices fill all of it."""
        return [
            [self.parameters[name] for name in layer.parameters.values()]
            for layer in self.layers
        ]

    def conversions(
        self, geometry: LoadGeometry, tensors: Sequence[TensorEntry]
    ) -> list[Conversion]:
        """What has to be made of ``tensors``: in the model's order of layers, and then
        what belongs to no processed layer."""
        published = {tensor.name: tensor for tensor in tensors}
        groups = group(self.layers, geometry, published)
        return [self._conversion(each, published) for each in groups]

    def _conversion(
        self, group: Group, published: Mapping[str, TensorEntry]
    ) -> Conversion:
        sliced, outputs = [], []
        alone = set(group.loaded)
        for layer in group.layers:
            alone -= set(layer.parameters.values())
            outputs += self._made[layer.name]
            sliced += [
                self.parameters[name]
                for name in layer.parameters.values()
                if name not in group.loaded
            ]
        return Conversion(
            # In the order of a load: a loader may wait for the last one.
            sources=tuple(t for name, t in published.items() if name in group.sources),
            loaded=tuple(group.loaded),
            sliced=tuple(sliced),
            layers=tuple(group.layers),
            outputs=(*outputs, *(name for name in group.loaded if name in alone)),
        )

    def convert(
        self, conversion: Conversion, inputs: Mapping[str, torch.Tensor]
    ) -> Converted:
        """Make what ``conversion`` makes of ``inputs``, which are only read.

        On the thread that runs the model, between two steps: vLLM's methods look at
        process-wide state, and may talk to the other ranks.

        Raises:
            LayerFailed: names the layer.
        """
        tensors: dict[str, torch.Tensor] = {}
        functions: list[Function] = []
        with self._as_after_a_load(), _failing(conversion.name):
            loaded = self._load(conversion, inputs)
            filled = {
                id(self.held[name]): tensor
                for name, tensor in loaded.items()
                if name in self.held
            }
            for layer in conversion.layers:
                weights = {
                    leaf: loaded[name] if name in loaded else inputs[name]
                    for leaf, name in layer.parameters.items()
                }
                update = self._process(layer, weights, filled)
                functions += update.functions
                tensors |= {
                    name: _in_memory_order(new, live)
                    for name, live, new in update.copies
                }
            for name in loaded.keys() & conversion.outputs:
                tensors[name] = _in_memory_order(loaded[name], self.held[name])
            if missing := [n for n in conversion.outputs if n not in tensors]:
                raise LayerFailed("it was not made this time", tensor=missing[0])
        return Converted(tensors, tuple(functions))

    def _load(
        self, conversion: Conversion, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        if not conversion.sources:
            return {}
        sources = [(t.name, inputs[whole(t.name)]) for t in conversion.sources]
        with made_real(self.twin, conversion.loaded, self._device) as loaded:
            with self._device:
                self.twin.load_weights(iter(sources))
            return dict(loaded)

    def _process(
        self,
        layer: ProcessedLayer,
        weights: Mapping[str, torch.Tensor],
        filled: Mapping[int, torch.Tensor],
    ) -> Update:
        scratch, update = process(layer, weights, filled)
        if layer.attention is not None:
            name, attention = layer.attention
            dtype = self.config.model_config.dtype
            update.add(name, derive_attention(attention, dtype, scratch))
        for name, leaf, view in layer.views:
            size, stride, offset = view
            made = weights[leaf].contiguous()
            made = made.as_strided(size, stride, made.storage_offset() + offset)
            update.copies.append((name, self.held[name], made))
        return update

    def _rehearse(self, model: nn.Module) -> None:
        compiled = _is_compiled(model)
        seen: set[tuple] = set()
        with self._as_after_a_load():
            for layer in self.layers:
                with _refusing(layer.name):
                    update = self._process(layer, _made_up(layer), {})
                if update.functions and compiled:
                    raise UnsupportedConfiguration(
                        f"{layer.name} keeps packed weights in a function, which "
                        "compiled code may have inlined: start the worker with "
                        "--enforce-eager"
                    )
                # A tensor may be held in several places: it is written once.
                made = {
                    name: live
                    for name, live, _ in update.copies
                    if live.numel() and _place(live) not in seen
                }
                seen |= {_place(live) for live in made.values()}
                self._made[layer.name] = tuple(made)
                self.made |= {n: _in_memory_order(t) for n, t in made.items()}

    @contextmanager
    def _as_after_a_load(self) -> Iterator[None]:
        """What vLLM's methods find around them when they process a loaded layer."""
        with (
            torch.no_grad(),
            set_current_vllm_config(self.config),
            set_default_torch_dtype(self.config.model_config.dtype),
        ):
            yield


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _in_memory_order(
    tensor: torch.Tensor, like: torch.Tensor | None = None
) -> torch.Tensor:
    """``tensor`` with its dimensions in the order in which those of ``like`` (itself)
    follow each other in memory, and of a dtype that a plan knows.

    vLLM holds some weights transposed: copies of contiguous memory are the quickest.
    """
    like = tensor if like is None else like
    order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
    if like.permute(order).is_contiguous():
        tensor = tensor.permute(order)
    if str(tensor.dtype).removeprefix("torch.") not in ITEMSIZE:
        tensor = tensor.view(BITS[tensor.dtype.itemsize])
    return tensor


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
            f"{name} cannot be made of what was published: {type(error).__name__}: "
            f"{error}",
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
