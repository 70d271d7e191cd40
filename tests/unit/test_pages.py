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
from tests.support.pages import Block, blocks, missing_lines

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


def test_what_a_page_shows_is_compared_up_to_numbers() -> None:
    said = (
        'worker 75878 serves version 3, fingerprint 51ac51ac51ac51ac\n{"loss": 8.5}\n'
    )
    assert (
        missing_lines("worker 1 serves version 2, fingerprint 0f0f0f0f0f0f0f0f", said)
        == []
    )
    assert missing_lines('{"loss": 7.25}\n...', said) == []
    assert missing_lines("worker 1 serves ...", said) == []
    wrong = ["worker 1 serves nothing", "{'loss': 8.5}", "worker 1 serves version 2"]
    assert missing_lines("\n".join(wrong), said) == wrong


def test_blocks_of_a_page() -> None:
    page = """
1. In a list:

   ```python
   if x:
       y = 1
   ```

```bash
make demo    # sets up
publish ./a \\
    --version 1
```

```
a drawing
```
"""
    python, bash, drawing = blocks(page)
    assert python == Block("python", "if x:\n    y = 1\n")
    assert bash.commands == ["make demo", "publish ./a      --version 1"]
    assert drawing.language == ""
