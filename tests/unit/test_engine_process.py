# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The mark leaves an engine between the last output of the old weights and the first
of the new ones: vLLM's own loop, over ranks that carry out what they are given in
order, and when somebody waits for it."""

from __future__ import annotations

import contextlib
import pickle
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequestType,
)
from vllm.v1.engine import core as vllm_core
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from dynamo.refit.errors import Failure
from dynamo.refit.protocol import Installed, RankAnswer, RankReply, Refused
from dynamo.refit.worker import engine_process
from dynamo.refit.worker.engine_process import (
    MarkingEngineCore,
    mark_changes,
    version_of_mark,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

CLIENT = 3
REFUSAL = Refused(failure=Failure(kind="X", message="no", stage="install"))


class Ranks:
    """An executor. Each step makes the version that is live as its only token."""

    def __init__(self) -> None:
        self.live = 0
        self.replies: list[RankReply] = [Installed(rank=0), Installed(rank=1)]
        self._orders: deque[tuple[Future, Callable[[], Any]]] = deque()

    def execute_model(self, step: Any, non_block: bool) -> Future:
        nothing = None if step.total_num_scheduled_tokens else "nothing"
        return self._order(lambda: nothing)

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Any:
        sampled = self._order(lambda: self.live)
        return sampled if non_block else sampled.result()

    def collective_rpc(self, method: str, *args: Any) -> list[bytes]:
        (payload,) = args[1]

        def install() -> list[bytes]:
            if all(isinstance(reply, Installed) for reply in self.replies):
                self.live = int(payload)
            answers = [RankAnswer(1, reply) for reply in self.replies]
            return [msgspec.msgpack.encode(answer) for answer in answers]

        return self._order(install).result()

    def _order(self, work: Callable[[], Any]) -> Future:
        ordered = Ordered(self._orders)
        self._orders.append((ordered, work))
        return ordered


class Ordered(Future):
    """As vLLM's: who waits for one has all before it carried out."""

    def __init__(self, orders: deque) -> None:
        super().__init__()
        self._orders = orders

    def result(self, timeout: float | None = None) -> Any:
        while not self.done():
            ordered, work = self._orders.popleft()
            ordered.set_result(work())
        return super().result(timeout)


class Scheduler:
    """Schedules so many steps; some of them have nothing to run, or nothing to say."""

    def __init__(self) -> None:
        self.steps = 0
        self.empty = False
        self.silent = False

    def has_requests(self) -> bool:
        return self.steps > 0

    def schedule(self, throttle: bool) -> SimpleNamespace:
        self.steps -= 1
        return SimpleNamespace(
            total_num_scheduled_tokens=0 if self.empty else 1,
            pending_structured_output_tokens=False,
            silent=self.silent or self.empty,
        )

    def get_grammar_bitmask(self, step: Any) -> None:
        return None

    def update_from_output(
        self, step: Any, version: int
    ) -> dict[int, EngineCoreOutputs]:
        if step.silent:
            return {}
        return {CLIENT: EngineCoreOutputs(outputs=[EngineCoreOutput("a", [version])])}


def engine(ahead: int) -> MarkingEngineCore:
    """vLLM's engine without its start; it schedules so many steps ahead."""
    core = MarkingEngineCore.__new__(MarkingEngineCore)
    core._waiting = []
    core.model_executor = Ranks()
    core.scheduler = Scheduler()
    core.vllm_config = SimpleNamespace(
        observability_config=SimpleNamespace(enable_logging_iteration_details=False)
    )
    core.log_stats = core.is_pooling_model = core.is_mm_encoder_only = False
    core.check_for_draft_tokens = core.engines_running = False
    core.shutdown_state = EngineShutdownState.RUNNING
    core.process_input_queue_block = False
    core.aborts_queue, core.input_queue = queue.Queue(), queue.Queue()
    core.output_queue = queue.Queue()
    core._idle_state_callbacks = []
    core.batch_queue_size = ahead + 1
    core.batch_queue = deque(maxlen=ahead + 1) if ahead else None
    core.step_fn = core.step_with_batch_queue if ahead else core.step
    return core


def change(core: MarkingEngineCore, version: int | None) -> None:
    """What its client sends; carried out before the next step."""
    arguments = (str(version or 0).encode(), CLIENT, version)
    call = (CLIENT, 77, "refit_change", arguments)
    core.input_queue.put((EngineCoreRequestType.UTILITY, call))


