# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a refit needs of the engine: call the ranks, pause, resume, tell epochs apart.

Thin over vLLM's ``AsyncLLM`` and Dynamo's handler around it. All that is private
there and used here is listed in ``tests/unit/test_upstream_contract.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from dynamo.refit.errors import OutOfStep
from dynamo.refit.protocol import (
    InFlightPolicy,
    Install,
    RankAnswer,
    RankCall,
    RankReply,
    RankRequest,
    Restore,
)
from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.kv_epoch import new_epoch, with_epoch
from dynamo.refit.worker.token_versions import TokenVersions, asks_for_versions

logger = logging.getLogger(__name__)

#: A probe makes one token; an engine that has room for it needs milliseconds.
PROBE_SECONDS = 2.0


#: In a prefill worker's ``kv_transfer_params``: the version that computed the KV.
PREFILLED_WITH = "refit_version"
#: Several versions, or nobody knows which.
OTHER = "other"

#: How long an engine must have had no request to be drained.
IDLE_SECONDS = 0.1


class RefitEngine:
    """One vLLM engine and the Dynamo handler that serves with it.

    Args:
        handler: a ``dynamo.vllm`` decode or prefill handler.
        worker: this worker's instance id.
        tracer: gets a span for each request that is traced.
    """

    def __init__(self, handler: Any, worker: int, tracer: Tracer) -> None:
        self._handler = handler
        self._llm = handler.engine_client
        self._calls = itertools.count()
        self.kv_epoch = ""
        self._version: int | None = None
        self._open_calls = 0
        #: The epoch that each prefill was sent to the engine in, by its request's id.
        self._prefill_epochs: dict[str, str] = {}
        self._token_versions = TokenVersions(self._llm.output_processor, worker, tracer)
        handler.generate = self._followed(handler.generate)
        self._llm.generate = self._telling_version(self._llm.generate)
        core = self._llm.engine_core
        core.add_request_async = self._in_epoch(core.add_request_async)

    @property
    def admin_lock(self) -> asyncio.Lock:
        """Held by Dynamo's own pause, resume and update routes while they run."""
        return self._handler._pause_lock

    @property
    def paused_by_user(self) -> bool:
        """Generation was paused over Dynamo's admin route: leave it so."""
        return self._handler._paused

    @property
    def asleep(self) -> bool:
        """Dynamo's sleep route was called: the weights may not even be in memory."""
        return self._handler._pause_controller.is_paused

    @property
    def installs_in_step(self) -> bool:
        """One ``collective_rpc`` reaches all ranks between the same two steps.

        So it is where the engine and its ranks share one queue: a single process, or
        vLLM's own processes of one host.
        """
        parallel = self._llm.vllm_config.parallel_config
        return parallel.distributed_executor_backend in (None, "uni", "mp")

    async def call_ranks(self, request: RankRequest) -> list[RankReply]:
        """Every rank's answer, in rank order. Waits for the step that is running.

        Raises:
            OutOfStep: an answer belongs to another call; nothing that the ranks
                say can be trusted from here on.
            vllm.v1.engine.exceptions.EngineDeadError: the engine is gone.
        """
        call = next(self._calls)
        payload = msgspec.msgpack.encode(RankCall(call, request))
        answers = [
            msgspec.msgpack.decode(answer, type=RankAnswer)
            for answer in await self._send(payload, request)
        ]
        for rank, answer in enumerate(answers):
            if answer.call != call:
                raise OutOfStep(
                    f"answered call {answer.call} when asked call {call} "
                    f"({type(request).__name__}): restart this worker",
                    rank=rank,
                )
        return [answer.reply for answer in answers]

    async def _send(self, payload: bytes, request: RankRequest) -> list[bytes]:
        match request:
            case Install(version=version):
                return await self._change_weights(payload, version)
            case Restore():
                return await self._change_weights(payload, self._version)
        return await self._llm.collective_rpc("refit_call", args=(payload,))

    async def _change_weights(self, payload: bytes, version: int | None) -> list[bytes]:
        """A call after which all ranks run on ``version``, unless one refuses; the
        engine marks the place in its stream of outputs."""
        core = self._llm.engine_core
        return await core.call_utility_async(
            "refit_change", payload, core.client_index, version
        )

    async def pause(self, in_flight: InFlightPolicy) -> None:
        """Stop scheduling after the running step; requests stay where they are.

        ``AsyncLLM.pause_generation`` does this and then sleeps for 20 ms.
        """
        recompute = in_flight == "recompute"
        await self._llm.engine_core.pause_scheduler_async(
            mode="keep", clear_cache=recompute
        )
        if not recompute:
            await self.forget_media()

    async def forget_media(self) -> None:
        """Drop cached encoder outputs: their key is the media's hash, without epoch."""
        if self._llm.model_config.is_multimodal_model:
            await self._llm.reset_encoder_cache()

    async def resume(self) -> None:
        await self._llm.engine_core.resume_scheduler_async()

    async def drain(self, seconds: float) -> int:
        """Wait until no request runs; returns how many still do after ``seconds``.

        A request runs from the call of the handler, which may load media for seconds
        before the engine knows of it, to the end of its stream. Only for an engine
        that routers do not send to. A request that left the router before that may
        still be on its way: none must have come for a moment.
        """
        loop = asyncio.get_running_loop()
        end, idle_since = loop.time() + seconds, None
        while (now := loop.time()) < end:
            if self._running():
                idle_since = None
            elif idle_since is None:
                idle_since = now
            elif now - idle_since > IDLE_SECONDS:
                return 0
            await asyncio.sleep(IDLE_SECONDS / 10)
        return self._running()

    def _running(self) -> int:
        unfinished = self._llm.output_processor.get_num_unfinished_requests()
        return max(self._open_calls, unfinished)

    def begin_epoch(self, version: int) -> str:
        """From here on admitted requests share KV with each other only.

        To be called between the install and the resume: earlier, and blocks of
        the old weights would carry the new epoch; later, and a new request could
        hit them.
        """
        self.kv_epoch = new_epoch(version)
        self._version = version
        return self.kv_epoch

    async def declare_version(self, version: int) -> None:
        """Set the version that Dynamo's and vLLM's own routes report."""
        await self._handler.set_weight_version({"weight_version": version})
        # vLLM keeps a version of its own since 0.31.
        if hasattr(self._llm, "update_weight_version"):
            await self._llm.update_weight_version(str(version))

    async def probe(self) -> None:
        """Make one token, which also lets an idle engine publish its KV events.

        An engine that is full of requests has none within :data:`PROBE_SECONDS`:
        it publishes with its own steps, and whether it lives the next call tells.

        Raises:
            vllm.v1.engine.exceptions.EngineDeadError: the engine is gone.
        """
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                async for _ in self._llm.generate(
                    {"prompt_token_ids": [1]},
                    SamplingParams(max_tokens=1, temperature=0.0),
                    f"refit-probe-{uuid.uuid4().hex}",
                ):
                    pass
        except TimeoutError:
            logger.info("no room for a probe within %g s", PROBE_SECONDS)

    def _followed(self, generate: Any) -> Any:
        """The handler's ``generate``: counted from its call to its stream's end, and
        with the versions that made its tokens, if the request asks for them."""

        @functools.wraps(generate)
        async def followed(request: Any, context: Any) -> AsyncIterator[Any]:
            asked = asks_for_versions(request)
            self._open_calls += 1
            try:
                with self._token_versions.follow(context) as made:
                    outputs = generate(request, context)
                    async with contextlib.aclosing(outputs):
                        async for output in outputs:
                            if asked:
                                made.add_to(output)
                            yield output
            finally:
                self._open_calls -= 1

        return followed

    def _in_epoch(self, add_request: Any) -> Any:
        """``add_request`` with the KV epoch in the request's prefix-cache key.

        The epoch is that of the moment in which the request is sent: the engine's
        inputs may take seconds to prepare, and an install may come meanwhile.

        A decode worker also keeps what a prefill worker computed. If that was with
        another version, no other request may hit it: its key is the request's own.
        """

        @functools.wraps(add_request)
        async def add_request_in_epoch(request: EngineCoreRequest) -> None:
            transfer, epoch = _kv_transfer(request.sampling_params), self.kv_epoch
            if transfer.get("do_remote_decode"):
                self._prefill_epochs[request.external_req_id] = epoch
            if transfer.get("do_remote_prefill") and (
                transfer.get(PREFILLED_WITH, OTHER) != self._version
            ):
                epoch = f"{epoch}|{uuid.uuid4().hex}"
            request.cache_salt = with_epoch(request.cache_salt, epoch)
            self._token_versions.sent(request)
            await add_request(request)

        return add_request_in_epoch

    def _telling_version(self, generate: Any) -> Any:
        """``generate`` whose handover of a prefill says which version computed it."""

        @functools.wraps(generate)
        def generate_telling_version(
            prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
        ) -> Any:
            outputs = generate(prompt, sampling_params, request_id, **kwargs)
            if _kv_transfer(sampling_params).get("do_remote_decode"):
                return self._tell_version(outputs, request_id)
            return outputs

        return generate_telling_version

    async def _tell_version(
        self, outputs: AsyncGenerator[Any, None], request_id: str
    ) -> AsyncIterator[Any]:
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    if output.kv_transfer_params is not None:
                        same = self._prefill_epochs.get(request_id) == self.kv_epoch
                        output.kv_transfer_params = {
                            **output.kv_transfer_params,
                            PREFILLED_WITH: self._version if same else OTHER,
                        }
                    yield output
        finally:
            self._prefill_epochs.pop(request_id, None)


def _kv_transfer(sampling_params: Any) -> dict[str, Any]:
    """What a request says about KV that comes from, or goes to, another worker."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return extra.get("kv_transfer_params") or {}
