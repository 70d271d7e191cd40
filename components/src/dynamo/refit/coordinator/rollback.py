# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which weights a fleet can go back to, and the announcement that takes it there.

Versions only grow, so the weights of before come as a new version. It is announced,
superseded and committed as any other; only where it is staged from differs: from the
copies that the workers keep. Pure: what is kept where comes with the workers' statuses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from dynamo.refit.errors import RefitError
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import FleetMember, Rollback

Kept = tuple[int, str]
"""A version and its fingerprint."""


class NothingKept(RefitError):
    """No worker has a copy of the weights to go back to."""


class RollbackRefused(RefitError):
    """The rollback contradicts itself, or what is served."""


def find_keepers(
    members: Iterable[FleetMember], version: int, weights: str
) -> set[int]:
    """The workers that have a copy of a version that they served before."""
    return {member.worker for member in members if _kept(member) == (version, weights)}


def announce_rollback(
    wish: Rollback,
    members: Collection[FleetMember],
    model: str | None,
    newest: int | None,
) -> WeightVersionReady:
    """The announcement that ``wish`` stands for.

    Args:
        members: the workers, as they are now.
        model: the served model's name; ``None``: there is no worker yet.
        newest: the highest version that this coordinator has heard of.

    Raises:
        NothingKept: nobody has a copy, or not of what was asked for.
        RollbackRefused: the new version's number is not a new one.
    """
    if model is None:
        raise NothingKept("there is no worker to go back, and no copy: start one first")
    serving = (member.status.version for member in members)
    newest = max((v for v in (newest, *serving) if v is not None), default=None)
    version = wish.version
    if version is None:
        version = 0 if newest is None else newest + 1
    if wish.weights:
        # It was decided before, perhaps by a coordinator that is gone.
        if wish.to is None or wish.version is None:
            raise RollbackRefused("weights without their version, or the new number")
        restores, weights = wish.to, wish.weights
    else:
        if newest is not None and version <= newest:
            raise RollbackRefused(
                f"version {version} is not above {newest}, the newest so far: versions "
                f"must grow; leave the number out, or take {newest + 1}"
            )
        restores, weights = _choose(wish.to, members, version)
    return WeightVersionReady(
        model=model,
        version=version,
        announcement=wish.announcement,
        endpoint="",
        instance=0,
        manifest="",
        slot=0,
        weights=weights,
        in_flight=wish.in_flight,
        restores=restores,
    )


def _choose(wanted: int | None, members: Collection[FleetMember], version: int) -> Kept:
    """The newest version that a worker keeps, or the one that is ``wanted``."""
    keepers: dict[Kept, list[int]] = defaultdict(list)
    for member in members:
        kept = _kept(member)
        if kept is not None and member.status.phase != "fenced":
            keepers[kept].append(member.worker)
    found = [kept for kept in keepers if wanted in (None, kept[0])]
    if found:
        return max(found)
    which = "a version before" if wanted is None else f"version {wanted}"
    raise NothingKept(
        f"no worker keeps a copy of {which} ({_describe(keepers)}): publish the old "
        f"weights again: dynamo-refit publish DIR --version {version}"
    )


def _describe(keepers: dict[Kept, list[int]]) -> str:
    if not keepers:
        return (
            "there is none before a worker's second version, in direct staging, or "
            "when another version was staged since"
        )
    return "kept: " + ", ".join(
        f"version {version} by {_count(workers)}"
        for (version, _), workers in sorted(keepers.items(), reverse=True)
    )


def _count(workers: list[int]) -> str:
    return "1 worker" if len(workers) == 1 else f"{len(workers)} workers"


def _kept(member: FleetMember) -> Kept | None:
    status = member.status
    if status.kept_version is None:
        return None
    return status.kept_version, status.kept_weights
