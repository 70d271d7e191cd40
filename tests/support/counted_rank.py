# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Ranks that can say what they hold in NIXL at the moment.

with CountedRanks(2, logs) as group:
    assert group.nixl()[0].registrations == 3
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from dynamo.refit.rank import stager
from dynamo.refit.transport.nixl import NixlAgent, Read, Registration
from tests.support.child import answer_requests
from tests.support.rank_group import RankGroup
from tests.support.rank_process import RankProcess


@dataclass(frozen=True)
class NixlUse:
    """What one rank's agent holds: registrations, peers, prepared reads, and how many
    of those are under way."""

    registrations: int
    peers: int
    reads: int
    active: int


class CountedRanks(RankGroup):
    """A :class:`RankGroup` of processes that count."""

    module = "tests.support.counted_rank"

    def nixl(self) -> list[NixlUse]:
        """Per rank, what its NIXL agent holds."""
        return [NixlUse(*held) for held in self._ask("nixl")]

    def spoil_shadows(self) -> None:
        """Change a bit of every shadow."""
        self._ask("spoil_shadows")


class CountingAgent(NixlAgent):
    """The real agent, which keeps books of what was not given back."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._registered: list[Registration] = []
        self._met: Counter[str] = Counter()
        self._prepared: set[Read] = set()

    def register(self, *arguments: Any) -> Registration:
        registration = super().register(*arguments)
        self._registered.append(registration)
        return registration

    def deregister(self, registration: Registration) -> None:
        super().deregister(registration)
        self._registered.remove(registration)

    def connect(self, metadata: bytes) -> str:
        peer = super().connect(metadata)
        self._met[peer] += 1
        return peer

    def disconnect(self, peer: str) -> None:
        super().disconnect(peer)
        self._met[peer] -= 1

    def prepare_read(self, *arguments: Any) -> Read:
        read = super().prepare_read(*arguments)
        self._prepared.add(read)
        release = read.release

        def counted() -> None:
            release()
            self._prepared.remove(read)

        read.release = counted
        return read

    def use(self) -> tuple[int, int, int, int]:
        """The fields of :class:`NixlUse`, as a module that is run cannot send one."""
        # A stage may be at work on another thread: copies do not change under way.
        reads = list(self._prepared)
        return (
            len(self._registered),
            sum(count > 0 for count in list(self._met.values())),
            len(reads),
            sum(read.active for read in reads),
        )


class CountingRankProcess(RankProcess):
    """Carries out what the test asks for; each public method is a request."""

    def nixl(self) -> tuple[int, int, int, int]:
        return self._worker._refit_rank()._stager._agent.use()

    def spoil_shadows(self) -> None:
        for shadow in self._worker._refit_rank()._stager.memory.arena.shadows:
            shadow.buffer.bytes[0] ^= 1


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    stager.NixlAgent = CountingAgent
    answer_requests(descriptor, CountingRankProcess(rank, ranks, port))
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
