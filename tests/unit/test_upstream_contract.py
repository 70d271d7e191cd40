# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What is used of Dynamo and vLLM beyond their public API, by name.

When one of these fails after an upgrade, upstream has moved something: the file
that is named in the test is the one to change. Imports only; no engine is started.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.metadata
import inspect
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

stand_in_if_missing()

from dynamo.common import model_taints  # noqa: E402
from dynamo.common.utils import graceful_shutdown  # noqa: E402
from dynamo.runtime import Endpoint  # noqa: E402
from dynamo.vllm import handlers, worker_factory  # noqa: E402
from dynamo.vllm import main as vllm_main  # noqa: E402
from dynamo.vllm.handlers import (  # noqa: E402
    BaseWorkerHandler,
    DecodeWorkerHandler,
    PrefillWorkerHandler,
)
from dynamo.vllm.worker_factory import WorkerFactory  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from vllm.config import LoadConfig, ModelConfig, ParallelConfig  # noqa: E402
from vllm.distributed.kv_events import BlockStored  # noqa: E402
from vllm.model_executor.layers import utils as gemm  # noqa: E402
from vllm.model_executor.layers.fused_moe.experts import cpu_moe  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # noqa: E402
    UnquantizedMoeBackend,
    backend_to_kernel_cls,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    UnquantizedEmbeddingMethod,
)
from vllm.model_executor.model_loader.default_loader import (  # noqa: E402
    DefaultModelLoader,
)
from vllm.model_executor.model_loader.reload import layerwise  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest  # noqa: E402
from vllm.v1.engine import utils as engine_utils  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402
from vllm.v1.engine.core import EngineCore, EngineCoreProc  # noqa: E402
from vllm.v1.engine.core_client import AsyncMPClient  # noqa: E402
from vllm.v1.engine.output_processor import OutputProcessor  # noqa: E402
from vllm.v1.executor import Executor  # noqa: E402
from vllm.v1.executor.multiproc_executor import (  # noqa: E402
    MultiprocExecutor,
    WorkerProc,
)
from vllm.v1.executor.uniproc_executor import UniProcExecutor  # noqa: E402
from vllm.v1.worker import worker_base  # noqa: E402

from dynamo.refit.rank import cpu_layout  # noqa: E402
from dynamo.refit.rank.extension import RefitWorkerExtension  # noqa: E402
from dynamo.refit.rank.twin import ONLINE_LOADER  # noqa: E402
from dynamo.refit.worker.hook import on_user_taints, on_worker_ready  # noqa: E402
from dynamo.refit.worker.main import EXTENSION  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def tree(code: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(code)))


