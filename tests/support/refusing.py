# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The real worker extension, of ranks that refuse to be refitted.

Passed to a real worker as ``--worker-extension-cls``. ``REFIT_TEST_REFUSES`` says when
its last rank refuses: ``loading``, while vLLM starts the engine, or ``described``, when
the agent asks it what it holds.
"""

from __future__ import annotations

import os

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.worker.cpu_worker import CPUWorker

from dynamo.refit.errors import UnsupportedConfiguration
from dynamo.refit.rank.extension import RefitRank, RefitWorkerExtension
from dynamo.refit.rank.start_failure import told_to_worker

REFUSES = "REFIT_TEST_REFUSES"
LAST_RANK = 1
MESSAGE = "this model\nis not refitted: serve it otherwise"


def refuse(when: str) -> None:
    if os.environ[REFUSES] == when and get_tensor_model_parallel_rank() == LAST_RANK:
        raise UnsupportedConfiguration(MESSAGE, tensor="model.a", rank=LAST_RANK)


class RefusingRank(RefitRank):
    def __init__(self, worker: object) -> None:
        super().__init__(worker)
        refuse("described")


class RefusingExtension(RefitWorkerExtension):
    refit_rank_class = RefusingRank


_determine_available_memory = CPUWorker.determine_available_memory


def determine_available_memory(worker: CPUWorker) -> int:
    """Refuses where rank/reserve.py does on a GPU: after the model was loaded."""
    with told_to_worker(worker.rank):
        refuse("loading")
    return _determine_available_memory(worker)


CPUWorker.determine_available_memory = determine_available_memory
