# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands' way onto the Dynamo runtime, without its log among what they say.

To be imported before anything of Dynamo or NIXL: they read these variables when they
are imported. Dynamo tells a lot about itself by default, and NIXL on standard output.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

#: Somebody wants to see Dynamo's log.
LOG_WANTED = "DYN_LOG" in os.environ

os.environ.setdefault("DYN_LOG", "warn")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

from dynamo.refit.errors import RefitError  # noqa: E402
from dynamo.refit.rpc import runtime_from_environment  # noqa: E402

if TYPE_CHECKING:
    from dynamo.runtime import DistributedRuntime

#: How long a server may take to accept a connection.
CONNECT_SECONDS = 2.0


def connect(*, alone_on_terminal: bool = False) -> DistributedRuntime:
    """A runtime on the running loop, which logs only where DYN_LOG is set; never if it
    would write into a view that is ``alone_on_terminal``.

    Raises:
        RefitError: a server that it needs does not answer: it would wait for minutes.
    """
    if missing := missing_server(os.environ):
        raise RefitError(": ".join(missing))
    if not LOG_WANTED or (alone_on_terminal and os.isatty(2)):
        _silence()
    return runtime_from_environment()


def missing_server(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """Which server of discovery or of a plane does not answer, and what to do."""
    if environment.get("DYN_DISCOVERY_BACKEND", "etcd") == "etcd":
        endpoints = environment.get("ETCD_ENDPOINTS", "http://localhost:2379")
        refused = [_refusal(url.strip(), 2379) for url in endpoints.split(",")]
        if all(refused):
            return (
                f"no etcd answers: {'; '.join(refused)}",
                "start etcd, set ETCD_ENDPOINTS to the graph's, or "
                "DYN_DISCOVERY_BACKEND to the backend that the graph uses (etcd is "
                "Dynamo's default)",
            )
    planes = {"DYN_EVENT_PLANE": "event plane", "DYN_REQUEST_PLANE": "request plane"}
    named = [plane for plane in planes if environment.get(plane) == "nats"]
    if named:
        kinds = " and no ".join(planes[plane] for plane in named)
        why = _refusal(environment.get("NATS_SERVER", "nats://localhost:4222"), 4222)
        if why:
            return (
                f"no NATS answers: {why}; there is no {kinds}",
                "start nats-server, set NATS_SERVER to the graph's, or "
                f"{' and '.join(named)} to what the graph uses",
            )
    return None


def _refusal(url: str, default_port: int) -> str:
    """Why nothing accepts a connection at ``url``; empty if something does."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    address = parts.hostname or "localhost", parts.port or default_port
    try:
        with socket.create_connection(address, CONNECT_SECONDS):
            return ""
    except OSError as error:
        return f"{url} ({error.strerror or error})"


@functools.cache
def _silence() -> None:
    """Leave file 2 to nobody: Dynamo 1.6 logs each call there, whatever its level is.

    Python goes on to write to what it was.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
