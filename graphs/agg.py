# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Aggregated serving with refit: frontend, one worker, refit coordinator.

    python -m graphs.agg --model DIR --tensor-parallel 2 [-- WORKER ARGUMENTS]

Without ``-- ...`` the worker gets arguments for a CPU engine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from graphs.local import CPU_WORKER_ARGS, GraphError, LocalGraph, interruptible


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m graphs.agg", description=__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint directory"
    )
    parser.add_argument("--name", default="tiny", help="served model name")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="directory for logs and discovery")
    parser.add_argument("worker_args", nargs="*", help="arguments for the worker")
    options = parser.parse_args()
    graph = LocalGraph(
        options.model,
        name=options.name,
        tensor_parallel=options.tensor_parallel,
        worker_args=options.worker_args or CPU_WORKER_ARGS,
        directory=options.logs,
    )
    with interruptible(), graph:
        try:
            graph.start(report=print)
            print("a trainer joins this graph with:")
            for name, value in graph.environment.items():
                print(f"  export {name}={value}")
            while all(process.running for process in graph.processes.values()):
                time.sleep(0.5)
            dead = [p for p in graph.processes.values() if not p.running]
            raise GraphError("\n".join(f"{p.name} ended:\n{p.tail()}" for p in dead))
        except GraphError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopping")
    return 0


if __name__ == "__main__":
    sys.exit(main())
