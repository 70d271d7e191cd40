# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The one place where dynamo.vllm is hooked.

``WorkerFactory.register_engine_routes`` is called once per worker, before it
registers its model, with all that a refit agent needs; ``register_vllm_model`` is an
attribute of the factory, awaited right before ``generate`` is served. If upstream moves
them, the contract tests say so and this file changes.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from dynamo.common import model_taints
from dynamo.runtime import DistributedRuntime, Endpoint
from dynamo.vllm.worker_factory import WorkerFactory

Registration = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
"""Calls what registers the model, once it is time."""

OnWorker = Callable[[DistributedRuntime, Endpoint, Any], Registration]


def on_worker_ready(callback: OnWorker) -> None:
    """Call ``callback(runtime, generate_endpoint, handler)`` for every worker that
    this process sets up, on its event loop; its model is registered through what the
    callback returns."""
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
        registration = callback(runtime, generate_endpoint, handler)
        register = self.register_vllm_model

        @functools.wraps(register)
        async def register_vllm_model(*args: Any, **kwargs: Any) -> None:
            await registration(functools.partial(register, *args, **kwargs))

        self.register_vllm_model = register_vllm_model

    WorkerFactory.register_engine_routes = register_engine_routes


def on_user_taints(
    callback: Callable[[Endpoint, set[str]], Awaitable[None]],
) -> None:
    """Let ``POST /engine/update/model_taints`` call ``callback(endpoint, taints)``
    where it would replace all taints of the model card."""
    model_taints.update_model_taints = callback
