# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Command line of ``python -m dynamo.refit``; an environment variable for each flag."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, get_args

from dynamo.refit.coordinator.policy import CommitPolicy, Policy
from dynamo.refit.protocol import InFlightPolicy

T = TypeVar("T")


@dataclass(frozen=True)
class CoordinatorConfig:
    """Configuration of the coordinator; times in seconds."""

    namespace: str
    model: str | None
    worker_components: tuple[str, ...]
    fleet_poll_seconds: float
    policy: Policy


def build_parser() -> argparse.ArgumentParser:
    """The flags, with defaults from the environment as it is now.

    Ends the process where a variable's value is not allowed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dynamo.refit",
        description="Coordinates weight refits of the vLLM workers of one Dynamo "
        "namespace. The discovery backend and the planes come from Dynamo's own "
        "environment variables.",
    )
    _add(
        parser,
        "--namespace",
        "DYN_NAMESPACE",
        "dynamo",
        "Dynamo namespace",
        kind=_name,
    )
    _add(
        parser,
        "--model",
        "DYN_REFIT_MODEL",
        None,
        "served model name; by default that of the first workers",
        kind=_model,
    )
    _add(
        parser,
        "--worker-components",
        "DYN_REFIT_WORKER_COMPONENTS",
        "backend,prefill",
        "comma-separated components whose workers are refitted",
        kind=_names,
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
        kind=BOUND,
    )
    _add(
        parser,
        "--commit-seconds",
        "DYN_REFIT_COMMIT_SECONDS",
        "30",
        "how long a worker keeps a staged version for the commit",
        kind=BOUND,
    )
    _add(
        parser,
        "--fleet-poll-seconds",
        "DYN_REFIT_FLEET_POLL_SECONDS",
        "0.5",
        "how often the workers' status is read",
        kind=BOUND,
    )
    _add(
        parser,
        "--commit-policy",
        "DYN_REFIT_COMMIT_POLICY",
        "barrier",
        "order in which workers change: all together, some at a time, or one first",
        choices=get_args(CommitPolicy),
    )
    _add(
        parser,
        "--max-unavailable",
        "DYN_REFIT_MAX_UNAVAILABLE",
        "1",
        "workers that change at a time with rolling and canary; 0: all",
        kind=COUNT,
    )
    _add(
        parser,
        "--hold-seconds",
        "DYN_REFIT_HOLD_SECONDS",
        "10",
        "how long a worker waits for the others at a barrier",
        kind=SECONDS,
    )
    _add(
        parser,
        "--drain-seconds",
        "DYN_REFIT_DRAIN_SECONDS",
        "30",
        "how long in-flight policy drain waits for running requests",
        kind=SECONDS,
    )
    _add(
        parser,
        "--quorum",
        "DYN_REFIT_QUORUM",
        "1",
        "share of the workers that must stage a version; the others are fenced",
        kind=SHARE,
    )
    _add(
        parser,
        "--direct-readers",
        "DYN_REFIT_DIRECT_READERS",
        "0",
        "workers that read from the trainer at a time, the others from workers; 0: all",
        kind=COUNT,
    )
    _add(
        parser,
        "--peer-readers",
        "DYN_REFIT_PEER_READERS",
        "2",
        "workers that read from one worker at a time; 0: all",
        kind=COUNT,
    )
    _add(
        parser,
        "--settle-seconds",
        "DYN_REFIT_SETTLE_SECONDS",
        "2",
        "after its start the coordinator lets nobody serve start-up weights",
        kind=SECONDS,
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> CoordinatorConfig:
    """The configuration from ``argv`` and the environment."""
    options = build_parser().parse_args(argv)
    return CoordinatorConfig(
        namespace=options.namespace,
        model=options.model,
        worker_components=options.worker_components,
        fleet_poll_seconds=options.fleet_poll_seconds,
        policy=Policy(
            stage_seconds=options.stage_seconds,
            commit_seconds=options.commit_seconds,
            in_flight=options.in_flight,
            commit=options.commit_policy,
            max_unavailable=options.max_unavailable,
            hold_seconds=options.hold_seconds,
            drain_seconds=options.drain_seconds,
            quorum=options.quorum,
            direct_readers=options.direct_readers,
            peer_readers=options.peer_readers,
            settle_seconds=options.settle_seconds,
        ),
    )


def _number(
    kind: Callable[[str], T], fits: Callable[[T], bool], allowed: str
) -> Callable[[str], T]:
    """Reads a number that ``fits``, which NaN never does."""

    def read(text: str) -> T:
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"{text!r} is no {allowed}")
        return number

    return read


BOUND = _number(float, lambda s: 0 < s < math.inf, "number of seconds above 0")
SECONDS = _number(float, lambda s: 0 <= s < math.inf, "number of seconds from 0 up")
SHARE = _number(float, lambda share: 0 < share <= 1, "share above 0 and up to 1")
COUNT = _number(int, lambda count: count >= 0, "whole number from 0 up")


def _model(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(
            "'' is no model's name: leave it out for that of the first workers"
        )
    return text


def _name(text: str) -> str:
    """A part of the path of an endpoint, which has dots between its parts."""
    if not text or "." in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name without dots")
    return text


def _names(text: str) -> tuple[str, ...]:
    """Each name once: a component that is listed twice has its workers once."""
    return tuple(dict.fromkeys(_name(name.strip()) for name in text.split(",")))


def _add(
    parser: argparse.ArgumentParser,
    flag: str,
    variable: str,
    default: str | None,
    text: str,
    *,
    kind: Callable[[str], object] = str,
    choices: Sequence[str] | None = None,
) -> None:
    value = os.environ.get(variable)
    if value is not None:
        # argparse does not compare a default with the choices, and would name the
        # flag for a value that came from the environment.
        try:
            kind(value)
        except argparse.ArgumentTypeError as error:
            parser.error(f"{variable}: {error}")
        if choices is not None and value not in choices:
            parser.error(f"{variable}={value!r} is none of {', '.join(choices)}")
    parser.add_argument(
        flag,
        type=kind,
        choices=choices,
        default=default if value is None else value,
        help=f"{text} [env: {variable}; default: {default}]",
    )
