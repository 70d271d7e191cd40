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
from types import ModuleType
from typing import Any

from dynamo.common import model_taints
from dynamo.runtime import DistributedRuntime, Endpoint
from dynamo.vllm import main as dynamo_vllm
from dynamo.vllm import worker_factory
from dynamo.vllm.args import Config
from dynamo.vllm.worker_factory import WorkerFactory
from vllm.config import VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.errors import UnsupportedConfiguration

Registration = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
"""Calls what registers the model, once it is time."""

OnWorker = Callable[[DistributedRuntime, Endpoint, Any], Registration]


def on_arguments(check: Callable[[Config], None]) -> None:
    """Call ``check(config)`` when dynamo.vllm has parsed its arguments, before it
    downloads or loads anything; what it raises ends the start."""
    original = dynamo_vllm.parse_args_with_model_fetch

    @functools.wraps(original)
    async def parse_args_with_model_fetch(argv: list[str] | None = None) -> Config:
        config = await original(argv)
        check(config)
        return config

    dynamo_vllm.parse_args_with_model_fetch = parse_args_with_model_fetch


def on_engine_config(check: Callable[[VllmConfig], None]) -> None:
    """Call ``check(config)`` with the final configuration of every engine, before it
    loads; what it raises ends the start."""
    original = AsyncLLM.from_vllm_config

    @functools.wraps(original)
    def from_vllm_config(vllm_config: VllmConfig, **kwargs: Any) -> AsyncLLM:
        check(vllm_config)
        return original(vllm_config, **kwargs)

    AsyncLLM.from_vllm_config = staticmethod(from_vllm_config)


def on_worker_ready(callback: OnWorker) -> None:
    """Call ``callback(runtime, generate_endpoint, handler)`` for every worker that
    this process sets up, on its event loop; its model is registered through what the
    callback returns. A model of a worker without it is not registered."""
    original = WorkerFactory.register_engine_routes
    registrations: list[Registration] = []

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
        registrations.append(registration)
        register = self.register_vllm_model

        @functools.wraps(register)
        async def register_vllm_model(*args: Any, **kwargs: Any) -> None:
            await registration(functools.partial(register, *args, **kwargs))

        self.register_vllm_model = register_vllm_model

    WorkerFactory.register_engine_routes = register_engine_routes
    for module in (dynamo_vllm, worker_factory):
        _register_only_with(registrations, module)


def _register_only_with(registrations: list[Registration], module: ModuleType) -> None:
    """Let ``module`` register models only where there is an agent: whatever kind of
    worker dynamo.vllm sets up, routers find it by its model."""
    original = module.register_model

    @functools.wraps(original)
    async def register_model(*args: Any, **kwargs: Any) -> Any:
        if not registrations:
            raise UnsupportedConfiguration(
                "this kind of worker has no refit agent and would serve its first "
                "weights for ever: start it with python -m dynamo.vllm"
            )
        return await original(*args, **kwargs)

    module.register_model = register_model


def on_user_taints(
    callback: Callable[[Endpoint, set[str]], Awaitable[None]],
) -> None:
    """Let ``POST /engine/update/model_taints`` call ``callback(endpoint, taints)``
    where it would replace all taints of the model card."""
    model_taints.update_model_taints = callback
