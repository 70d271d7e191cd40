# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish``: its arguments. What the command does with a checkpoint is
in :mod:`checkpoint`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from dynamo.refit.cli.output import AsJson, Namespace, bound
from dynamo.refit.errors import UnsupportedConfiguration
from dynamo.refit.protocol import MAX_VERSION, InFlightPolicy


def publish(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a safetensors checkpoint")
    ],
    version: Annotated[
        int,
        typer.Option(min=0, max=MAX_VERSION, help="higher than any version before it"),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="served model name; by default the coordinator's"),
    ] = None,
    policy: Annotated[
        InFlightPolicy | None,
        typer.Option(help="what happens to running requests, if not the coordinator's"),
    ] = None,
    namespace: Namespace = "dynamo",
    timeout: Annotated[
        float,
        typer.Option(
            parser=bound,
            metavar="SECONDS",
            help="seconds to wait; DIR is then withdrawn",
        ),
    ] = 600.0,
    as_json: AsJson = False,
) -> int:
    """Install a checkpoint, and wait until it is served.

    The files are mapped, and the workers read them from this process, so it runs until
    they are done; Ctrl-C withdraws the version.

    Exits with 0 when every worker serves the version, with 1 when it failed, was
    refused or was superseded, and with 2 for wrong arguments.
    """
    # Loaded on use: torch and NIXL take seconds, and the other commands are to answer
    # at once, also where neither is installed.
    try:
        command = importlib.import_module("dynamo.refit.cli.checkpoint")
    except ModuleNotFoundError as error:
        raise UnsupportedConfiguration(
            f"publishing needs the trainer's packages ({error}): pip install "
            "'dynamo-refit[trainer]'"
        ) from error
    return command.run(
        command.Publication(
            directory=directory,
            version=version,
            model=model,
            in_flight=policy,
            namespace=namespace,
            timeout=timeout,
            as_json=as_json,
        )
    )
