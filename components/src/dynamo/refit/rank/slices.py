# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a rank's loader reads, what it fills, and whether that amounts to a model.

Pure data, and the checks that need no source: every parameter is filled, element by
element, by what is published.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import ITEMSIZE, Box, Manifest, TensorEntry, align
from dynamo.refit.rank import boxes

#: Dtypes that a trainer's copy may be converted between, as ``Tensor.copy_`` does.
#: Eight-bit floats need scales, and are not among them.
CONVERTIBLE = frozenset({"float64", "float32", "bfloat16", "float16"})


@dataclass(frozen=True)
class ReadSlice:
    """One copy of the engine's loader: a box of a source tensor into a parameter.

    ``strides`` are the destination's, in elements, one per dimension of the
    *source*; ``offset`` is the destination's first element in the parameter.
    """

    tensor: str
    box: Box
    parameter: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter in the layout it is loaded in. ``unloaded`` elements (vocabulary
    padding) are covered by no source and stay zero."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    unloaded: int = 0

    @classmethod
    def of(cls, name: str, tensor: Any, unloaded: int = 0) -> Parameter:
        """The form of a torch ``tensor``."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, tuple(tensor.shape), dtype, unloaded)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEMSIZE[self.dtype]


def whole(tensor: str) -> str:
    """How an intake names all of a published tensor, as opposed to a parameter."""
    return f"all of {tensor}"


def read_whole(tensor: TensorEntry) -> ReadSlice:
    """All of ``tensor``, as it is published, into an intake."""
    return ReadSlice(
        tensor=tensor.name,
        box=tuple((0, size) for size in tensor.shape),
        parameter=whole(tensor.name),
        offset=0,
        strides=boxes.row_major(tensor.shape),
    )


class IntakeLayout:
    """Where what a conversion takes in waits for it: in one half of the intake, or in
    the other, in turns.

    Args:
        groups: what each conversion takes in, in the order of the conversions.
        limit: bytes that a half has, unless one group needs more.
    """

    def __init__(self, groups: Sequence[Sequence[Parameter]], limit: int) -> None:
        self.groups = tuple(tuple(group) for group in groups)
        self.parameters = tuple(itertools.chain(*self.groups))
        self.offsets: dict[str, int] = {}
        #: By group, how many groups must have been converted before its bytes come.
        self.after: list[int] = []
        sizes = [sum(align(p.nbytes) for p in group) for group in self.groups]
        half = max([align(limit), *sizes]) if sum(sizes) > limit else sum(sizes)
        used, batches = 0, [0]
        for number, group in enumerate(self.groups):
            if used + sizes[number] > half:
                used = 0
                batches.append(number)
            # The half is the one of the batch before the last.
            self.after.append(batches[-2] if len(batches) > 2 else 0)
            start = half * ((len(batches) - 1) % 2)
            for parameter in group:
                self.offsets[parameter.name] = start + used
                used += align(parameter.nbytes)
        #: Bytes of the intake, and of the largest group.
        self.nbytes = half * min(2, len(batches))
        self.largest = max(sizes, default=0)

    @property
    def working_nbytes(self) -> int:
        """Bytes that conversions take beside arena and scratch, at the most: the
        intake, one group's parameters as they are loaded, and what is made of them."""
        return self.nbytes + 2 * self.largest


class ArenaLayout:
    """Where each parameter lies in the arena, in bytes, aligned.

    Args:
        parameters: what lies there.
        first: names that lie there first, in this order; then come the others.
    """

    def __init__(
        self, parameters: Sequence[Parameter], first: Sequence[str] = ()
    ) -> None:
        self.parameters = tuple(parameters)
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        place = {name: number for number, name in enumerate(first)}
        for parameter in sorted(
            parameters, key=lambda p: place.get(p.name, len(place))
        ):
            self.offsets[parameter.name] = self.nbytes
            self.nbytes += align(parameter.nbytes)


