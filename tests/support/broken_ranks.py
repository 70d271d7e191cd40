# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Ranks whose capture is wrong, as after a change upstream that nobody noticed.

with BrokenRanks(2, logs) as group:
    group.breaks("row")
    group.load(checkpoint)
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank import conversion, loads
from dynamo.refit.rank.capture import LoadGeometry, capture_load
from dynamo.refit.rank.slices import ReadSlice
from tests.support.child import answer_requests
from tests.support.survey import SurveyedRanks
from tests.support.surveyed_rank import SurveyedRankProcess

#: Steps of a conversion that can be made to fail.
FAILING = ("_load", "_process", "convert")


class BrokenRanks(SurveyedRanks):
    """Ranks that get one thing wrong."""

    module = "tests.support.broken_ranks"

    def breaks(self, what: str) -> None:
        """``row``: the slices of a query are a row off. ``parts``: gate and up are
        exchanged. ``_load``, ``_process``, ``convert``: this method of
        :class:`RuntimeForm` fails on rank 1. ``nothing``: all is right again."""
        self._ask("breaks", what)


class BrokenRankProcess(SurveyedRankProcess):
    """Carries out what the test asks for; each public method is a request."""

    what = "nothing"

    def breaks(self, what: str) -> None:
        self.what = what

    def may_fail(self, step: str, method: Callable) -> Callable:
        """``method``, which fails once it is done while ``step`` is broken."""

        @functools.wraps(method)
        def carry_out(*arguments: object) -> object:
            result = method(*arguments)
            if self.what == step and self._rank == 1:
                raise RuntimeError(f"{step} is broken")
            return result

        return carry_out

    def capture(self, twin: nn.Module, tensors: Sequence[TensorEntry]) -> LoadGeometry:
        geometry = capture_load(twin, tensors)
        return replace(geometry, slices=tuple(self._broken(geometry.slices)))

    def _broken(self, slices: Sequence[ReadSlice]) -> list[ReadSlice]:
        match self.what:
            case "row":
                return [part for piece in slices for part in _row_off(piece)]
            case "parts":
                parts = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
                return [_renamed(piece, parts) for piece in slices]
        return list(slices)


def _row_off(piece: ReadSlice) -> list[ReadSlice]:
    """Every row of one query comes a row too early, and the first one last."""
    if not piece.tensor.endswith("layers.1.self_attn.q_proj.weight"):
        return [piece]
    (start, stop), columns = piece.box
    last = piece.offset + (stop - start - 1) * piece.strides[0]
    return [
        replace(piece, box=((start + 1, stop), columns)),
        replace(piece, box=((start, start + 1), columns), offset=last),
    ]


def _renamed(piece: ReadSlice, parts: dict[str, str]) -> ReadSlice:
    *path, projection, leaf = piece.tensor.split(".")
    name = ".".join([*path, parts.get(projection, projection), leaf])
    return replace(piece, tensor=name)


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    process = BrokenRankProcess(rank, ranks, port)
    loads.capture_load = process.capture
    for step in FAILING:
        method = getattr(conversion.RuntimeForm, step)
        setattr(conversion.RuntimeForm, step, process.may_fail(step, method))
    answer_requests(descriptor, process)
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
