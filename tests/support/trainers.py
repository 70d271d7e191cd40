# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Trainers that publish something else than the served model expects.

    python -m tests.support.trainers CHANGE TENSOR -- ARGUMENTS OF graphs.trainer

``CHANGE``: ``none``; ``drop``, ``grow`` (one row more), ``shrink`` (one row less) or
``int8`` change one tensor; ``deaf`` does not answer readers that connect, so
that a first pull waits for ever; ``torn`` writes into the tensor when it has been
fingerprinted, as long as there is the file named by ``REFIT_TEST_TORN``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from dynamo.refit.publish.memory import RankMemory
from dynamo.refit.publish.publisher import WeightPublisher
from graphs import trainer

load_weights = trainer.load_weights
fold = RankMemory.fold


def changed_weights(change: str, name: str):
    def load(checkpoint: Path) -> dict[str, torch.Tensor]:
        weights = load_weights(checkpoint)
        tensor = weights[name]
        match change:
            case "drop":
                del weights[name]
            case "grow":
                weights[name] = torch.cat([tensor, tensor[:1]])
            case "shrink":
                weights[name] = tensor[:-1].clone()
            case "int8":
                weights[name] = tensor.to(torch.int8)
        return weights

    return load


def torn_after_fold(name: str):
    def fold_and_tear(memory: RankMemory, slot: int) -> np.ndarray:
        folded = fold(memory, slot)
        if Path(os.environ["REFIT_TEST_TORN"]).exists():
            entries = memory._buffers.entries
            blocks = [entry.name for entry in entries for _ in entry.shards]
            memory._buffers.views(slot)[blocks.index(name)].view(-1)[0] += 1
        return folded

    return fold_and_tear


def main() -> None:
    change, name, separator, *arguments = sys.argv[1:]
    if separator != "--":
        raise SystemExit(__doc__)
    sys.argv = ["graphs.trainer", *arguments]
    if change == "deaf":
        WeightPublisher._progress = lambda self: self._stopped.wait()
    elif change == "torn":
        RankMemory.fold = torn_after_fold(name)
    elif change != "none":
        trainer.load_weights = changed_weights(change, name)
    trainer.main()


if __name__ == "__main__":
    main()
