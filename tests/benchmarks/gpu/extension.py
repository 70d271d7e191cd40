# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The worker extension, which can be told to forget what it has cached, and compares
what is live with the golden path."""

from __future__ import annotations

import gc
import time

import torch

from dynamo.refit.rank.extension import RefitWorkerExtension
from dynamo.refit.rank.sessions import KeptSessions
from tests.benchmarks.gpu.model import empty, fill


class Extension(RefitWorkerExtension):
    """For measurements only."""

    def watch_gc(self) -> None:
        """Note from now on how long Python's garbage collections take."""
        self._pauses: list[float] = []
        began = [0.0]

        def note(phase: str, _: dict) -> None:
            now = time.perf_counter()
            if phase == "start":
                began[0] = now
            else:
                self._pauses.append((now - began[0]) * 1e3)

        gc.callbacks.append(note)

    def gc_pauses(self) -> tuple[int, float]:
        """How many there were, and the milliseconds of the longest."""
        return len(self._pauses), max(self._pauses, default=0.0)

    def refit_forget(self) -> None:
        """Drop the session, its requests, its buffers and their registrations."""
        stager = self._refit_rank()._stager
        # As a stage would.
        stager._live.wait()
        for session in stager._sessions.all:
            session.close()
        stager._sessions = KeptSessions()
        if stager.memory.arena is not None:
            stager.memory.arena.close()
        stager.memory.arena = None
        stager._versions.staged = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def golden_compare(self, config: dict, seed: int) -> tuple[int, list[str]]:
        """How many live parameters there are, and those that differ from what
        ``load_weights`` makes of the weights with ``seed``, bit by bit."""
        model = self.model_runner.get_model()
        weights = empty(config, str(self.device))
        parameters = dict(model.named_parameters())
        # On the host where the device has no room for a second copy.
        needed = sum(parameter.nbytes for parameter in parameters.values())
        room = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed * 1.1
        there = self.device if room else torch.device("cpu")
        live = {name: p.to(there, copy=True) for name, p in parameters.items()}
        fill(weights, seed)
        for parameter in model.parameters():
            parameter.data.fill_(1.5)
        model.load_weights(iter(weights.items()))
        different = [
            name
            for name, parameter in parameters.items()
            if not torch.equal(
                parameter.view(torch.uint8),
                live[name].to(parameter.device).view(torch.uint8),
            )
        ]
        compared = len(live)
        # Two copies of the model, else kept in torch's cache, where no other process
        # and no staging finds room.
        del weights, live
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return compared, different
