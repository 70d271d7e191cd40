# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``make survey``: every architecture, refitted twice at TP 1 and TP 2, and the page
that says how it went.

    python -m tests.survey [ARCHITECTURE ...]

The exit code is 0 only if each was refitted or refused at its worker's start, or is
none that vLLM loads here; only then is the page written. With names, judges these and
writes no page; without names, vLLM has to load at least 50.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from tests.support.architectures import ARCHITECTURES
from tests.support.survey import Finding, Outcome, Survey
from tests.survey.page import PAGE, write_page

SIZES = (1, 2)

NOT_LOADED = Outcome.NOT_LOADED

#: Architectures that the page has to speak of.
FEWEST = 50

console = Console(highlight=False, soft_wrap=True)


def survey(size: int, names: list[str], logs: Path) -> list[Finding]:
    """Judge ``names`` on ``size`` ranks; prints each finding."""
    findings = []
    with Survey(size, logs) as judge:
        for name in names:
            finding = judge.judge(name)
            colour = "green" if finding.outcome.good else "red"
            console.print(f"[{colour}]{name} TP {size}: {finding.outcome}")
            if not finding.outcome.good:
                console.print(finding.reason, markup=False)
            findings.append(finding)
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE")
    chosen = parser.parse_args().names
    if unknown := set(chosen) - ARCHITECTURES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    names = chosen or list(ARCHITECTURES)
    with tempfile.TemporaryDirectory(prefix="survey-") as logs:
        findings = []
        for size in SIZES:
            found = survey(size, names, Path(logs))
            findings += found
            # What vLLM does not load on one rank it does not load on two.
            missing = {f.architecture for f in found if f.outcome is NOT_LOADED}
            names = [name for name in names if name not in missing]
    bad = [finding for finding in findings if not finding.outcome.good]
    loaded = {f.architecture for f in findings if f.outcome is not NOT_LOADED}
    console.print(f"{len(loaded)} architectures loaded, {len(bad)} wrong")
    for finding in bad:
        console.print(
            f"{finding.architecture} TP {finding.ranks}: {finding.outcome}: "
            f"{finding.reason}",
            markup=False,
        )
    if bad or chosen:
        return 1 if bad else 0
    write_page(findings)
    console.print(PAGE)
    return 0 if len(loaded) >= FEWEST else 1


if __name__ == "__main__":
    sys.exit(main())
