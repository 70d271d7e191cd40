# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's refit cycle, step by step, beside what it is measured against.

    make bench                              # ten minutes on two cores, 24 GiB
    make bench BENCH_ARGS="--sizes 64 --warm 3 --no-engine"

Shapes and tensor counts are real ones, weights are dummies; ranks, loader, extension
and NIXL are the product's. Baselines take turns with the measured cycles in the same
processes, since machines are noisy: what is compared are neighbours. Prints one table,
then PASS or FAIL for each number that must hold, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.ranks import CycleTimes, Ranks
from tests.benchmarks.shapes import dense, experts, tensors, write_config
from tests.benchmarks.sources import Held, Sources
from tests.support.child import Child, ChildFailed

MIB = 1 << 20

#: What must hold.
LEAD_MS = 5.0
CONTIGUOUS = 0.95
ROW_PARALLEL = 0.60
FINGERPRINT = 0.50
WARM_TOTAL = 1.15
#: A pull at 95 % of raw NIXL's rate and then a fingerprint that takes half as long.
PROVED = 1 / CONTIGUOUS + FINGERPRINT

#: Steps of a stage, as :class:`StageTimings` names them, and the table's heads.
STEPS = {
    "plan": "plan",
    "allocate": "alloc",
    "register": "regist",
    "prepare": "prepare",
    "pull": "pull",
    "wire": "wire",
    "fingerprint": "fingerp",
    "backup": "backup",
}


@dataclass(frozen=True)
class Case:
    """What is refitted, from where to where.

    ``row_parallel``: runs are short on one side or the other, and what is pulled goes
    through scratch. ``small``: runs are long, but tensors are small. ``snapshot``: the
    source's memory is what a publisher copies into, instead of the trainer's own.
    """

    name: str
    config: dict
    ranks: int = 1
    sources: int = 1
    row_parallel: bool = False
    small: bool = False
    snapshot: bool = False


@dataclass
class Measured:
    """Cycles and baselines of one case, in the order they ran; rates in bytes/s."""

    case: Case
    nbytes: int
    cold: list[list[CycleTimes]] = field(default_factory=list)
    readdressed: list[list[CycleTimes]] = field(default_factory=list)
    warm: list[list[CycleTimes]] = field(default_factory=list)
    anew: list[list[CycleTimes]] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    neighbours: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    modelexpress: list[float] = field(default_factory=list)
    #: Cores that other processes of the machine took during the warm cycles.
    others: float = 0.0

    @property
    def wire_nbytes(self) -> int:
        """Bytes that all ranks read in one cycle."""
        return sum(rank.nbytes for rank in self.warm[0])

    @property
    def shares_of_raw(self) -> list[float]:
        """Of each warm cycle: its rate on the wire over raw NIXL's before and after."""
        return [
            wire_rate(cycle) / raw
            for cycle, raw in zip(self.warm, self.neighbours, strict=True)
        ]

    @property
    def shares_of_modelexpress(self) -> list[float]:
        """Of the same reads without fingerprints, over ModelExpress's of them."""
        rates = zip(self.alone, self.modelexpress, strict=True)
        return [alone / other for alone, other in rates]

    @property
    def shares_alone(self) -> list[float]:
        """As :attr:`shares_of_raw`, of the same reads without fingerprints."""
        rates = zip(self.alone, self.neighbours, strict=True)
        return [alone / raw for alone, raw in rates]

    @property
    def proved(self) -> list[float]:
        """Of each warm cycle: its pull, the last fingerprint included, over the time
        that raw NIXL takes for the bytes."""
        return [
            slowest(cycle, step("pull")) / 1e3 * raw / self.wire_nbytes
            for cycle, raw in zip(self.warm, self.neighbours, strict=True)
        ]


