# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's NixlConnector, also for CPU engines that share few cores.

NIXL's Python API starts every agent's progress thread without a delay: it takes a whole
core, idle or not. vLLM in turn binds the thread that runs a CPU model to the last core
of each NUMA node. On two cores a prefill and a decode engine then hardly get to run: a
request took 3 to 60 s, and a worker fell out of discovery. On GPUs nothing is changed.

Workers load this module by ``kv_connector_module_path``.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from nixl._api import nixl_agent
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.platforms import current_platform

#: With this pause the thread takes 1.5 % of a core.
PROGRESS_MICROSECONDS = 1000

_bindings = sys.modules[nixl_agent.__module__].nixlBind


class PatientAgentConfig(_bindings.nixlAgentConfig):
    """The progress thread waits between two looks, whatever ``nixl_agent`` sets."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(
            name, PROGRESS_MICROSECONDS if name == "pthrDelay" else value
        )


if current_platform.is_cpu():
    _bindings.nixlAgentConfig = PatientAgentConfig


class NixlConnector(NixlPullConnector):
    """Leaves its process on the cores it was on. Dynamo looks for this name."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)
