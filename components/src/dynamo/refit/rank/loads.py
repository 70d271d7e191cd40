# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a version fills, and with what: known of the tensors of the start checkpoint, or
of those that were published last, and shown before anything rests on it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig

from dynamo.refit.errors import LayoutRefused, UnsupportedConfiguration
from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank.capture import LoadGeometry, capture_load
from dynamo.refit.rank.conversion import Conversion, RuntimeForm
from dynamo.refit.rank.image import check_image, read_image
from dynamo.refit.rank.load_check import (
    StartCheckpoint,
    check_other_tensors,
    compare_with_live,
    rehearse,
    rehearse_conversions,
)
from dynamo.refit.rank.processing import LayerFailed
from dynamo.refit.rank.slices import Parameter, ReadSlice, check_slices


@dataclass(frozen=True)
class Filling:
    """How a version fills the ``live`` tensors: ``parameters`` by ``slices``, and by
    what is made of some of them."""

    parameters: Sequence[Parameter]
    slices: Sequence[ReadSlice]
    conversions: Sequence[Conversion]
    live: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Checked:
    """What the engine's loader makes of tensors of these ``forms`` (name, dtype and
    shape), and what is made of that."""

    forms: frozenset[tuple]
    geometry: LoadGeometry
    conversions: list[Conversion]


class Loads:
    """What the engine's loader makes of published tensors.

    Args:
        form: what the engine computes with.

    Raises:
        UnsupportedConfiguration: no version could be installed; names the tensors.
    """

    def __init__(self, form: RuntimeForm) -> None:
        self._model = form.model
        self._twin = form.twin
        self.form = form
        #: Elements that the loader leaves as they are constructed, by tensor.
        self._unfilled: Mapping[str, int] = {}
        #: Of tensors that were shown to give what the engine's loader gives.
        self._checked = self._check_start(form.config)

    @property
    def known(self) -> bool:
        """What a version fills is known, if it has the names that were seen last."""
        return self._checked is not None

    @property
    def filled(self) -> dict[str, torch.Tensor]:
        """By name, the live tensors that such a version fills, as far as known."""
        return self.form.live(self._checked.geometry.loaded if self._checked else ())

    @property
    def taken_in(self) -> list[Sequence[Parameter]]:
        """What each of its conversions takes in."""
        if self._checked is None:
            return self.form.taken_in()
        return [each.inputs for each in self._checked.conversions]

    def filling(self, tensors: Sequence[TensorEntry]) -> Filling:
        """How a version of ``tensors`` fills the live model.

        Raises:
            LayoutRefused, LayerFailed: it does not, or not so that it could be shown.
        """
        checked = self._checked
        if checked is None or checked.forms != _forms(tensors):
            checked = self._check(tensors)
            self._require_filled(checked.geometry)
            self._checked = checked
        geometry = checked.geometry
        return Filling(
            self._sliced(geometry),
            geometry.slices,
            checked.conversions,
            self.form.live(geometry.loaded),
        )

    def filling_of_image(self, tensors: Mapping[str, TensorEntry]) -> Filling:
        """How an image of ``tensors``, by the model's names, fills the live model.

        Raises:
            PeerUnsuitable: it is one of other tensors.
            LayoutRefused: a version leaves something else as it is; names it.
        """
        live = self.form.live(name for name in tensors if name in self.form.held)
        check_image(tensors, live)
        if self._checked is None or live.keys() != self.filled.keys():
            check_other_tensors(self._model, self._twin, live.values())
        return Filling(*read_image(tensors), (), live)

    def _check_start(self, config: VllmConfig) -> _Checked | None:
        """Refuse now what no version could be installed into; blocks, for seconds if
        the model is large.

        Where the start checkpoint's names are known, what its tensors give is what a
        version of these names will give. A directory whose weights were not loaded
        (``--load-format dummy``) need not fit the model: what its names cannot show is
        left to the first version.
        """
        checkpoint = StartCheckpoint(config)
        try:
            entries = checkpoint.entries(self._twin)
            if not (entries and checkpoint.is_live):
                # A version may fill any buffer, and nothing that is not one.
                filled = *self.form.live().values(), *self._model.buffers()
                check_other_tensors(self._model, self._twin, filled)
            if not entries:
                return None
            if not checkpoint.is_live:
                with contextlib.suppress(LayoutRefused, LayerFailed):
                    checked = self._check(entries)
                    self._require_filled(checked.geometry)
                    return checked
                return None
            checked = self._check(entries)
            compare_with_live(
                checkpoint.tensors(self._twin),
                checked.geometry.slices,
                checked.conversions,
                self.form,
            )
            self._unfilled = checked.geometry.unfilled
        except (LayoutRefused, LayerFailed) as error:
            raise UnsupportedConfiguration(
                f"{type(self._model).__name__} cannot be refitted by this release: "
                f"{error}; serve it with python -m dynamo.vllm",
                tensor=error.tensor,
            ) from error
        return checked

    def _check(self, tensors: Sequence[TensorEntry]) -> _Checked:
        """What the engine's loader makes of ``tensors``, once it has been shown on
        made-up numbers that it does so.

        Raises:
            LayoutRefused: names the tensors of which it makes something else, and those
                of the model that no version would fill.
            LayerFailed: a conversion does not work.
        """
        geometry = capture_load(self._twin, tensors)
        sliced = self._sliced(geometry)
        check_slices(tensors, sliced, geometry.slices)
        rehearse(self._twin, tensors, sliced, geometry.slices)
        conversions = self.form.conversions(geometry, tensors)
        filled = self.form.live(geometry.loaded)
        check_other_tensors(self._model, self._twin, filled.values())
        rehearse_conversions(conversions, self.form)
        return _Checked(_forms(tensors), geometry, conversions)

    def _require_filled(self, geometry: LoadGeometry) -> None:
        """A version leaves no element as it was constructed that the start checkpoint
        did not.

        Raises:
            LayoutRefused: names the tensor.
        """
        for name, number in geometry.unfilled.items():
            if number != self._unfilled.get(name):
                raise LayoutRefused(
                    f"{number} of its elements are made of no published tensor: one of "
                    "this parameter is missing or has another shape",
                    tensor=name,
                )

    def _sliced(self, geometry: LoadGeometry) -> list[Parameter]:
        every = self.form.parameters.values()
        return [p for p in every if p.name not in geometry.loaded]


def _forms(tensors: Sequence[TensorEntry]) -> frozenset[tuple]:
    return frozenset((t.name, t.dtype, t.shape) for t in tensors)
