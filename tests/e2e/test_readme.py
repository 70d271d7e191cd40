# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The README, read by a new user: every command is run, in its order, on the graph that
the README itself starts, and says what the page shows. Comes before the tests that
share a graph: two engines at a time are too many for two cores."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import Block, blocks, missing_lines

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.core,
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).resolve().parents[2]

#: Commands that are not run here, and why.
EXEMPT = {
    "make demo": "tests/e2e/test_demo.py runs what it runs",
    "make test": "this is a part of it",
}

#: Python that is not run here, by a name in it, and why.
EXEMPT_PYTHON = {
    "bridge_shards": "needs Megatron-Bridge; tests/unit/test_megatron_bridge.py has "
    "what it takes",
}

#: Commands that run until they are interrupted: what they say when they are ready.
LONG_RUNNING = {
    "python -m graphs.agg ": "DYN_NAMESPACE=",
    "dynamo-refit watch": None,
}

#: Where the README writes and reads, and what stands for it in the test's directory.
PLACES = {"/tmp/": "/", "./checkpoint": "/model-a"}

COMMAND_SECONDS = 150.0
START_SECONDS = 240.0
STOP_SECONDS = 30.0

#: What the Python of the README takes for granted. The weights have to move from block
#: to block: the fleet refuses nothing, but a version of old bytes would prove little.
TRAINER = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({model!r}, dtype="auto")
step = {step}
with torch.no_grad():
    for parameter in model.parameters():
        parameter *= 1 + step / 1000
"""
SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from dynamo.refit.publish.publisher import WeightPublisher
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
fully_shard(model)
"""
OUTCOME = """
print("outcome", handle.wait().outcome)
publisher.close()
"""


class Program:
    """A command that goes on, and what it has said."""

    def __init__(self, child: subprocess.Popen) -> None:
        self.child = child
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.child.stdout:
            self.lines.append(line)

    @property
    def said(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.said:
            assert self.child.poll() is None, self.said
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.said}"
            time.sleep(0.1)

    def interrupt(self) -> int:
        """As Ctrl-C does, to everything that the terminal runs; the exit code."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGINT)
        try:
            code = self.child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            code = self.child.wait()
        self._reader.join(STOP_SECONDS)
        return code


class Reader:
    """A user with a terminal: what was sourced and exported stays."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ran: list[str] = []
        self.running: dict[str, Program] = {}
        self._prelude: list[str] = []

    def obey(self, block: Block) -> str:
        """Run a block of shell commands; what they said."""
        said = ""
        for command in block.commands:
            if command in EXEMPT:
                continue
            self.ran.append(command)
            for shown, here in PLACES.items():
                command = command.replace(f" {shown}", f" {self.directory}{here}")
            if command.split()[0] in ("source", "export"):
                self._prelude.append(command)
            elif ready := [k for k in LONG_RUNNING if f"{command} ".startswith(k)]:
                said += self._begin(command, LONG_RUNNING[ready[0]])
            else:
                said += self.run(command)
        return said

    def run(self, command: str) -> str:
        program = Program(self._start(command))
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.child.wait(COMMAND_SECONDS)
        code = program.interrupt()
        assert code == 0, f"{command}: {code}\n{program.said}"
        return program.said

    def run_python(self, text: str, step: int, ranks: int = 1) -> str:
        """A block of Python, in a trainer whose variables have the README's names."""
        code = TRAINER.format(model=str(self.directory / "model-b"), step=step)
        code += (SHARDED if ranks > 1 else "") + text.replace('"my-model"', '"tiny"')
        if "handle" not in text:
            code += "\nhandle = publisher.publish(version=step)\n"
        file = self.directory / f"block-{step}.py"
        file.write_text(code + OUTCOME)
        torchrun = f"torchrun --standalone --nproc-per-node {ranks}"
        return self.run(f"{torchrun if ranks > 1 else 'python'} {file}")

    def _begin(self, command: str, ready: str | None) -> str:
        program = self.running[command] = Program(self._start(command))
        if ready is None:
            return ""
        program.wait_for(ready, START_SECONDS)
        # "... with the exports that it has printed"
        self._prelude += re.findall(r"^  (export \w+=\S+)$", program.said, re.M)
        return program.said

    def _start(self, command: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", "\n".join([*self._prelude, f"exec {command}"])],
            cwd=ROOT,
            env={**os.environ, "DYN_LOG": "error", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    # A graph that is killed would leave its processes.
    for program in reversed(reader.running.values()):
        program.interrupt()


def test_what_the_readme_says_happens(reader: Reader) -> None:
    said, steps, checked = "", iter(range(20, 40)), 0
    for block in blocks((ROOT / "README.md").read_text()):
        match block.language:
            case "bash":
                said = reader.obey(block)
            case "text":
                missing = missing_lines(block.text, said)
                assert missing == [], f"the page shows {missing}, but it said:\n{said}"
                checked += 1
            case "python" if not any(name in block.text for name in EXEMPT_PYTHON):
                ranks = 2 if "world_size" in block.text else 1
                ended = reader.run_python(block.text, next(steps), ranks)
                assert ended.count("outcome completed") == ranks, ended
            case "json":
                ask(reader, json.loads(block.text))
            case language:
                assert language in ("", "python"), f"who runs {language}? {block.text}"
    # The walk was no walk past everything.
    assert checked >= 3
    assert next(steps) == 22
    assert {command.split()[0] for command in reader.ran} >= {
        "source",
        "dynamo-refit",
        "python",
    }
    end(reader)


def ask(reader: Reader, fields: dict) -> None:
    """A request with the fields that the README shows."""
    (graph,) = [p for c, p in reader.running.items() if "graphs.agg" in c]
    (url,) = re.findall(r"serving tiny at (\S+)", graph.said)
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, **fields}
    request = urllib.request.Request(
        f"{url}/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=COMMAND_SECONDS) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 8


def end(reader: Reader) -> None:
    """Ctrl-C in every terminal: nothing complains, and the graph says that it stops."""
    for command, program in reversed(list(reader.running.items())):
        code = program.interrupt()
        assert "Traceback" not in program.said, program.said
        if command.startswith("dynamo-refit watch"):
            # One version after the other went by, in whatever form.
            assert re.search(r"\b21\b", program.said), program.said
            assert re.search(r"\b42\b", program.said), program.said
        else:
            assert code == 0
            assert program.lines[-1] == "stopping\n"
