# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of what the engine computes with, live or in a shadow, part by part."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from dynamo.refit.errors import FingerprintMismatch
from dynamo.refit.fingerprint import Batch, Part
from dynamo.refit.rank import boxes
from dynamo.refit.rank.buffers import Shadow
from dynamo.refit.rank.plan import Piece
from dynamo.refit.rank.slices import ReadSlice


class RuntimeParts:
    """Shows that the live tensors, or their image in a shadow, are those of one
    version. Its views are made once, by :meth:`prepare` or the first :meth:`check`: the
    first read of a version does not wait for them.

    Args:
        pieces: the boxes that make the parameters up that are served as read.
        converted: names of the other tensors.
        tensors: what is looked at, by name.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        converted: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._of = pieces, converted
        self._tensors = tensors
        self._names = [*(piece.parameter for piece in pieces), *converted]

    @functools.cached_property
    def _pieces(self) -> Batch:
        return Batch(
            [
                Part(piece_view(p, self._tensors[p.parameter]), p.box, p.shape)
                for p in self._of[0]
            ]
        )

    @functools.cached_property
    def _converted(self) -> Batch:
        return whole_parts(self._tensors[name] for name in self._of[1])

    def prepare(self) -> None:
        """Make its views and tables, unless they are there: what is short of memory is
        so here, and not when an install is checked."""
        _ = self._pieces, self._converted

    def in_shadow(self, shadow: Shadow) -> RuntimeParts:
        """The same of the image in ``shadow``."""
        return RuntimeParts(*self._of, shadow.by_name)

    def check(self, landed: np.ndarray, rank: int) -> None:
        """Compare with ``landed``, one part per piece and per converted tensor.

        Raises:
            FingerprintMismatch: names the parameter.
        """
        found = np.concatenate([self._pieces.fold(), self._converted.fold()])
        wrong = np.flatnonzero(found != landed)
        if len(wrong):
            raise FingerprintMismatch(
                f"{len(wrong)} blocks of the weights are not what was staged: "
                "something else wrote them",
                tensor=self._names[wrong[0]],
                rank=rank,
            )


def whole_parts(tensors: Iterable[torch.Tensor]) -> Batch:
    """One part of each of ``tensors``: its fingerprint."""
    return Batch(
        [Part(t, tuple((0, size) for size in t.shape), tuple(t.shape)) for t in tensors]
    )


def piece_view(piece: Piece | ReadSlice, parameter: torch.Tensor) -> torch.Tensor:
    """The elements of ``parameter`` that ``piece`` fills, in the box's shape."""
    if not parameter.is_contiguous():
        # What is loaded has no gaps: it is of an image, and the box one of its own.
        return parameter[tuple(slice(start, stop) for start, stop in piece.box)]
    offset = parameter.storage_offset() + piece.offset
    return parameter.as_strided(boxes.extent(piece.box), piece.strides, offset)
