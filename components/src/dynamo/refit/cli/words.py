# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Events, bytes and times in a few words for a person. Pure."""

from __future__ import annotations

from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WorkerAdmitted,
    WorkerFenced,
    WorkerJoined,
    WorkerRefitted,
    WorkerStaged,
)


def headline(event: Event) -> str | None:
    """As :func:`describe`, with the version it is about."""
    line = describe(event)
    version = getattr(event, "version", None)
    if line is None or version is None or isinstance(event, WorkerJoined):
        return line
    return f"version {version}: {line}"


def describe(event: Event) -> str | None:
    """The event in one line; ``None`` for one that has nothing to tell here."""
    match event:
        case RefitStarted(workers=workers, catch_up=catch_up):
            how = "bringing it to" if catch_up else "staging on"
            return f"{how} {count(len(workers), 'worker')}"
        case WorkerStaged(worker=worker, ranks=ranks):
            nbytes = sum(rank.nbytes for rank in ranks)
            where = count(len(ranks), "rank")
            return f"worker {worker} holds it: {size(nbytes)} on {where}"
        case WorkerRefitted(worker=worker, timings=timings):
            return f"worker {worker} serves it, stall {timings.stall_ms:.1f} ms"
        case WorkerFenced(worker=worker, failure=failure):
            return f"worker {worker} was taken out of service: {failure}"
        case RefitCompleted(workers=workers, seconds=seconds, excluded=excluded):
            took = "" if seconds is None else f" in {seconds:.2f} s"
            without = f", without {len(excluded)}" if excluded else ""
            done = count(len(workers), "worker")
            return f"completed: {done} refitted{took}{without}"
        case RefitFailed(failure=failure):
            return f"failed: {failure}"
        case RefitSuperseded(by=by):
            return f"superseded by version {by}"
        case RefitRefused(reason=reason, detail=detail):
            return f"refused ({reason}): {detail}"
        case WorkerJoined(worker=worker, version=version):
            return f"worker {worker} has come, with {weights_of(version)}"
        case WorkerAdmitted(worker=worker):
            return f"worker {worker} may serve"
    return None


def weights_of(version: int | None) -> str:
    return "start-up weights" if version is None else f"version {version}"


def count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def size(nbytes: int) -> str:
    """With a binary unit, in at most eight characters below 10 TiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        value = nbytes / scale
        if value >= 1 or unit == "MiB":
            break
    digits = 0 if value >= 100 else 1 if value >= 10 or unit == "MiB" else 2
    return f"{value:.{digits}f} {unit}"


def lasting(seconds: float) -> str:
    """As one would say it: ``0.4 s``, ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
