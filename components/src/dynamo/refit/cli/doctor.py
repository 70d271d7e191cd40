# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit doctor``: what keeps refits from working here, and what to do.

``judge_*`` are pure; the rest tries things and takes about a minute at most.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Literal

import msgspec
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynamo.refit.bus import EventPublisher, EventSubscriber
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.cli.output import AsJson, Namespace
from dynamo.refit.cli.runtime import connect, missing_server
from dynamo.refit.cli.words import count
from dynamo.refit.errors import RefitError
from dynamo.refit.events import RefitSuperseded
from dynamo.refit.protocol import FleetStatus
from dynamo.refit.release import DISTRIBUTION, RELEASE
from dynamo.refit.rpc import Caller

#: Extras whose packages have to fit where they are installed.
EXTRAS = ("vllm", "cpu", "trainer", "megatron")

#: How long an event may take to arrive, discovery included; and between two tries: a
#: publisher's first events are lost until it is discovered.
ARRIVAL_SECONDS, RETRY_SECONDS = 10.0, 0.05

#: The child that reads through NIXL imports torch first.
LOOPBACK_SECONDS = 90.0

#: In a line of UCX's log that tells a connection's configuration.
LANES = re.compile(r"cfg#\d+(?P<lanes>.*)")
LANE = re.compile(r"\b([a-z][a-z0-9_]*)/[\w.:-]+")

MARKS = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "failure": ("x", "red")}


class Finding(msgspec.Struct, frozen=True):
    """One result of a check. A warning could not be looked at, or is not needed
    everywhere; the ``remedy`` is empty where all is well."""

    check: str
    level: Literal["ok", "warning", "failure"]
    summary: str
    remedy: str = ""


def doctor(namespace: Namespace = "dynamo", as_json: AsJson = False) -> int:
    """Check what a refit needs, as it is in this environment and on this machine.

    Packages, the event plane (an event is published and received), the coordinator,
    NIXL (a read is compared byte for byte) and the transports that UCX uses for it.
    Every finding comes with its remedy. Exits with 1 if something does not work.
    """
    worst = 0
    console = Console()
    for finding in _findings(namespace):
        worst = max(worst, int(finding.level == "failure"))
        if as_json:
            print(msgspec.json.encode(finding).decode(), flush=True)
        else:
            _print(console, finding)
    return worst


def _findings(namespace: str) -> Iterator[Finding]:
    """In the order of their tries, as some take seconds."""
    try:
        asked = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        asked = [DISTRIBUTION]
    yield from judge_packages(asked, _installed)
    missing = missing_server(os.environ)
    if missing is None:
        yield from asyncio.run(_live(namespace))
    else:
        yield Finding("servers", "failure", *missing)
    yield from judge_nixl(*_loopback(), os.environ)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge_packages(
    asked: Iterable[str], version_of: Callable[[str], str | None]
) -> list[Finding]:
    """Which of the requirements ``asked`` does not hold for what is installed.

    A package of an extra may be missing; where several ask for one, any may fit.
    """
    wanted: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, asked):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in EXTRAS):
            wanted.setdefault(requirement.name, []).append(requirement)
    bad, pinned = [], []
    for name, requirements in wanted.items():
        version = version_of(name)
        optional = all(r.marker for r in requirements)
        fits = any(r.specifier.contains(version or "", True) for r in requirements)
        if (version is None and not optional) or (version is not None and not fits):
            pin = requirements[0].specifier
            found = f"{version} is" if version else "it is not"
            made_for = pin or "any version"
            summary = f"{name}: {found} installed, this release is made for {made_for}"
            bad.append(
                Finding("packages", "failure", summary, f"pip install '{name}{pin}'")
            )
        elif version is not None and any(r.specifier for r in requirements):
            pinned.append(f"{name} {version}")
    return bad or [Finding("packages", "ok", ", ".join(sorted(pinned)))]


async def _live(namespace: str) -> list[Finding]:
    """Publish on an endpoint that nobody else knows, then ask the coordinator."""
    plane = os.environ.get("DYN_EVENT_PLANE", "zmq")
    try:
        runtime = connect()
        topic = runtime.endpoint(f"{namespace}.refit.doctor_{uuid.uuid4().hex[:12]}")
        async with (
            EventSubscriber(topic) as events,
            EventPublisher(topic, "doctor") as publisher,
        ):
            milliseconds = await _first_event(events, publisher)
    # Dynamo raises plain Exceptions for what the environment has wrong.
    except Exception as error:
        remedy = (
            "set DYN_DISCOVERY_BACKEND, DYN_REQUEST_PLANE and DYN_EVENT_PLANE as the "
            "graph's processes have them, and see that their servers run"
        )
        return [Finding("event plane", "failure", f"there is none: {error}", remedy)]
    found = judge_event(milliseconds, plane, os.environ)
    try:
        fleet = await fetch_status(Caller(runtime), namespace)
    except (RefitError, msgspec.ValidationError) as error:
        summary = "there is no status, and without a coordinator nothing is refitted"
        return [found, Finding("coordinator", "warning", summary, str(error))]
    return [found, judge_fleet(fleet)]


