# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Processes that tests talk to: a trainer, and the event stream as the CLI shows it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from dynamo.refit.events import AnyEvent, Event
from graphs.local import LocalGraph

T = TypeVar("T", bound=Event)

#: Processes import torch while engines keep both cores busy.
PATIENCE_SECONDS = 90.0


class _Lines:
    """A child's standard output, line by line, read by a thread."""

    def __init__(
        self, graph: LocalGraph, command: list[str], name: str, **environment: str
    ) -> None:
        with (graph.directory / f"{name}.log").open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, *command],
                env={
                    **os.environ,
                    **graph.environment,
                    "DYN_LOG": "error",
                    **environment,
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.child.stdout:
            self.lines.put(line)

    def kill(self) -> None:
        self.child.send_signal(signal.SIGKILL)
        self.child.wait()

    def close(self) -> None:
        self.child.stdin.close()
        try:
            self.child.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()


class Trainer(_Lines):
    """A process of :mod:`graphs.trainer`, or one of :mod:`tests.support.trainers`."""

    def __init__(
        self,
        graph: LocalGraph,
        initial: Path,
        *,
        change: str = "none",
        tensor: str = "-",
        model: str | None = None,
        mode: str = "snapshot",
        **environment: str,
    ) -> None:
        command = ["-m", "tests.support.trainers", change, tensor, "--"]
        command += ["--model-name", model or graph.name, "--initial", str(initial)]
        command += ["--mode", mode]
        super().__init__(graph, command, f"trainer-{change}", **environment)
        if environment.get("RANK", "0") == "0":
            self.hear("ready")

    def publish(
        self, version: int, checkpoint: Path, in_flight: str | None = None
    ) -> None:
        step = {"version": version, "checkpoint": str(checkpoint)}
        if in_flight is not None:
            step["in_flight"] = in_flight
        self.child.stdin.write(json.dumps(step) + "\n")
        self.child.stdin.flush()
        self.hear("published")

    def released(self) -> dict:
        return self.hear("released")

    def hear(self, what: str) -> dict:
        message = json.loads(self.lines.get(timeout=PATIENCE_SECONDS))
        assert what in message, message
        return message

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Events(_Lines):
    """The events of a graph, through ``dynamo-refit watch --json``."""

    def __init__(self, graph: LocalGraph) -> None:
        command = ["-m", "dynamo.refit.cli", "watch", "--json"]
        super().__init__(graph, command, "watch")
        self._seen: list[AnyEvent] = []
        self._waited_for = 0

    def wait_for(
        self,
        kind: type[T],
        matches: Callable[[T], bool] = lambda event: True,
        seconds: float = PATIENCE_SECONDS,
    ) -> T:
        """The next event of ``kind`` that ``matches``, from the last one waited for."""
        deadline = time.monotonic() + seconds
        while True:
            while self._waited_for < len(self._seen):
                event = self._seen[self._waited_for]
                self._waited_for += 1
                if isinstance(event, kind) and matches(event):
                    return event
            if not self._see(deadline - time.monotonic()):
                raise AssertionError(
                    f"no {kind.__name__} within {seconds} s; last: {self._seen[-3:]}"
                )

    def find(self, kind: type[T], version: int) -> T:
        """The one event of ``kind`` about ``version``, seen or still to come."""
        (event,) = self.find_all(kind, version, 1)
        return event

    def find_all(self, kind: type[T], version: int, count: int) -> list[T]:
        """The ``count`` events of ``kind`` about ``version``, each from a publisher of
        its own: what one says may overtake what another one said before.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(found := self.of(kind, version)) < count:
            if not self._see(deadline - time.monotonic()):
                raise AssertionError(
                    f"{len(found)} {kind.__name__} of version {version} within "
                    f"{PATIENCE_SECONDS} s, not {count}; last: {self._seen[-3:]}"
                )
        assert len(found) == count, found
        return found

    def of(self, kind: type[T], version: int) -> list[T]:
        """Events of ``kind`` about ``version`` that have come so far."""
        return [e for e in self.seen if isinstance(e, kind) and e.version == version]

    @property
    def seen(self) -> list[AnyEvent]:
        """Everything that has come so far, in that order."""
        while self._see(0):
            pass
        return self._seen

    def _see(self, seconds: float) -> bool:
        """Whether another event comes in this time."""
        try:
            line = self.lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return False
        self._seen.append(msgspec.json.decode(line, type=AnyEvent))
        return True


def fleet_status(graph: LocalGraph) -> dict:
    """``dynamo-refit status --json``."""
    return ask_cli(graph, "status")


def ask_cli(graph: LocalGraph, *words: str) -> dict:
    """The last line of ``dynamo-refit WORDS --json``, which must succeed.

    Raises:
        CalledProcessError: it did not; with what it said.
    """
    answer = subprocess.run(
        [sys.executable, "-m", "dynamo.refit.cli", *words, "--json"],
        env={**os.environ, **graph.environment, "DYN_LOG": "error"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    return json.loads(answer.stdout.splitlines()[-1])
