# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that fail at a step of an install when they are told to.

with OrderedRanks(2, logs) as group:
    group.order(1, after_install="broken")
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from types import SimpleNamespace

from torch import nn

from dynamo.refit.rank.extension import RefitRank
from dynamo.refit.rank.stager import RankStager
from tests.support.child import answer_requests
from tests.support.rank_group import RankGroup
from tests.support.rank_process import RankProcess, RankWorker


class OrderedRanks(RankGroup):
    """A :class:`RankGroup` of processes that take orders."""

    module = "tests.support.ordered_rank"

    def order(self, rank: int, times: int = 1, **steps: str) -> None:
        """The next ``times`` times, ``rank`` fails at ``steps`` with these errors:
        ``install``, before anything is written, ``after_install``, ``restore``."""
        self._ask("order", rank, times, steps)

    def keep_busy(self, rank: int | None) -> None:
        """One rank is at work on something, or ``None``."""
        self._ask("keep_busy", rank)

    def move(self, rank: int, parameter: str) -> None:
        """Give a live parameter of one rank another storage with the same bytes."""
        self._ask("move", rank, parameter)

    def move_back(self) -> None:
        self._ask("move_back")

    def exit_codes(self, seconds: float = 20.0) -> list[int]:
        """Wait until every process has ended."""
        return [child.process.wait(seconds) for child in self._children]


class OrderedStager(RankStager):
    """Fails as ordered; otherwise the product."""

    #: What is ordered of this process: by step, an error and how often.
    errors: dict[str, str]
    left: Counter[str]

    def install(self, version: int) -> None:
        self._obey("install")
        super().install(version)
        self._obey("after_install")

    def restore(self, version: int) -> None:
        self._obey("restore")
        super().restore(version)

    def _obey(self, step: str) -> None:
        if self.left[step] > 0:
            self.left[step] -= 1
            raise RuntimeError(self.errors[step])


OrderedStager.errors = {}
OrderedStager.left = Counter()


class OrderedRank(RefitRank):
    stager_class = OrderedStager


class OrderedRankProcess(RankProcess):
    """Carries out what the test asks for; each public method is a request."""

    def __init__(self, rank: int, ranks: int, port: int) -> None:
        super().__init__(rank, ranks, port)
        self._moved: tuple[str, nn.Parameter] | None = None

    def order(self, rank: int, times: int, steps: dict[str, str]) -> None:
        if rank == self._rank:
            OrderedStager.errors = steps
            OrderedStager.left = Counter(dict.fromkeys(steps, times))

    def keep_busy(self, rank: int | None) -> None:
        job = SimpleNamespace(running=True, version=-1)
        self._worker._refit_rank()._job = job if rank == self._rank else None

    def move(self, rank: int, parameter: str) -> None:
        if rank == self._rank:
            kept = self._model.get_parameter(parameter)
            self._moved = parameter, kept
            self._put(parameter, nn.Parameter(kept.detach().clone(), False))

    def move_back(self) -> None:
        if self._moved is not None:
            self._put(*self._moved)
            self._moved = None

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, own = name.rpartition(".")
        setattr(self._model.get_submodule(module), own, parameter)


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    RankWorker.refit_rank_class = OrderedRank
    answer_requests(descriptor, OrderedRankProcess(rank, ranks, port))
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
