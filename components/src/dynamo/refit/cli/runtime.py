# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The commands' way onto the Dynamo runtime, without its log among what they say.

To be imported before anything of Dynamo or NIXL: they read these variables when they
are imported. Dynamo tells a lot about itself by default, and NIXL on standard output.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING

#: Somebody wants to see Dynamo's log.
LOG_WANTED = "DYN_LOG" in os.environ

os.environ.setdefault("DYN_LOG", "warn")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

from dynamo.refit.cli.doctor import discovery  # noqa: E402
from dynamo.refit.errors import RefitError  # noqa: E402
from dynamo.refit.rpc import runtime_from_environment  # noqa: E402

if TYPE_CHECKING:
    from dynamo.runtime import DistributedRuntime


def connect(*, alone_on_terminal: bool = False) -> DistributedRuntime:
    """A runtime on the running loop, which logs only where DYN_LOG is set; never if it
    would write into a view that is ``alone_on_terminal``.

    Raises:
        RefitError: a server that it needs does not answer: it would wait for minutes.
    """
    for finding in discovery.check_servers(os.environ):
        if finding.level == "failure":
            raise RefitError(f"{finding.summary}: {finding.remedy}")
    if not LOG_WANTED or (alone_on_terminal and os.isatty(2)):
        _silence()
    return runtime_from_environment()


@functools.cache
def _silence() -> None:
    """Leave file 2 to nobody: Dynamo 1.6 logs each call there, whatever its level is.

    Python goes on to write to what it was.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
