# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The slow path that a refit must equal: every rank reads the whole checkpoint and
lets the engine's own loader take its part."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import load_file

from dynamo.refit.rank.extension import RefitWorkerExtension


class GoldenExtension(RefitWorkerExtension):
    """The real extension, with the golden load and a look at the live bytes."""

    def golden_load(self, file: str) -> int:
        """Load ``file`` into the live parameters with ``load_weights``."""
        return len(self.model_runner.get_model().load_weights(load_file(file).items()))

    def golden_digests(self) -> dict[str, str]:
        """SHA-256 of the bytes of every live parameter of this rank."""
        return {
            name: hashlib.sha256(
                parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name, parameter in self.model_runner.get_model().named_parameters()
        }

    def golden_scribble(self) -> None:
        """Overwrite every live parameter, so that nothing can be equal by chance."""
        for parameter in self.model_runner.get_model().parameters():
            parameter.detach().fill_(1.5)
