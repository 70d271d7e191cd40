# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Keep a CPU engine's weights in the layout they are loaded in.

vLLM's CPU build packs linear weights at load (oneDNN, SGL kernels) and drops or
shadows the plain ones, so that nothing can be written into them afterwards. An
engine that is to be refitted runs on the plain weights instead. On any other
platform this does nothing.
"""

from __future__ import annotations

from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers import utils as gemm
from vllm.platforms import current_platform

logger = init_logger("vllm.dynamo_refit")


def keep_plain_layout() -> None:
    """Turn weight packing off in this process; call it before the model loads."""
    if not current_platform.is_cpu():
        return
    _custom_ops._supports_onednn = False
    gemm.check_cpu_sgl_kernel = _never
    logger.warning(
        "dynamo-refit: CPU weight packing is off, since packed weights cannot be "
        "refitted: linear layers run on the plain layout with torch's kernels."
    )


def _never(n: int, k: int, dtype: object) -> bool:
    return False
