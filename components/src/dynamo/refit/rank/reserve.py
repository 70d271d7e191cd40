# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Room for staging on a GPU, set aside before vLLM gives what is left to the KV cache.

vLLM asks each rank once, after it has loaded and profiled the model, how many bytes
the cache may have: that answer is made smaller. An operator who sets the size of the
cache (``--kv-cache-memory-bytes``) has decided: then the start-up check of
:mod:`memory` alone says whether staging still fits. On a CPU this does nothing.
"""

from __future__ import annotations

import functools
import os

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.worker.gpu_worker import Worker

from dynamo.refit.rank.conversion import RuntimeForm
from dynamo.refit.rank.limits import LIMITS
from dynamo.refit.rank.memory import STAGING_VARIABLE, room_for_cache
from dynamo.refit.rank.slices import ArenaLayout, IntakeLayout, Parameter
from dynamo.refit.rank.start_failure import told_to_worker
from dynamo.refit.rank.twin import build_twin

logger = init_logger("vllm.dynamo_refit")

#: The attribute of a worker that keeps its :class:`RuntimeForm`.
_FORM = "_refit_form"

_determine_available_memory = Worker.determine_available_memory


def leave_room_for_staging() -> None:
    """Have vLLM's GPU workers of this process reckon with staging; call it before
    they are asked."""
    if current_platform.is_cuda():
        Worker.determine_available_memory = determine_with_staging


def runtime_form(worker: Worker) -> RuntimeForm:
    """What the engine of ``worker`` computes with: built before the KV cache if that
    makes room for staging, and again only if a later step of vLLM's start has moved
    what versions fill.

    Raises:
        UnsupportedConfiguration: no version could be installed.
    """
    form = getattr(worker, _FORM, None)
    if form is None or not form.look_again():
        model = worker.model_runner.get_model()
        twin = build_twin(worker.vllm_config, model)
        form = RuntimeForm(model, twin, worker.vllm_config)
        setattr(worker, _FORM, form)
    return form


@functools.wraps(_determine_available_memory)
def determine_with_staging(worker: Worker) -> int:
    """Bytes for the KV cache of this rank.

    Raises:
        MemoryShort: none are left.
    """
    available = _determine_available_memory(worker)
    if worker.cache_config.kv_cache_memory_bytes:
        return available
    with told_to_worker(worker.rank):
        form = runtime_form(worker)
        limit = LIMITS["cuda"].scratch
        filled = [Parameter.of(name, t) for name, t in form.live().items()]
        left = room_for_cache(
            available,
            os.environ.get(STAGING_VARIABLE, "auto"),
            arena=ArenaLayout(filled).nbytes,
            scratch=2 * limit + IntakeLayout(form.taken_in(), limit).working_nbytes,
        )
    logger.info(
        "dynamo-refit: of %d bytes for the KV cache, %d are left for staging",
        available,
        available - left,
    )
    return left
