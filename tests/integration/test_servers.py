# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A graph's own etcd and NATS, and Dynamo processes that meet through them."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphs.local import LocalGraph, fetch
from tests.support.processes import ask_cli

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(120),
]


def test_processes_meet_through_etcd(tmp_path: Path) -> None:
    with LocalGraph(tmp_path, plane="etcd", directory=tmp_path) as graph:
        graph.start_servers()
        graph.start_coordinator()
        status = ask_cli(graph, "status")
        processes = list(graph.processes.values())
    assert (status["members"], status["desired"]) == ([], None)
    assert not any(process.running for process in processes)
    # Nothing was left in files, where the other plane would have it.
    assert not (tmp_path / "discovery").exists()
    assert fetch(f"{graph.environment['ETCD_ENDPOINTS']}/health") is None
