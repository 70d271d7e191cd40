# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The one place where dynamo.vllm is hooked.

``WorkerFactory.register_engine_routes`` is called once per worker, before it
registers its model, with all that a refit agent needs. If upstream moves it, the
contract test says so and this file changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dynamo.runtime import DistributedRuntime, Endpoint
from dynamo.vllm.worker_factory import WorkerFactory

OnWorker = Callable[[DistributedRuntime, Endpoint, Any], None]


def on_worker_ready(callback: OnWorker) -> None:
    """Call ``callback(runtime, generate_endpoint, handler)`` for every worker that
    this process sets up, on its event loop."""
    original = WorkerFactory.register_engine_routes

    @functools.wraps(original)
    def register_engine_routes(
        self: WorkerFactory,
        runtime: DistributedRuntime,
        generate_endpoint: Endpoint,
        handler: Any,
        lora_enabled: bool = False,
    ) -> None:
        original(self, runtime, generate_endpoint, handler, lora_enabled=lora_enabled)
        callback(runtime, generate_endpoint, handler)

    WorkerFactory.register_engine_routes = register_engine_routes