def cases(sizes: Sequence[int], names: Sequence[str]) -> list[Case]:
    """Everything that is measured, for ``sizes`` in MiB."""
    middle = sorted(sizes)[len(sizes) // 2]
    small = dense(middle * MIB)
    found = [
        *(Case(f"dense-{size}", dense(size * MIB)) for size in sizes),
        Case(f"snapshot-{middle}", small, snapshot=True),
        *(
            Case(f"moe-{size}", experts(size * MIB), small=True)
            for size in sorted({min(sizes), middle})
        ),
        Case(f"columns-{middle}", small, sources=2, row_parallel=True),
        Case(f"tp2-{middle}", small, ranks=2, row_parallel=True),
    ]
    return [c for c in found if not names or c.name.split("-")[0] in names]


# --- measuring ----------------------------------------------------------------


def measure(case: Case, ranks: Ranks, logs: Path, warm: int, anew: int) -> Measured:
    """Cold, re-addressed and warm cycles, and cycles that build everything anew."""
    ranks.load(write_config(case.config, logs / case.name))
    with Sources(case.sources, logs) as sources:
        held = hold(case, sources)
        result = Measured(case, held.manifest.nbytes)
        result.cold.append(ranks.cycle(held))
    with Sources(case.sources, logs) as sources:
        held = hold(case, sources)
        result.readdressed.append(ranks.cycle(held))
        ranks.open_baselines(held)
        quiet = Quiet()
        for _ in range(warm):
            before = ranks.raw()
            result.warm.append(ranks.cycle(held))
            result.alone.append(ranks.alone())
            after = ranks.raw()
            result.neighbours.append((before + after) / 2)
            result.raw += [before, after]
            result.copy.append(ranks.copy())
            result.modelexpress.append(ranks.modelexpress())
        result.others = quiet.others()
        ranks.close_baselines()
        for _ in range(anew):
            ranks.forget()
            result.anew.append(ranks.cycle(held))
    return result


class Quiet:
    """How much of the machine others take from here on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def others(self) -> float:
        """Cores, on the average."""
        busy, own = _busy_seconds() - self._busy, _own_seconds() - self._own
        return max(0.0, busy - own) / (time.perf_counter() - self._began)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _own_seconds() -> float:
    """Of this process and all below it, which must be the same at both ends."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def hold(case: Case, sources: Sources) -> Held:
    return sources.hold(
        tensors(case.config), cut_columns=case.sources > 1, snapshot=case.snapshot
    )


def wire_rate(cycle: Sequence[CycleTimes]) -> float:
    """All ranks' bytes over the longest time on the wire; bytes per second."""
    longest = max(rank.timings.wire_ms for rank in cycle)
    return sum(rank.nbytes for rank in cycle) / longest * 1e3


def slowest(cycle: Sequence[CycleTimes], of: Callable[[CycleTimes], float]) -> float:
    return max(of(rank) for rank in cycle)


def step(name: str) -> Callable[[CycleTimes], float]:
    return lambda rank: getattr(rank.timings, f"{name}_ms")


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def summarise(cycles: Sequence[Sequence[CycleTimes]]) -> dict[str, Any]:
    """Medians over cycles of each step on the slowest rank; milliseconds."""

    def over(of: Callable[[CycleTimes], float]) -> float:
        return round(median(slowest(cycle, of) for cycle in cycles), 3)

    built = [rank.vote.counters for cycle in cycles for rank in cycle]
    return {
        "session": cycles[0][0].vote.session,
        "cycles": len(cycles),
        "lead_ms": over(lambda rank: rank.arrival),
        **{f"{name}_ms": over(step(name)) for name in STEPS},
        "install_ms": over(lambda rank: rank.install),
        "verify_ms": over(lambda rank: rank.verify),
        "total_ms": over(lambda rank: rank.total),
        "gb_per_s": round(median(wire_rate(cycle) for cycle in cycles) / 1e9, 3),
        "allocations": max(c.allocations for c in built),
        "registrations": max(c.registrations for c in built),
        "descriptor_builds": max(c.descriptor_builds for c in built),
    }


def report(measured: Measured) -> dict[str, Any]:
    """What goes into the JSON for one case."""
    case = measured.case
    shares = measured.shares_of_raw
    return {
        "case": case.name,
        "nbytes": measured.nbytes,
        "tensors": len(tensors(case.config)),
        "ranks": case.ranks,
        "sources": case.sources,
        "row_parallel": case.row_parallel,
        "small": case.small,
        "wire_nbytes": measured.wire_nbytes,
        "cold": summarise(measured.cold),
        "re-addressed": summarise(measured.readdressed),
        "warm": summarise(measured.warm),
        "anew": summarise(measured.anew) if measured.anew else None,
        "alone_gb_per_s": round(median(measured.alone) / 1e9, 3),
        "raw_gb_per_s": round(median(measured.raw) / 1e9, 3),
        "copy_gb_per_s": round(median(measured.copy) / 1e9, 3),
        "modelexpress_gb_per_s": round(median(measured.modelexpress) / 1e9, 3),
        "share_of_raw": round(median(shares), 3),
        "shares_of_raw": [round(share, 3) for share in shares],
        "share_alone": round(median(measured.shares_alone), 3),
        "share_of_modelexpress": round(median(measured.shares_of_modelexpress), 3),
        "proved_over_raw": round(median(measured.proved), 3),
        "useful_gb_per_s": round(
            measured.nbytes
            / measured.wire_nbytes
            * median(wire_rate(cycle) for cycle in measured.warm)
            / 1e9,
            3,
        ),
        "others_cores": round(measured.others, 2),
        "fingerprint_of_pull": round(median(fingerprint_shares(measured)), 3),
        "total_of_pull_and_install": round(median(total_shares(measured)), 3),
    }


def fingerprint_shares(measured: Measured) -> list[float]:
    return [
        slowest(cycle, step("fingerprint")) / slowest(cycle, step("pull"))
        for cycle in measured.warm
    ]


def total_shares(measured: Measured) -> list[float]:
    return [
        slowest(cycle, lambda rank: rank.total)
        / slowest(cycle, lambda rank: rank.timings.pull_ms + rank.install)
        for cycle in measured.warm
    ]


# --- what must hold -------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    what: str
    value: float
    bound: str
    holds: bool

    def __str__(self) -> str:
        word = "PASS" if self.holds else "FAIL"
        return f"{word}  {self.what}: {self.value:g} ({self.bound})"


def verdicts(reports: Sequence[dict[str, Any]]) -> list[Verdict]:
    return [verdict for found in reports for verdict in _verdicts(found)]


def _verdicts(found: dict[str, Any]) -> Iterable[Verdict]:
    name, warm = found["case"], found["warm"]
    work = ("allocations", "registrations", "descriptor_builds")
    built = sum(warm[counter] for counter in work)
    yield Verdict(f"{name}: built in a warm cycle", built, "0", built == 0)
    if found["tensors"] <= 400:
        lead = warm["lead_ms"]
        yield at_most(f"{name}: ms from the call to the first read", lead, LEAD_MS)
    share = found["share_of_raw"]
    if found["row_parallel"]:
        yield at_least(f"{name}: row-parallel pull over raw NIXL", share, ROW_PARALLEL)
    else:
        yield at_least(f"{name}: contiguous pull over raw NIXL", share, CONTIGUOUS)
        alone = found["share_alone"]
        yield at_least(f"{name}: its reads alone over raw NIXL", alone, CONTIGUOUS)
        ratio = found["proved_over_raw"]
        yield at_most(f"{name}: proved pull over raw NIXL's time", ratio, PROVED)
        part = found["fingerprint_of_pull"]
        yield at_most(f"{name}: fingerprint over pull", part, FINGERPRINT)
    if found["small"]:
        # A descriptor has its price, of which one large buffer says nothing.
        other = found["share_of_modelexpress"]
        yield at_least(f"{name}: its reads over ModelExpress's", other, CONTIGUOUS)
    total = found["total_of_pull_and_install"]
    yield at_most(f"{name}: warm cycle over pull + install", total, WARM_TOTAL)


def at_least(what: str, value: float, bound: float) -> Verdict:
    return Verdict(what, value, f"at least {bound:g}", value >= bound)


def at_most(what: str, value: float, bound: float) -> Verdict:
    return Verdict(what, value, f"at most {bound:g}", value <= bound)


# --- printing -------------------------------------------------------------------

HEADS = ("lead", *STEPS.values(), "install", "verify", "total", "GB/s", "built")


def rows(found: dict[str, Any]) -> Iterable[list[str]]:
    """The case's part of the table; milliseconds and GB/s."""
    label = f"{found['case']}, {found['tensors']} tensors"
    for kind in ("cold", "re-addressed", "warm", "anew"):
        cycle = found[kind]
        if cycle is None:
            continue
        names = ["lead", *STEPS, "install", "verify", "total"]
        work = ("allocations", "registrations", "descriptor_builds")
        yield [
            label,
            kind,
            *(_number(cycle[f"{name}_ms"]) for name in names),
            f"{cycle['gb_per_s']:.2f}",
            "/".join(str(cycle[counter]) for counter in work),
        ]
        label = ""
    baselines = {
        "reads alone": "alone",
        "raw NIXL": "raw",
        "ModelExpress": "modelexpress",
        "memcpy": "copy",
    }
    for title, key in baselines.items():
        rate = found[f"{key}_gb_per_s"]
        times = {"wire": _number(found["wire_nbytes"] / rate / 1e6)}
        cells = [times.get(name, "") for name in STEPS]
        yield ["", title, "", *cells, "", "", "", f"{rate:.2f}", ""]
    notes = f"{found['share_of_raw']:.0%} of raw NIXL's rate"
    notes += f", {found['share_alone']:.0%} without fingerprints"
    if found["wire_nbytes"] != found["nbytes"]:
        notes += f"; {found['useful_gb_per_s']:.2f} GB/s of useful bytes"
    yield ["", f"{notes}; others took {found['others_cores']:.2f} cores"]


def table(reports: Sequence[dict[str, Any]]) -> str:
    lines = ["{:26} {:13}".format("", "ms") + "".join(f"{h:>8}" for h in HEADS)]
    for found in reports:
        for label, kind, *cells in rows(found):
            line = f"{label:26} {kind:13}" + "".join(f"{c:>8}" for c in cells)
            lines.append(line.rstrip())
    return "\n".join(lines)


def stall_table(stall: dict[str, Any]) -> str:
    title = f"engine, {stall['nbytes'] / MIB:.0f} MiB, {stall['streams']} streams"
    lines = [
        f"{title:40} {'p50':>8}{'p95':>8}{'max':>8}",
        f"{'undisturbed: ms between two tokens':40} {stall['quiet']['gap_ms']:8.1f}"
        f"{'':8}{stall['quiet']['longest_gap_ms']:8.1f}",
    ]
    labels = {
        "refit_stall_ms": "refit: engine stall",
        "refit_install_ms": "  of which install",
        "refit_commit_gap_ms": "refit: longest gap, commit",
        "refit_gap_ms": "refit: longest gap, stage and commit",
        "stock_stall_ms": "update_weights_from_disk: engine stall",
        "stock_gap_ms": "update_weights_from_disk: longest gap",
    }
    for key, label in labels.items():
        numbers = (f"{stall[key][q]:8.1f}" for q in ("p50", "p95", "max"))
        lines.append(f"{label:40} {''.join(numbers)}")
    return "\n".join(lines)


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.{0 if milliseconds >= 1000 else 1}f}"


