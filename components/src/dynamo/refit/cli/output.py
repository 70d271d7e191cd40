# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, and how they say things."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from datetime import datetime
from typing import Annotated

import typer

from dynamo.refit.args import BOUND
from dynamo.refit.errors import RefitError
from dynamo.refit.events import Event

Namespace = Annotated[
    str, typer.Option(envvar="DYN_NAMESPACE", help="Dynamo namespace")
]
Model = Annotated[
    str | None,
    typer.Option(help="served model name; needed where a namespace has several"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one line of JSON each")]


def bound(text: str) -> float:
    """An option's seconds, as the components' own flags have them: above 0, finite."""
    try:
        return BOUND(text)
    except argparse.ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error


def time_of(event: Event) -> str:
    """When the event was sent, as local time of day with milliseconds."""
    return datetime.fromtimestamp(event.at).strftime("%H:%M:%S.%f")[:-3]


def is_of(event: Event, model: str | None) -> bool:
    """Whether the event concerns ``model``; where that is not known, it may."""
    return not model or event.model in ("", model)


def complain(what: RefitError | str) -> None:
    """One line on standard error."""
    tensor = getattr(what, "tensor", None)
    where = f"tensor {tensor}: " if tensor else ""
    line = " ".join(f"dynamo-refit: {where}{what}".splitlines())
    print(line, file=sys.stderr, flush=True)


def cancel_on_signals() -> None:
    """Let SIGINT and SIGTERM cancel the running task.

    A shell's background jobs begin with SIGINT ignored, and asyncio leaves it so.
    """
    cancel = asyncio.current_task().cancel
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, cancel)
