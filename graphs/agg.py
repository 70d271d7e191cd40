# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Aggregated serving with refit: frontend, one worker, refit coordinator.

    python -m graphs.agg --model DIR --tensor-parallel 2 [-- WORKER ARGUMENTS]

Without ``-- ...`` the worker gets arguments for a CPU engine.
"""

from __future__ import annotations

import sys

from graphs.command import main
from graphs.local import LocalGraph

if __name__ == "__main__":
    sys.exit(main(LocalGraph, "graphs.agg", __doc__))
