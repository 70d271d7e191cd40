# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A child process that a test talks to over a pipe: requests in, results out."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from graphs.local import CPU_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]

#: A child imports vLLM, perhaps while other tests keep the cores busy.
PATIENCE_SECONDS = 120.0


class ChildFailed(Exception):
    """A request raised in a child process, or it died; its output is in the text."""


class Child:
    """A process of ``python -m module`` that answers requests over a pipe.

    It gets the pipe's descriptor as its first argument and answers each
    ``(method, arguments)`` with ``(True, result)`` or ``(False, traceback)``.
    """

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self.log = log
        mine, theirs = multiprocessing.Pipe()
        self._pipe: Connection = mine
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), *arguments],
                env={**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def send(self, method: str, *arguments: Any) -> None:
        self._pipe.send((method, arguments))

    def receive(self, seconds: float = PATIENCE_SECONDS) -> Any:
        """The result of the oldest request that was sent.

        Raises:
            ChildFailed: it raised there, or took too long, or the process is gone.
        """
        try:
            if not self._pipe.poll(seconds):
                raise ChildFailed(f"no answer in {seconds} s\n{self._tail()}")
            fine, result = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise ChildFailed(f"the process is gone\n{self._tail()}") from error
        if not fine:
            raise ChildFailed(result)
        return result

    def ask(self, method: str, *arguments: Any) -> Any:
        self.send(method, *arguments)
        return self.receive()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._pipe.close()

    def close(self) -> None:
        """Closing the pipe ends the process."""
        self._pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def answer_requests(
    descriptor: int,
    target: Any,
    idle: Callable[[], None] = lambda: None,
    idle_seconds: float | None = None,
) -> None:
    """The child's side: call the methods of ``target`` that are asked for, until the
    parent closes the pipe.

    ``idle`` is called every ``idle_seconds`` while nothing is asked.
    """
    pipe = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            if not pipe.poll(idle_seconds):
                idle()
                continue
            method, arguments = pipe.recv()
            try:
                answer = (True, getattr(target, method)(*arguments))
            except Exception:
                answer = (False, traceback.format_exc())
            pipe.send(answer)
