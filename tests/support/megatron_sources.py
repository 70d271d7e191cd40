# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainer ranks that hold a model as Megatron-Core lays it out, and publish it as the
product does: its shards, snapshots, manifest and fingerprints. A process a rank.

    with MegatronSources(checkpoint, 2, logs) as sources:
        group.refit(sources.write(0, other_checkpoint))
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import numpy as np

from dynamo.refit.publish.megatron import megatron_shards
from dynamo.refit.publish.memory import RankMemory
from dynamo.refit.publish.merge import RankPart, merge
from graphs.trainer import load_weights
from tests.support.child import Child, answer_requests
from tests.support.megatron import Parameter, Shape, megatron_rank, spec_of
from tests.support.raw_sources import PROGRESS_SECONDS, RawVersion


class MegatronSources:
    """``checkpoint`` over ``tp`` tensor-parallel ranks of a trainer."""

    def __init__(self, checkpoint: Path, tp: int, logs: Path) -> None:
        self._children = [
            Child("tests.support.megatron_sources", [], logs / f"megatron-{rank}.log")
            for rank in range(tp)
        ]
        for rank, child in enumerate(self._children):
            child.send("hold", checkpoint, tp, rank)
        parts = {rank: child.receive() for rank, child in enumerate(self._children)}
        self._merged = merge(parts)
        self.manifest = self._merged.manifest

    def write(self, slot: int, checkpoint: Path) -> RawVersion:
        """Train to ``checkpoint`` on every rank, and snapshot it into ``slot``."""
        for child in self._children:
            child.send("write", slot, checkpoint)
        written = {rank: child.receive() for rank, child in enumerate(self._children)}
        return RawVersion(self.manifest, slot, self._merged.add_up(written))

    def __enter__(self) -> MegatronSources:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.close()


class TrainerRank:
    """The inside of one rank; each public method is a request."""

    def __init__(self) -> None:
        self._memory: RankMemory | None = None

    def hold(self, checkpoint: Path, tp: int, rank: int) -> RankPart:
        self._shape, self._tp, self._rank = Shape.of(checkpoint), tp, rank
        # Shards are views of these.
        self._parameters = self._parameters_of(checkpoint)
        specs = [spec_of(parameter, self._shape) for parameter in self._parameters]
        shards = megatron_shards(specs, vocab_size=self._shape.vocab)
        name = f"megatron-{rank}-{uuid.uuid4().hex[:8]}"
        self._memory = RankMemory(name, shards, "snapshot", may_be_empty=False)
        return self._memory.part("raw")

    def write(self, slot: int, checkpoint: Path) -> np.ndarray:
        trained = self._parameters_of(checkpoint)
        for parameter, target in zip(self._parameters, trained, strict=True):
            parameter.local.copy_(target.local)
        self._memory.write(slot)
        return self._memory.fold(slot)

    def _parameters_of(self, checkpoint: Path) -> list[Parameter]:
        weights = load_weights(checkpoint)
        return list(megatron_rank(weights, self._shape, tp=self._tp, rank=self._rank))

    def progress(self) -> None:
        if self._memory is not None:
            self._memory.progress()


def main() -> None:
    rank = TrainerRank()
    answer_requests(int(sys.argv[1]), rank, rank.progress, PROGRESS_SECONDS)


if __name__ == "__main__":
    main()
