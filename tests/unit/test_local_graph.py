# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a local graph would start, without starting it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graphs import agg_router, servers
from graphs.local import GraphError, LocalGraph, Process, fetch, free_port

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class Unhealthy(BaseHTTPRequestHandler):
    """A worker's system server before the worker may serve."""

    def do_GET(self) -> None:
        found = self.path == "/health"
        self.send_response(503 if found else 404)
        self.end_headers()
        self.wfile.write(b'{"endpoints": {"refit": "ready"}}' if found else b"gone")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unhealthy() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unhealthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_replicas_share_no_port(tmp_path: Path) -> None:
    graph = agg_router.build(tmp_path, replicas=3, directory=tmp_path)
    ports = [graph.port]
    for index, env in enumerate(graph.worker_envs):
        ports += [int(env["DYN_SYSTEM_PORT"]), int(env["VLLM_NIXL_SIDE_CHANNEL_PORT"])]
        events = json.loads(graph.commands[f"worker{index}"][-1])
        ports.append(int(events["endpoint"].rpartition(":")[2]))
    assert len(set(ports)) == len(ports) == 1 + 3 * 3


def test_what_is_set_for_the_workers_goes_before_what_is_chosen(tmp_path: Path) -> None:
    graph = LocalGraph(
        tmp_path, worker_env={"DYN_SYSTEM_PORT": "12345"}, directory=tmp_path
    )
    assert graph.worker_envs[0]["DYN_SYSTEM_PORT"] == "12345"


def test_processes_start_in_the_order_of_the_commands(tmp_path: Path) -> None:
    graph = agg_router.build(tmp_path, directory=tmp_path)
    assert list(graph.commands) == ["frontend", "worker0", "worker1", "coordinator"]


def test_a_port_is_given_once() -> None:
    given = [free_port() for _ in range(200)]
    assert len(set(given)) == 200
    assert all(20000 <= port < 32000 for port in given)


def test_without_servers_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "ETCD", tmp_path / "no" / "etcd")
    with pytest.raises(GraphError, match="no/etcd: run `make servers`"):
        LocalGraph(tmp_path, plane="etcd", directory=tmp_path)


def test_an_unhealthy_worker_still_says_what_it_has(unhealthy: str) -> None:
    assert fetch(f"{unhealthy}/health") == {"endpoints": {"refit": "ready"}}


def test_no_answer_and_no_json_are_no_answer(unhealthy: str) -> None:
    assert fetch(f"{unhealthy}/other") is None
    assert fetch(f"http://127.0.0.1:{free_port()}/health") is None


REFUSAL = "dynamo-refit: UnsupportedConfiguration: not --x: y. Start it without"


@pytest.mark.parametrize(
    ("lines", "end"),
    [
        (["loads", f"\x1b[31mERROR\x1b[0m main._end_with: {REFUSAL}"], REFUSAL),
        # One that was refused and went on has ended for another reason.
        ([REFUSAL, "killed"], f"{REFUSAL}\nkilled"),
        (["why"] + ['INFO uri: "/health" status: 503'] * 40, "why"),
        ([], ""),
        ([str(number) for number in range(40)], "\n".join(map(str, range(10, 40)))),
    ],
)
def test_the_end_of_a_log_is_its_reason(
    lines: list[str], end: str, tmp_path: Path
) -> None:
    process = Process("worker0", ["true"], {}, tmp_path / "worker0.log")
    process.stop()
    process.log.write_text("\n".join(lines))
    assert process.end_of_log() == end
