# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``make demo``: refit a serving graph four times under load and check every answer.

Everything is real: Dynamo's frontend, a vLLM worker with two tensor-parallel
ranks, the coordinator, and a trainer process that publishes checkpoints B, C, A, B
over NIXL while requests stream. After each completion event, greedy tokens and log
probabilities must equal, bit for bit, those of a fresh engine on that checkpoint.
The last line is JSON; the exit code is 0 only if all of it holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from dynamo.runtime import DistributedRuntime
from rich.console import Console
from rich.table import Table

from dynamo.refit.bus import EventSubscriber
from dynamo.refit.events import (
    REFIT_EVENTS,
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    WorkerRefitted,
    WorkerStaged,
)
from graphs.client import Client, Load
from graphs.local import GraphError, LocalGraph, interruptible
from graphs.references import MAX_TOKENS, Answer, prompts, reference_answers
from graphs.tiny_model import make_checkpoint

TENSOR_PARALLEL = 2
SEEDS = {"A": 1, "B": 2, "C": 3}
PUBLISHED = ("B", "C", "A", "B")
REFIT_SECONDS = 120.0
CACHE = Path(__file__).resolve().parent.parent / ".cache"

console = Console()
_began = time.monotonic()


@dataclass
class Refit:
    """One published version: what the events said and what clients saw."""

    version: int
    checkpoint: str
    staged: WorkerStaged | None = None
    refitted: WorkerRefitted | None = None
    completed: RefitCompleted | None = None
    since: float = 0.0
    until: float = 0.0
    mismatched: int = 0
    stale_cached_tokens: int = 0
    client_gap_ms: float = 0.0


@dataclass
class Outcome:
    """The numbers of the last line."""

    refits: list[Refit] = field(default_factory=list)
    events: Counter = field(default_factory=Counter)
    requests: int = 0
    failed: int = 0
    truncated: int = 0
    mismatched: int = 0
    outside_gap_ms: float = 0.0

    def summary(self) -> dict:
        warm = [
            rank.counters for refit in self.refits[1:] for rank in refit.staged.ranks
        ]
        return {
            "refits": len(self.refits),
            "requests": self.requests,
            "failed": self.failed,
            "truncated": self.truncated,
            "mismatched": self.mismatched,
            "stale_cached_tokens": sum(r.stale_cached_tokens for r in self.refits),
            "stall_ms_max": round(max(r.client_gap_ms for r in self.refits), 1),
            "engine_stall_ms_max": round(
                max(r.refitted.timings.stall_ms for r in self.refits), 1
            ),
            "gap_ms_max_outside_refits": round(self.outside_gap_ms, 1),
            "warm": {
                "allocations": sum(c.allocations for c in warm),
                "registrations": sum(c.registrations for c in warm),
                "descriptor_builds": sum(c.descriptor_builds for c in warm),
            },
            "events": dict(sorted(self.events.items())),
        }

    def holds(self) -> bool:
        summary = self.summary()
        wrong = ("failed", "truncated", "mismatched", "stale_cached_tokens")
        count = len(PUBLISHED)
        return (
            summary["refits"] == count
            and summary["requests"] > 0
            and not any(summary[name] for name in wrong)
            and not any(summary["warm"].values())
            and summary["events"].get("completed") == count
            and "failed" not in summary["events"]
        )


