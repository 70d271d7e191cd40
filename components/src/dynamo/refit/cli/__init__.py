# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit``: look at a running deployment, and give it new weights."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

# Read when they are imported: Dynamo tells a lot about itself by default, and NIXL on
# standard output.
os.environ.setdefault("DYN_LOG", "warn")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

from dynamo.refit.cli.doctor import doctor
from dynamo.refit.cli.history import history
from dynamo.refit.cli.output import AsJson, Namespace, complain
from dynamo.refit.cli.status import status
from dynamo.refit.cli.verify import verify
from dynamo.refit.cli.watch import watch
from dynamo.refit.errors import RefitError, UnsupportedConfiguration
from dynamo.refit.protocol import InFlightPolicy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    rich_markup_mode="markdown",
)
app.command()(status)
app.command()(watch)
app.command()(history)
app.command()(verify)
app.command()(doctor)


@app.command()
def publish(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="a safetensors checkpoint")
    ],
    version: Annotated[
        int, typer.Option(min=0, help="higher than any version before it")
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
        float, typer.Option(min=1, help="seconds until the version is withdrawn")
    ] = 600.0,
    as_json: AsJson = False,
) -> int:
    """Install a checkpoint: map its files, announce it, and wait until it is served.

    The workers read it from this process, so it runs until they are done. Exits with 0
    when every worker serves the version, and with 1 when it failed, was refused or was
    superseded; Ctrl-C withdraws it.
    """
    # Loaded on use: torch and NIXL take seconds, and `status` and `watch` are to
    # answer at once, also where neither is installed.
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


def main() -> None:
    """Console entry point: an error is one line and exit code 1, or 2 for arguments."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except typer.TyperException as error:
        error.show()
        sys.exit(error.exit_code)
    except RefitError as error:
        complain(error)
        sys.exit(1)
