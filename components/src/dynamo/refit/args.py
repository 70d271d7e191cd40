# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Command line of ``python -m dynamo.refit``; an environment variable for each flag."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dynamo.refit.coordinator.reconciler import Policy
from dynamo.refit.protocol import InFlightPolicy


@dataclass(frozen=True)
class CoordinatorConfig:
    """Configuration of the coordinator; times in seconds."""

    namespace: str
    model: str | None
    worker_components: tuple[str, ...]
    fleet_poll_seconds: float
    policy: Policy


def parse_args(argv: Sequence[str] | None = None) -> CoordinatorConfig:
    """The configuration from ``argv`` and the environment."""
    parser = argparse.ArgumentParser(
        prog="python -m dynamo.refit",
        description="Coordinates weight refits of the vLLM workers of one Dynamo "
        "namespace. The discovery backend and the planes come from Dynamo's own "
        "environment variables.",
    )
    _add(parser, "--namespace", "DYN_NAMESPACE", "dynamo", "Dynamo namespace")
    _add(
        parser,
        "--model",
        "DYN_REFIT_MODEL",
        None,
        "served model name; by default what the workers serve",
    )
    _add(
        parser,
        "--worker-components",
        "DYN_REFIT_WORKER_COMPONENTS",
        "backend,prefill",
        "comma-separated components whose workers are refitted",
    )
    _add(
        parser,
        "--in-flight",
        "DYN_REFIT_IN_FLIGHT",
        "continue",
        "what happens to running requests, unless the event says otherwise",
        choices=get_args(InFlightPolicy),
    )
    _add(
        parser,
        "--stage-seconds",
        "DYN_REFIT_STAGE_SECONDS",
        "300",
        "bound on the staging of one version",
        kind=float,
    )
    _add(
        parser,
        "--commit-seconds",
        "DYN_REFIT_COMMIT_SECONDS",
        "30",
        "how long a worker keeps a staged version for the commit",
        kind=float,
    )
    _add(
        parser,
        "--fleet-poll-seconds",
        "DYN_REFIT_FLEET_POLL_SECONDS",
        "0.5",
        "how often the workers' status is read",
        kind=float,
    )
    options = parser.parse_args(argv)
    components = tuple(c.strip() for c in options.worker_components.split(","))
    return CoordinatorConfig(
        namespace=options.namespace,
        model=options.model,
        worker_components=components,
        fleet_poll_seconds=options.fleet_poll_seconds,
        policy=Policy(
            stage_seconds=options.stage_seconds,
            commit_seconds=options.commit_seconds,
            in_flight=options.in_flight,
        ),
    )


def _add(
    parser: argparse.ArgumentParser,
    flag: str,
    variable: str,
    default: str | None,
    text: str,
    *,
    kind: type = str,
    choices: Sequence[str] | None = None,
) -> None:
    parser.add_argument(
        flag,
        type=kind,
        choices=choices,
        default=os.environ.get(variable, default),
        help=f"{text} [env: {variable}; default: {default}]",
    )
