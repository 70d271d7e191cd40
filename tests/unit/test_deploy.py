# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes manifests are the twins of the local graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dynamo.refit.args import parse_args

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def containers(name: str) -> dict[str, dict]:
    """Component name to its main container."""
    graph = yaml.safe_load((DEPLOY / name).read_text())
    assert graph["apiVersion"] == "nvidia.com/v1beta1"
    assert graph["kind"] == "DynamoGraphDeployment"
    found = {}
    for component in graph["spec"]["components"]:
        (main,) = component["podTemplate"]["spec"]["containers"]
        assert main["name"] == "main"
        found[component["name"]] = main
    return found


def test_agg_runs_what_the_local_graph_runs() -> None:
    commands = {name: c["command"][2] for name, c in containers("agg.yaml").items()}
    assert commands == {
        "Frontend": "dynamo.frontend",
        "VllmWorker": "dynamo.refit.worker",
        "RefitCoordinator": "dynamo.refit",
    }


def test_the_coordinator_accepts_its_arguments() -> None:
    arguments = containers("agg.yaml")["RefitCoordinator"]["args"]
    assert parse_args(arguments).worker_components == ("backend", "prefill")


def test_every_flag_has_its_environment_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYN_NAMESPACE", "other")
    monkeypatch.setenv("DYN_REFIT_STAGE_SECONDS", "7.5")
    monkeypatch.setenv("DYN_REFIT_IN_FLIGHT", "recompute")
    config = parse_args([])
    assert config.namespace == "other"
    assert config.policy.stage_seconds == 7.5
    assert config.policy.in_flight == "recompute"
    assert parse_args(["--namespace", "flag"]).namespace == "flag"