# --- running --------------------------------------------------------------------


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every case, and the engine's stall; what is printed last."""
    began = time.time()
    load = [os.getloadavg()[0]]
    reports: list[dict[str, Any]] = []
    stall = None
    with tempfile.TemporaryDirectory(prefix="refit-bench-") as directory:
        logs = Path(directory)
        chosen = cases(options.sizes, options.cases)
        for count in sorted({case.ranks for case in chosen}):
            with Ranks(count, logs) as ranks:
                for case in (c for c in chosen if c.ranks == count):
                    measured = measure(case, ranks, logs, options.warm, options.anew)
                    reports.append(report(measured))
                    say(f"{time.time() - began:5.0f} s  {case.name} done")
        if options.engine:
            stall = measure_stall(options, logs)
            say(f"{time.time() - began:5.0f} s  engine done")
    load.append(os.getloadavg()[0])
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in load],
        "seconds": round(time.time() - began),
        "cases": reports,
        "stall": stall,
    }


def measure_stall(options: argparse.Namespace, logs: Path) -> dict[str, Any]:
    # The stock reload goes wrong where embeddings are tied.
    size = sorted(options.sizes)[len(options.sizes) // 2] * MIB
    config = dense(size, tied=False)
    child = Child("tests.benchmarks.engine", [], logs / "engine.log")
    try:
        child.send("measure", config, options.updates, options.streams)
        return child.receive(300.0)
    except ChildFailed:
        # The folder of the logs is gone when this is read.
        print(child.log.read_text(errors="replace"), file=sys.stderr)
        raise
    finally:
        child.close()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[64, 512, 2048], help="in MiB")
    kinds = "dense, snapshot, moe, columns, tp2; all"
    add("--cases", nargs="+", default=[], help=kinds)
    add("--warm", type=int, default=9, help="warm cycles per case")
    add("--anew", type=int, default=2, help="cycles per case that cache nothing")
    add("--updates", type=int, default=7, help="of either kind on the engine")
    add("--streams", type=int, default=4, help="requests that decode meanwhile")
    add("--no-engine", dest="engine", action="store_false")
    add("--check", action="store_true", help="exit 1 if something does not hold")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    results = run(options, lambda line: print(line, file=sys.stderr, flush=True))
    first, last = results["load_average"]
    print(
        f"{results['cpu']}, {results['cores']} cores; load average {first} at the "
        f"start, {last} at the end; {results['seconds']} s"
    )
    print(table(results["cases"]))
    if results["stall"] is not None:
        print(stall_table(results["stall"]))
    found = verdicts(results["cases"])
    for verdict in found:
        print(verdict)
    results["verdicts"] = {v.what: v.holds for v in found}
    print(json.dumps(results))
    if options.check and not all(verdict.holds for verdict in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