def order_of_arrival(manifest: Manifest, slices: Sequence[ReadSlice]) -> list[str]:
    """The parameters in the order in which their first tensors are published.

    An arena in this order has the neighbours that a source's arena has, and NIXL reads
    neighbours as one.
    """
    published = {tensor.name: number for number, tensor in enumerate(manifest.tensors)}
    first: dict[str, int] = {}
    for piece in slices:
        number = published[piece.tensor]
        first[piece.parameter] = min(number, first.get(piece.parameter, number))
    return sorted(first, key=first.__getitem__)


def check_slices(
    tensors: Sequence[TensorEntry],
    parameters: Sequence[Parameter],
    slices: Sequence[ReadSlice],
) -> None:
    """Every slice lies in its tensor and in its parameter, every parameter is filled
    element by element, and the dtypes go together.

    Raises:
        LayoutRefused: names the tensor or the parameter.
    """
    published = {tensor.name: tensor for tensor in tensors}
    pieces: dict[str, list[ReadSlice]] = {p.name: [] for p in parameters}
    by_name = {parameter.name: parameter for parameter in parameters}
    for piece in slices:
        tensor = published.get(piece.tensor)
        if tensor is None:
            raise LayoutRefused("this tensor is not published", tensor=piece.tensor)
        whole = tuple((0, size) for size in tensor.shape)
        if boxes.intersect(piece.box, whole) != piece.box:
            raise LayoutRefused(
                f"the loader reads {piece.box} of shape {tensor.shape}",
                tensor=tensor.name,
            )
        parameter = by_name.get(piece.parameter)
        if parameter is None:
            raise LayoutRefused(
                f"the loader writes {piece.parameter!r}, which is not a parameter of "
                "the live model",
                tensor=tensor.name,
            )
        if tensor.dtype != parameter.dtype and not (
            {tensor.dtype, parameter.dtype} <= CONVERTIBLE
        ):
            raise LayoutRefused(
                f"published as {tensor.dtype}, the engine holds {parameter.name} as "
                f"{parameter.dtype}: publish it as {parameter.dtype}",
                tensor=tensor.name,
            )
        pieces[parameter.name].append(piece)
    for parameter in parameters:
        _check_filled(parameter, pieces[parameter.name])


def _check_filled(parameter: Parameter, pieces: Sequence[ReadSlice]) -> None:
    filled = sum(boxes.volume(piece.box) for piece in pieces)
    wanted = parameter.elements - parameter.unloaded
    if filled != wanted:
        raise LayoutRefused(
            f"the published tensors fill {filled} of its {wanted} elements: a tensor "
            "of this parameter is missing or has another shape",
            tensor=parameter.name,
        )
    spans = sorted(_destination_span(piece) for piece in pieces)
    if spans and not 0 <= spans[0][0] <= max(end for _, end in spans) <= (
        parameter.elements
    ):
        raise LayoutRefused("a slice is written outside it", tensor=parameter.name)
    apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    if not apart and _written_elements(parameter, pieces) != wanted:
        raise LayoutRefused(
            "slices overlap in it, and leave other elements out", tensor=parameter.name
        )


def _destination_span(piece: ReadSlice) -> tuple[int, int]:
    """First element of the parameter that a slice writes, and one past the last."""
    extent = boxes.extent(piece.box)
    return piece.offset, piece.offset + boxes.last_element(extent, piece.strides) + 1


def _written_elements(parameter: Parameter, pieces: Sequence[ReadSlice]) -> int:
    """How many elements are written at all: for slices that interleave."""
    written = np.zeros(parameter.elements, dtype=bool)
    for piece in pieces:
        extent = boxes.extent(piece.box)
        steps = [stride * written.itemsize for stride in piece.strides]
        np.lib.stride_tricks.as_strided(
            written[piece.offset :], shape=extent, strides=steps
        )[...] = True
    return int(written.sum())
