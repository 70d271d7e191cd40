# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Kills, stalls and corruptions of the processes of a running graph, under load. Every
response is compared with what its worker's version produces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import tempfile
import time
from collections import Counter
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
from graphs.client import Client, Completion
from graphs.references import MAX_TOKENS
from tests.support.live_fleet import Fleet, live_fleet
from tests.support.processes import Trainer

FAULTS = (
    "kill coordinator",
    "stall coordinator",
    "kill trainer",
    "stall trainer",
    "stall worker",
    "stage fails",
    "stage is slow",
    "corrupt source",
    "install fails once",
    "install fails",
    "install is slow",
    "kill coordinator in the barrier",
    "kill worker",
)

#: A version with these is served by nobody.
NEVER_SERVED = ("stage fails", "corrupt source", "install fails")

STALL_SECONDS = 3.0

#: How exact the times of events and responses are taken to be, in seconds.
BLUR_SECONDS = 1.0


@dataclass(frozen=True)
class Observation:
    """One response of one worker; Unix seconds."""

    worker: int
    prompt: int
    began: float
    ended: float
    completion: Completion


@dataclass
class Outcome:
    """What all real faults came to."""

    injected: int = 0
    by_name: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    violated: Counter[str] = field(default_factory=Counter)
    responses: int = 0
    straddled: int = 0
    failed_with_their_worker: int = 0


def real_faults(count: int, seed: int, console: Console) -> Outcome:
    """Inject ``count`` faults, all kinds in turn, with moments drawn from ``seed``."""
    with (
        tempfile.TemporaryDirectory(prefix="refit-faults-") as directory,
        live_fleet("file", Path(directory)) as fleet,
    ):
        outcome = asyncio.run(LiveFaults(fleet, seed, console).run(count))
    table = Table(title=f"{count} faults of a running graph")
    for name in ("fault", "injected"):
        table.add_column(name)
    for name, times in sorted(outcome.by_name.items()):
        table.add_row(name, str(times))
    console.print(table)
    console.print(
        f"{outcome.responses} responses, {outcome.straddled} of them across a change, "
        f"{outcome.failed_with_their_worker} lost with a killed worker; "
        f"versions ended: {dict(outcome.ends)}"
    )
    return outcome