class Trainer:
    """The trainer process of :mod:`graphs.trainer`."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    @classmethod
    async def start(cls, graph: LocalGraph, initial: Path) -> Trainer:
        log = (graph.directory / "trainer.log").open("ab")
        with log:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "graphs.trainer",
                "--model-name",
                graph.name,
                "--initial",
                str(initial),
                env={**os.environ, **graph.environment},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        trainer = cls(child)
        await trainer.hear("ready")
        return trainer

    async def publish(self, version: int, checkpoint: Path) -> None:
        step = {"version": version, "checkpoint": str(checkpoint)}
        self._child.stdin.write(json.dumps(step).encode() + b"\n")
        await self._child.stdin.drain()

    async def hear(self, what: str) -> dict:
        """The next message, which must have the key ``what``."""
        async with asyncio.timeout(REFIT_SECONDS):
            line = await self._child.stdout.readline()
        message = json.loads(line or b"{}")
        if what not in message:
            raise GraphError(f"the trainer said {message}, not {what!r}")
        return message

    async def stop(self) -> None:
        self._child.stdin.close()
        try:
            async with asyncio.timeout(10):
                await self._child.wait()
        except TimeoutError:
            self._child.kill()
            await self._child.wait()


def main() -> int:
    models = {
        name: make_checkpoint(CACHE / "models" / f"qwen3-{seed}", seed=seed)
        for name, seed in SEEDS.items()
    }
    asked = prompts()
    graph = LocalGraph(models["A"], tensor_parallel=TENSOR_PARALLEL)
    with interruptible(), graph:
        try:
            expected = compute_references(models, asked)
            graph.start(report=say)
            os.environ.update(graph.environment)
            outcome = uvloop.run(refit_under_load(graph, models, asked, expected))
        except (GraphError, TimeoutError) as error:
            console.print(f"[red]failed[/]: {error or 'timed out'}")
            return 1
        except KeyboardInterrupt:
            say("interrupted; stopping everything")
            return 130
        say("stopping the graph")
    console.print(table(outcome.refits))
    print(json.dumps(outcome.summary()))
    return 0 if outcome.holds() else 1


def compute_references(
    models: Mapping[str, Path], asked: Sequence[Sequence[int]]
) -> dict[str, list[Answer]]:
    expected = {}
    for name, checkpoint in models.items():
        say(f"reference answers of a fresh engine on checkpoint {name}")
        expected[name] = reference_answers(
            checkpoint,
            tensor_parallel=TENSOR_PARALLEL,
            asked=asked,
            cache=CACHE / "references",
        )
    return expected


async def refit_under_load(
    graph: LocalGraph,
    models: Mapping[str, Path],
    asked: Sequence[Sequence[int]],
    expected: Mapping[str, list[Answer]],
) -> Outcome:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    topic = runtime.endpoint(f"{graph.namespace}.refit.{REFIT_EVENTS}")
    outcome = Outcome()
    async with Client(graph.url, graph.name) as client, EventSubscriber(topic) as bus:
        start = Refit(0, "A")
        await check(client, asked, expected["A"], start)
        outcome.mismatched += start.mismatched
        say(f"checkpoint A serves; {start.mismatched} answers differ from its own")
        trainer = await Trainer.start(graph, models["A"])
        load = Load(client, prompts(count=5, seed=11), streams=2, max_tokens=96)
        load.start()
        try:
            for version, name in enumerate(PUBLISHED, start=1):
                refit = Refit(version, name, since=time.monotonic())
                outcome.refits.append(refit)
                await trainer.publish(version, models[name])
                await follow(bus, refit, outcome.events)
                refit.until = time.monotonic()
                await check(client, asked, expected[name], refit)
                outcome.mismatched += refit.mismatched
                say(describe(refit))
                for message in ("published", "released"):
                    await trainer.hear(message)
        finally:
            await load.stop()
            await trainer.stop()
    runtime.shutdown()
    for refit in outcome.refits:
        refit.client_gap_ms = load.longest_gap(refit.since, refit.until) * 1e3
    refitting = [(refit.since, refit.until) for refit in outcome.refits]
    outcome.outside_gap_ms = load.longest_gap_outside(refitting) * 1e3
    outcome.requests = len(load.completions)
    outcome.failed, outcome.truncated = len(load.failed), len(load.truncated)
    for completion in load.failed[:3]:
        say(f"a request failed: {completion.error}")
    return outcome


async def follow(bus: EventSubscriber, refit: Refit, events: Counter) -> None:
    """Take events until the refit has ended."""
    async with asyncio.timeout(REFIT_SECONDS):
        async for event in bus:
            events[_name(event)] += 1
            match event:
                case WorkerStaged(version=refit.version):
                    refit.staged = event
                case WorkerRefitted(version=refit.version):
                    refit.refitted = event
                case RefitCompleted(version=refit.version):
                    refit.completed = event
                case RefitFailed() | RefitRefused():
                    raise GraphError(f"{event}")
            if refit.staged and refit.refitted and refit.completed:
                return
    raise GraphError("the event stream ended")


async def check(
    client: Client, asked: Sequence[Sequence[int]], expected: list[Answer], refit: Refit
) -> None:
    """Ask everything twice: with a cold prefix cache, then with a hot one."""
    for hot in (False, True):
        for prompt, answer in zip(asked, expected, strict=True):
            got = await client.complete(prompt, MAX_TOKENS)
            refit.mismatched += got.answer != answer
            if not hot:
                refit.stale_cached_tokens += got.cached_tokens


def describe(refit: Refit) -> str:
    ranks = refit.staged.ranks
    stall = refit.refitted.timings.stall_ms
    return (
        f"version {refit.version} (checkpoint {refit.checkpoint}): "
        f"{refit.completed.seconds * 1e3:.0f} ms from event to event, "
        f"{ranks[0].session} session, engine stall {stall:.1f} ms, "
        f"{refit.mismatched} answers differ, "
        f"{refit.stale_cached_tokens} stale tokens cached"
    )


def table(refits: Sequence[Refit]) -> Table:
    """A row per refit; milliseconds, the slowest rank where ranks differ."""
    made = Table(
        title="milliseconds per refit",
        caption="stall: the engine's pause; gap: the longest wait of a client for a "
        "token; built: allocations/registrations/descriptor lists",
        padding=(0, 0),
    )
    headings = (
        "v", "of", "cache", "MiB", "stage", "pull", "pause", "install", "resume",
        "stall", "gap", "built",
    )  # fmt: skip
    for heading in headings:
        made.add_column(heading, justify="right")
    for refit in refits:
        ranks, commit = refit.staged.ranks, refit.refitted.timings
        stage = max(r.timings.finished_at - r.timings.started_at for r in ranks)
        counters = [r.counters for r in ranks]
        built = "/".join(
            str(sum(getattr(c, name) for c in counters))
            for name in ("allocations", "registrations", "descriptor_builds")
        )
        made.add_row(
            str(refit.version),
            refit.checkpoint,
            ranks[0].session,
            f"{sum(r.nbytes for r in ranks) / 2**20:.1f}",
            f"{stage * 1e3:.1f}",
            f"{max(r.timings.pull_ms for r in ranks):.1f}",
            f"{commit.pause_ms:.1f}",
            f"{commit.install_ms:.1f}",
            f"{commit.resume_ms:.1f}",
            f"{commit.stall_ms:.1f}",
            f"{refit.client_gap_ms:.1f}",
            built,
        )
    return made


def say(line: str) -> None:
    console.print(f"[dim]{time.monotonic() - _began:6.1f} s[/]  {line}")


def _name(event: Event) -> str:
    """``RefitCompleted`` as ``completed``, ``WorkerRefitted`` as ``refitted``."""
    name = type(event).__name__
    return name.removeprefix("Refit").removeprefix("Worker").lower()


if __name__ == "__main__":
    sys.exit(main())
