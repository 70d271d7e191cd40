# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Run a Dynamo graph with refit on this machine, without containers.

Owns the processes and their private discovery: a directory, or an etcd and a NATS
server of its own. Stopping a graph, or leaving its ``with`` block, leaves no process
behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from graphs.servers import etcd_command, missing_servers, nats_command

#: ``file``: discovery in a directory, events over ZMQ; ``etcd``: etcd and NATS.
Plane = Literal["file", "etcd"]

#: For an engine on the CPU: small, eager, and quick to start.
CPU_WORKER_ARGS = (
    "--enforce-eager",
    "--dtype=bfloat16",
    "--block-size=32",
    "--max-model-len=2048",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=512",
    f"--kv-cache-memory-bytes={64 << 20}",
)

#: Arguments of a frontend with several workers. A request that the router has just
#: given to one that leaves routing then (drained, or fenced) fails in Dynamo 1.6,
#: unless it may be given to another one.
KV_ROUTER_ARGS = ("--router-mode", "kv", "--migration-limit", "3")

#: What vLLM needs on a CPU with few cores; anything set outside wins.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

#: What the last line of a worker ends with that refused to start.
REFUSAL = re.compile(r"dynamo-refit: \w+: .*")

#: In what Dynamo logs of every health check.
HEALTH_RECORD = "/health"

START_SECONDS = 240.0
STOP_SECONDS = 10.0


class GraphError(RuntimeError):
    """A part of the graph did not start, or died."""


class Process:
    """A child in a process group of its own, logging to a file."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                self.command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                # A group, not a session: Linux shares cores out to sessions first, and
                # ranks that spin in one of their own leave others none for seconds.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def send(self, number: int) -> None:
        """Send a signal to the whole group, if there still is one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self._child.wait()

    def ask_to_stop(self) -> None:
        if self.running:
            self._child.terminate()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Ask to end, then insist; the group's other processes go too."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(seconds)
        self.kill()

    def end_of_log(self, lines: int = 30) -> str:
        """The last lines, without the records of health checks; of a worker that
        refused to start its one line that says why."""
        kept = [
            line
            for line in self.log.read_text(errors="replace").splitlines()
            if HEALTH_RECORD not in line
        ]
        refusal = REFUSAL.search(kept[-1]) if kept else None
        return refusal.group() if refusal else "\n".join(kept[-lines:])


