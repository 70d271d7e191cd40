# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a trainer may tell a publisher: refused here, before anything starts or is
announced, where workers and coordinator would not understand it."""

from __future__ import annotations

import math
import operator
from typing import get_args

from dynamo.refit.protocol import MAX_VERSION, InFlightPolicy
from dynamo.refit.publish.memory import Mode

MODES = get_args(Mode)
IN_FLIGHT_POLICIES = get_args(InFlightPolicy)

#: Characters, so that an announcement with these names in it is not too long to be
#: read: of a model's name, and of a part of an endpoint's path.
MAX_MODEL = 1024
MAX_PATH_PART = 200


def check_settings(
    *,
    model: str,
    mode: str,
    namespace: str,
    component: str,
    rank: int,
    world_size: int,
    ready_seconds: float,
) -> None:
    """
    Raises:
        ValueError: a setting is not allowed; says which one, and what is.
    """
    part_of_path = f"a name of 1 to {MAX_PATH_PART} characters without dots"
    settings = (
        ("model", model, 0 < len(model) <= MAX_MODEL, f"1 to {MAX_MODEL} characters"),
        ("mode", mode, mode in MODES, f"one of {', '.join(MODES)}"),
        ("namespace", namespace, _is_part_of_path(namespace), part_of_path),
        ("component", component, _is_part_of_path(component), part_of_path),
        ("world_size", world_size, world_size > 0, "a number of ranks above 0"),
        ("rank", rank, 0 <= rank < world_size, f"from 0 to {world_size - 1}"),
        # NaN is not between the two, either.
        ("ready_seconds", ready_seconds, 0 < ready_seconds < math.inf, "above 0"),
    )
    for name, value, fits, allowed in settings:
        if not fits:
            raise ValueError(f"{name}={value!r} is not allowed: {allowed}")


def _is_part_of_path(name: str) -> bool:
    return 0 < len(name) <= MAX_PATH_PART and "." not in name


def check_in_flight(in_flight: str | None) -> None:
    """
    Raises:
        ValueError: it is no policy.
    """
    if in_flight not in (None, *IN_FLIGHT_POLICIES):
        raise ValueError(
            f"in_flight={in_flight!r} is none of {', '.join(IN_FLIGHT_POLICIES)}"
        )


def version_number(version: int) -> int:
    """``version`` as an int of Python's; numpy has integers of its own.

    Raises:
        TypeError, ValueError: it is no integer, or not in the range of a version.
    """
    if isinstance(version, bool):
        raise TypeError(f"version {version} is no number")
    number = int(operator.index(version))
    if not 0 <= number <= MAX_VERSION:
        raise ValueError(f"version {number} is no number from 0 to 2**63 - 1")
    return number
