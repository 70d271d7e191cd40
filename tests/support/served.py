# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A live model, and what a rank does with versions of it, without a transfer: makes
what the engine computes with beside it, and installs that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynamo.refit.rank.capture import LoadGeometry
from dynamo.refit.rank.conversion import RuntimeForm
from dynamo.refit.rank.install import LiveModel
from dynamo.refit.rank.processing import Function


@dataclass(frozen=True)
class Made:
    """A version, as it waits for its install."""

    tensors: dict[str, torch.Tensor]
    functions: list[Function]


class Served:
    """A live ``model`` all of whose parameters slices fill.

    Args:
        twin: the same model before a load.
        config: what both were built with.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, config: Any) -> None:
        self.form = RuntimeForm(model, twin, config)
        self.live = LiveModel(model, self.form.live())
        self.conversions = self.form.conversions(LoadGeometry((), {}), ())

    @property
    def processed(self) -> set[str]:
        """The parameters that are not served as they are loaded."""
        return {
            name for layer in self.form.layers for name in layer.parameters.values()
        }

    def make(self, weights: Mapping[str, torch.Tensor]) -> Made:
        """``weights`` are the parameters as they are loaded, by name; only read."""
        tensors = {name: weights[name] for name in self.form.plain}
        functions: list[Function] = []
        for conversion in self.conversions:
            inputs = {p.name: weights[p.name] for p in conversion.inputs}
            made = self.form.convert(conversion, inputs)
            tensors |= {name: made.tensors[name] for name in conversion.outputs}
            functions += made.functions
        return Made(tensors, functions)

    def install(self, made: Made) -> list[Function]:
        """Gives the functions that it took the place of."""
        self.live.copy_from(made.tensors)
        return [function.install() for function in made.functions]

    def refit(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.install(self.make(weights))
