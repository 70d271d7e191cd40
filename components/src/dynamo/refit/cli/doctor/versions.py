# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Are the packages those that this release is made for, and does the whole fleet run
one release? Pure, but for :func:`installed`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement

from dynamo.refit.cli.doctor.finding import Finding, failure, ok
from dynamo.refit.events import SCHEMA
from dynamo.refit.protocol import FleetStatus
from dynamo.refit.release import DISTRIBUTION, RELEASE

PACKAGES = "packages"
RELEASES = "releases"

#: Extras whose packages have to fit where they are installed, the widest pins first.
EXTRAS = ("vllm", "trainer", "megatron", "cpu")


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages() -> list[Finding]:
    """The packages of this environment against those that this package asks for."""
    try:
        asked = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [
            failure(
                PACKAGES,
                f"{DISTRIBUTION} is on the path, but not installed",
                f"pip install {DISTRIBUTION}",
            )
        ]
    return judge_packages(asked, installed)


def judge_packages(
    asked: Iterable[str], version_of: Callable[[str], str | None]
) -> list[Finding]:
    """Which of the requirements ``asked`` does not hold for what is installed.

    What an extra asks for may be missing, and if several ask for a package it has to
    fit the first of :data:`EXTRAS`.
    """
    needed, pinned = _sorted_out(asked)
    findings, fitting = [], []
    for name, requirement in {**pinned, **needed}.items():
        version = version_of(name)
        if version is None:
            if name in needed:
                findings.append(_unfit(requirement, "it is not installed"))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(_unfit(requirement, f"{version} is installed"))
        elif requirement.specifier:
            fitting.append(f"{name} {version}")
    return findings or [ok(PACKAGES, ", ".join(sorted(fitting)))]


def _sorted_out(
    asked: Iterable[str],
) -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """What must be there, and what must fit if it is there."""
    requirements = [Requirement(text) for text in asked]
    needed = {r.name: r for r in requirements if r.marker is None}
    pinned: dict[str, Requirement] = {}
    for extra in EXTRAS:
        for r in requirements:
            if r.marker is not None and r.marker.evaluate({"extra": extra}):
                pinned.setdefault(r.name, r)
    return needed, pinned


def _unfit(requirement: Requirement, what: str) -> Finding:
    wanted = f"{requirement.name}{requirement.specifier}"
    return failure(
        PACKAGES,
        f"{requirement.name}: {what}, this release is made for "
        f"{requirement.specifier or 'any version'}",
        f"pip install '{wanted}'",
    )


def judge_fleet(fleet: FleetStatus) -> list[Finding]:
    """Whether the coordinator, its workers and this command are of one release."""
    here = _name(RELEASE, SCHEMA)
    coordinator = _name(fleet.release, fleet.schema)
    findings = []
    if coordinator != here:
        findings.append(
            failure(
                RELEASES,
                f"the coordinator runs {coordinator}, this command is {here}",
                "run the same release of dynamo-refit everywhere",
            )
        )
    others: dict[str, list[int]] = {}
    for member in fleet.members:
        name = _name(member.status.release, member.status.schema)
        if name != coordinator:
            others.setdefault(name, []).append(member.worker)
    for name, workers in others.items():
        listed = ", ".join(map(str, workers))
        findings.append(
            failure(
                RELEASES,
                f"workers {listed} run {name}, the coordinator {coordinator}",
                "restart them with the coordinator's release: they may not understand "
                "each other's events and calls",
            )
        )
    workers = len(fleet.members)
    return findings or [
        ok(RELEASES, f"{here} on the coordinator and {workers} workers")
    ]


def _name(release: str, schema: int) -> str:
    if not release:
        return "an older release, which does not tell"
    return f"{release} (schema {schema})"
