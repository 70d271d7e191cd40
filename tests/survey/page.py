# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The page of the survey, ``components/docs/architectures.md``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
import vllm

from tests.support.survey import Finding, Outcome

PAGE = Path(__file__).resolve().parents[2] / "components/docs/architectures.md"

#: Characters of a reason in the table.
LONGEST_REASON = 300

#: Of a refusal: which class it is, and the way out.
SAID_ALWAYS = re.compile(
    r"^describe: .* cannot be refitted by this release: |; serve it with .*$", re.S
)

INTRODUCTION = """\
<!-- Made by `make survey` from tests/support/architectures.py: change it there. -->
# Architectures

{loaded} architectures that vLLM {vllm} loads on a CPU, each as a tiny random checkpoint of transformers {transformers} (torch {torch}): {refitted} are refitted, and {refused} refused when the worker starts; none is refused later, and none was found corrupt. An architecture that is not here is judged in the same way when its worker starts, with all of its tensors.

- **refitted**: two versions were staged, installed and verified, and after each every parameter, buffer and other tensor that a module of a rank holds was, bit for bit, that of a model that vLLM loads afresh from this version's checkpoint.
- **refused**: the worker ends at its start and says which tensors a refit would get wrong; serve it with `python -m dynamo.vllm`.

| architecture | vLLM's class | TP 1 | TP 2 | reason |
|---|---|---|---|---|
"""  # noqa: E501

NOT_LOADED = """
## Not loaded by vLLM's CPU build

Nothing is known of these: vLLM {vllm} did not load the tiny checkpoint that transformers {transformers} wrote. Some need a package or a kernel that a CPU does not have (Qwen3.5: torchvision), some a field that their published configs have and this one does not, and some are not in vLLM any more, or not with these layers.

| architecture | TP | vLLM says |
|---|---|---|
"""  # noqa: E501

NOT_SURVEYED = """
## Not surveyed

Models with images, video or audio need torchvision, of which there is no build for CPU-only torch: here is the language model alone of those that have one as a class of its own. Quantized checkpoints, embedding models and pooling models are not here, either.
"""  # noqa: E501


def write_page(findings: Iterable[Finding]) -> None:
    """Write the page of ``findings``, which are good, of every architecture."""
    by_name: dict[str, dict[int, Finding]] = {}
    for finding in findings:
        by_name.setdefault(finding.architecture, {})[finding.ranks] = finding
    PAGE.write_text(page(dict(sorted(by_name.items()))))


def page(by_name: Mapping[str, Mapping[int, Finding]]) -> str:
    """The page's text; ``by_name`` has an architecture's good findings by size."""
    loaded = {
        name: sizes
        for name, sizes in by_name.items()
        if any(f.outcome is not Outcome.NOT_LOADED for f in sizes.values())
    }
    refused = sum(
        any(f.outcome is Outcome.REFUSED for f in sizes.values())
        for sizes in loaded.values()
    )
    versions = {
        library.__name__: library.__version__ for library in (vllm, transformers, torch)
    }
    text = INTRODUCTION.format(
        loaded=len(loaded),
        refitted=len(loaded) - refused,
        refused=refused,
        **versions,
    )
    text += "".join(_row(name, sizes) for name, sizes in loaded.items())
    text += NOT_LOADED.format(**versions)
    for name, sizes in by_name.items():
        missing = [f for f in sizes.values() if f.outcome is Outcome.NOT_LOADED]
        if missing:
            ranks = ", ".join(str(finding.ranks) for finding in missing)
            text += f"| {name} | {ranks} | {_shorten(missing[0].reason)} |\n"
    return text + NOT_SURVEYED


def _row(name: str, sizes: Mapping[int, Finding]) -> str:
    served_as = next(f.served_as for f in sizes.values() if f.served_as)
    found = " | ".join(str(sizes[ranks].outcome) for ranks in sorted(sizes))
    reasons: Sequence[str] = [
        finding.reason
        for finding in sizes.values()
        if finding.outcome not in (Outcome.REFITTED, Outcome.NOT_LOADED)
    ]
    reason = _shorten(reasons[0]) if reasons else ""
    return f"| {name} | {served_as} | {found} | {reason} |\n"


def _shorten(reason: str) -> str:
    """For a cell of a table, without what every refusal says."""
    reason = SAID_ALWAYS.sub("", reason)
    reason = " ".join(reason.split()).replace("|", "\\|")
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[:LONGEST_REASON]}..."
    return reason.replace("<", "&lt;")
