# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension, which can be told to forget what it has cached, and compares
what is live with the golden path."""

from __future__ import annotations

import torch

from dynamo.refit.rank.extension import RefitWorkerExtension
from tests.benchmarks.gpu.model import empty, fill


class Extension(RefitWorkerExtension):
    """For measurements only."""

    def refit_forget(self) -> None:
        """Drop the session, its requests, its buffers and their registrations."""
        stager = self._refit_rank()._stager
        # As a stage would.
        stager._live.wait()
        for session in (stager._session, stager._spare):
            if session is not None:
                session.close()
        if stager._arena is not None:
            stager._arena.close()
        stager._session = stager._spare = stager._proven = stager._arena = None
        stager._staged = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def golden_compare(self, config: dict, seed: int) -> tuple[int, list[str]]:
        """How many live parameters there are, and those that differ from what
        ``load_weights`` makes of the weights with ``seed``, bit by bit."""
        model = self.model_runner.get_model()
        live = {name: p.detach().clone() for name, p in model.named_parameters()}
        weights = empty(config, str(self.device))
        fill(weights, seed)
        for parameter in model.parameters():
            parameter.data.fill_(1.5)
        model.load_weights(iter(weights.items()))
        different = [
            name
            for name, parameter in model.named_parameters()
            if not torch.equal(
                parameter.view(torch.uint8), live[name].view(torch.uint8)
            )
        ]
        return len(live), different
