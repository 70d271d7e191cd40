# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Kills, stalls and corruptions of the processes of a running graph, under load. Every
response is compared with what its worker's version produces; everyone who lives must
answer soon after each fault, and nothing may be left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitSuperseded,
    WorkerRefitted,
)
from graphs.client import Client
from graphs.references import MAX_TOKENS
from graphs.versions import ASK
from tests.faults.judge import END, Judge, Observation, phase_at
from tests.faults.kinds import FAULTS, LATEST_SECONDS, Fault
from tests.support.live_fleet import (
    HOLD_SECONDS,
    Fleet,
    live_fleet,
)
from tests.support.process_group import Held, held, rank_process
from tests.support.processes import Trainer

STALL_SECONDS = 3.0

#: Until every worker that lives answers: it waits at the barrier, for a slow install,
#: and two cores are shared by all.
ANSWER_SECONDS = HOLD_SECONDS + 5.0

RELEASE_SECONDS = 30.0

#: In which order replicas change; another one for each round of all kinds of faults.
POLICIES = ("barrier", "rolling")

OUTCOMES = {
    "completed": RefitCompleted,
    "failed": RefitFailed,
    "superseded": RefitSuperseded,
}

#: What a worker may hold more than after its first refit, however many faults it has
#: seen: connections that come and go.
THREADS, DESCRIPTORS = 4, 24


