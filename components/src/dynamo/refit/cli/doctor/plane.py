# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Does an event that is published arrive, and what does the coordinator say?

Both are asked by a child (:mod:`trial`), which may hang or abort; this judges how far
it came. Pure, but for :func:`ask`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dynamo.refit.cli.doctor.finding import Finding, failure, ok, warning
from dynamo.refit.cli.doctor.trial import PlaneReport, Trial, run_probe

PLANE = "event plane"
COORDINATOR = "coordinator"
RUNTIME = "runtime"

#: The child imports Dynamo, and waits for its own events and for a coordinator.
PROBE_SECONDS = 60.0


def ask(namespace: str) -> Trial:
    """Try the event plane, and fetch the fleet's status, as this environment says."""
    return run_probe("plane", [namespace], {}, PROBE_SECONDS)


def read(trial: Trial) -> PlaneReport:
    """What the child has said before its end, all of it or not."""
    report = PlaneReport()
    for line in trial.answers:
        report = msgspec.json.decode(line, type=PlaneReport)
    return report


def judge(
    report: PlaneReport, trial: Trial, environment: Mapping[str, str]
) -> list[Finding]:
    """What the trial of the event plane shows, and whether there is a coordinator."""
    if not report.runtime:
        return [_no_runtime(report, trial)]
    findings = [
        ok(RUNTIME, "starts"),
        _judge_plane(report, trial, environment),
    ]
    if report.fleet is None:
        why = report.fleet_error or trial.why or "it was not asked"
        findings.append(
            warning(
                COORDINATOR,
                "there is no status, and without a coordinator nothing is refitted",
                why,
            )
        )
        return findings
    workers = len(report.fleet.members)
    told = f"answers; it sees {workers} worker{'s' if workers != 1 else ''}"
    return [*findings, ok(COORDINATOR, told)]


def _no_runtime(report: PlaneReport, trial: Trial) -> Finding:
    return failure(
        RUNTIME,
        f"the Dynamo runtime does not start: {report.error or trial.why}",
        "set DYN_DISCOVERY_BACKEND, DYN_REQUEST_PLANE and DYN_EVENT_PLANE as the "
        "graph's processes have them, and see that their servers run",
    )


def _judge_plane(
    report: PlaneReport, trial: Trial, environment: Mapping[str, str]
) -> Finding:
    plane = environment.get("DYN_EVENT_PLANE", "zmq")
    if report.received_ms is not None:
        return ok(
            PLANE,
            f"{plane}: an event is published and received, the first one after "
            f"{report.received_ms:.0f} ms",
        )
    if not report.connected:
        return failure(
            PLANE,
            f"there is none: {plane} does not connect: {report.error or trial.why}",
            "see that the event plane's servers run and discovery can be written to",
        )
    remedy = (
        "DYN_EVENT_PLANE_HOST must be an address of this host that others reach; ports "
        "that the system assigns must be open between the graph's hosts"
    )
    if any(name.startswith("DYN_ZMQ_BROKER") for name in environment):
        remedy = "start the broker that DYN_ZMQ_BROKER_URL names, or unset it"
    return failure(
        PLANE, f"there is none: {plane} takes events, and none arrives", remedy
    )
