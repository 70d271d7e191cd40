# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a check has found, and what to do about it."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of a check; the ``remedy`` is empty where nothing is to be done.

    A warning works, but not as well as it could, or could not be looked at.
    """

    check: str
    level: Level
    summary: str
    remedy: str = ""


def ok(check: str, summary: str) -> Finding:
    return Finding(check=check, level="ok", summary=summary)


def warning(check: str, summary: str, remedy: str) -> Finding:
    return Finding(check=check, level="warning", summary=summary, remedy=remedy)


def failure(check: str, summary: str, remedy: str) -> Finding:
    return Finding(check=check, level="failure", summary=summary, remedy=remedy)
