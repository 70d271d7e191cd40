# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two real replicas, refitted back to back under load.

    python -m tests.benchmarks.fleet --refits 50 --plane file

Stall: in which a replica could make no token. Staleness: from the announcement until
both replicas serve it. The last line is JSON; the exit code is 0 only if no request
failed, none was cut short, and every version arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from graphs.client import Client, Load
from graphs.references import prompts
from tests.support.live_fleet import Fleet, live_fleet
from tests.support.processes import Trainer


@dataclass
class Measured:
    """Milliseconds, one per refit and replica, or one per refit."""

    stall: list[float] = field(default_factory=list)
    install: list[float] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    requests: int = 0
    failed: int = 0
    truncated: int = 0


async def measure(fleet: Fleet, refits: int) -> Measured:
    measured = Measured()
    with Trainer(fleet.graph, fleet.models["A"]) as trainer:
        async with Client(fleet.graph.url, fleet.graph.name) as client:
            load = Load(client, prompts(count=5, seed=11), streams=4, max_tokens=48)
            load.start()
            for number in range(refits):
                name = "BCA"[number % 3]
                done = await asyncio.to_thread(fleet.refit, trainer, name)
                measured.staleness.append(done.seconds * 1e3)
                for each in await asyncio.to_thread(fleet.refitted, 2):
                    measured.stall.append(each.timings.stall_ms)
                    measured.install.append(each.timings.install_ms)
            await fleet.assert_serves(name)
            await load.stop()
    measured.requests = len(load.completions)
    measured.failed, measured.truncated = len(load.failed), len(load.truncated)
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {
        "p50": round(statistics.median(values), 2),
        "p95": round(cuts[-1], 2),
        "max": round(max(values), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.fleet", description=__doc__
    )
    parser.add_argument("--refits", type=int, default=50)
    parser.add_argument("--plane", choices=("file", "etcd"), default="file")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="refit-fleet-") as directory,
        live_fleet(options.plane, Path(directory)) as fleet,
    ):
        measured = asyncio.run(measure(fleet, options.refits))
    table = Table(title=f"{options.refits} refits of two replicas under load, ms")
    for heading in ("", "p50", "p95", "max"):
        table.add_column(heading, justify="right")
    spreads = {
        name: spread(getattr(measured, name))
        for name in ("stall", "install", "staleness")
    }
    for name, values in spreads.items():
        table.add_row(name, *(f"{value:.1f}" for value in values.values()))
    Console().print(table)
    summary = {
        "refits": len(measured.staleness),
        "requests": measured.requests,
        "failed": measured.failed,
        "truncated": measured.truncated,
        **{f"{name}_ms": values for name, values in spreads.items()},
    }
    print(json.dumps(summary))
    good = len(measured.staleness) == options.refits and measured.requests > 0
    return int(not good or measured.failed > 0 or measured.truncated > 0)


if __name__ == "__main__":
    sys.exit(main())
