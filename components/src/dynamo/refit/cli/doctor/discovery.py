# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Is there a place where processes find each other, and is it clean?

Looks at the environment, at files and at ports; makes no runtime, whose start waits
for good where a server is missing, and tidies up what is to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dynamo.refit.cli.doctor.finding import Finding, failure, ok, warning
from dynamo.refit.cli.words import count, lasting

DISCOVERY = "discovery"
STALE = "stale records"
SERVERS = "servers"

#: Dynamo 1.6 renews a record every 3 s, and takes one that is 10 s old for expired.
STALE_SECONDS = 15.0

#: How long a server may take to accept a connection.
CONNECT_SECONDS = 2.0

#: Stale records that are named.
NAMED = 3


@dataclass(frozen=True)
class Record:
    """A file of the file backend: under which key, its age, and whether it is one."""

    key: str
    age: float
    readable: bool


def check_discovery(environment: Mapping[str, str], now: float) -> list[Finding]:
    """The backend that ``environment`` names; ``now`` in Unix seconds."""
    backend = environment.get("DYN_DISCOVERY_BACKEND", "etcd")
    match backend:
        case "file":
            return _check_directory(_directory(environment), now)
        case "etcd":
            # With the other servers.
            return []
        case "kubernetes":
            return [_check_kubernetes(environment)]
        case "mem":
            return [
                failure(
                    DISCOVERY,
                    "DYN_DISCOVERY_BACKEND=mem does not leave the process",
                    "set the backend of the graph: file, etcd or kubernetes",
                )
            ]
    return [
        failure(
            DISCOVERY,
            f"DYN_DISCOVERY_BACKEND={backend!r} is unknown",
            "set it to file, etcd or kubernetes, as the graph's processes have it",
        )
    ]


def _directory(environment: Mapping[str, str]) -> Path:
    default = Path(tempfile.gettempdir(), "dynamo_store_kv")
    return Path(environment.get("DYN_FILE_KV", default))


def _check_directory(directory: Path, now: float) -> list[Finding]:
    where = f"files in {directory}"
    if not directory.exists():
        return [
            warning(
                DISCOVERY,
                f"{where}: there is no such directory",
                "start the graph, or set DYN_FILE_KV to the directory that it uses",
            )
        ]
    if not directory.is_dir() or not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        return [
            failure(
                DISCOVERY,
                f"{where}: this user cannot read and write there",
                "run as the graph's user, or set DYN_FILE_KV to another directory",
            )
        ]
    records = list(_records(directory, now))
    return [
        ok(DISCOVERY, f"{where}: {count(len(records), 'record')}"),
        judge_records(directory, records),
    ]


def _records(directory: Path, now: float) -> Iterator[Record]:
    for file in sorted(directory.rglob("*")):
        # One that goes meanwhile was its owner's to take away.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            if not file.is_file():
                continue
            age = now - file.stat().st_mtime
            key = file.relative_to(directory).as_posix()
            yield Record(key, age, _is_json(file.read_bytes()))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def judge_records(directory: Path, records: Sequence[Record]) -> Finding:
    """Whether all records are of processes that live, and of this release of Dynamo."""
    stale = [r for r in records if r.age > STALE_SECONDS]
    foreign = [r for r in records if not r.readable]
    if not stale and not foreign:
        return ok(STALE, "none: every process that is registered lives")
    told = []
    if stale:
        oldest = max(r.age for r in stale)
        told.append(
            f"{count(len(stale), 'record')} of processes that are gone or stalled, the "
            f"oldest for {lasting(oldest)}"
        )
    if foreign:
        told.append(f"{count(len(foreign), 'file')} that this Dynamo cannot read")
    bad = sorted({r.key for r in [*stale, *foreign]})
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    if len(bad) == len(records):
        remedy = f"nobody who lives is registered: rm -r {directory}"
    else:
        remedy = f"others live: remove these files only, below {directory}"
    named = ", ".join(bad[:NAMED])
    return failure(STALE, f"{' and '.join(told)}: {named}{more}", remedy)


def _check_etcd(environment: Mapping[str, str]) -> Finding:
    endpoints = environment.get("ETCD_ENDPOINTS", "http://localhost:2379")
    refused = []
    for endpoint in endpoints.split(","):
        why = unreachable(endpoint.strip(), 2379)
        if why is None:
            return ok(SERVERS, f"etcd answers at {endpoint.strip()}")
        refused.append(why)
    return failure(
        SERVERS,
        f"no etcd answers: {'; '.join(refused)}",
        "start etcd, set ETCD_ENDPOINTS to the graph's, or DYN_DISCOVERY_BACKEND to "
        "the backend that the graph uses (etcd is Dynamo's default)",
    )


def _check_kubernetes(environment: Mapping[str, str]) -> Finding:
    if "KUBERNETES_SERVICE_HOST" in environment:
        return ok(DISCOVERY, "Kubernetes, from within a pod")
    return failure(
        DISCOVERY,
        "DYN_DISCOVERY_BACKEND=kubernetes, and this is no pod",
        "run it in a pod of the graph: kubectl exec ... -- dynamo-refit doctor",
    )


def check_servers(environment: Mapping[str, str]) -> list[Finding]:
    """The servers that ``environment`` needs, for discovery and for its planes."""
    etcd = []
    if environment.get("DYN_DISCOVERY_BACKEND", "etcd") == "etcd":
        etcd.append(_check_etcd(environment))
    return [*etcd, *_check_nats(environment)]


def _check_nats(environment: Mapping[str, str]) -> list[Finding]:
    planes = [
        variable
        for variable, default in (
            ("DYN_EVENT_PLANE", "zmq"),
            ("DYN_REQUEST_PLANE", "tcp"),
        )
        if environment.get(variable, default) == "nats"
    ]
    if not planes:
        return []
    server = environment.get("NATS_SERVER", "nats://localhost:4222")
    why = unreachable(server, 4222)
    if why is None:
        return [ok(SERVERS, f"NATS answers at {server}")]
    kinds = " and no ".join(
        variable.removeprefix("DYN_").replace("_", " ").lower() for variable in planes
    )
    return [
        failure(
            SERVERS,
            f"no NATS answers: {why}; there is no {kinds}",
            "start nats-server, set NATS_SERVER to the graph's, or "
            f"{' and '.join(planes)} to what the graph uses",
        )
    ]


def unreachable(url: str, default_port: int) -> str | None:
    """Why nothing accepts a connection at ``url``; ``None`` if something does."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    address = parts.hostname or "localhost", parts.port or default_port
    try:
        with socket.create_connection(address, CONNECT_SECONDS):
            return None
    except OSError as error:
        return f"{url} ({error.strerror or error})"
