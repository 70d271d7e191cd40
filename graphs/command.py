# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the graphs' command lines share: arguments, and running until Ctrl-C."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from graphs.local import CPU_WORKER_ARGS, GraphError, LocalGraph, Plane, interruptible


def main(build: Callable[..., LocalGraph], module: str, description: str) -> int:
    """Run the graph that ``build`` makes of a model and LocalGraph's settings."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint directory"
    )
    parser.add_argument("--name", default="tiny", help="served model name")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument(
        "--plane",
        choices=get_args(Plane),
        default="file",
        help="discovery in files and events over ZMQ, or etcd and NATS",
    )
    parser.add_argument("--logs", type=Path, help="directory for logs and discovery")
    parser.add_argument("worker_args", nargs="*", help="arguments for the workers")
    options = parser.parse_args()
    with interruptible():
        try:
            graph = build(
                options.model,
                name=options.name,
                tensor_parallel=options.tensor_parallel,
                worker_args=options.worker_args or CPU_WORKER_ARGS,
                plane=options.plane,
                directory=options.logs,
            )
            with graph:
                graph.start(report=print)
                print("a trainer joins this graph with:")
                for name, value in graph.environment.items():
                    print(f"  export {name}={value}", flush=True)
                wait_until_one_ends(graph)
        except GraphError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopping")
    return 0


def wait_until_one_ends(graph: LocalGraph) -> None:
    """Block while all processes run.

    Raises:
        GraphError: which process ended, with its last lines.
    """
    while all(process.running for process in graph.processes.values()):
        time.sleep(0.5)
    dead = [p for p in graph.processes.values() if not p.running]
    raise GraphError("\n".join(f"{p.name} ended:\n{p.end_of_log()}" for p in dead))
