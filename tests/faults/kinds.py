# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The faults of a running graph, as data: what is struck, at which step of a refit, and
what a worker's rank is ordered to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Target = Literal["coordinator", "trainer", "worker", "rank"]
Step = Literal["stage", "install"]

#: How long a rank waits at the step in which something is struck; less than what the
#: coordinator gives a step of the barrier.
SLOW_SECONDS = 2.0

#: How late something is struck at most, from the beginning of its step.
LATEST_SECONDS = 1.5


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    ``strike`` is done to ``target`` while a rank waits at the step ``at``, or at any
    moment if that is ``None``. ``orders`` are for one worker's ranks; see
    :mod:`tests.support.faulty`. ``torn``: the trainer's bytes change after the
    announcement. ``never_served``: the struck worker may not come to serve such a
    version, and no other one either, unless it changed before.
    """

    name: str
    strike: Literal["kill", "stall"] | None = None
    target: Target | None = None
    at: Step | None = None
    orders: dict[str, dict] = field(default_factory=dict)
    torn: bool = False
    never_served: bool = False

    @property
    def takes_a_worker(self) -> bool:
        """A replica is gone after it."""
        return self.strike == "kill" and self.target in ("worker", "rank")


def _strikes(
    strike: Literal["kill", "stall"], target: Target, *steps: Step | None
) -> list[Fault]:
    return [
        Fault(
            f"{strike} {target} {f'in {step}' if step else 'at any moment'}",
            strike,
            target,
            step,
            _wait(step),
        )
        for step in steps
    ]


def _broken(name: str, step: Step, error: str, **order: int) -> Fault:
    orders = {step: {"rank": 0, "error": error, **order}}
    return Fault(name, orders=orders, never_served="times" not in order)


def _slow(step: Step) -> Fault:
    return Fault(f"{step} is slow", orders=_wait(step))


def _wait(step: Step | None) -> dict[str, dict]:
    return {step: {"rank": 0, "seconds": SLOW_SECONDS}} if step else {}


#: In this order, again and again; those that cost a start of an engine come last.
FAULTS = (
    *_strikes("kill", "coordinator", "stage", "install", None),
    *_strikes("stall", "coordinator", "stage", "install"),
    *_strikes("kill", "trainer", "stage", "install"),
    *_strikes("stall", "trainer", "stage"),
    *_strikes("stall", "worker", "stage", "install"),
    _slow("stage"),
    _slow("install"),
    _broken("stage fails", "stage", "no memory"),
    _broken("install fails once", "install", "hiccup", times=1),
    _broken("install fails", "install", "cannot write"),
    Fault("corrupt source", torn=True, never_served=True),
    *_strikes("kill", "rank", "stage", "install"),
    *_strikes("kill", "worker", "stage", "install", None),
)
