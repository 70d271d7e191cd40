# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A prefill worker and a decode worker, both refitted by one version.

    python -m graphs.disagg --model DIR [--plane etcd] [-- WORKER ARGUMENTS]

The KV cache goes from one to the other over NIXL. Without ``-- ...`` the workers get
arguments for a CPU engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from graphs.command import main
from graphs.local import KV_ROUTER_ARGS, LocalGraph, kv_events


def build(model: Path, **settings: Any) -> LocalGraph:
    """The graph, not started; ``settings`` are those of :class:`LocalGraph`."""
    return LocalGraph(
        model,
        workers=[
            [
                "--disaggregation-mode",
                "prefill",
                *kv_over_nixl("producer"),
                *kv_events(),
            ],
            ["--disaggregation-mode", "decode", *kv_over_nixl("consumer")],
        ],
        frontend_args=KV_ROUTER_ARGS,
        **settings,
    )


def kv_over_nixl(role: str) -> list[str]:
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_connector_module_path": "graphs.kv_transfer",
        "kv_role": f"kv_{role}",
    }
    return ["--kv-transfer-config", json.dumps(transfer)]


if __name__ == "__main__":
    sys.exit(main(build, "graphs.disagg", __doc__))
