# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which version is staged in a rank, which is live, and which was live before it.

The only place that says so. Installs and undoes the functions of a version, which
are all of it that is no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynamo.refit.errors import NothingStaged
from dynamo.refit.rank.processing import Function
from dynamo.refit.rank.runtime_parts import RuntimeParts


@dataclass(frozen=True)
class Version:
    """A version that was staged here: ``parts`` of the weights as the engine computes
    with them, which must come to ``landed`` once it is installed, and ``functions``
    that hold the rest of them."""

    number: int
    parts: RuntimeParts
    landed: np.ndarray
    functions: tuple[Function, ...] = ()


class Versions:
    """The versions of one rank."""

    def __init__(self) -> None:
        self.staged: Version | None = None
        self.live: Version | None = None
        self._previous: Version | None = None
        #: What the functions of the live version took the place of.
        self._replaced: list[Function] = []

    def require_staged(self, number: int) -> Version:
        """
        Raises:
            NothingStaged: another version, or none, is staged.
        """
        staged = self.staged
        if staged is None or staged.number != number:
            there = staged.number if staged else None
            raise NothingStaged(
                f"version {number} is not staged here (staged: {there})"
            )
        return staged

    def require_live(self, number: int) -> Version:
        """
        Raises:
            NothingStaged: another version, or none, was installed last.
        """
        live = self.live
        if live is None or live.number != number:
            raise NothingStaged(
                f"version {number} is not what was installed here last "
                f"({live.number if live else 'nothing'})"
            )
        return live

    def installed(self) -> None:
        """The tensors of what is staged are live; now its functions are, too. May be
        repeated."""
        staged = self.staged
        if self.live is None or self.live.number != staged.number:
            self._previous = self.live
            self._replaced = [function.install() for function in staged.functions]
        self.live = staged

    def restored(self) -> None:
        """The tensors of what was live before what is staged are live again; now its
        functions are, too. May be repeated."""
        if self.live is not None and self.live.number == self.staged.number:
            for function in self._replaced:
                function.install()
            self.live = self._previous
