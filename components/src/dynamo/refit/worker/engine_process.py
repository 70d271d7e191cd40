# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""In vLLM's engine process: a mark in its stream of outputs where the weights changed,
and KV events without the KV epoch.

vLLM schedules ahead: while the ranks install, the engine may not have read yet what
steps on the old weights made, and those outputs leave after the install's answer. The
mark leaves behind the last of them and before the first output of the new weights.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine import core as vllm_core
from vllm.v1.engine.core import EngineCoreProc

from dynamo.refit.protocol import Installed, RankAnswer
from dynamo.refit.worker.kv_epoch import hiding_epochs

#: The request that a mark is an output of. vLLM drops outputs of unknown requests.
MARK = "dynamo-refit-mark"

_run_engine_core = EngineCoreProc.run_engine_core


def mark_changes() -> None:
    """Let every engine that this process starts from now on mark its changes."""
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """What the engine's process runs."""
    vllm_core.EngineCoreProc = MarkingEngineCore
    _run_engine_core(*args, **kwargs)


def version_of_mark(outputs: list[EngineCoreOutput]) -> tuple[int | None] | None:
    """``(version,)`` where ``outputs`` are a mark: what made all tokens after it."""
    if len(outputs) != 1 or outputs[0].request_id != MARK:
        return None
    return (outputs[0].new_token_ids[0] if outputs[0].new_token_ids else None,)


class MarkingEngineCore(EngineCoreProc):
    """vLLM's engine, with one more method that its client can call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: Marks that outputs have to leave before: the newest step that ran before the
        #: change, the client and the mark.
        self._waiting: list[tuple[object, int, EngineCoreOutputs]] = []
        super().__init__(*args, **kwargs)
        events = self.scheduler.kv_event_publisher
        events.publish = hiding_epochs(events.publish)

    def refit_change(
        self, payload: bytes, client_index: int, version: int | None
    ) -> list[bytes]:
        """Have every rank carry out an encoded install or restore; their answers.

        If all ranks have, what they run on from then on is ``version``.
        """
        answers = self.collective_rpc("refit_call", args=(payload,))
        decoded = [
            msgspec.msgpack.decode(answer, type=RankAnswer) for answer in answers
        ]
        if all(isinstance(answer.reply, Installed) for answer in decoded):
            self._mark(client_index, version)
        return answers

    def _mark(self, client_index: int, version: int | None) -> None:
        tokens = [] if version is None else [version]
        mark = EngineCoreOutputs(outputs=[EngineCoreOutput(MARK, tokens)])
        if self.batch_queue:
            # Ranks carry out steps and calls in the order in which they were given.
            self._waiting.append((self.batch_queue[0], client_index, mark))
        else:
            self.output_queue.put_nowait((client_index, mark))

    def post_step(self, model_executed: bool) -> None:
        """vLLM calls it when the outputs of a step are on their way."""
        super().post_step(model_executed)
        while self._waiting and not self._is_queued(self._waiting[0][0]):
            _, client_index, mark = self._waiting.pop(0)
            self.output_queue.put_nowait((client_index, mark))

    def _is_queued(self, step: object) -> bool:
        return any(queued is step for queued in self.batch_queue)
