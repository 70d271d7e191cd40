# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Every token has the version that made it: over vLLM's own output processor, with the
engine's outputs given by hand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.engine import RefitEngine
from dynamo.refit.worker.engine_process import MARK
from dynamo.refit.worker.token_versions import asks_for_versions
from graphs.versions import TokenVersions
from tests.support.engine_parts import WORKER, FakeContext, engine_request

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

ASKS = {"extra_args": {"nvext": {"extra_fields": ["engine_data"]}}}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

#: Choice, first token, end, version.
Spans = list[tuple[int, int, int, int | None]]


class Bench:
    """An engine whose steps are given by hand, and a handler around it that makes one
    output of each of the engine's, as Dynamo's does."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.engine_core = self
        self.preparing = asyncio.Event()
        self.preparing.set()
        self._handler = SimpleNamespace(engine_client=self, generate=self._handle)
        self.engine = RefitEngine(self._handler, WORKER, tracer or Tracer())

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """The engine has it."""

    async def generate(self) -> None:
        raise NotImplementedError

    async def _handle(self, request: dict, context: FakeContext) -> AsyncIterator[Any]:
        await self.preparing.wait()
        queue = RequestOutputCollector(RequestOutputKind.DELTA, context.id())
        sent = list(requests(context.id(), request.get("n", 1)))
        for index, (parent, each) in enumerate(sent):
            self.output_processor.add_request(each, None, parent, index, queue)
        for _, each in sent:
            await self.engine_core.add_request_async(each)
        finished = False
        while not finished:
            result = await queue.get()
            finished = result.finished
            for made in result.outputs:
                output = {"index": made.index, "token_ids": list(made.token_ids)}
                if made.finish_reason:
                    output["finish_reason"] = made.finish_reason
                    output["engine_data"] = {"prompt_token_ids": [1]}
                yield output

    async def ask(
        self, name: str, request: dict = ASKS, headers: dict | None = None
    ) -> list[dict]:
        """What a request is answered with, which grows; the engine has it."""
        outputs: list[dict] = []

        async def run() -> None:
            stream = self._handler.generate(request, FakeContext(name, headers))
            async for output in stream:
                outputs.append(output)

        self.running = asyncio.create_task(run())
        await settle()
        return outputs

    def step(self, made: dict[str, int], *ended: str) -> None:
        """One step of the engine: so many tokens for each request or choice."""
        outputs = [
            EngineCoreOutput(
                f"{name}-internal",
                [5] * count,
                finish_reason=FinishReason.LENGTH if name in ended else None,
            )
            for name, count in made.items()
        ]
        self.output_processor.process_outputs(outputs)

    def mark(self, version: int | None) -> None:
        tokens = [] if version is None else [version]
        self.output_processor.process_outputs([EngineCoreOutput(MARK, tokens)])


def requests(
    name: str, n: int
) -> Iterator[tuple[ParentRequest | None, EngineCoreRequest]]:
    """What vLLM makes of a request: one, or one for each choice, called ``0_name``."""
    params = SamplingParams(n=n, output_kind=RequestOutputKind.DELTA, detokenize=False)
    whole = engine_request({"prompt_token_ids": [1]}, params, name)
    if n == 1:
        yield None, whole
        return
    parent = ParentRequest(whole)
    for index in range(n):
        request_id, choice = parent.get_child_info(index)
        each = engine_request({"prompt_token_ids": [1]}, choice, name)
        each.request_id = request_id
        yield parent, each


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def spans(output: dict) -> Spans:
    """Of one output; all are of this worker."""
    found = output["engine_data"]["weight_versions"]
    assert {span.pop("worker") for span in map(dict, found)} <= {WORKER}
    return [(s["index"], s["start"], s["end"], s["version"]) for s in found]


async def test_tokens_before_and_after_a_change() -> None:
    bench = Bench()
    outputs = await bench.ask("a")
    bench.step({"a": 1})
    await settle()
    bench.mark(1)
    for _ in range(2):
        bench.step({"a": 1})
        await settle()
    bench.mark(2)
    bench.step({"a": 1}, "a")
    await settle()
    assert [spans(output) for output in outputs] == [
        [(0, 0, 1, None)],
        [(0, 0, 1, None), (0, 1, 2, 1)],
        [(0, 0, 1, None), (0, 1, 3, 1)],
        [(0, 0, 1, None), (0, 1, 3, 1), (0, 3, 4, 2)],
    ]
    # What Dynamo puts there stays.
    assert outputs[-1]["engine_data"]["prompt_token_ids"] == [1]


async def test_an_output_that_is_read_after_the_change_keeps_its_version() -> None:
    """vLLM joins what a slow reader has not fetched: one output has tokens of both."""
    bench = Bench()
    bench.mark(1)
    slow, ended = await bench.ask("slow"), await bench.ask("ended")
    bench.step({"slow": 2, "ended": 3}, "ended")
    bench.mark(2)
    bench.step({"slow": 4}, "slow")
    await settle()
    assert [spans(output) for output in slow] == [[(0, 0, 2, 1), (0, 2, 6, 2)]]
    assert [spans(output) for output in ended] == [[(0, 0, 3, 1)]]


async def test_an_output_that_is_read_before_later_tokens_are_there() -> None:
    bench = Bench()
    outputs = await bench.ask("a")
    bench.step({"a": 2})
    await settle()
    bench.step({"a": 3})
    bench.mark(7)
    assert spans(outputs[0]) == [(0, 0, 2, None)]
    await settle()
    assert spans(outputs[1]) == [(0, 0, 5, None)]
    bench.running.cancel()


async def test_a_request_that_is_prepared_across_a_change_is_of_the_new_one() -> None:
    bench = Bench()
    bench.preparing.clear()
    outputs = await bench.ask("a")
    bench.mark(3)
    bench.preparing.set()
    await settle()
    bench.step({"a": 1}, "a")
    await settle()
    assert spans(outputs[0]) == [(0, 0, 1, 3)]


async def test_a_request_that_waits_in_the_engine_across_changes() -> None:
    """No token is of version 3, which was live for no step of this request's."""
    bench = Bench()
    outputs = await bench.ask("a")
    bench.mark(3)
    bench.mark(4)
    bench.step({"a": 1})
    bench.mark(5)
    bench.mark(4)
    bench.step({"a": 1}, "a")
    await settle()
    assert spans(outputs[-1]) == [(0, 0, 2, 4)]


