# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The pages lead somewhere, and leave no error out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from dynamo.refit.events import RefusalReason
from dynamo.refit.protocol import ReleaseOutcome

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "components" / "src" / "dynamo" / "refit"
DOCS = ROOT / "components" / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "deploy" / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / "tests" / "benchmarks").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert missing == []
    # All of the repository's pages hang together.
    if page == ROOT / "README.md":
        assert len(local) > 10


def test_every_error_is_on_the_failure_page() -> None:
    """Found in the sources: some are defined where vLLM would have to be imported."""
    errors = {
        name
        for file in PACKAGE.rglob("*.py")
        for name in re.findall(r"^class (\w+)\(RefitError\)", file.read_text(), re.M)
    }
    assert len(errors) > 25
    rows = set(re.findall(r"^\| `(\w+)` \|", (DOCS / "failures.md").read_text(), re.M))
    assert errors - rows == set()
    # Neither does it explain what is no more.
    others = {*get_args(RefusalReason), *get_args(ReleaseOutcome)}
    assert rows - errors == others
