# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A page's fenced blocks, and whether a program said what the page shows."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

#: Indentation of the fence (blocks of lists are indented), language, text.
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)

#: Numbers, and what else differs from run to run: fingerprints, paths.
VARIABLE = re.compile(r"/\S+|\b[0-9a-f]{16,}\b|\d[\d.]*")


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Shell commands, without comments; continued lines are joined."""
        joined = self.text.replace("\\\n", " ")
        lines = [re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines()]
        return [line for line in lines if line]


def blocks(page: str) -> list[Block]:
    return [
        Block(language, textwrap.dedent(text))
        for _, language, text in FENCED.findall(page)
    ]


def missing_lines(shown: str, said: str) -> list[str]:
    """Lines of ``shown`` that ``said`` has none like, whatever their numbers are; a
    line of three dots stands for any, and at the end of a line for its rest."""
    found = [_shape(line) for line in said.splitlines()]
    missing = []
    for line in shown.splitlines():
        wanted = _shape(line)
        if wanted.endswith("..."):
            wanted = wanted.removesuffix("...")
            there = any(shape.startswith(wanted) for shape in found)
        else:
            there = wanted in found
        if not there:
            missing.append(line)
    return missing


def _shape(line: str) -> str:
    return " ".join(VARIABLE.sub("#", line).split())
