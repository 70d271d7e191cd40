# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch loop that publishes the weights of every step.

    python -m graphs.training.plain --model DIR --model-name tiny --steps 3

The steps fit the model to random tokens: enough to move its weights. One line of JSON
per version; the exit code is 1 if the last one is not served. With ``--keep DIR`` each
version is also saved there, as a checkpoint that ``dynamo-refit publish`` takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dynamo.refit.publish.publisher import PublishedVersion, WeightPublisher

#: Sequences per step, and tokens in each.
BATCH = (2, 32)


def main() -> int:
    options = read_arguments(__doc__, "graphs.training.plain")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    weights = dict(model.named_parameters())
    with WeightPublisher(options.model_name, weights) as publisher:
        return train(options, model, publisher, model.save_pretrained)


def train(
    options: argparse.Namespace,
    model: nn.Module,
    publisher: WeightPublisher,
    save: Callable[[Path], None],
) -> int:
    """Step, publish, and step again while the fleet reads; returns the exit code."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = options.first_version
    handle: PublishedVersion | None = None
    for version in range(first, first + options.steps):
        loss = step(model, optimizer, seed=version + publisher.rank)
        # A version that is still under way would be given up for the next one.
        if handle is not None:
            served(handle, publisher.rank)
        # Blocks for a copy of the weights, not for anybody who reads it.
        handle = publisher.publish(version)
        say(publisher.rank, version=version, loss=loss)
        if options.keep is not None:
            save(options.keep / str(version))
    return 0 if handle is None or served(handle, publisher.rank) else 1


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One optimizer step on random tokens; returns the loss before it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, BATCH, generator=generator)
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten()
    )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return round(loss.item(), 3)


def served(handle: PublishedVersion, rank: int) -> bool:
    """Wait until nobody reads the version any more: whether the fleet serves it."""
    release = handle.wait()
    say(rank, version=handle.version, outcome=release.outcome, detail=release.detail)
    return release.outcome == "completed"


def say(rank: int, **fields: object) -> None:
    if rank == 0:
        print(json.dumps(fields), flush=True)


def read_arguments(description: str, module: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--model-name", default="tiny", help="as it is served")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--first-version", type=int, default=1, help="higher than any before it"
    )
    parser.add_argument("--keep", type=Path, help="save every version there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