def run(core: MarkingEngineCore, steps: int) -> None:
    """As many steps as are given, and the end of what was scheduled ahead."""
    core.scheduler.steps = steps
    core._process_input_queue()
    while core.has_work():
        core._process_engine_step()
        core._process_input_queue()


def said(core: MarkingEngineCore) -> list[int | str]:
    """What has left the engine: tokens, marks and answers."""
    found: list[int | str] = []
    while not core.output_queue.empty():
        client, outputs = core.output_queue.get()
        assert client == CLIENT
        if outputs.utility_output is not None:
            assert outputs.utility_output.failure_message is None
            assert len(outputs.utility_output.result.result) == 2
            found.append("answer")
        elif (mark := version_of_mark(outputs.outputs)) is not None:
            found.append(f"now {mark[0]}")
        else:
            found += outputs.outputs[0].new_token_ids
    return found


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_mark_leaves_behind_what_ran_before_the_change(ahead: int) -> None:
    """Steps that were scheduled ahead run before the install, and leave after it."""
    core = engine(ahead)
    core.scheduler.steps = 9
    for _ in range(4):
        core._process_engine_step()
    assert said(core) == [0] * (4 - ahead)
    change(core, 5)
    core._process_input_queue()
    while core.has_work():
        core._process_engine_step()
    if ahead:
        assert said(core) == ["answer"] + [0] * ahead + ["now 5"] + [5] * 5
    else:
        assert said(core) == ["now 5", "answer"] + [5] * 5


def test_the_mark_of_an_idle_engine_leaves_at_once() -> None:
    core = engine(1)
    change(core, 5)
    core._process_input_queue()
    assert said(core) == ["now 5", "answer"]


def test_outputs_that_are_not_sent_do_not_hold_the_mark_back() -> None:
    core = engine(2)
    core.scheduler.steps = 3
    core.scheduler.silent = True
    for _ in range(3):
        core._process_engine_step()
    change(core, 5)
    core._process_input_queue()
    core.scheduler.silent = False
    core.scheduler.steps = 1
    while core.has_work():
        core._process_engine_step()
    assert said(core) == ["answer", "now 5", 5]


def test_an_undo_at_the_start_leads_to_no_version() -> None:
    core = engine(1)
    change(core, None)
    core._process_input_queue()
    assert said(core) == ["now None", "answer"]


@pytest.mark.parametrize("replies", [[REFUSAL, REFUSAL], [Installed(rank=0), REFUSAL]])
def test_a_change_that_a_rank_refuses_is_none(replies: list[RankReply]) -> None:
    core = engine(1)
    core.model_executor.replies = replies
    change(core, 5)
    run(core, 3)
    assert said(core) == ["answer", 0, 0, 0]


@given(
    ahead=st.integers(0, 3),
    moves=st.lists(
        st.sampled_from(["step", "empty", "silent", "change", "request"]), max_size=60
    ),
)
def test_marks_and_tokens_agree_in_any_order(ahead: int, moves: list[str]) -> None:
    """Whatever is scheduled ahead, stands idle or says nothing meanwhile: a token was
    made by the version of the last mark before it."""
    core = engine(ahead)
    version = 0
    for move in moves:
        if move == "request":
            core.scheduler.steps += 3
        elif move == "change":
            version += 1
            change(core, version)
            core._process_input_queue()
        elif core.has_work():
            core.scheduler.empty = move == "empty"
            core.scheduler.silent = move == "silent"
            core._process_engine_step()
    core.scheduler.empty = core.scheduler.silent = False
    run(core, 1)
    now, marks = 0, 0
    for item in said(core):
        if item == "answer":
            continue
        if isinstance(item, str):
            now, marks = int(item.removeprefix("now ")), marks + 1
        else:
            assert item == now
    assert (now, marks) == (version, version)


def test_an_engine_is_started_as_one_that_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its process gets a function by name, and finds vLLM's engine replaced."""
    monkeypatch.setattr(
        EngineCoreProc, "run_engine_core", EngineCoreProc.__dict__["run_engine_core"]
    )
    monkeypatch.setattr(vllm_core, "EngineCoreProc", EngineCoreProc)
    mark_changes()
    target = pickle.loads(pickle.dumps(EngineCoreProc.run_engine_core))
    started = []

    def original(*args: Any, **kwargs: Any) -> None:
        started.append((vllm_core.EngineCoreProc, args, kwargs))

    monkeypatch.setattr(engine_process, "_run_engine_core", original)
    with contextlib.suppress(SystemExit):
        target("a", dp_rank=0)
    assert started == [(MarkingEngineCore, ("a",), {"dp_rank": 0})]
