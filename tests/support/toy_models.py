# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Models of one layer whose loaders do one thing each that vLLM's loaders do, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dynamo.refit.manifest import TensorEntry

ROWS, COLUMNS = 6, 4

Loader = Callable[["Toy", str, torch.Tensor], None]


class Toy(nn.Module):
    """A weight, a scale and a buffer; ``loader`` gets each tensor with its name."""

    def __init__(self, loader: Loader) -> None:
        super().__init__()
        self.layer = nn.Linear(COLUMNS, ROWS, bias=False)
        self.layer.register_buffer("table", torch.arange(3.0))
        self.scale = nn.Parameter(torch.ones(ROWS))
        self._loader = loader

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self._loader(self, name, tensor)


def twin_of(loader: Loader) -> Toy:
    """On the meta device, but for what is computed: as vLLM's model is built."""
    twin = Toy(loader)
    for holder, key in ((twin.layer, "weight"), (twin, "scale")):
        planned = holder._parameters[key].data.to("meta")
        holder._parameters[key] = nn.Parameter(planned, requires_grad=False)
    return twin


def live_of(loader: Loader, tensors: Iterable[tuple[str, torch.Tensor]]) -> Toy:
    """As an engine serves it once ``tensors`` are loaded."""
    live = Toy(loader)
    with torch.no_grad():
        live.load_weights(tensors)
    return live


def checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """``gate`` and ``up`` make up the weight, ``scale`` is the scale."""
    generator = torch.Generator().manual_seed(seed)
    halves = {
        name: torch.rand(ROWS // 2, COLUMNS, generator=generator)
        for name in ("gate", "up")
    }
    return {**halves, "scale": torch.rand(ROWS, generator=generator) + 1}


def entries(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [
        TensorEntry(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            shards=(),
        )
        for name, tensor in tensors.items()
    ]


def half(toy: Toy, name: str) -> torch.Tensor:
    """Where ``gate`` or ``up`` belongs."""
    return toy.layer.weight.data.narrow(0, (name == "up") * ROWS // 2, ROWS // 2)


def copy_slices(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """The usual way: each tensor is copied to its part of a parameter."""
    target = toy.scale.data if name == "scale" else half(toy, name)
    target.copy_(tensor)
