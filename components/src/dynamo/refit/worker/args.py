# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The worker's own flags, beside those of ``dynamo.vllm``; an environment variable for
each."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import get_args

from dynamo.refit.protocol import StagingChoice
from dynamo.refit.worker.routing import Admission

#: Dynamo's: appended to the namespace that a worker serves in.
GENERATION = "DYN_NAMESPACE_WORKER_SUFFIX"


@dataclass(frozen=True)
class Options:
    """Our own arguments."""

    staging: StagingChoice
    admission: Admission


def build_parser() -> argparse.ArgumentParser:
    """The flags, with defaults from the environment as it is now.

    Ends the process where a variable is none of the choices.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dynamo.refit.worker", add_help=False, allow_abbrev=False
    )
    _add(
        parser,
        "staging",
        "auto",
        get_args(StagingChoice),
        "where a version waits for its commit; auto: the first that fits",
    )
    _add(
        parser,
        "admission",
        "coordinator",
        get_args(Admission),
        "who lets a worker that starts serve: the coordinator, or nobody need",
    )
    return parser


def take_own_arguments() -> Options:
    """Our own arguments, taken out of what dynamo.vllm will parse."""
    parser = build_parser()
    own, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        # Dynamo's own help follows, which does not have these.
        print(parser.format_help())
    sys.argv = [sys.argv[0], *rest]
    return Options(**vars(own))


def graph_namespace(namespace: str) -> str:
    """Where coordinator and trainer are, for a worker that serves in ``namespace``.

    On Kubernetes the operator gives every generation of workers (one per change of
    their pods) a namespace of its own; refits go through the graph's, so that a new
    generation is brought to what the old one serves, by the old one.
    """
    suffix = os.environ.get(GENERATION)
    return namespace.removesuffix(f"-{suffix}") if suffix else namespace


def _add(
    parser: argparse.ArgumentParser,
    name: str,
    default: str,
    choices: tuple[str, ...],
    text: str,
) -> None:
    variable = f"DYN_REFIT_{name.upper()}"
    value = os.environ.get(variable, default)
    if value not in choices:
        parser.error(f"{variable}={value!r} is none of {', '.join(choices)}")
    parser.add_argument(
        f"--refit-{name}",
        dest=name,
        choices=choices,
        default=value,
        help=f"{text} [env: {variable}; default: {default}]",
    )
