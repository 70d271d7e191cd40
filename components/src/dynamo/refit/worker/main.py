# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Stock dynamo.vllm with a refit agent beside its engine."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import signal
import sys
from typing import Any, get_args

from dynamo.runtime import DistributedRuntime, Endpoint
from dynamo.vllm.main import main as dynamo_vllm

from dynamo.refit.bus import EventPublisher
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.protocol import StagingChoice, WorkerRequest
from dynamo.refit.rpc import Caller, unary
from dynamo.refit.worker.agent import RefitAgent
from dynamo.refit.worker.engine import RefitEngine
from dynamo.refit.worker.hook import on_worker_ready

logger = logging.getLogger(__name__)

EXTENSION = "dynamo.refit.rank.extension.RefitWorkerExtension"

#: Time for the last events of a fenced worker to leave.
FENCE_SECONDS = 1.0

_agents: set[asyncio.Task] = set()


def main() -> None:
    """Run ``dynamo.vllm`` with its own arguments and a refit agent."""
    staging = _take_staging_argument()
    if not any(arg.startswith("--worker-extension-cls") for arg in sys.argv):
        sys.argv += ["--worker-extension-cls", EXTENSION]
    on_worker_ready(functools.partial(_start_agent, staging))
    dynamo_vllm()


def _take_staging_argument() -> StagingChoice:
    """Our own argument, taken out of what dynamo.vllm will parse."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--refit-staging",
        choices=get_args(StagingChoice),
        default=os.environ.get("DYN_REFIT_STAGING", "auto"),
    )
    options, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], *rest]
    if options.refit_staging not in get_args(StagingChoice):
        parser.error(f"DYN_REFIT_STAGING={options.refit_staging!r} is no staging mode")
    return options.refit_staging


def _start_agent(
    staging: StagingChoice,
    runtime: DistributedRuntime,
    generate_endpoint: Endpoint,
    handler: Any,
) -> None:
    run = _run_agent(staging, runtime, generate_endpoint, handler)
    task = asyncio.create_task(run)
    _agents.add(task)
    task.add_done_callback(_agent_ended)


def _agent_ended(task: asyncio.Task) -> None:
    _agents.discard(task)
    if not task.cancelled() and task.exception() is not None:
        # A worker that was started to be refitted and cannot be is of no use.
        logger.critical("the refit agent ended", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _run_agent(
    staging: StagingChoice,
    runtime: DistributedRuntime,
    generate_endpoint: Endpoint,
    handler: Any,
) -> None:
    config = handler.config
    worker = generate_endpoint.connection_id()
    topic = runtime.endpoint(f"{config.namespace}.refit.{REFIT_EVENTS}")
    commands = runtime.endpoint(f"{config.namespace}.{config.component}.refit")
    async with EventPublisher(topic, f"worker-{worker}") as events:

        def fence() -> None:
            task = asyncio.create_task(_leave(generate_endpoint, events))
            _agents.add(task)

        agent = RefitAgent(
            RefitEngine(handler),
            Caller(runtime),
            events.publish,
            fence,
            model=config.served_model_name or config.model,
            worker=worker,
            staging=staging,
        )
        await agent.start()
        await commands.serve_endpoint(unary(WorkerRequest, agent.answer, "worker"))


async def _leave(endpoint: Endpoint, events: EventPublisher) -> None:
    """Take a worker whose weights are unknown out of routing, then end it.

    Its engine stays paused, so no stream gets a token of a mixture; the streams
    end in an error, which lets Dynamo migrate them.
    """
    await endpoint.unregister_endpoint_instance()
    await asyncio.sleep(FENCE_SECONDS)
    events.close()
    os._exit(1)
