# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Start dynamo.vllm where torchvision is missing.

``dynamo.vllm`` imports one function of transformers' Qwen2-VL image processor,
whose module imports torchvision, and there is no torchvision for CPU-only torch.
A text model never calls that function.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types

logger = logging.getLogger(__name__)

_MODULE = "transformers.models.qwen2_vl.image_processing_qwen2_vl"


def stand_in_if_missing() -> None:
    """Make dynamo.vllm importable; does nothing where torchvision is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    logger.warning("torchvision is not installed: only text models will work")
    module = types.ModuleType(_MODULE)
    module.smart_resize = _smart_resize
    sys.modules[_MODULE] = module


def _smart_resize(*args: object, **kwargs: object) -> None:
    raise ImportError("image models need torchvision, which is not installed")
