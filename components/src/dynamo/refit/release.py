# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which release of this package runs: coordinator and workers say it in their status,
so that a fleet of two releases can be told."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "dynamo-refit"


def _installed() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        # On the path, but not installed.
        return "unknown"


RELEASE = _installed()