class LocalGraph:
    """Frontend, workers and refit coordinator as local processes.

    Args:
        model: directory of the checkpoint that the workers start with.
        name: served model name.
        tensor_parallel: ranks per worker.
        workers: how many, or the arguments that each has for itself.
        worker_args: arguments of all workers.
        worker_env: more environment for the workers.
        coordinator_args: arguments of ``python -m dynamo.refit``.
        coordinator_env: more environment for it.
        frontend_args: arguments of ``python -m dynamo.frontend``.
        plane: what carries discovery and events.
        directory: for logs and discovery; a temporary one by default.

    Raises:
        GraphError: the plane needs servers that are not there.
    """

    def __init__(
        self,
        model: Path,
        *,
        name: str = "tiny",
        tensor_parallel: int = 1,
        workers: int | Sequence[Sequence[str]] = 1,
        worker_args: Sequence[str] = CPU_WORKER_ARGS,
        worker_env: Mapping[str, str] | None = None,
        coordinator_args: Sequence[str] = (),
        coordinator_env: Mapping[str, str] | None = None,
        frontend_args: Sequence[str] = (),
        plane: Plane = "file",
        directory: Path | None = None,
        namespace: str = "dynamo",
    ) -> None:
        if plane == "etcd" and (missing := missing_servers()):
            raise GraphError(f"no {missing[0]}: run `make servers`")
        self.model = model
        self.name = name
        self.namespace = namespace
        self._temporary = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="refit-graph-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tensor_parallel = tensor_parallel
        self._workers = [()] * workers if isinstance(workers, int) else workers
        self._worker_args = tuple(worker_args)
        self.coordinator_args = tuple(coordinator_args)
        self._frontend_args = tuple(frontend_args)
        self._plane = plane
        self._etcd_port, self._nats_port = free_port(), free_port()
        #: Environment of each worker: two engines cannot listen on one port.
        self.worker_envs = [
            {
                "DYN_SYSTEM_PORT": str(free_port()),
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                **(worker_env or {}),
            }
            for _ in self._workers
        ]
        self.coordinator_env = {
            "DYN_SYSTEM_PORT": str(free_port()),
            **(coordinator_env or {}),
        }
        self.processes: dict[str, Process] = {}
        self.port = free_port()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in order to join this graph."""
        planes = {
            "file": {
                "DYN_DISCOVERY_BACKEND": "file",
                "DYN_FILE_KV": str(self.directory / "discovery"),
                "DYN_EVENT_PLANE": "zmq",
            },
            "etcd": {
                "DYN_DISCOVERY_BACKEND": "etcd",
                "ETCD_ENDPOINTS": f"http://127.0.0.1:{self._etcd_port}",
                "DYN_EVENT_PLANE": "nats",
                "NATS_SERVER": f"nats://127.0.0.1:{self._nats_port}",
            },
        }
        return {
            **planes[self._plane],
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_NAMESPACE": self.namespace,
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def commands(self) -> dict[str, list[str]]:
        """Every Dynamo process and its arguments of Python, in order of their start."""
        workers = {
            f"worker{index}": [
                "-m",
                "dynamo.refit.worker",
                "--model",
                str(self.model),
                "--served-model-name",
                self.name,
                "--tensor-parallel-size",
                str(self._tensor_parallel),
                *self._worker_args,
                *own,
            ]
            for index, own in enumerate(self._workers)
        }
        return {
            "frontend": [
                "-m",
                "dynamo.frontend",
                "--http-port",
                str(self.port),
                *self._frontend_args,
            ],
            **workers,
            "coordinator": ["-m", "dynamo.refit", *self.coordinator_args],
        }

    def start(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Start everything and wait until it serves.

        Engines start one after the other. ``report`` gets a line per step.

        Raises:
            GraphError: a process ended, or it took too long; with its last lines.
        """
        if self._plane == "etcd":
            report("starting etcd and NATS")
            self.start_servers()
        self.start_frontend()
        for index in range(len(self._workers)):
            report(f"starting worker {index} (TP={self._tensor_parallel})")
            self.start_worker(index)
            self.wait_for_worker(index)
        self.start_coordinator()
        for index in range(len(self._workers)):
            self.wait_for_worker(index, "generate")
        self.wait_for_model()
        report(f"serving {self.name} at {self.url}/v1")

    def start_servers(self) -> None:
        """Start the graph's own etcd and NATS, and wait until they answer."""
        data = self.directory / "etcd"
        self._spawn("etcd", etcd_command(self._etcd_port, free_port(), data))
        etcd = f"http://127.0.0.1:{self._etcd_port}/health"
        self.wait_until(
            "etcd is healthy", lambda: (fetch(etcd) or {}).get("health") == "true"
        )
        self.start_nats()

    def start_nats(self) -> None:
        """Start the graph's own NATS, where it was before if it has ended."""
        self._spawn("nats", nats_command(self._nats_port))
        self.wait_until("NATS listens", lambda: listens(self._nats_port))

    def start_frontend(self) -> Process:
        return self.run("frontend", self.commands["frontend"])

    def start_worker(self, index: int = 0) -> Process:
        name = f"worker{index}"
        return self.run(name, self.commands[name], **self.worker_envs[index])

    def start_coordinator(self) -> Process:
        command = self.commands["coordinator"]
        return self.run("coordinator", command, **self.coordinator_env)

    def wait_for_worker(self, index: int = 0, endpoint: str = "refit") -> None:
        """Until the worker serves ``endpoint``: ``refit`` as soon as its engine is up,
        ``generate`` when the coordinator has admitted it."""
        port = self.worker_envs[index]["DYN_SYSTEM_PORT"]

        def serves() -> bool:
            health = fetch(f"http://127.0.0.1:{port}/health")
            return health is not None and health["endpoints"].get(endpoint) == "ready"

        self.wait_until(f"worker{index} serves its {endpoint} endpoint", serves)

    def wait_for_model(self) -> None:
        """Until the frontend lists the model, moments after a worker is admitted."""
        self.wait_until("the model is listed", self._serves_model)

    def run(self, name: str, arguments: Sequence[str], **env: str) -> Process:
        """Start a Python process of this graph; a dead one of that name is replaced."""
        return self._spawn(name, [sys.executable, *arguments], **env)

    def _spawn(self, name: str, command: Sequence[str], **env: str) -> Process:
        process = Process(
            name,
            command,
            {
                **CPU_ENVIRONMENT,
                "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
                **os.environ,
                **self.environment,
                "DYN_LOG": "info",
                **env,
            },
            self.directory / f"{name}.log",
        )
        self.processes[name] = process
        return process

    def wait_until(
        self,
        what: str,
        condition: Callable[[], bool],
        seconds: float = START_SECONDS,
    ) -> None:
        """Poll ``condition``; a process that ends meanwhile is an error."""
        deadline = time.monotonic() + seconds
        while not condition():
            for process in self.processes.values():
                if not process.running:
                    raise GraphError(f"{process.name} ended:\n{process.end_of_log()}")
            if time.monotonic() > deadline:
                raise GraphError(f"not after {seconds:g} s: {what}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop every process and clean up; a second signal does not cut it short."""
        with uninterruptible():
            # The servers last: the others take themselves out of discovery.
            servers = [self.processes.pop(n, None) for n in ("etcd", "nats")]
            for processes in (self.processes.values(), filter(None, servers)):
                stop_all(list(processes))
        self.processes.clear()
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> LocalGraph:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serves_model(self) -> bool:
        listed = fetch(f"{self.url}/v1/models")
        return listed is not None and any(
            model["id"] == self.name for model in listed["data"]
        )


def stop_all(processes: Sequence[Process]) -> None:
    for process in processes:
        process.ask_to_stop()
    for process in processes:
        process.stop()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt, so that ``with`` blocks
    end; SIGINT too where the shell that started this process ignores it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with (
        _signals(signal.default_int_handler, signal.SIGINT),
        _signals(interrupt, signal.SIGTERM, signal.SIGHUP),
    ):
        yield


def uninterruptible() -> contextlib.AbstractContextManager[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP: what runs inside must come to its end."""
    return _signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _signals(handler: object, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread gets signals.
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def kv_events() -> list[str]:
    """Arguments of a worker that tells the KV router what is in its prefix cache."""
    publisher = {
        "publisher": "zmq",
        "topic": "kv-events",
        "endpoint": f"tcp://*:{free_port()}",
        "enable_kv_cache_events": True,
    }
    return ["--kv-events-config", json.dumps(publisher)]


def fetch(url: str) -> dict | None:
    """The JSON there, also that of an error; None where nothing answers so."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refusal:
        # A worker that may not serve yet is unhealthy, and says what it has.
        with contextlib.suppress(json.JSONDecodeError):
            return json.load(refusal)
    except (OSError, json.JSONDecodeError):
        pass
    return None


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


def free_port() -> int:
    """A port nobody listens on and that this process has not been given before, below
    32768: Dynamo 1.6 reads ``DYN_SYSTEM_PORT`` as a signed 16-bit number."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given_ports:
                _given_ports.add(port)
                return port
    raise GraphError("no free port between 20000 and 32000")


_given_ports: set[int] = set()
