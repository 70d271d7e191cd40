# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker extension whose model says which version it runs on: an install changes no
weights, but from the next step on every token is the version's number."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from dynamo.refit.protocol import Install, Installed, RankAnswer, RankCall


class TellingExtension:
    """Passed to a real worker as ``--worker-extension-cls``."""

    def refit_call(self, payload: bytes) -> bytes:
        call = msgspec.msgpack.decode(payload, type=RankCall)
        assert isinstance(call.request, Install)
        if not hasattr(self, "_told"):
            runner = self.model_runner
            model = runner.get_model()
            model.compute_logits = self._telling(model.compute_logits)
            # Without a profile run, vLLM's CPU runner lacks them for a second stage.
            runner.intermediate_tensors = model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.dtype,
                device=runner.device,
            )
        self._told = call.request.version
        return msgspec.msgpack.encode(RankAnswer(call.call, Installed(rank=self.rank)))

    def _telling(self, compute_logits: Callable) -> Callable:
        def telling(*args: object, **kwargs: object) -> torch.Tensor | None:
            logits = compute_logits(*args, **kwargs)
            if logits is not None:
                logits[:, self._told] = 1e4
            return logits

        return telling
