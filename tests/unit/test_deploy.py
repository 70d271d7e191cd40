# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes manifests are the twins of the local graphs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from dynamo.refit.args import parse_args
from graphs import agg_router, disagg
from graphs.local import LocalGraph

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

TWINS = [
    ("agg.yaml", LocalGraph, 2),
    ("agg_router.yaml", agg_router.build, 1),
    ("disagg.yaml", disagg.build, 1),
]

#: These belong to the place: another model, port or accelerator.
LOCAL_TO_A_PLACE = {
    "--model",
    "--served-model-name",
    "--http-port",
    "--gpu-memory-utilization",
}

#: A module that is run, and its options; JSON in a canonical form.
Program = tuple[str, frozenset[tuple[str, str]]]


def components(name: str) -> list[dict]:
    graph = yaml.safe_load((DEPLOY / name).read_text())
    assert graph["apiVersion"] == "nvidia.com/v1beta1"
    assert graph["kind"] == "DynamoGraphDeployment"
    return graph["spec"]["components"]


def main_container(component: dict) -> dict:
    (main,) = component["podTemplate"]["spec"]["containers"]
    assert main["name"] == "main"
    return main


def program(command: Sequence[str]) -> Program:
    """What ``-m MODULE --option value ...`` runs, wherever it runs."""
    dash_m, module, *arguments = command
    assert dash_m == "-m"
    if module == "dynamo.refit":
        return module, frozenset({("config", str(parse_args(arguments)))})
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return module, frozenset(
        (option, canonical(value))
        for option, value in pairs
        if option not in LOCAL_TO_A_PLACE
    )


def canonical(value: str) -> str:
    if not value.startswith("{"):
        return value
    fields = json.loads(value)
    for local in ("endpoint", "kv_connector_module_path"):
        fields.pop(local, None)
    return json.dumps(fields, sort_keys=True)


@pytest.mark.parametrize(("manifest", "build", "ranks"), TWINS)
def test_a_manifest_runs_what_its_local_graph_runs(
    manifest: str, build: Callable[..., LocalGraph], ranks: int, tmp_path: Path
) -> None:
    graph = build(
        tmp_path, tensor_parallel=ranks, worker_args=(), directory=tmp_path / "graph"
    )
    local = Counter(program(command) for command in graph.commands.values())
    deployed: Counter[Program] = Counter()
    for component in components(manifest):
        main = main_container(component)
        command = [*main["command"][1:], *main.get("args", ())]
        deployed[program(command)] += component["replicas"]
    assert deployed == local


@pytest.mark.parametrize(("manifest", "build", "ranks"), TWINS)
def test_a_worker_gets_a_gpu_for_each_rank(
    manifest: str, build: Callable[..., LocalGraph], ranks: int
) -> None:
    for component in components(manifest):
        main = main_container(component)
        limits = main.get("resources", {}).get("limits", {})
        works = main["command"][2] == "dynamo.refit.worker"
        assert limits.get("nvidia.com/gpu") == (str(ranks) if works else None)


def test_component_types_say_who_prefills() -> None:
    types = {
        component["name"]: component.get("type")
        for component in components("disagg.yaml")
    }
    assert types == {
        "Frontend": "frontend",
        "VllmPrefillWorker": "prefill",
        "VllmDecodeWorker": "decode",
        "RefitCoordinator": None,
    }


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
