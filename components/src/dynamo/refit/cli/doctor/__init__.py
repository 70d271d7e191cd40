# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit doctor``: what keeps refits from working here, and what to do."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynamo.refit.cli.doctor import discovery, nixl, plane, versions
from dynamo.refit.cli.doctor.finding import Finding, failure
from dynamo.refit.cli.output import AsJson, Namespace
from dynamo.refit.errors import RefitError
from dynamo.refit.protocol import StagingChoice

NAME_COLUMNS = 14

MARKS = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "failure": ("x", "red")}


def doctor(
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="plan memory for a worker with this checkpoint, on this machine",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="ranks of that worker")
    ] = 1,
    staging: Annotated[
        StagingChoice, typer.Option(help="its --refit-staging")
    ] = "auto",
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0, max=1, help="its share of a GPU, as vLLM takes it")
    ] = 0.9,
    namespace: Namespace = "dynamo",
    as_json: AsJson = False,
) -> int:
    """Check what a refit needs, as it is in this environment and on this machine.

    Packages, discovery and what is stale in it, the event plane, the coordinator and
    the releases of its workers, NIXL and UCX's transports; and with --model whether a
    worker has room to stage it. Every finding comes with its remedy. Exits with 1 if
    something does not work.
    """
    worst = 0
    console = Console()
    for finding in _findings(
        os.environ, namespace, model, tensor_parallel, staging, gpu_memory_utilization
    ):
        worst = max(worst, int(finding.level == "failure"))
        if as_json:
            print(msgspec.json.encode(finding).decode(), flush=True)
        else:
            _print(console, finding)
    return worst


def _findings(
    environment: Mapping[str, str],
    namespace: str,
    model: Path | None,
    ranks: int,
    staging: StagingChoice,
    utilization: float,
) -> Iterator[Finding]:
    yield from versions.check_packages()
    # Before a runtime begins to tidy up.
    ground = [
        *discovery.check_discovery(environment, time.time()),
        *discovery.check_servers(environment),
    ]
    yield from ground
    # A runtime waits for a missing server for good.
    failed = {f.check for f in ground if f.level == "failure"}
    if not failed & {discovery.DISCOVERY, discovery.SERVERS}:
        yield from _live(environment, namespace)
    yield from nixl.judge(nixl.ask(), environment)
    if model is not None:
        yield from _memory(model, ranks, staging, utilization)


def _live(environment: Mapping[str, str], namespace: str) -> Iterator[Finding]:
    trial = plane.ask(namespace)
    report = plane.read(trial)
    yield from plane.judge(report, trial, environment)
    if report.fleet is not None:
        yield from versions.judge_fleet(report.fleet)


def _memory(
    model: Path, ranks: int, staging: StagingChoice, utilization: float
) -> Iterator[Finding]:
    # Loaded on use: torch takes seconds, and may not be there.
    try:
        memory = importlib.import_module("dynamo.refit.cli.doctor.memory")
    except ModuleNotFoundError as error:
        yield failure(
            "memory plan",
            f"it cannot be made: {error}",
            "pip install 'dynamo-refit[trainer]'",
        )
        return
    try:
        yield from memory.check_memory(model, ranks, staging, utilization)
    except RefitError as error:
        yield failure("memory plan", f"it cannot be made: {error}", "see --model")


def _print(console: Console, finding: Finding) -> None:
    """As soon as it is there: some take seconds."""
    mark, style = MARKS[finding.level]
    told = Text(finding.summary)
    if finding.remedy:
        told.append(f"\n-> {finding.remedy}", style="bold")
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=2)
    line.add_column(width=NAME_COLUMNS)
    line.add_column(overflow="fold")
    line.add_row(Text(mark, style=style), finding.check, told)
    console.print(line)
