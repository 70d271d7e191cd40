# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank that cannot be refitted, through a graph: its worker ends with one line that
says why, and the graph shows that line."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphs.local import CPU_WORKER_ARGS, GraphError, LocalGraph
from graphs.tiny_model import make_checkpoint
from tests.support.refusing import REFUSES

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(300),
]

REFUSAL = (
    "dynamo-refit: UnsupportedConfiguration: this model is not refitted: serve it "
    "otherwise (rank 1, tensor model.a)"
)


@pytest.mark.parametrize(
    ("when", "admission"),
    [
        ("loading", "coordinator"),
        ("described", "coordinator"),
        ("described", "immediate"),
    ],
)
def test_the_refusal_of_a_rank_is_what_a_graph_shows(
    when: str, admission: str, tmp_path: Path
) -> None:
    graph = LocalGraph(
        make_checkpoint(tmp_path / "model", seed=1),
        tensor_parallel=2,
        worker_args=[
            *CPU_WORKER_ARGS,
            "--worker-extension-cls=tests.support.refusing.RefusingExtension",
            f"--refit-admission={admission}",
        ],
        worker_env={REFUSES: when},
        directory=tmp_path / "graph",
    )
    with graph:
        with pytest.raises(GraphError) as shown:
            graph.start()
        worker = graph.processes["worker0"]
        assert worker._child.wait(10) == 1
        log = worker.log.read_text()
    assert str(shown.value) == f"worker0 ended:\n{REFUSAL}"
    assert log.splitlines()[-1].endswith(REFUSAL)
    assert "admitted: this worker registers" not in log
