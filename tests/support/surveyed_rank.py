# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The inside of a rank of :mod:`tests.support.survey`: it also compares the model that
it serves with one that vLLM loads afresh.

    python -m tests.support.surveyed_rank PIPE RANK RANKS PORT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model

from dynamo.refit.rank.twin import held_tensors, same_bits
from tests.support.child import answer_requests
from tests.support.rank_process import RankProcess


class CannotLoad(Exception):
    """vLLM's reason, in one line."""


class SurveyedRankProcess(RankProcess):
    """Carries out what the survey asks for; each public method is a request."""

    def load(self, directory: Path, load_format: str = "auto") -> None:
        try:
            super().load(directory, load_format)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise CannotLoad(f"{type(error).__name__}: {reason}") from error

    def served_as(self) -> str:
        """vLLM's class."""
        return type(self._model).__name__

    def differences(self, directory: Path) -> list[str]:
        """Names of the tensors that modules hold, parameters, buffers and others, that
        are not bit for bit those of a fresh load of ``directory``."""
        config = self._make_config(directory, "auto")
        with set_current_vllm_config(config):
            fresh = get_model(vllm_config=config)
        live = {name: tensor for name, _, _, tensor in held_tensors(self._model)}
        wanted = {name: tensor for name, _, _, tensor in held_tensors(fresh)}
        return sorted(
            name
            for name in live.keys() | wanted.keys()
            if name not in live
            or name not in wanted
            or not same_bits(live[name].detach(), wanted[name].detach())
        )


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    answer_requests(descriptor, SurveyedRankProcess(rank, ranks, port))
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
