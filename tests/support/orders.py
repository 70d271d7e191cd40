# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How a test and a rank of :mod:`tests.support.faulty` talk: through files, of which
the test names one. Imports nothing of the product."""

from __future__ import annotations

import json
from pathlib import Path

#: At which a rank waits if it is ordered to.
STEPS = ("stage", "install")


def give(orders: Path, **steps: dict) -> None:
    """Let the file ``orders`` say ``steps``, at once and whole."""
    for step in STEPS:
        waiting_file(orders, step).unlink(missing_ok=True)
    temporary = orders.with_suffix(".tmp")
    temporary.write_text(json.dumps(steps))
    temporary.rename(orders)


def forget(orders: Path) -> None:
    """There are no orders, and nobody waits."""
    orders.unlink(missing_ok=True)
    for step in STEPS:
        waiting_file(orders, step).unlink(missing_ok=True)


def waiting_file(orders: Path, step: str) -> Path:
    """There as long as a rank waits at ``step``; one that is killed leaves it."""
    return orders.with_suffix(f".{step}")


def waits_at(orders: Path) -> str | None:
    """The step at which a rank waits."""
    return next((s for s in STEPS if waiting_file(orders, s).exists()), None)
