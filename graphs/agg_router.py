# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two replicas behind the KV router, refitted together.

    python -m graphs.agg_router --model DIR [--plane etcd] [-- WORKER ARGUMENTS]

Without ``-- ...`` the workers get arguments for a CPU engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from graphs.command import main
from graphs.local import KV_ROUTER_ARGS, LocalGraph, kv_events

REPLICAS = 2


def build(model: Path, *, replicas: int = REPLICAS, **settings: Any) -> LocalGraph:
    """The graph, not started; ``settings`` are those of :class:`LocalGraph`."""
    return LocalGraph(
        model,
        workers=[kv_events() for _ in range(replicas)],
        frontend_args=KV_ROUTER_ARGS,
        **settings,
    )


if __name__ == "__main__":
    sys.exit(main(build, "graphs.agg_router", __doc__))
