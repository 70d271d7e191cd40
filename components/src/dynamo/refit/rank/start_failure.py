# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Why a rank refused while its engine started, for the worker's process.

vLLM tells that process only that a rank failed. So the rank leaves its failure in a
file whose path all processes of a worker have in their environment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dynamo.refit.errors import Failure, RefitError, failure_from

#: Set by the worker for the processes that it starts.
START_FAILURE_VARIABLE = "DYN_REFIT_START_FAILURE"


@contextlib.contextmanager
def told_to_worker(rank: int | None = None) -> Iterator[None]:
    """Leave the first :class:`RefitError` of all ranks for the worker, and raise it."""
    try:
        yield
    except RefitError as error:
        path = os.environ.get(START_FAILURE_VARIABLE)
        if path:
            failure = failure_from(error, stage="start", rank=rank)
            with contextlib.suppress(FileExistsError), open(path, "xb") as file:
                file.write(msgspec.msgpack.encode(failure))
        raise


def take_failure(path: Path) -> Failure | None:
    """What a rank has left at ``path``, taken away from there."""
    try:
        failure = msgspec.msgpack.decode(path.read_bytes(), type=Failure)
    except FileNotFoundError:
        return None
    path.unlink()
    return failure
