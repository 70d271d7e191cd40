# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which version made which token of the requests that run here.

A mark in the engine's stream of outputs (:mod:`worker.engine_process`) says where the
weights changed. Only then is anything counted: the tokens that each running request
has by then. A token costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor

from dynamo.refit.tracing import Tracer
from dynamo.refit.worker.engine_process import version_of_mark

logger = logging.getLogger(__name__)

#: The key in ``nvext.engine_data`` of an answer.
WEIGHT_VERSIONS = "weight_versions"


class Span(TypedDict):
    """Tokens ``start`` to ``end``, exclusive, that ``worker`` made for choice ``index``
    with one version; ``None`` is what the worker was started with."""

    index: int
    start: int
    end: int
    version: int | None
    worker: int


class RequestVersions:
    """Of one request: from which token on each choice was made with which version.

    Args:
        worker: the instance id of the worker that makes the tokens.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._changes: dict[int, list[tuple[int, int | None]]] = {}
        #: Tokens of each choice that have left.
        self._tokens: dict[int, int] = {}

    def begin(self, index: int, version: int | None) -> None:
        """Choice ``index`` is begun, if it is not, while ``version`` is live."""
        self._changes.setdefault(index, [(0, version)])

    def change(self, index: int, position: int, version: int | None) -> None:
        """Tokens of choice ``index`` from ``position`` on are made with ``version``."""
        changes = self._changes.setdefault(index, [])
        if changes and changes[-1][0] == position:
            changes.pop()
        if not changes or changes[-1][1] != version:
            changes.append((position, version))

    @property
    def versions(self) -> list[int | None]:
        """All that any choice was made with; they grow."""
        found = {v for choice in self._changes.values() for _, v in choice}
        return sorted(found, key=lambda version: (version is not None, version))

    def add_to(self, output: dict[str, Any]) -> None:
        """Put the spans of all tokens so far into the handler's ``output``.

        Dynamo makes a whole answer of the last output that has ``engine_data``, so an
        output that ends a choice has the spans of all choices. Nobody gets the token of
        a prefill worker, and an output that is text has no tokens: they have none.
        """
        if "token_ids" not in output or "disaggregated_params" in output:
            return
        index = output.get("index") or 0
        tokens = len(output.get("token_ids") or ())
        self._tokens[index] = self._tokens.get(index, 0) + tokens
        spans = self._spans(index)
        if output.get("finish_reason"):
            spans = [
                span for each in sorted(self._tokens) for span in self._spans(each)
            ]
        output.setdefault("engine_data", {})[WEIGHT_VERSIONS] = spans

    def _spans(self, index: int) -> list[Span]:
        changes, tokens = self._changes.get(index, ()), self._tokens[index]
        ends = [start for start, _ in changes[1:]] + [tokens]
        return [
            {
                "index": index,
                "start": start,
                "end": min(end, tokens),
                "version": version,
                "worker": self._worker,
            }
            for (start, version), end in zip(changes, ends, strict=False)
            if start < tokens
        ]


class TokenVersions:
    """Follows the requests of one engine.

    Args:
        processor: vLLM's, of that engine; it sees every output in order.
        worker: instance id.
        tracer: gets a span for each request that is traced.
    """

    def __init__(self, processor: OutputProcessor, worker: int, tracer: Tracer) -> None:
        self._processor = processor
        self._worker = worker
        self._tracer = tracer
        self._version: int | None = None
        #: By the id that the handler gives a request.
        self._followed: dict[str, RequestVersions] = {}
        processor.process_outputs = self._noticing_marks(processor.process_outputs)

    def sent(self, request: EngineCoreRequest) -> None:
        """The engine is sent a request, or one of the choices of a request.

        To be called before anything is awaited: until the next mark, its tokens are
        made with what is live now.
        """
        followed = self._followed.get(request.external_req_id)
        state = self._processor.request_states.get(request.request_id)
        if followed is not None and state is not None:
            followed.begin(state.request_index, self._version)

    @contextlib.contextmanager
    def follow(self, context: Any) -> Iterator[RequestVersions]:
        """While a request of the handler's runs. At its end its versions go into the
        log, and into its span ``generate``."""
        request_id, began = context.id(), time.time()
        made = self._followed[request_id] = RequestVersions(self._worker)
        try:
            yield made
        finally:
            # A request that came back here may have taken its place.
            if self._followed.get(request_id) is made:
                del self._followed[request_id]
            versions = ",".join(map(str, made.versions))
            logger.debug("request_id=%s weight_versions=%s", request_id, versions)
            if self._tracer.enabled:
                self._trace(context, began, versions)

    def _trace(self, context: Any, began: float, versions: str) -> None:
        parent = (context.trace_headers() or {}).get("traceparent")
        if parent is not None:
            self._tracer.start(
                "generate",
                parent,
                "server",
                at=began,
                worker=self._worker,
                weight_versions=versions,
            ).end()

    def _noticing_marks(self, process_outputs: Callable) -> Callable:
        """``process_outputs``, which itself has nothing to do for a mark."""

        @functools.wraps(process_outputs)
        def process(outputs: list, *args: Any, **kwargs: Any) -> Any:
            mark = version_of_mark(outputs)
            if mark is not None:
                self._changed(*mark)
            return process_outputs(outputs, *args, **kwargs)

        return process

    def _changed(self, version: int | None) -> None:
        self._version = version
        for state in self._processor.request_states.values():
            followed = self._followed.get(state.external_req_id)
            if followed is not None:
                tokens = state.detokenizer.num_output_tokens()
                followed.change(state.request_index, tokens, version)


def asks_for_versions(request: Mapping[str, Any]) -> bool:
    """Whether a request has ``nvext.extra_fields: ["engine_data"]``.

    Dynamo's frontend puts ``nvext`` into ``extra_args``.
    """
    for source in (request, request.get("extra_args")):
        nvext = source.get("nvext") if isinstance(source, Mapping) else None
        if isinstance(nvext, Mapping) and "engine_data" in (
            nvext.get("extra_fields") or ()
        ):
            return True
    return False