@dataclass
class Outcome:
    """What all real faults came to."""

    injected: int = 0
    #: By the fault's name: how far the refit had come when it struck.
    hit: dict[str, Counter[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    violated: Counter[str] = field(default_factory=Counter)
    #: Responses, by the judge's verdict.
    verdicts: Counter[str] = field(default_factory=Counter)
    #: The most that a worker held more than after its first refit.
    grown: Held = field(default_factory=lambda: Held(0, 0))

    @property
    def phases(self) -> Counter[str]:
        return sum(self.hit.values(), Counter())


def real_faults(count: int, seed: int, console: Console) -> Outcome:
    """Inject ``count`` faults, all kinds in turn, with moments drawn from ``seed``."""
    with (
        tempfile.TemporaryDirectory(prefix="refit-faults-") as directory,
        live_fleet("file", Path(directory)) as fleet,
    ):
        outcome = asyncio.run(LiveFaults(fleet, seed, console).run(count))
    table = Table(title=f"{count} faults of a running graph")
    for name in ("fault", "injected", "the refit was in"):
        table.add_column(name)
    for name, phases in outcome.hit.items():
        said = ", ".join(f"{phase} {times}" for phase, times in phases.items())
        table.add_row(name, str(phases.total()), said)
    console.print(table)
    console.print(f"responses: {dict(outcome.verdicts)}")
    console.print(f"versions ended: {dict(outcome.ends)}")
    console.print(f"a worker held at most this more than at first: {outcome.grown}")
    return outcome


class LiveFaults:
    """One run over ``fleet``."""

    def __init__(self, fleet: Fleet, seed: int, console: Console) -> None:
        self.fleet = fleet
        self.draw, self.load = random.Random(seed), random.Random(seed)
        self.console = console
        self.outcome = Outcome()
        self._torn = fleet.graph.directory / "torn"
        self.trainer = self._start_trainer()
        #: Which checkpoint a version is of; ``None``: what workers start with.
        self.checkpoints: dict[int | None, str] = {None: "A"}
        self.observed: list[Observation] = []
        #: When a worker was killed, or ordered to do what it is fenced for.
        self.killed: dict[int, float] = {}
        #: The worker that each living process is.
        self.workers: dict[int, int] = {}
        self.first = set(fleet.members())
        self.policy = POLICIES[0]
        #: By process group, what it held after its first refit.
        self.baseline: dict[int, Held] = {}

    async def run(self, count: int) -> Outcome:
        stop = asyncio.Event()
        async with Client(self.fleet.graph.url, self.fleet.graph.name) as client:
            self.client = client
            await self._settle("the start")
            observers = [asyncio.create_task(self._observe(stop)) for _ in range(3)]
            for number in range(count):
                fault = FAULTS[number % len(FAULTS)]
                if number % len(FAULTS) == 0:
                    self.policy = POLICIES[number // len(FAULTS) % len(POLICIES)]
                    await asyncio.to_thread(self._restart_coordinator)
                began = time.monotonic()
                await self._inject(fault)
                await self._settle(fault.name)
                self.outcome.injected += 1
                seconds = time.monotonic() - began
                self.console.print(
                    f"{number + 1:3} {self.policy}: {fault.name}: {seconds:.1f} s"
                )
            stop.set()
            await asyncio.gather(*observers)
        self.trainer.kill()
        self._judge()
        return self.outcome

    def _start_trainer(self) -> Trainer:
        """One whose bytes change after the announcement, on order."""
        return Trainer(
            self.fleet.graph,
            self.fleet.models["A"],
            change="torn",
            tensor="model.layers.1.self_attn.k_proj.weight",
            REFIT_TEST_TORN=str(self._torn),
        )

    # --- one fault --------------------------------------------------------------

    async def _inject(self, fault: Fault) -> None:
        index = self._draw_index(fault)
        self.fleet.order(index, **fault.orders)
        if fault.torn:
            self._torn.touch()
        gone = self._take(index) if self._fences(fault) else None
        version = self._publish()
        if fault.at is not None:
            await asyncio.to_thread(self.fleet.wait_until_at, index, fault.at)
        await asyncio.sleep(self.draw.uniform(0.0, LATEST_SECONDS))
        moment = time.time()
        if fault.takes_a_worker:
            gone = self._take(index)
        answers = asyncio.create_task(self._all_answer(fault.name))
        if fault.strike is not None:
            await self._strike(fault, index)
        end = await self._await_end(version, fault)
        phase = self._phase(fault, version, moment)
        self.outcome.hit.setdefault(fault.name, Counter())[phase] += 1
        await answers
        if fault.never_served and gone is None and not isinstance(end, RefitFailed):
            self._violated("wrong_version", f"{fault.name}: version {version}: {end}")
        # Before another one comes, which would carry them out, too.
        self._torn.unlink(missing_ok=True)
        self.fleet.forget_orders()
        if gone is not None:
            self._check_named(gone, version, end, phase)
            await asyncio.to_thread(self._bring_back, index)

    def _take(self, index: int) -> int:
        """Which worker is gone from now on: it is asked no more."""
        gone = self.workers.pop(index)
        self.killed[gone] = time.time()
        return gone

    def _draw_index(self, fault: Fault) -> int:
        """Of the process that is struck."""
        if self._fences(fault):
            # The one that changes last.
            return max(self.workers, key=self.workers.__getitem__)
        return self.draw.choice(sorted(self.workers))

    def _fences(self, fault: Fault) -> bool:
        """Its worker cannot install when another one has changed: it must go."""
        cannot_install = fault.never_served and "install" in fault.orders
        return cannot_install and self.policy == "rolling"

    def _restart_coordinator(self) -> None:
        self.fleet.restart_coordinator(f"--commit-policy={self.policy}")

    def _phase(self, fault: Fault, version: int, moment: float) -> str:
        """How far the refit had come; an order waits for its step by itself."""
        if fault.strike is None:
            return "ordered"
        return phase_at(self.fleet.events.seen, version, moment)

    async def _strike(self, fault: Fault, index: int) -> None:
        graph = self.fleet.graph
        match fault.strike, fault.target:
            case "kill", "coordinator":
                await asyncio.to_thread(self._restart_coordinator)
            case "stall", "coordinator":
                await stall(graph.processes["coordinator"].send)
            case "kill", "trainer":
                self.trainer.kill()
            case "stall", "trainer":
                await stall(self.trainer.child.send_signal)
            case "stall", "worker":
                await stall(graph.processes[f"worker{index}"].send)
            case "kill", "worker":
                graph.processes[f"worker{index}"].kill()
            case "kill", "rank":
                rank_process(graph.processes[f"worker{index}"].pid).kill()

    def _bring_back(self, index: int) -> None:
        """What is left of a worker ends by itself; another one takes its place, and
        serves what the fleet serves as soon as it serves."""
        graph = self.fleet.graph
        worker = graph.processes.pop(f"worker{index}")
        try:
            self.fleet.wait_for_the_end(worker)
        except AssertionError as error:
            self._violated("leaked", str(error))
            worker.kill()
        graph.start_worker(index)
        graph.wait_for_worker(index, "generate")
        served = {
            member: status["version"]
            for member, status in self.fleet.members().items()
            if member not in self.killed
        }
        if len(served) != 2 or len(set(served.values())) != 1:
            self._violated("wrong_version", f"a joiner is admitted, and all: {served}")

    def _publish(self) -> int:
        version = next(self.fleet.versions)
        name = self.draw.choice(["A", "B", "C"])
        self.checkpoints[version] = name
        step = {"version": version, "checkpoint": str(self.fleet.models[name])}
        self.trainer.child.stdin.write(json.dumps(step) + "\n")
        self.trainer.child.stdin.flush()
        return version

    # --- how it ends ------------------------------------------------------------

    async def _await_end(self, version: int, fault: Fault) -> END | None:
        """Every version that its trainer can repeat ends in one event, and is given
        back to the trainer."""
        if (fault.strike, fault.target) == ("kill", "trainer"):
            end = await self._end_event(version, 15.0)
            self.trainer = await asyncio.to_thread(self._start_trainer)
            return end
        end = await self._end_event(version, 90.0)
        if end is None:
            self._violated("leaked", f"{fault.name}: version {version} does not end")
        await self._await_release(version)
        return end

    async def _end_event(self, version: int, seconds: float) -> END | None:
        with contextlib.suppress(AssertionError):
            end = await asyncio.to_thread(
                self.fleet.events.wait_for,
                END,
                lambda event: event.version == version,
                seconds,
            )
            self.outcome.ends[type(end).__name__] += 1
            return end
        return None

    async def _await_release(self, version: int) -> None:
        """The trainer may write into its buffer again, and is told how it ended."""
        try:
            outcome = await asyncio.to_thread(self._released, version)
        except queue.Empty:
            what = f"the handle of version {version} is not released"
            self._violated("leaked", what)
            return
        deadline = time.monotonic() + RELEASE_SECONDS
        while not self._told(version, outcome):
            if time.monotonic() > deadline:
                what = f"version {version} is released as {outcome}; no event says so"
                self._violated("wrong_version", what)
                return
            await asyncio.sleep(0.1)

    def _released(self, version: int) -> str:
        deadline = time.monotonic() + RELEASE_SECONDS
        while True:
            left = max(0.0, deadline - time.monotonic())
            message = json.loads(self.trainer.lines.get(timeout=left))
            if message.get("released") == version:
                return message["outcome"]

    def _told(self, version: int, outcome: str) -> bool:
        kind = OUTCOMES[outcome]
        return len(self.fleet.events.of(kind, version)) > 0

    def _check_named(
        self, gone: int, version: int, end: END | None, phase: str
    ) -> None:
        """The event that ends a version says on whom it failed, or who is missing; of
        one that had changed before it went there is nothing to say."""
        changed = {e.worker for e in self.fleet.events.of(WorkerRefitted, version)}
        if phase == "ended" or gone in changed:
            return
        match end:
            case RefitFailed(failure=failure):
                named = failure.worker == gone
            case RefitCompleted(excluded=excluded):
                named = gone in {failure.worker for failure in excluded}
            case _:
                named = False
        if not named:
            self._violated("leaked", f"nobody says that worker {gone} is gone: {end}")

    # --- what must hold ---------------------------------------------------------

    async def _settle(self, after: str) -> None:
        """A good version goes through, and nothing is left behind."""
        version = self._publish()
        try:
            await asyncio.to_thread(
                self.fleet.events.wait_for,
                RefitCompleted,
                lambda event: event.version == version,
            )
        except AssertionError as error:
            self._violated("left_paused", f"after {after}: {error}")
            return
        await self._await_release(version)
        members = await asyncio.to_thread(self.fleet.members)
        for worker, status in members.items():
            state = (status["phase"], status["pending"], status["version"])
            if state != ("serving", None, version):
                self._violated("leaked", f"after {after}: worker {worker} is {state}")
        self.workers = {self.fleet.index_of(worker): worker for worker in members}
        if len(self.workers) != 2:
            self._violated("left_paused", f"after {after}: {len(members)} workers")
        for index in self.workers:
            self._check_held(index, after)

    def _check_held(self, index: int, after: str) -> None:
        """A worker's processes hold what they held after their first refit."""
        group = self.fleet.graph.processes[f"worker{index}"].pid
        now = held(group)
        before = self.baseline.setdefault(group, now)
        threads = now.threads - before.threads
        descriptors = now.descriptors - before.descriptors
        most = self.outcome.grown
        self.outcome.grown = Held(
            max(threads, most.threads), max(descriptors, most.descriptors)
        )
        if threads > THREADS or descriptors > DESCRIPTORS:
            what = f"after {after}: worker{index} holds {now}, after its first refit"
            self._violated("leaked", f"{what} {before}")

    async def _all_answer(self, after: str) -> None:
        """Every worker that lives, whatever it waits for."""

        async def answer(worker: int) -> None:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._ask(worker, self.load.randrange(len(self.fleet.asked)))
            except TimeoutError:
                what = f"{after}: worker {worker} gives no answer"
                self._violated("left_paused", f"{what} within {ANSWER_SECONDS} s")

        await asyncio.gather(*map(answer, self.workers.values()))

    async def _observe(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            worker = self.load.choice(sorted(self.workers.values()))
            await self._ask(worker, self.load.randrange(len(self.fleet.asked)))
            await asyncio.sleep(0.1)

    async def _ask(self, worker: int, prompt: int) -> None:
        began = time.time()
        pinned = {**ASK, "backend_instance_id": worker}
        asked = self.fleet.asked[prompt]
        completion = await self.client.complete(asked, MAX_TOKENS, nvext=pinned)
        seen = Observation(worker, prompt, began, time.time(), completion)
        self.observed.append(seen)

    def _judge(self) -> None:
        """Every response is what its worker's version produces."""
        judge = Judge(
            self.fleet.expected,
            self.checkpoints,
            [e for e in self.fleet.events.seen if isinstance(e, WorkerRefitted)],
            self.first,
            self.killed,
        )
        for seen in self.observed:
            verdict = judge.verdict(seen)
            self.outcome.verdicts[verdict.kind] += 1
            if verdict.kind == "wrong":
                self._violated("wrong_version", verdict.why)

    def _violated(self, kind: str, what: str) -> None:
        self.console.print(f"{kind}: {what}", style="red", markup=False)
        self.outcome.violated[kind] += 1


async def stall(send: Callable[[int], object]) -> None:
    send(signal.SIGSTOP)
    await asyncio.sleep(STALL_SECONDS)
    send(signal.SIGCONT)
