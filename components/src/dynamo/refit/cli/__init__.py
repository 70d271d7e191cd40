# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""``dynamo-refit``: look at a running deployment, and give it new weights."""

from __future__ import annotations

import sys

import typer

# First, as others read what it sets when they are imported.
from dynamo.refit.cli import runtime  # isort: skip

from dynamo.refit.cli.doctor import doctor
from dynamo.refit.cli.history import history
from dynamo.refit.cli.output import complain
from dynamo.refit.cli.publish import publish
from dynamo.refit.cli.status import status
from dynamo.refit.cli.verify import verify
from dynamo.refit.cli.watch import watch
from dynamo.refit.errors import RefitError

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
app.command()(publish)
app.command()(doctor)


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
    # Dynamo raises plain Exceptions for what the environment has wrong.
    except Exception as error:
        if runtime.LOG_WANTED:
            raise
        complain(
            f"{type(error).__name__}: {error}; `dynamo-refit doctor` looks for what is "
            "wrong here, and DYN_LOG=debug shows where it happened"
        )
        sys.exit(1)