async def test_an_undone_install_leads_back_to_the_version_before() -> None:
    bench = Bench()
    outputs = await bench.ask("a")
    bench.step({"a": 1})
    for version in (1, None):
        bench.mark(version)
    bench.step({"a": 1}, "a")
    await settle()
    assert spans(outputs[-1]) == [(0, 0, 2, None)]


async def test_every_choice_has_spans_of_its_own_and_the_last_output_all() -> None:
    """Dynamo's frontend makes a whole answer's ``engine_data`` of the last one."""
    bench = Bench()
    bench.mark(1)
    outputs = await bench.ask("a", {**ASKS, "n": 2})
    bench.step({"0_a": 1, "1_a": 2})
    await settle()
    bench.mark(2)
    bench.step({"0_a": 1, "1_a": 1}, "0_a")
    await settle()
    bench.mark(3)
    bench.step({"1_a": 1}, "1_a")
    await settle()
    by_choice = [(output["index"], spans(output)) for output in outputs]
    assert by_choice == [
        (0, [(0, 0, 1, 1)]),
        (1, [(1, 0, 2, 1)]),
        (0, [(0, 0, 1, 1), (0, 1, 2, 2), (1, 0, 2, 1)]),
        (1, [(1, 0, 2, 1), (1, 2, 3, 2)]),
        (1, [(0, 0, 1, 1), (0, 1, 2, 2), (1, 0, 2, 1), (1, 2, 3, 2), (1, 3, 4, 3)]),
    ]


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"extra_args": None},
        {"extra_args": {"nvext": {"extra_fields": ["worker_id"]}}},
        {"extra_args": {"nvext": {"extra_fields": None}}},
    ],
)
async def test_nothing_is_added_unless_it_is_asked_for(request_: dict) -> None:
    bench = Bench()
    outputs = await bench.ask("a", request_)
    bench.step({"a": 1})
    bench.mark(1)
    await settle()
    bench.step({"a": 1}, "a")
    await settle()
    assert outputs == [
        {"index": 0, "token_ids": [5]},
        {
            "index": 0,
            "token_ids": [5],
            "finish_reason": "length",
            "engine_data": {"prompt_token_ids": [1]},
        },
    ]


def test_where_a_request_asks() -> None:
    nvext = {"extra_fields": ["timing", "engine_data"]}
    assert asks_for_versions({"nvext": nvext})
    assert asks_for_versions({"extra_args": {"nvext": nvext}})
    assert not asks_for_versions({"extra_args": nvext})


async def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    """Also of those that nobody reads to their end."""
    bench = Bench()
    await bench.ask("a")
    await bench.ask("b")
    bench.running.cancel()
    bench.step({"a": 1}, "a")
    await settle()
    assert bench.engine._token_versions._followed == {}


async def test_a_request_s_end_is_logged_and_traced(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = InMemorySpanExporter()
    bench = Bench(Tracer(SimpleSpanProcessor(exporter)))
    caplog.set_level(logging.DEBUG, "dynamo.refit.worker.token_versions")
    await bench.ask("traced", {}, {"traceparent": TRACEPARENT})
    await bench.ask("untraced", {})
    for version in (8, 9):
        bench.step({"traced": 1, "untraced": 1})
        bench.mark(version)
    bench.step({"traced": 1, "untraced": 1}, "traced", "untraced")
    await settle()
    assert [record.getMessage() for record in caplog.records] == [
        f"request_id={name} weight_versions=None,8,9" for name in ("traced", "untraced")
    ]
    [span] = exporter.get_finished_spans()
    assert (span.name, f"{span.parent.span_id:x}") == ("generate", TRACEPARENT[36:52])
    assert dict(span.attributes) == {
        "refit.worker": WORKER,
        "refit.weight_versions": "None,8,9",
    }


def chunk(worker: int, *spans: tuple[int, int, int, int | None]) -> dict:
    names = ("index", "start", "end", "version")
    found = [{**dict(zip(names, s, strict=True)), "worker": worker} for s in spans]
    return {"nvext": {"engine_data": {"weight_versions": found}}}


def test_a_client_puts_the_spans_of_workers_in_turn_together() -> None:
    """A chunk has all spans so far, of the worker that made it."""
    versions = TokenVersions()
    for part in (
        chunk(1, (0, 0, 1, 4)),
        {"usage": {}},
        chunk(1, (0, 0, 2, 4), (0, 2, 3, 5)),
        chunk(2, (0, 0, 9, 4)),
        {"nvext": {"engine_data": None}},
        chunk(1, (0, 0, 1, None)),
        chunk(1, (0, 0, 2, None)),
    ):
        versions.add(part)
    assert versions.workers == [1, 2, 1]
    assert versions.of() == [4, 4, 5, *[4] * 9, None, None]
    assert versions.of(1) == []
