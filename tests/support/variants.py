# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every shape that is refitted, and three sets of weights of each."""

from __future__ import annotations

from pathlib import Path

from graphs.tiny_model import ARCHITECTURES, make_checkpoint

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"

SEEDS = {"A": 1, "B": 2, "C": 3}

#: What is served: an architecture and what is different in its config.
VARIANTS = {
    **{architecture: (architecture, {}) for architecture in ARCHITECTURES},
    # The last rank's part of the vocabulary is shorter, and padded.
    "uneven-vocabulary": ("qwen3", {"vocab_size": 4100}),
}

#: Fused and row-parallel weights; a tied embedding; experts; a vocabulary that does not
#: divide: where every architecture would take too long.
TELLING = ("qwen3", "qwen3-tied", "qwen3moe", "uneven-vocabulary")


def checkpoint(variant: str, weights: str) -> Path:
    """Weights ``A``, ``B`` or ``C`` of a variant; made once."""
    architecture, changes = VARIANTS[variant]
    seed = SEEDS[weights]
    directory = MODELS / f"layouts-{variant}-{seed}"
    return make_checkpoint(directory, seed=seed, architecture=architecture, **changes)
