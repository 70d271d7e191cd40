# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks that are measured: vLLM's, with dummy weights and the product's
extension, without an engine. The baselines run in the same processes.

Each rank drives its own cycles, as an engine's loop would, so that no time is spent
between processes while it is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dynamo.refit.protocol import RankVote, StageTimings
from dynamo.refit.worker.proof import Proof
from graphs.local import free_port
from tests.benchmarks.sources import Held
from tests.support.child import Child

#: Any step of the largest model; a rank that takes longer is stuck.
SECONDS = 120.0


@dataclass(frozen=True)
class CycleTimes:
    """One rank's cycle, in milliseconds where nothing else is said.

    ``arrival`` is from the call of the rank's method to its first posted read, and
    ``stage`` from there to the vote. ``nbytes`` came over the wire.
    """

    vote: RankVote
    arrival: float
    stage: float
    install: float
    verify: float
    parts: bytes = field(repr=False)
    reads: tuple = field(repr=False)

    @property
    def timings(self) -> StageTimings:
        return self.vote.timings

    @property
    def nbytes(self) -> int:
        return self.vote.nbytes

    @property
    def total(self) -> float:
        """What a cycle takes, the check of the live weights excepted."""
        return self.stage + self.install


class Ranks:
    """``count`` rank processes; every method asks all of them at once."""

    def __init__(self, count: int, logs: Path) -> None:
        port = free_port()
        self._children = [
            Child(
                "tests.benchmarks.rank_process",
                [str(rank), str(count), str(port)],
                logs / f"rank-{rank}-of-{count}.log",
            )
            for rank in range(count)
        ]

    def load(self, model: Path) -> None:
        self._ask("load", model)

    def cycle(self, held: Held) -> list[CycleTimes]:
        """Stage, install and verify what is held; each rank's times.

        Raises:
            FingerprintMismatch: the staged bytes are not the held ones.
        """
        payload = msgspec.msgpack.encode(held.manifest)
        cycles = self._ask("cycle", held.manifest.fingerprint(), payload)
        proof = Proof(held.manifest, [cycle.reads for cycle in cycles])
        parts = [np.frombuffer(cycle.parts, dtype="<u8") for cycle in cycles]
        proof.check(held.fingerprints, parts)
        return cycles

    def forget(self) -> None:
        """Drop session and arena: the next cycle builds everything anew."""
        self._ask("forget")

    def open_baselines(self, held: Held) -> None:
        """Buffers and connections for the three below; what a cycle reads is known."""
        self._ask("open_baselines", msgspec.msgpack.encode(held.manifest))

    def raw(self) -> float:
        """One NIXL read of as many bytes as a cycle reads; bytes per second in all."""
        return self._rate("raw")

    def alone(self) -> float:
        """A cycle's reads without fingerprints; bytes per second in all."""
        return self._rate("alone")

    def copy(self) -> float:
        """A copy of as many bytes by one thread; bytes per second in all."""
        return self._rate("copy")

    def modelexpress(self) -> float:
        """ModelExpress's transport over a cycle's descriptors; bytes per second."""
        return self._rate("modelexpress")

    def close_baselines(self) -> None:
        self._ask("close_baselines")

    def close(self) -> None:
        for child in self._children:
            child.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rate(self, method: str) -> float:
        """All ranks' bytes over the time of the slowest."""
        moved = self._ask(method)
        return sum(n for n, _ in moved) / max(seconds for _, seconds in moved)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        for child in self._children:
            child.send(method, *arguments)
        return [child.receive(SECONDS) for child in self._children]