class LiveFaults:
    """One run over ``fleet``."""

    def __init__(self, fleet: Fleet, seed: int, console: Console) -> None:
        self.fleet = fleet
        self.draw = random.Random(seed)
        self.console = console
        self.outcome = Outcome()
        self._torn = fleet.graph.directory / "torn"
        self.trainer = self._start_trainer()
        #: Which checkpoint a version is of; ``None``: what workers start with.
        self.checkpoints: dict[int | None, str] = {None: "A"}
        self.observed: list[Observation] = []
        #: When a worker's process was killed.
        self.killed: dict[int, float] = {}
        self.workers: list[int] = []
        self.first = set(fleet.members())

    async def run(self, count: int) -> Outcome:
        stop = asyncio.Event()
        async with Client(self.fleet.graph.url, self.fleet.graph.name) as client:
            await self._settle("the start")
            observers = [
                asyncio.create_task(self._observe(client, stop)) for _ in range(3)
            ]
            for number in range(count):
                name = FAULTS[number % len(FAULTS)]
                began = time.monotonic()
                await self._inject(name)
                await self._settle(name)
                self.outcome.injected += 1
                self.outcome.by_name[name] += 1
                seconds = time.monotonic() - began
                self.console.print(f"{number + 1:3} {name}: {seconds:.1f} s")
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

    # --- faults -----------------------------------------------------------------

    async def _inject(self, name: str) -> None:
        processes = self.fleet.graph.processes
        index = self.draw.randrange(2)
        moment = self.draw.uniform(0.0, 0.3)
        match name:
            case "stage fails":
                self.fleet.order(index, stage={"rank": 0, "error": "no memory"})
            case "stage is slow":
                self.fleet.order(index, stage={"rank": 0, "seconds": 2.0})
            case "corrupt source":
                self._torn.touch()
            case "install fails once":
                order = {"rank": 0, "error": "hiccup", "times": 1}
                self.fleet.order(index, install=order)
            case "install fails":
                self.fleet.order(index, install={"rank": 0, "error": "cannot write"})
            case "install is slow" | "kill coordinator in the barrier":
                self.fleet.order(index, install={"rank": 0, "seconds": 1.0})
        version = self._publish()
        await asyncio.sleep(moment)
        match name:
            case "kill coordinator" | "kill coordinator in the barrier":
                if "barrier" in name:
                    await asyncio.sleep(0.5)
                await asyncio.to_thread(self.fleet.restart_coordinator)
            case "stall coordinator":
                await self._stall(processes["coordinator"].send)
            case "kill trainer":
                self.trainer.kill()
            case "stall trainer":
                await self._stall(self.trainer.child.send_signal)
            case "stall worker":
                await self._stall(processes[f"worker{index}"].send)
            case "kill worker":
                await self._kill_worker(index)
        end = await self._await_end(version, trainer_lives=name != "kill trainer")
        if name in NEVER_SERVED and end is not RefitFailed:
            self._violated("wrong_version", f"{name}: version {version} ends as {end}")
        if name == "kill trainer":
            self.trainer = await asyncio.to_thread(self._start_trainer)
        self._torn.unlink(missing_ok=True)
        for env in self.fleet.graph.worker_envs:
            Path(env["REFIT_TEST_FAULTS"]).unlink(missing_ok=True)

    async def _stall(self, send: object) -> None:
        send(signal.SIGSTOP)
        await asyncio.sleep(STALL_SECONDS)
        send(signal.SIGCONT)

    async def _kill_worker(self, index: int) -> None:
        known = set(self.workers)
        now = time.time()
        graph = self.fleet.graph
        graph.processes.pop(f"worker{index}").kill()
        await asyncio.to_thread(graph.start_worker, index)
        await asyncio.to_thread(graph.wait_for_worker, index, "generate")
        members = await asyncio.to_thread(self.fleet.members)
        for worker in known - set(members):
            self.killed[worker] = now

    def _publish(self) -> int:
        version = next(self.fleet.versions)
        name = self.draw.choice(["A", "B", "C"])
        self.checkpoints[version] = name
        step = {"version": version, "checkpoint": str(self.fleet.models[name])}
        self.trainer.child.stdin.write(json.dumps(step) + "\n")
        self.trainer.child.stdin.flush()
        return version

    async def _await_end(self, version: int, *, trainer_lives: bool) -> type | None:
        """Every version that its trainer can repeat ends in one event."""
        seconds = 90.0 if trainer_lives else 15.0
        kinds = RefitCompleted | RefitFailed | RefitSuperseded
        with contextlib.suppress(AssertionError):
            end = await asyncio.to_thread(
                self.fleet.events.wait_for,
                kinds,
                lambda event: event.version == version,
                seconds,
            )
            self.outcome.ends[type(end).__name__] += 1
            return type(end)
        if trainer_lives:
            self._violated("leaked", f"version {version} does not end")
        return None

    # --- what must hold -----------------------------------------------------------

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
        members = await asyncio.to_thread(self.fleet.members)
        self.workers = sorted(members)
        for worker, status in members.items():
            state = (status["phase"], status["pending"], status["version"])
            if state != ("serving", None, version):
                self._violated("leaked", f"after {after}: worker {worker} is {state}")
        if len(members) != 2:
            self._violated("left_paused", f"after {after}: {len(members)} workers")

    async def _observe(self, client: Client, stop: asyncio.Event) -> None:
        while not stop.is_set():
            worker = self.draw.choice(self.workers)
            prompt = self.draw.randrange(len(self.fleet.asked))
            began = time.time()
            completion = await client.complete(
                self.fleet.asked[prompt],
                MAX_TOKENS,
                nvext={"backend_instance_id": worker},
            )
            self.observed.append(
                Observation(worker, prompt, began, time.time(), completion)
            )
            await asyncio.sleep(0.1)

    def _judge(self) -> None:
        """Every response is what its worker's version produces."""
        changes = [e for e in self.fleet.events.seen if isinstance(e, WorkerRefitted)]
        for seen in self.observed:
            self.outcome.responses += 1
            killed = self.killed.get(seen.worker)
            if seen.completion.error is not None:
                if killed is not None and seen.ended > killed - BLUR_SECONDS:
                    self.outcome.failed_with_their_worker += 1
                else:
                    self._violated("wrong_version", f"{seen.completion.error}")
                continue
            versions = self._possible(seen, changes)
            expected = {
                self.fleet.expected[self.checkpoints[version]][seen.prompt]
                for version in versions
            }
            if seen.completion.answer in expected:
                continue
            if len(versions) > 1:
                self.outcome.straddled += 1
            else:
                what = f"worker {seen.worker} answered unlike version {versions}"
                self._violated("wrong_version", what)

    def _possible(
        self, seen: Observation, changes: list[WorkerRefitted]
    ) -> set[int | None]:
        """The versions that its worker may have served meanwhile."""
        own = [event for event in changes if event.worker == seen.worker]
        # Start-up weights are served by those only that were there before any version.
        before: set[int | None] = {None} if seen.worker in self.first else set()
        during = set()
        for event in sorted(own, key=lambda event: event.at):
            if event.at < seen.began - BLUR_SECONDS:
                before = {event.version}
            elif event.at < seen.ended + BLUR_SECONDS:
                during.add(event.version)
        return before | during

    def _violated(self, kind: str, what: str) -> None:
        self.console.print(f"[red]{kind}: {what}")
        self.outcome.violated[kind] += 1
