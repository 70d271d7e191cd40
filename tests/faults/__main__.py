# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``make faults``: many lives of a simulated fleet, and real faults on a running graph.

    python -m tests.faults --simulations 1000 --real 42 --seed 0

The last line is JSON (``hit``: how far a refit had come when a real fault struck); the
exit code is 0 only if nothing happened that never may.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter

from rich.console import Console
from rich.table import Table

from tests.faults.live import real_faults
from tests.faults.simulation import Result, simulate
from tests.faults.world import Violated

KINDS = ("wrong_version", "left_paused", "leaked")

console = Console()


def one_life(seed: int) -> Result | Violated:
    logging.disable(logging.CRITICAL)
    try:
        return simulate(seed)
    except Violated as violated:
        return Violated(violated.kind, f"seed {seed}: {violated.what}")


def simulated_faults(seeds: range) -> Counter[str]:
    """Every seed's life, on all cores; what was violated, by kind."""
    began = time.monotonic()
    totals: Counter[str] = Counter()
    violated: Counter[str] = Counter()
    # Forked before anything has started a thread; imports take longer than lives.
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for result in pool.imap_unordered(one_life, seeds, chunksize=10):
            if isinstance(result, Violated):
                console.print(f"[red]{result}")
                violated[result.kind] += 1
                continue
            for name in ("faults", "tokens", "published", "completed", "failed"):
                totals[name] += getattr(result, name)
            totals["fenced"] += result.fenced
    table = Table(title=f"{len(seeds)} lives of a simulated fleet")
    for name in totals:
        table.add_column(name, justify="right")
    table.add_row(*(f"{count:,}" for count in totals.values()))
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s")
    return violated


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--real", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    violated = simulated_faults(range(options.seed, options.seed + options.simulations))
    real = real_faults(options.real, options.seed, console) if options.real else None
    if real is not None:
        violated += real.violated
    summary = {
        "simulated": options.simulations,
        "real": real.injected if real else 0,
        **{kind: violated[kind] for kind in KINDS},
        "hit": dict(real.phases) if real else {},
    }
    print(json.dumps(summary))
    return int(any(violated.values()))


if __name__ == "__main__":
    sys.exit(main())