def assigned_to_self(method: Any) -> set[str]:
    """The attributes of ``self`` that a method sets."""
    return {
        node.attr
        for node in ast.walk(tree(method))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def calls_of(name: str, code: Any) -> list[ast.Call]:
    """The calls of a method or function called ``name`` in ``code``."""
    return [
        node
        for node in ast.walk(tree(code))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", None)) == name
    ]


# --- dynamo.vllm: worker/hook.py ----------------------------------------------


def test_the_hooked_method_has_these_parameters() -> None:
    signature = inspect.signature(WorkerFactory.register_engine_routes)
    assert list(signature.parameters) == [
        "self",
        "runtime",
        "generate_endpoint",
        "handler",
        "lora_enabled",
    ]
    assert signature.parameters["lora_enabled"].default is False
    assert not inspect.iscoroutinefunction(WorkerFactory.register_engine_routes)


@pytest.mark.parametrize("path", ["_run_decode_worker", "_run_prefill_worker"])
def test_both_kinds_of_worker_come_through_the_hook(path: str) -> None:
    method = getattr(WorkerFactory, path)
    # On the event loop, where the agent's task is created.
    assert inspect.iscoroutinefunction(method)
    assert len(calls_of("register_engine_routes", method)) == 1


@pytest.mark.parametrize("path", ["_run_decode_worker", "_run_prefill_worker"])
def test_the_hook_comes_before_the_model_is_registered(path: str) -> None:
    method = getattr(WorkerFactory, path)
    [hooked] = calls_of("register_engine_routes", method)
    registering = [
        node
        for node in ast.walk(tree(method))
        if isinstance(node, ast.Call)
        and "register_vllm_model" in ast.unparse(node.func)
    ]
    assert registering
    assert all(hooked.lineno < call.lineno for call in registering)


@pytest.mark.parametrize("path", ["_run_decode_worker", "_run_prefill_worker"])
def test_the_model_is_registered_and_then_everything_is_served(path: str) -> None:
    """So a registration that waits keeps all of it out of discovery."""
    method = getattr(WorkerFactory, path)
    [registering] = calls_of("register_vllm_model", method)
    assert ast.unparse(registering.func) == "self.register_vllm_model"
    assert f"await {ast.unparse(registering)}" in ast.unparse(tree(method))
    assert "register_vllm_model" in assigned_to_self(WorkerFactory.__init__)
    serving = calls_of("serve_endpoint", method)
    served = {ast.unparse(call.func.value) for call in serving}
    assert {"generate_endpoint", "clear_endpoint", "perf_endpoint"} <= served
    assert all(registering.lineno < call.lineno for call in serving)


def test_arguments_are_parsed_before_anything_is_fetched() -> None:
    source = ast.unparse(tree(vllm_main.worker))
    parsed = source.index("config = await parse_args_with_model_fetch(argv)")
    for later in ("fetch_model(config.model)", "prepare_snapshot_engine(", "create("):
        assert parsed < source.index(later)
    assert parameters(vllm_main.parse_args_with_model_fetch) == ["argv"]


def test_an_engine_is_made_of_its_final_configuration() -> None:
    source = ast.unparse(tree(vllm_main.setup_vllm_engine))
    made = source.index("AsyncLLM.from_vllm_config(vllm_config=vllm_config,")
    for earlier in ("configure_multimodal_embedding_cache(", "create_engine_config("):
        assert source.index(earlier) < made
    assert parameters(AsyncLLM.from_vllm_config)[0] == "vllm_config"


def test_every_kind_of_worker_registers_a_model_through_the_two_modules() -> None:
    """Those in which worker/hook.py lets nobody register one without an agent."""
    kinds = [name for name in vars(WorkerFactory) if name.startswith("_create_")]
    assert len(kinds) == 6
    for kind in kinds:
        source = ast.unparse(tree(getattr(WorkerFactory, kind)))
        if kind in ("_create_decode_worker", "_create_prefill_worker"):
            assert "self._run_" in source
        else:
            assert "register_vllm_model(" in source or "await register_model(" in source
    assert "await register_model(" in ast.unparse(tree(vllm_main.register_vllm_model))
    for module in (vllm_main, worker_factory):
        assert callable(module.register_model)


def test_what_a_worker_serves_is_listed_before_it_is_registered() -> None:
    """The list is read when a worker that stalled is put back."""
    assert isinstance(vllm_main.shutdown_endpoints, list)
    [creating] = calls_of("create", vllm_main.worker)
    assert "shutdown_endpoints" in map(ast.unparse, creating.args)
    for path in ("_run_decode_worker", "_run_prefill_worker"):
        source = ast.unparse(tree(getattr(WorkerFactory, path)))
        listed = source.index("shutdown_endpoints[:] = [generate_endpoint,")
        assert listed < source.index("self.register_vllm_model(")


@pytest.mark.parametrize("by_name", [False, True])
async def test_the_hook_wraps_and_calls_back(
    monkeypatch: pytest.MonkeyPatch, by_name: bool
) -> None:
    calls: list[Any] = []

    def original(
        self: Any,
        runtime: Any,
        generate_endpoint: Any,
        handler: Any,
        lora_enabled: bool = False,
    ) -> None:
        """Upstream's."""
        calls.append((self, runtime, generate_endpoint, handler, lora_enabled))

    async def register(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    async def registration(register: Any) -> None:
        calls.append("admitted")
        await register()

    def callback(*seen: Any) -> Any:
        calls.append(seen)
        return registration

    # Also puts the real one back afterwards.
    monkeypatch.setattr(WorkerFactory, "register_engine_routes", original)
    for module in (vllm_main, worker_factory):
        monkeypatch.setattr(module, "register_model", module.register_model)
    on_worker_ready(callback)
    hooked = WorkerFactory.register_engine_routes
    assert (hooked.__name__, hooked.__doc__) == ("original", "Upstream's.")

    factory = object.__new__(WorkerFactory)
    factory.register_vllm_model = register
    if by_name:
        factory.register_engine_routes(
            runtime="runtime",
            generate_endpoint="endpoint",
            handler="handler",
            lora_enabled=True,
        )
    else:
        factory.register_engine_routes("runtime", "endpoint", "handler", True)
    await factory.register_vllm_model("tokens", needs=[])
    assert calls == [
        (factory, "runtime", "endpoint", "handler", True),
        ("runtime", "endpoint", "handler"),
        "admitted",
        (("tokens",), {"needs": []}),
    ]


def test_the_hook_does_not_call_back_when_upstream_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def original(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("routes")

    monkeypatch.setattr(WorkerFactory, "register_engine_routes", original)
    on_worker_ready(lambda *seen: pytest.fail("called back"))
    with pytest.raises(RuntimeError, match="routes"):
        object.__new__(WorkerFactory).register_engine_routes(1, 2, 3)


# --- Dynamo: worker/routing.py --------------------------------------------------


async def test_the_taints_route_goes_through_the_hook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Also puts the real one back afterwards.
    monkeypatch.setattr(
        model_taints, "update_model_taints", model_taints.update_model_taints
    )
    written: list[Any] = []

    async def merged(endpoint: Any, taints: set[str]) -> None:
        written.append((endpoint, taints))

    on_user_taints(merged)
    routes: dict[str, Any] = {}
    runtime = SimpleNamespace(register_engine_route=routes.__setitem__)
    model_taints.register_model_taint_route(runtime, "endpoint")
    [(name, route)] = routes.items()
    assert name == "update/model_taints"
    assert (await route({"taints": ["a", "b", "a"]}))["status"] == "ok"
    assert written == [("endpoint", {"a", "b"})]


def test_dynamo_vllm_writes_no_taints_besides_that_route() -> None:
    """What the user wants is what came through it; nothing is read back."""
    package = Path(inspect.getfile(WorkerFactory)).parent
    # Its multimodal twin in omni/ is another program.
    sources = list(package.glob("*.py"))
    assert len(sources) > 20
    naming = [path.name for path in sources if "taints" in path.read_text()]
    assert naming == ["worker_factory.py"]
    routes = ast.unparse(tree(WorkerFactory.register_engine_routes))
    assert "register_model_taint_route(runtime, generate_endpoint)" in routes


def test_an_ending_process_says_so_first() -> None:
    """A worker that waits for its admission ends at once, and none is put back."""
    assert isinstance(graceful_shutdown._shutdown_started, asyncio.Event)
    ending = ast.unparse(tree(graceful_shutdown.graceful_shutdown_with_discovery))
    started = ending.index("_shutdown_started.set()")
    assert started < ending.index("await _unregister_endpoints(")


def test_sleep_holds_the_lock_from_before_it_leaves_routing() -> None:
    """So that a sleeping worker is not taken for a lost one."""
    for method in (BaseWorkerHandler.sleep, BaseWorkerHandler.wake_up):
        source = ast.unparse(tree(method))
        locked = source.index("async with self._pause_lock:")
        assert locked < source.index("self.generate_endpoint.")


# --- dynamo.vllm: worker/engine.py, worker/main.py ----------------------------


def test_the_handler_has_what_an_engine_takes_from_it() -> None:
    attributes = assigned_to_self(BaseWorkerHandler.__init__)
    used = {"_pause_lock", "_paused", "_pause_controller", "engine_client", "config"}
    assert used <= attributes


@pytest.mark.parametrize(
    ("route", "held"), [("pause_generation", True), ("resume_generation", False)]
)
async def test_the_admin_routes_use_the_lock_and_the_flag(
    route: str, held: bool
) -> None:
    """Run upstream's route: it waits for the lock, and then sets the flag."""

    async def done(**_: Any) -> None:
        return None

    handler = SimpleNamespace(
        _pause_lock=asyncio.Lock(),
        _paused=not held,
        _lora_state=SimpleNamespace(active_requests={}),
        engine_client=SimpleNamespace(pause_generation=done, resume_generation=done),
    )
    async with handler._pause_lock:
        calling = asyncio.create_task(getattr(BaseWorkerHandler, route)(handler, {}))
        for _ in range(5):
            await asyncio.sleep(0)
        assert handler._paused is not held
    assert (await calling)["status"] == "ok"
    assert handler._paused is held


async def test_declaring_a_version_takes_no_lock_and_needs_no_pause() -> None:
    """The agent holds the lock when it declares: it must not be taken again."""
    handler = SimpleNamespace(_weight_version=None, _pause_lock=asyncio.Lock())
    async with handler._pause_lock, asyncio.timeout(5):
        reply = await BaseWorkerHandler.set_weight_version(
            handler, {"weight_version": 5}
        )
    assert reply["status"] == "ok"
    assert handler._weight_version == 5


@pytest.mark.parametrize("path", ["_run_decode_worker", "_run_prefill_worker"])
def test_the_handler_s_generate_is_taken_when_it_is_served(path: str) -> None:
    """After the hook has put one in its place that counts."""
    assert "generate_endpoint.serve_endpoint(handler.generate," in ast.unparse(
        tree(getattr(WorkerFactory, path))
    )
    for handler in (DecodeWorkerHandler, PrefillWorkerHandler):
        assert parameters(handler.generate) == ["self", "request", "context"]
        assert inspect.isasyncgenfunction(handler.generate)


def test_the_handlers_generate_through_the_engine_client() -> None:
    """So that every prefill passes the wrapper that tells its version."""
    module = inspect.getmodule(BaseWorkerHandler)
    calls = [
        call
        for call in calls_of("generate", module)
        if ast.unparse(call.func) == "self.engine_client.generate"
    ]
    assert len(calls) >= 3
    assert {ast.unparse(call.args[0]) for call in calls} == {"prompt"}


def test_an_endpoint_can_be_taken_out_of_routing() -> None:
    for name in (
        "unregister_endpoint_instance",
        "register_endpoint_instance",
        "connection_id",
        "serve_endpoint",
        "client",
    ):
        assert callable(getattr(Endpoint, name))


# --- vLLM's engine: worker/engine.py ------------------------------------------


def test_the_engine_s_methods() -> None:
    assert parameters(AsyncLLM.generate)[:4] == [
        "self",
        "prompt",
        "sampling_params",
        "request_id",
    ]
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert parameters(AsyncLLM.collective_rpc)[:4] == [
        "self",
        "method",
        "timeout",
        "args",
    ]
    assert parameters(AsyncLLM.update_weight_version) == ["self", "new_version"]
    assert parameters(AsyncLLM.reset_encoder_cache) == ["self"]
    for name in ("collective_rpc", "update_weight_version", "reset_encoder_cache"):
        assert inspect.iscoroutinefunction(getattr(AsyncLLM, name))
    assert {"engine_core", "model_config", "vllm_config"} <= assigned_to_self(
        AsyncLLM.__init__
    )
    assert isinstance(ModelConfig.is_multimodal_model, property)


def test_every_request_is_sent_through_the_core_client() -> None:
    """Where its salt gets the epoch, after all that takes time."""
    assert parameters(AsyncMPClient.add_request_async) == ["self", "request"]
    assert inspect.iscoroutinefunction(AsyncMPClient.add_request_async)
    sending = calls_of("add_request_async", inspect.getmodule(AsyncLLM))
    assert len(sending) == 3
    assert {ast.unparse(c.func) for c in sending} == {
        "self.engine_core.add_request_async"
    }
    adding = ast.unparse(tree(AsyncLLM.add_request))
    assert adding.index("process_inputs_async(") < adding.index("self._add_request(")
    assert {"cache_salt", "external_req_id", "sampling_params"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert not EngineCoreRequest.__struct_config__.frozen


def test_a_utility_call_reaches_a_method_of_the_engine_by_its_name() -> None:
    """``refit_change`` of worker/engine_process.py is one."""
    assert parameters(AsyncMPClient.call_utility_async) == ["self", "method", "args"]
    assert "client_index" in assigned_to_self(AsyncMPClient.__init__)
    handling = ast.unparse(tree(EngineCoreProc._handle_client_request))
    assert "getattr(self, method_name)" in handling


# --- vLLM's engine process: worker/engine_process.py and token_versions.py --------


def test_the_engine_s_process_is_started_by_a_function_that_can_be_replaced() -> None:
    """And it finds the engine's class by its name."""
    assert isinstance(EngineCoreProc.__dict__["run_engine_core"], staticmethod)
    started = inspect.getsource(engine_utils)
    assert "target=EngineCoreProc.run_engine_core," in started
    made = calls_of("EngineCoreProc", EngineCoreProc.run_engine_core)
    assert [call.func.id for call in made] == ["EngineCoreProc"]


def test_outputs_are_on_their_way_before_the_hook_after_a_step() -> None:
    step = ast.unparse(tree(EngineCoreProc._process_engine_step))
    assert step.index("self.output_queue.put_nowait(output)") < step.index(
        "self.post_step(model_executed)"
    )
    for engine in (EngineCore, EngineCoreProc):
        assert parameters(engine.post_step) == ["self", "model_executed"]
    assert EngineCoreProc.post_step is EngineCore.post_step


def test_what_is_scheduled_ahead_is_queued_the_newest_first() -> None:
    stepping = ast.unparse(tree(EngineCore.step_with_batch_queue))
    assert stepping.count("batch_queue.appendleft(") == 2
    assert stepping.count("batch_queue.pop()") == 1
    assert "bool(self.batch_queue)" in ast.unparse(tree(EngineCoreProc.has_work))


def test_every_output_passes_the_output_processor_in_order() -> None:
    """Looked up at each call; an output of a request that it does not know is none."""
    calls = calls_of("process_outputs", AsyncLLM._run_output_handler)
    assert [ast.unparse(call.func) for call in calls] == [
        "output_processor.process_outputs"
    ]
    processor = OutputProcessor(None, log_stats=False)
    made = processor.process_outputs([EngineCoreOutput("nobody", [1])])
    assert (made.request_outputs, made.reqs_to_abort) == ([], [])


def test_the_output_processor_has_a_request_before_the_engine_has_it() -> None:
    adding = ast.unparse(tree(AsyncLLM._add_request))
    assert adding.index("output_processor.add_request(") < adding.index(
        "engine_core.add_request_async("
    )
    between = adding[: adding.index("engine_core.add_request_async(")]
    assert between.count("await ") == 1


def test_the_handlers_outputs() -> None:
    """Token ids of each choice since its last output; a prefill's says where KV is."""
    source = inspect.getsource(BaseWorkerHandler.generate_tokens)
    assert '"index": output_idx' in source
    assert '"token_ids": token_ids' in source
    assert handlers._DELTA_REQUEST_OUTPUT_KIND == RequestOutputKind.DELTA
    built = inspect.getsource(handlers.build_sampling_params)
    assert "output_kind = _DELTA_REQUEST_OUTPUT_KIND" in built
    prefill = inspect.getsource(PrefillWorkerHandler._generate_token_mode)
    assert '"disaggregated_params":' in prefill
    assert "request_id = context.id()" in inspect.getsource(
        DecodeWorkerHandler.generate
    )


def test_the_scheduler_is_paused_and_resumed_through_the_core_client() -> None:
    assert parameters(AsyncMPClient.pause_scheduler_async) == [
        "self",
        "mode",
        "clear_cache",
    ]
    assert parameters(AsyncMPClient.resume_scheduler_async) == ["self"]
    assert inspect.iscoroutinefunction(AsyncMPClient.pause_scheduler_async)
    assert inspect.iscoroutinefunction(AsyncMPClient.resume_scheduler_async)
    [paused] = calls_of("call_utility_async", AsyncMPClient.pause_scheduler_async)
    assert [ast.unparse(argument) for argument in paused.args] == [
        "'pause_scheduler'",
        "mode",
        "clear_cache",
    ]


def test_a_prompt_s_salt_is_part_of_its_prefix_cache_keys() -> None:
    cache = importlib.import_module("vllm.v1.core.kv_cache_utils")
    extra_keys = inspect.getsource(cache.generate_block_hash_extra_keys)
    assert "cache_salt" in extra_keys


def test_the_scheduler_s_kv_events_all_go_through_its_publisher() -> None:
    """What worker/kv_epoch.py wraps, looked up at each step."""
    source = inspect.getsource(Scheduler)
    assert source.count("self.kv_event_publisher.publish(batch)") == 1
    assert source.count("self.kv_event_publisher = EventPublisherFactory.create(") == 1
    assert {"block_hashes", "extra_keys"} <= set(BlockStored.__struct_fields__)
    assert not BlockStored.__struct_config__.frozen


# --- vLLM's executors: worker/engine.py, rank/extension.py, an install in step ----


@pytest.mark.parametrize(
    ("backend", "executor"), [("uni", UniProcExecutor), ("mp", MultiprocExecutor)]
)
def test_the_backends_that_reach_all_ranks_in_one_order(
    backend: str, executor: type
) -> None:
    """The config that an engine has says which one it runs on."""
    assert "distributed_executor_backend" in ParallelConfig.__dataclass_fields__
    source = inspect.getsource(Executor.get_class)
    assert f"== '{backend}'" in source.replace('"', "'")
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    config = SimpleNamespace(parallel_config=parallel)
    assert Executor.get_class(config) is executor


def test_a_config_names_its_backend_once_it_is_made() -> None:
    made = ParallelConfig(distributed_executor_backend="mp", tensor_parallel_size=2)
    assert made.distributed_executor_backend == "mp"
    assert ParallelConfig().distributed_executor_backend == "uni"


@pytest.mark.parametrize("step", ["execute_model", "sample_tokens"])
def test_steps_and_calls_go_to_the_ranks_through_one_queue(step: str) -> None:
    """So every rank carries out a call after the same step, before the same next."""
    [call] = calls_of("collective_rpc", getattr(MultiprocExecutor, step))
    assert ast.unparse(call.args[0]) == f"'{step}'"
    [sent] = calls_of("enqueue", MultiprocExecutor.collective_rpc)
    assert ast.unparse(sent.func) == "self.rpc_broadcast_mq.enqueue"


def test_a_rank_takes_from_that_queue_one_after_the_other() -> None:
    [loop] = [
        n
        for n in ast.walk(tree(WorkerProc.worker_busy_loop))
        if n.__class__ is ast.While
    ]
    assert ast.unparse(loop.body[-1]) == (
        "self._execute_worker_rpc(self.rpc_broadcast_mq.dequeue(indefinite=True))"
    )
    assert len(loop.body) == 1
    execute = inspect.getsource(WorkerProc._execute_worker_rpc)
    assert "output = func(*args, **kwargs)" in execute


def test_calls_are_made_between_steps_by_the_thread_that_makes_them() -> None:
    # In the class's source: the method itself is wrapped.
    [core] = tree(EngineCoreProc).body
    loop = ast.unparse(definitions(core, ast.FunctionDef)["run_busy_loop"])
    handled = loop.index("self._process_input_queue()")
    assert handled < loop.index("self._process_engine_step()")
    assert "_handle_client_request" in inspect.getsource(
        EngineCoreProc._process_input_queue
    )
    [call] = calls_of("collective_rpc", EngineCore.collective_rpc)
    assert ast.unparse(call.func) == "self.model_executor.collective_rpc"


def test_ranks_can_agree_on_the_cpu() -> None:
    state = importlib.import_module("vllm.distributed.parallel_state")
    assert "cpu_group" in assigned_to_self(state.GroupCoordinator.__init__)
    assert "cpu_group" in state.GroupCoordinator.__annotations__
    assert callable(state.get_tp_group)


def test_a_rank_that_ends_ends_the_engine() -> None:
    """Nothing is generated after that: the executor fails, then the engine core."""
    monitor = inspect.getsource(MultiprocExecutor.start_worker_monitor)
    assert "multiprocessing.connection.wait(sentinels)" in monitor
    assert monitor.index("_self.is_failed = True") < monitor.index("_self.shutdown()")
    assert "callback()" in monitor
    refused = inspect.getsource(MultiprocExecutor.collective_rpc)
    assert refused.index("self.is_failed") < refused.index("rpc_broadcast_mq.enqueue")
    handled = inspect.getsource(EngineCoreProc._handle_client_request)
    assert "EngineCoreRequestType.EXECUTOR_FAILED" in handled
    assert "raise RuntimeError('Executor failed.')" in handled.replace('"', "'")


# --- vLLM's workers: rank/extension.py -----------------------------------------


def extension_names() -> list[str]:
    return [name for name in dir(RefitWorkerExtension) if not name.startswith("__")]


def test_the_extension_is_where_the_engine_is_told_that_it_is() -> None:
    module, name = EXTENSION.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name) is RefitWorkerExtension
    assert "refit_call" in extension_names()
    assert "worker_extension_cls" in ParallelConfig.__dataclass_fields__


@pytest.fixture(params=["cpu_worker.CPUWorker", "gpu_worker.Worker"])
def worker(request: pytest.FixtureRequest) -> type:
    """A worker class of vLLM that imports here."""
    module, name = request.param.split(".")
    path = f"vllm.v1.worker.{module}"
    return getattr(pytest.importorskip(path, exc_type=ImportError), name)


def test_the_extension_s_names_are_free_in_vllm_s_workers(worker: type) -> None:
    """vLLM refuses an extension that has an attribute of the worker's."""
    assert sorted(set(dir(worker)).intersection(extension_names())) == []


def test_a_worker_keeps_no_attribute_where_the_extension_keeps_its_own(
    worker: type,
) -> None:
    own = assigned_to_self(RefitWorkerExtension._refit_rank)
    assert own == {"_refit"}
    # What it keeps of the time before the KV cache.
    own.add(importlib.import_module("dynamo.refit.rank.reserve")._FORM)
    for parent in worker.__mro__[:-1]:
        set_there = {
            node.attr
            for node in ast.walk(tree(parent))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        assert not set_there & (own | set(extension_names())), parent


def test_vllm_mixes_the_extension_into_the_worker_s_class() -> None:
    source = inspect.getsource(worker_base.WorkerWrapperBase.init_worker)
    assert "worker_extension_cls" in source
    assert "__bases__" in source


def test_a_rank_reaches_its_model_and_its_config() -> None:
    assert {"vllm_config", "parallel_config"} <= assigned_to_self(
        worker_base.WorkerBase.__init__
    )
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        assert name in ParallelConfig.__dataclass_fields__
    runner = importlib.import_module("vllm.v1.worker.gpu_model_runner")
    assert parameters(runner.GPUModelRunner.get_model) == ["self"]


def test_a_gpu_rank_says_itself_how_many_bytes_the_cache_may_have() -> None:
    """What rank/reserve.py makes smaller, on GPUs only."""
    reserve = importlib.import_module("dynamo.refit.rank.reserve")
    assert parameters(reserve._determine_available_memory) == ["self"]
    cuda = current_platform.is_cuda()
    asked = reserve.Worker.determine_available_memory
    assert (asked is reserve.determine_with_staging) is cuda
    source = inspect.getsource(reserve._determine_available_memory)
    assert "self.cache_config.kv_cache_memory_bytes" in source
    for executor in (MultiprocExecutor, UniProcExecutor):
        source = inspect.getsource(executor.determine_available_memory)
        assert 'collective_rpc("determine_available_memory")' in source


# --- vLLM's CPU build: rank/cpu_layout.py --------------------------------------
# In the source, since importing the extension has replaced what is looked at here.


def definitions(code: Any, kind: type) -> dict[str, Any]:
    """The functions or classes that a module or class defines, as they are written."""
    body = code.body if isinstance(code, ast.ClassDef) else tree(code).body
    return {node.name: node for node in body if isinstance(node, kind)}


def arguments(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def test_one_function_decides_how_a_cpu_computes_with_a_matrix() -> None:
    function = definitions(gemm, ast.FunctionDef)["dispatch_cpu_unquantized_gemm"]
    assert arguments(function) == ["layer", "remove_weight"]
    # What it decides on is called with the weight that the layer has then.
    call = definitions(gemm, ast.FunctionDef)["cpu_unquantized_gemm"]
    assert ast.unparse(call.body[-1]) == "return layer.cpu_linear(x, weight, bias)"


@pytest.mark.parametrize(
    "method", [UnquantizedLinearMethod, UnquantizedEmbeddingMethod]
)
def test_that_function_is_looked_up_when_weights_have_been_loaded(method: type) -> None:
    """So that replacing it in its module is enough."""
    processing = method.process_weights_after_loading
    [imported] = [
        n for n in ast.walk(tree(processing)) if isinstance(n, ast.ImportFrom)
    ]
    assert imported.module == gemm.__name__
    assert [name.name for name in imported.names] == ["dispatch_cpu_unquantized_gemm"]
    assert len(calls_of("dispatch_cpu_unquantized_gemm", processing)) == 1


def test_experts_are_packed_in_one_method_and_used_in_another() -> None:
    classes = definitions(cpu_moe, ast.ClassDef)
    methods = definitions(classes["CPUUnquantizedExperts"], ast.FunctionDef)
    process, apply = methods["process_weights_after_loading"], methods["apply"]
    assert arguments(process) == ["self", "layer"]
    assert arguments(apply)[:5] == ["self", "output", "hidden_states", "w1", "w2"]
    # Everything that is done to the weights is done in the replacement, too.
    assert [ast.unparse(statement) for statement in process.body] == [
        "self._use_zentorch = is_zentorch_moe_supported(layer)",
        "if self._use_zentorch:\n    return",
        "self._pad_moe_intermediate(layer)",
        "replace_parameter(layer, 'w13_weight', "
        "cpu_prepack_moe_weight(layer.w13_weight, self.isa))",
        "replace_parameter(layer, 'w2_weight', "
        "cpu_prepack_moe_weight(layer.w2_weight, self.isa))",
    ]


def test_the_experts_of_every_kind_of_cpu_inherit_both() -> None:
    kinds = [
        node
        for node in definitions(cpu_moe, ast.ClassDef).values()
        if "CPUUnquantizedExperts" in [ast.unparse(base) for base in node.bases]
    ]
    assert len(kinds) >= 3
    replaced = {"process_weights_after_loading", "apply"}
    for kind in kinds:
        assert not replaced & definitions(kind, ast.FunctionDef).keys(), kind.name
    assert {c.__name__ for c in backend_to_kernel_cls(UnquantizedMoeBackend.CPU)} == {
        "CPUUnquantizedExperts",
        *(kind.name for kind in kinds),
    }


def test_importing_the_extension_has_replaced_them_on_a_cpu() -> None:
    if not current_platform.is_cpu():
        pytest.skip("another platform keeps its layout")
    experts = cpu_moe.CPUUnquantizedExperts
    assert gemm.dispatch_cpu_unquantized_gemm is cpu_layout.dispatch_plain
    assert experts.process_weights_after_loading is cpu_layout.keep_experts
    assert experts.apply is cpu_layout.apply_plain_experts


# --- vLLM's processing after a load: rank/runtime_layout.py, processing.py, twin.py


def test_every_layer_is_processed_by_its_quantization_method_and_by_nothing_else() -> (
    None
):
    """What ``processing`` does to a copy of a layer is all that a load does to one."""
    loader = importlib.import_module("vllm.model_executor.model_loader.utils")
    process = loader.process_weights_after_loading
    source = inspect.getsource(process)
    assert 'getattr(module, "quant_method", None)' in source
    assert "isinstance(quant_method, QuantizeMethodBase)" in source
    hooks = calls_of("process_weights_after_loading", process)
    assert {ast.unparse(call) for call in hooks} <= {
        "quant_method.process_weights_after_loading(module)",
        "module.process_weights_after_loading(model_config.dtype)",
        # A model's own, which is refused by name.
        "model.process_weights_after_loading()",
    }


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        ("linear", "UnquantizedLinearMethod"),
        ("vocab_parallel_embedding", "UnquantizedEmbeddingMethod"),
    ],
)
def test_unquantized_layers_are_left_alone_except_on_some_platforms(
    layers: str, kind: str
) -> None:
    module = importlib.import_module(f"vllm.model_executor.layers.{layers}")
    [function] = tree(getattr(module, kind).process_weights_after_loading).body
    [decision] = function.body
    conditions = []
    while decision is not None:
        assert isinstance(decision, ast.If)
        conditions.append(ast.unparse(decision.test))
        [decision] = decision.orelse or [None]
    assert {"current_platform.is_cpu()", "current_platform.is_xpu()"} >= set(conditions)


def test_experts_name_their_backend_and_build_their_kernel_at_the_first_load() -> None:
    method = importlib.import_module(
        "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
    ).UnquantizedFusedMoEMethod
    oracle = importlib.import_module(
        "vllm.model_executor.layers.fused_moe.oracle.unquantized"
    )
    assert "unquantized_backend" in assigned_to_self(method.__init__)
    names = {backend.name for backend in oracle.UnquantizedMoeBackend}
    assert {"TRITON", "BATCHED_TRITON"} <= names
    # Other backends' weights are converted here, often in the same shape.
    convert = inspect.getsource(oracle.convert_to_unquantized_kernel_format)
    assert "BATCHED_TRITON" not in convert
    # The reason for a copy of the twin, whose method has no kernel yet.
    setup = inspect.getsource(method._setup_kernel)
    assert "self.moe_kernel is not None" in setup


def test_attention_derives_nothing_from_weights_but_what_is_known() -> None:
    attention = importlib.import_module("vllm.model_executor.layers.attention")
    backend = importlib.import_module("vllm.v1.attention.backend")
    hooks = {
        getattr(attention, name).process_weights_after_loading.__module__
        for name in attention.__all__
        if hasattr(getattr(attention, name), "process_weights_after_loading")
    }
    prefix = "vllm.model_executor.layers.attention."
    assert hooks == {
        prefix + name for name in ("attention", "mla_attention", "mm_encoder_attention")
    }
    base = backend.AttentionImpl.process_weights_after_loading
    assert base.__module__ == "vllm.v1.attention.backend"
    assert [type(node) for node in tree(base).body[0].body] == [ast.Pass]
    # MLA's two copies, and the other ways that are refused.
    source = inspect.getsource(attention.MLAAttention.process_weights_after_loading)
    for name in ("W_UV", "W_UK_T", "is_aiter_triton_fp8_bmm_enabled"):
        assert name in source


def test_a_meta_parameter_is_given_memory_in_its_class() -> None:
    reload = importlib.import_module("vllm.model_executor.model_loader.reload.meta")
    planned = torch.nn.Parameter(torch.empty(2, 3, device="meta"), requires_grad=False)
    planned.output_dim = 0
    with torch.device("cpu"):
        made = reload.materialize_meta_tensor(planned)
    assert (made.device.type, made.shape, made.output_dim) == ("cpu", (2, 3), 0)
    assert isinstance(made, torch.nn.Parameter)
    assert planned.is_meta


def test_a_parameter_goes_to_the_meta_device_in_its_class() -> None:
    """A parameter of the twin loses its values, and keeps what its loader reads."""
    reload = importlib.import_module("vllm.model_executor.model_loader.reload.meta")
    parameter = torch.nn.Parameter(torch.ones(2, 3).t(), requires_grad=False)
    parameter.output_dim = 0
    made = reload.to_meta_tensor(parameter)
    assert isinstance(made, torch.nn.Parameter)
    assert (made.is_meta, made.shape, made.stride()) == (True, (3, 2), (1, 3))
    assert made.output_dim == 0
    # The twin's parameter may be given attributes that the live one must not have.
    made.initial_value = parameter.detach()
    assert not hasattr(parameter, "initial_value")
    assert torch.equal(parameter, torch.ones(3, 2))


def test_mamba_2_s_kernels_read_a_view_of_a_weight_that_is_a_buffer() -> None:
    """Buffers are where ``runtime_layout`` looks for views."""
    module = importlib.import_module(
        "vllm.model_executor.layers.mamba.mamba_mixer2"
    ).MambaMixer2
    source = ast.unparse(tree(module.__init__))
    assert "conv_weights = self.conv1d.weight.view(" in source
    assert "self.register_buffer('conv_weights', conv_weights, persistent=False)" in (
        source
    )


def test_the_scales_of_a_kv_cache_are_gone_after_a_load() -> None:
    module = importlib.import_module("vllm.model_executor.layers.quantization.kv_cache")
    method = module.BaseKVCacheMethod
    created = {
        node.attr
        for node in ast.walk(tree(method.create_weights))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    source = inspect.getsource(method.process_weights_after_loading)
    assert created == {"q_scale", "k_scale", "v_scale", "prob_scale"}
    assert all(f"del layer.{name}" in source for name in created)


def test_the_loaders_of_layers_that_are_quantized_at_load_can_be_unwrapped() -> None:
    def load(param: torch.Tensor, loaded_weight: torch.Tensor) -> None: ...

    layer = torch.nn.Linear(2, 2)
    layer.weight.weight_loader = load
    wrapped = layerwise.make_online_process_loader(layer, "weight")
    assert (wrapped.__name__, wrapped.__wrapped__) == (ONLINE_LOADER, load)


def test_vllm_s_usual_loader_lists_what_it_loads(tmp_path: Path) -> None:
    """The start checkpoint is read by it, with the names that the model is given."""
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    loader = DefaultModelLoader(LoadConfig(use_tqdm_on_load=False))
    config = SimpleNamespace(model=str(tmp_path), revision=None)
    found = dict(loader.get_all_weights(config, torch.nn.Module()))
    assert {name: t.shape for name, t in found.items()} == {"a": (1,), "b": (2, 3)}
    assert found["a"].item() == 1


def test_the_default_process_group_has_a_store_that_can_be_cloned() -> None:
    """Trainer ranks meet in it, over a connection of their own: one that waits for a
    key does not keep another one."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        default = dist.distributed_c10d._get_default_store()
        default.clone().set("of-ours", "1")
        assert default.check(["of-ours"])
    finally:
        dist.destroy_process_group()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = server.clone()
    waiting = threading.Thread(
        target=lambda: server.wait(["late"], timedelta(seconds=60)), daemon=True
    )
    waiting.start()
    time.sleep(0.2)
    begun = time.monotonic()
    own.set("late", "1")
    waiting.join(30)
    assert not waiting.is_alive()
    assert time.monotonic() - begun < 10


def test_a_store_deletes_what_was_read() -> None:
    own = dist.PrefixStore("refit", dist.HashStore().clone())
    own.multi_set(["a", "b"], ["1", "2"])
    assert own.multi_get(["a", "b"]) == [b"1", b"2"]
    assert own.delete_key("a")
    assert not own.check(["a"])
    assert own.add("generation", 0) == 0
