# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What may hang, abort or print, tried in a process of its own.

The child answers in lines of JSON, the last of which counts: so it is known how far it
came when it has to be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from dynamo.refit.protocol import FleetStatus

PROBE = "dynamo.refit.cli.doctor.probe"


class PlaneReport(msgspec.Struct, frozen=True, kw_only=True):
    """How far the trial of the event plane came: the runtime is made, both ends are
    ``connected``, the first event has arrived after ``received_ms``."""

    runtime: bool = False
    connected: bool = False
    received_ms: float | None = None
    error: str = ""
    fleet: FleetStatus | None = None
    fleet_error: str = ""


@dataclass(frozen=True)
class Trial:
    """What a child said: its answers, and the rest of its lines. ``why``: how it
    ended, if not well."""

    answers: tuple[bytes, ...]
    log: tuple[str, ...]
    why: str


def run_probe(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], seconds: float
) -> Trial:
    """Run a probe for at most ``seconds``, in this environment and ``environment``."""
    command = [sys.executable, "-m", PROBE, name, *arguments]
    child = subprocess.Popen(
        command,
        env={"DYN_LOG": "off", **os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    why = ""
    try:
        output, _ = child.communicate(timeout=seconds)
        if child.returncode:
            why = f"it ended with {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        why = f"not within {seconds:g} s"
    lines = output.splitlines()
    answers = tuple(line for line in lines if line.startswith(b"{"))
    log = tuple(
        line.decode(errors="replace") for line in lines if not line.startswith(b"{")
    )
    if why and log and not why.startswith("not within"):
        why = f"{why}: {log[-1]}"
    return Trial(answers, log, why)
