# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker without an engine, whose place in routing is driven over its stdin.

``routed_worker.py CHECKPOINT`` does what dynamo.vllm and ``worker/main.py`` do: it
serves ``refit``, registers the checkpoint once admitted, and then serves ``generate``
and ``clear_kv_blocks`` of ``routed.backend``. Each line is a method of WorkerRouting
with its arguments (``taints`` stands for Dynamo's own route) and is answered with
``done``.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import AsyncIterator

from dynamo.common import model_taints
from dynamo.common.utils import graceful_shutdown
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model

from dynamo.refit.protocol import GetStatus
from dynamo.refit.rpc import runtime_from_environment, serve
from dynamo.refit.worker.routing import WorkerRouting


async def answer(request: object) -> AsyncIterator[int]:
    yield os.getpid()


async def main(checkpoint: str) -> None:
    runtime = runtime_from_environment()
    stopping = asyncio.Event()
    graceful_shutdown.install_signal_handlers(
        asyncio.get_running_loop(), runtime, [], stopping, grace_period_s=30
    )
    generate, commands, clear = (
        runtime.endpoint(f"routed.backend.{name}")
        for name in ("generate", "refit", "clear_kv_blocks")
    )
    routing = WorkerRouting(
        runtime,
        generate,
        commands,
        others=[generate, clear],
        admission="coordinator",
        asleep=lambda: False,
        stopping=graceful_shutdown._shutdown_started,
        put_back=lambda: asyncio.sleep(0, result=True),
    )
    routing.open()
    # As worker/hook.py does, which imports vLLM.
    model_taints.update_model_taints = routing.set_user_taints
    register = functools.partial(
        register_model,
        ModelInput.Tokens,
        ModelType.Chat,
        generate,
        checkpoint,
        "tiny",
        worker_type=WorkerType.Aggregated,
    )
    background = [
        asyncio.create_task(serve(commands, answer, health_check=GetStatus())),
        asyncio.create_task(routing.watch()),
        asyncio.create_task(listen(routing, generate)),
    ]
    print(generate.connection_id(), flush=True)
    await routing.register(register)
    await asyncio.gather(serve(generate, answer), serve(clear, answer), *background)


async def listen(routing: WorkerRouting, generate: object) -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        match line.split():
            case ["admit"]:
                routing.admit()
            case ["label", version]:
                await routing.label(int(version))
            case ["taints", *taints]:
                await model_taints.update_model_taints(generate, set(taints))
            case ["withdraw" | "restore" | "fence" as method]:
                await getattr(routing, method)()
        print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
