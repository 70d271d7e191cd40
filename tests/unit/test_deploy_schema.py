# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The manifests and the image are what Kubernetes, the operator and Docker accept.

Neither a cluster nor a Docker daemon is here: the schema is that of
``tests/support/dgd_schema.py``, and the image's installation step is carried out on the
files that the Dockerfile copies, and on no others.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynamo.refit.args import parse_args
from tests.support.dgd_schema import faults
from tests.support.pages import blocks

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = ["agg.yaml", "agg_router.yaml", "disagg.yaml"]
TEMPLATES = files("dynamo.profiler") / "templates" / "dgd" / "vllm"


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())


def main_of(component: dict) -> dict:
    (main,) = component["podTemplate"]["spec"]["containers"]
    return main


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_accepted(name: str) -> None:
    assert faults(load(name)) == []


@pytest.mark.parametrize("name", ["agg.yaml", "disagg.yaml"])
def test_manifests_of_dynamo_itself_are_accepted(name: str) -> None:
    """The schema is no stricter than the one that these were made for."""
    assert faults(yaml.safe_load((TEMPLATES / name).read_text())) == []


def test_what_the_page_adds_to_a_manifest_is_accepted() -> None:
    page = (DEPLOY / "README.md").read_text()
    shown = [b.text for b in blocks(page) if b.language == "yaml"]
    assert shown
    for text in shown:
        manifest = load("agg.yaml")
        manifest["spec"]["components"] += yaml.safe_load(text)
        assert faults(manifest) == []


def test_what_is_wrong_is_found() -> None:
    """One mistake at a time, each of them named."""
    mistakes = {
        "services": lambda spec: spec.update(services={}),
        "replica": lambda spec: spec["components"][1].update(replica=2),
        "'-1' is not|-1 is less": lambda spec: spec["components"][1].update(
            replicas=-1
        ),
        "'backend' is not one of": lambda spec: spec["components"][1].update(
            type="backend"
        ),
        "'1.6' does not match": lambda spec: spec["components"][0].update(
            runtimeVersionOverride="1.6"
        ),
        "no version in the image's tag": lambda spec: spec["components"][0].pop(
            "runtimeVersionOverride"
        ),
        "has to be named main": lambda spec: main_of(spec["components"][0]).update(
            name="frontend"
        ),
        "arguments: unknown field": lambda spec: main_of(spec["components"][1]).update(
            arguments=[]
        ),
        "8000 is no str": lambda spec: main_of(spec["components"][0]).update(
            args=["--http-port", 8000]
        ),
        "'lots' is no quantity": lambda spec: main_of(spec["components"][1])[
            "resources"
        ]["requests"].update(memory="lots"),
        "names of components": lambda spec: spec["components"][0].update(
            name="vllmworker"
        ),
    }
    sound = load("agg.yaml")
    for complaint, mistake in mistakes.items():
        manifest = copy.deepcopy(sound)
        mistake(manifest["spec"])
        found = faults(manifest)
        assert len(found) == 1, (complaint, found)
        assert re.search(complaint, found[0])


@pytest.mark.parametrize("name", MANIFESTS)
def test_everything_runs_the_same_dynamo(name: str) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (tag,) = re.findall(r"^ARG RUNTIME_TAG=(\S+)$", dockerfile, re.M)
    (express,) = re.findall(r"^ARG MODELEXPRESS_VERSION=(\S+)$", dockerfile, re.M)
    assert (tag, express) == (version("ai-dynamo"), version("modelexpress"))
    for component in load(name)["spec"]["components"]:
        assert component["runtimeVersionOverride"] == tag


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pause_is_no_reason_to_restart_a_worker(name: str) -> None:
    """The longest pause that is bounded by configuration is the barrier's."""
    hold = parse_args([]).policy.hold_seconds
    workers = [
        component
        for component in load(name)["spec"]["components"]
        if main_of(component)["command"][2] == "dynamo.refit.worker"
    ]
    assert workers
    for component in workers:
        main = main_of(component)
        env = {variable["name"]: variable["value"] for variable in main["env"]}
        assert float(env["DYN_HEALTH_CHECK_REQUEST_TIMEOUT"]) > hold
        # Liveness asks the runtime, not the engine, and not once only.
        assert main["livenessProbe"]["httpGet"]["path"] == "/live"
        assert main["livenessProbe"]["failureThreshold"] > 1
        # Readiness stays the operator's: /health, as often as it likes.
        assert "readinessProbe" not in main


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_component_without_a_type_brings_its_probes(name: str) -> None:
    for component in load(name)["spec"]["components"]:
        main = main_of(component)
        if "type" not in component:
            (port,) = (v for v in main["env"] if v["name"] == "DYN_SYSTEM_PORT")
            for probe in ("readinessProbe", "livenessProbe"):
                assert main[probe]["httpGet"]["port"] == int(port["value"])


def test_the_image_installs_what_its_build_copies(tmp_path: Path) -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, re.M)
    sources = [source for line in copied for source in line.split()]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{source}" for source in sources} <= set(allowed)
    context = tmp_path / "context"
    for source in sources:
        target = context / source
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_of = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy_of(ROOT / source, target)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    built = subprocess.run(
        [sys.executable, "-c", build],
        cwd=context,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    wheel = zipfile.ZipFile(context / built.stdout.splitlines()[-1])
    package = ROOT / "components" / "src"
    ours = {str(file.relative_to(package)) for file in package.rglob("*.py")}
    inside = {name for name in wheel.namelist() if name.endswith(".py")}
    assert inside == ours
    assert "dynamo/__init__.py" not in inside
    entry = next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    assert b"dynamo-refit = dynamo.refit.cli:main" in wheel.read(entry)
