# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit publish``: its arguments. What it does with a checkpoint is in
:mod:`checkpoint`, what with a trainer in :mod:`trainer`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from dynamo.refit.cli.output import AsJson, Namespace
from dynamo.refit.cli.trainer import Repetition, run
from dynamo.refit.errors import UnsupportedConfiguration
from dynamo.refit.protocol import InFlightPolicy


def publish(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="a safetensors checkpoint")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="higher than any version before it; with --from-trainer by default "
            "the trainer's own",
        ),
    ] = None,
    from_trainer: Annotated[
        bool,
        typer.Option(
            "--from-trainer",
            help="announce again the newest version that a running trainer holds",
        ),
    ] = False,
    trainer: Annotated[
        str, typer.Option(help="that trainer's Dynamo component")
    ] = "trainer",
    model: Annotated[
        str | None,
        typer.Option(help="of DIR: served model name; by default the coordinator's"),
    ] = None,
    policy: Annotated[
        InFlightPolicy | None,
        typer.Option(help="what happens to running requests, if not the coordinator's"),
    ] = None,
    namespace: Namespace = "dynamo",
    timeout: Annotated[
        float,
        typer.Option(min=1, help="seconds to wait; DIR is then withdrawn"),
    ] = 600.0,
    as_json: AsJson = False,
) -> int:
    """Install a checkpoint, or what a trainer holds, and wait until it is served.

    A checkpoint's files are mapped, and the workers read them from this process, so it
    runs until they are done; Ctrl-C withdraws the version. With --from-trainer they
    read from the trainer, as when it published; Ctrl-C only ends the waiting.

    Exits with 0 when every worker serves the version, with 1 when it failed, was
    refused or was superseded, and with 2 for wrong arguments.
    """
    if from_trainer == (directory is not None):
        raise typer.BadParameter("give either a DIR or --from-trainer")
    if from_trainer:
        return run(
            Repetition(
                component=trainer,
                version=version,
                in_flight=policy,
                namespace=namespace,
                timeout=timeout,
                as_json=as_json,
            )
        )
    if version is None:
        raise typer.BadParameter("a DIR needs a --version: higher than any before it")
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
