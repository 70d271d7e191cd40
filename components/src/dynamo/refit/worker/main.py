# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Stock dynamo.vllm with a refit agent beside its engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn

import psutil
from dynamo.common.utils import graceful_shutdown
from dynamo.runtime import DistributedRuntime, Endpoint
from dynamo.vllm.main import main as dynamo_vllm
from dynamo.vllm.main import shutdown_endpoints

from dynamo.refit import tracing
from dynamo.refit.errors import Failure, RefitError, failure_from
from dynamo.refit.events import REFIT_EVENTS
from dynamo.refit.metrics import WorkerMetrics, export
from dynamo.refit.presence import LastingPublisher
from dynamo.refit.protocol import GetStatus, WorkerRequest
from dynamo.refit.rank.memory import STAGING_VARIABLE
from dynamo.refit.rank.start_failure import START_FAILURE_VARIABLE, take_failure
from dynamo.refit.rank.supported import check_settings, settings_of_config
from dynamo.refit.rpc import Caller, serve, unary
from dynamo.refit.worker.agent import RefitAgent
from dynamo.refit.worker.args import Options, graph_namespace, take_own_arguments
from dynamo.refit.worker.engine import RefitEngine
from dynamo.refit.worker.engine_process import mark_changes
from dynamo.refit.worker.hook import (
    Registration,
    on_arguments,
    on_engine_config,
    on_user_taints,
    on_worker_ready,
)
from dynamo.refit.worker.ranks import RanksFailed
from dynamo.refit.worker.routing import WorkerRouting
from dynamo.refit.worker.supported import check_arguments
from dynamo.refit.worker.telemetry import WorkerTelemetry

logger = logging.getLogger(__name__)

EXTENSION = "dynamo.refit.rank.extension.RefitWorkerExtension"

#: Time for the last events of a fenced worker to leave.
FENCE_SECONDS = 1.0

#: Dynamo's: endpoints whose health makes the process healthy, instead of all.
HEALTHY_ENDPOINTS = "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS"

_tasks: set[asyncio.Task] = set()

_exit = os._exit


def main() -> None:
    """Run ``dynamo.vllm`` with its own arguments and a refit agent."""
    options = take_own_arguments()
    # The rank processes reckon with it before the agent talks to them.
    os.environ[STAGING_VARIABLE] = options.staging
    if not any(arg.startswith("--worker-extension-cls") for arg in sys.argv):
        sys.argv += ["--worker-extension-cls", EXTENSION]
    if options.admission == "coordinator":
        _be_healthy_before_admission()
    on_arguments(check_arguments)
    on_engine_config(lambda config: check_settings(settings_of_config(config)))
    mark_changes()
    on_worker_ready(functools.partial(_start_agent, options))
    start_failure = Path(tempfile.gettempdir(), f"refit-start-{uuid.uuid4().hex}")
    os.environ[START_FAILURE_VARIABLE] = str(start_failure)
    # Dynamo ends a worker so whose engine is dead. EngineCore would outlive it: freeing
    # its sockets at the end, it may wait for them for ever (vllm 0.31).
    os._exit = _end
    try:
        dynamo_vllm()
    except RefitError as error:
        _refuse(error)
    except Exception:
        failure = take_failure(start_failure)
        if failure is None:
            raise
        _end_with(failure)


def _be_healthy_before_admission() -> None:
    """Let a worker that waits be ready on Kubernetes, where only ready pods are found.

    Dynamo takes the health of all endpoints that have a health check, as ``refit`` has
    from the start and ``generate`` from the admission on; unless it is told which.
    """
    if "generate" in os.environ.get(HEALTHY_ENDPOINTS, ""):
        logger.info("%s is not used: the admission comes first", HEALTHY_ENDPOINTS)
        del os.environ[HEALTHY_ENDPOINTS]


def _start_agent(
    options: Options,
    runtime: DistributedRuntime,
    generate_endpoint: Endpoint,
    handler: Any,
) -> Registration:
    config = handler.config
    worker = generate_endpoint.connection_id()
    tracer = tracing.from_environment()
    engine = RefitEngine(handler, worker, tracer)
    namespace = graph_namespace(config.namespace)
    topic = runtime.endpoint(f"{namespace}.refit.{REFIT_EVENTS}")
    events = LastingPublisher(topic, f"worker-{worker}", model=_model(config))
    commands = runtime.endpoint(f"{namespace}.{config.component}.refit")
    routing = WorkerRouting(
        runtime,
        generate_endpoint,
        commands,
        others=shutdown_endpoints,
        admission=options.admission,
        # The sleep route holds the lock from before it leaves routing.
        asleep=lambda: engine.asleep or engine.admin_lock.locked(),
        stopping=graceful_shutdown._shutdown_started,
        put_back=events.renew,
    )
    on_user_taints(routing.set_user_taints)
    _start(
        _run_agent(options, runtime, commands, engine, routing, events, tracer, config)
    )
    return routing.register


def _start(run: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(run)
    _tasks.add(task)
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task) -> None:
    _tasks.discard(task)
    if not task.cancelled() and task.exception() is not None:
        # A worker that was started to be refitted and cannot be is of no use. Dynamo's
        # log shows CRITICAL as INFO.
        logger.error("the refit agent ended", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _run_agent(
    options: Options,
    runtime: DistributedRuntime,
    commands: Endpoint,
    engine: RefitEngine,
    routing: WorkerRouting,
    events: LastingPublisher,
    tracer: tracing.Tracer,
    config: Any,
) -> None:
    await events.start()
    worker = commands.connection_id()
    metrics = WorkerMetrics()
    namespace = graph_namespace(config.namespace)
    export(metrics.registry, commands, f"{namespace}.{config.component}.refit")
    telemetry = WorkerTelemetry(metrics, tracer, worker)
    agent = RefitAgent(
        engine,
        Caller(runtime),
        telemetry.publishing(events.publish),
        routing,
        lambda: _start(_leave(routing, events, tracer)),
        model=_model(config),
        worker=worker,
        staging=options.staging,
    )
    try:
        try:
            await agent.start()
        except RefitError as error:
            events.close()
            _refuse(error)
        routing.open()
        _start(routing.watch())
        await serve(
            commands,
            unary(WorkerRequest, telemetry.answering(agent.answer), "worker"),
            health_check=GetStatus(),
        )
    finally:
        events.close()


async def _leave(
    routing: WorkerRouting, events: LastingPublisher, tracer: tracing.Tracer
) -> None:
    """Take a worker whose weights are unknown out of routing, then end it.

    Its engine stays paused, so no stream gets a token of a mixture; the streams
    end in an error, which lets Dynamo migrate them.
    """
    try:
        await routing.fence()
        await asyncio.sleep(FENCE_SECONDS)
        events.close()
        await tracer.close()
    finally:
        _end()


def _refuse(error: RefitError) -> NoReturn:
    """End a worker that cannot be refitted, before it serves anybody."""
    if isinstance(error, RanksFailed):
        _end_with(error.failure)
    _end_with(failure_from(error, stage="start"))


def _end_with(failure: Failure) -> NoReturn:
    """End this process; the failure is the last line of its log."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # What it would say of its end, or vLLM of it, comes no more.
            child.suspend()
    # Dynamo's log shows CRITICAL as INFO.
    logger.error("dynamo-refit: %s", failure.line())
    logging.disable()
    _end()


def _end(status: int = 1) -> NoReturn:
    """End this process at once, and all that it has started."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    _exit(status)


def _model(config: Any) -> str:
    """The served model's name, as in requests and in what a trainer announces."""
    return config.served_model_name or config.model