async def _first_event(
    events: EventSubscriber, publisher: EventPublisher
) -> float | None:
    """Milliseconds until an event has arrived; ``None`` if none does.

    Raises:
        EventPlaneUnavailable: this process cannot subscribe.
    """
    began = time.perf_counter()
    arrival = asyncio.ensure_future(anext(events))
    try:
        while not arrival.done():
            if time.perf_counter() - began > ARRIVAL_SECONDS:
                return None
            publisher.publish(RefitSuperseded(version=0, by=0))
            await asyncio.wait([arrival], timeout=RETRY_SECONDS)
        arrival.result()
    finally:
        arrival.cancel()
    return (time.perf_counter() - began) * 1e3


def judge_event(
    milliseconds: float | None, plane: str, environment: Mapping[str, str]
) -> Finding:
    if milliseconds is not None:
        told = f"{plane}: an event is published and received, the first one after "
        return Finding("event plane", "ok", f"{told}{milliseconds:.0f} ms")
    remedy = (
        "DYN_EVENT_PLANE_HOST must be an address of this host that others reach; ports "
        "that the system assigns must be open between the graph's hosts"
    )
    if any(name.startswith("DYN_ZMQ_BROKER") for name in environment):
        remedy = "start the broker that DYN_ZMQ_BROKER_URL names, or unset it"
    summary = f"there is none: {plane} takes events, and none arrives"
    return Finding("event plane", "failure", summary, remedy)


def judge_fleet(fleet: FleetStatus) -> Finding:
    """Whether the coordinator and its workers run this command's release."""
    releases = {fleet.release, *(m.status.release for m in fleet.members)}
    if others := sorted(releases - {RELEASE}):
        summary = f"this command is of release {RELEASE}, the fleet of {others}"
        remedy = "run the same release of dynamo-refit everywhere"
        return Finding("coordinator", "failure", summary, remedy)
    told = f"answers; it sees {count(len(fleet.members), 'worker')}"
    return Finding("coordinator", "ok", told)


def _loopback() -> tuple[str, list[str]]:
    """How a read through NIXL ended (empty: well), and what was said: in a child, since
    NIXL may hang or abort, and UCX says in its log only what it uses."""
    child = subprocess.Popen(
        [sys.executable, "-m", "dynamo.refit.cli.loopback"],
        env={**os.environ, "UCX_LOG_LEVEL": "info"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        log, _ = child.communicate(timeout=LOOPBACK_SECONDS)
        ended = f"exit code {child.returncode}" if child.returncode else ""
    except subprocess.TimeoutExpired:
        child.kill()
        log, _ = child.communicate()
        ended = f"not within {LOOPBACK_SECONDS:g} s"
    return ended, log.splitlines()


def judge_nixl(
    ended: str, log: list[str], environment: Mapping[str, str]
) -> list[Finding]:
    """What the read shows, by its last line, and the transports in its log."""
    last = log[-1] if log else ""
    if not ended:
        return [Finding("NIXL", "ok", last), judge_transports(log, environment)]
    if last.startswith("ModuleNotFoundError"):
        remedy = (
            "install what weights are moved with: pip install 'dynamo-refit[trainer]' "
            "or, for a worker, 'dynamo-refit[vllm]'"
        )
    else:
        see = "see UCX's own log with UCX_LOG_LEVEL=info; reinstall nixl"
        remedy = _forced(environment) or see
    summary = f"a read between two agents fails ({ended}): {last}"
    return [Finding("NIXL", "failure", summary, remedy)]


def judge_transports(log: Iterable[str], environment: Mapping[str, str]) -> Finding:
    check = "UCX transports"
    lanes = (match["lanes"] for line in log if (match := LANES.search(line)))
    used = {name for each in lanes for name in LANE.findall(each)}
    if not used:
        remedy = "look for cfg# with UCX_LOG_LEVEL=info"
        return Finding(check, "warning", "UCX did not say which it uses", remedy)
    if used - {"tcp", "self"}:
        rdma = any(name.startswith(("rc", "dc", "ud")) for name in used)
        told = "" if rdma else "; no RDMA, so between hosts it is sockets"
        return Finding(check, "ok", f"{', '.join(sorted(used))}{told}")
    remedy = _forced(environment) or (
        "on one host UCX lacks cma: give the containers SYS_PTRACE and one PID "
        "namespace; between hosts it lacks RDMA: give them /dev/infiniband; with GPUs "
        "cuda_ipc: give all processes of a host all its GPUs"
    )
    summary = "TCP only, at the speed of a socket: every byte is copied several times"
    return Finding(check, "failure", summary, remedy)


def _forced(environment: Mapping[str, str]) -> str:
    """The way out where somebody has chosen UCX's transports."""
    names = ("UCX_TLS", "UCX_NET_DEVICES")
    chosen = [f"{n}={v}" for n in names if (v := environment.get(n, "all")) != "all"]
    told = f"{' and '.join(chosen)} in the environment forces it: unset it"
    return told if chosen else ""


def _print(console: Console, finding: Finding) -> None:
    mark, style = MARKS[finding.level]
    told = Text(finding.summary)
    if finding.remedy:
        told.append(f"\n-> {finding.remedy}", style="bold")
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=2)
    line.add_column(width=14)
    line.add_column(overflow="fold")
    line.add_row(Text(mark, style=style), finding.check, told)
    console.print(line)
