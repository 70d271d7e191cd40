# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Each set of packages in an environment of its own, which has what the wheel asks for
and nothing else; there its entry points run.

Names are resolved, so a dependency that pyproject.toml lacks is missing here; versions
are those of cpu.lock.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from dynamo.runtime import DistributedRuntime
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from dynamo.refit.cli import app
from graphs.local import free_port
from tests.support.fake_worker import fake_worker
from tests.support.packages import ROOT, CleanEnvironment, build_wheel

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    # Another engine may keep both cores busy while a process imports vLLM.
    pytest.mark.timeout(600),
]

PATIENCE_SECONDS = 120.0

LOCK = ROOT / "cpu.lock"

#: What pyproject.toml says of machines without a GPU.
ONE_NIXL = "nixl-cu13; sys_platform == 'never'\n"

#: What a training loop does: README, "Add it to a graph you have".
TRAINER = """
import torch
from dynamo.refit.publish.publisher import WeightPublisher

torch.manual_seed(1)
model = torch.nn.Linear(16, 300)
publisher = WeightPublisher("tiny", dict(model.named_parameters()))
handle = publisher.publish(version=1)
print(handle.wait().outcome)
publisher.close()
"""

MEGATRON = """
import json, torch
from dynamo.refit.publish.megatron import MegatronTensorSpec, megatron_shards

spec = MegatronTensorSpec(
    name="decoder.layers.0.mlp.linear_fc1.weight",
    tensor=torch.arange(24.0).view(8, 3),
    role="gated_mlp_column",
    hf_names=("gate.weight", "up.weight"),
    global_shape=(16, 3),
    placement_kind="SHARD",
    shard_axis=0,
    local_shard_range=(8, 16),
    extras={"gated_mlp_order": "gate_then_up"},
)
print(json.dumps([
    [shard.name, shard.shape, shard.offset, shard.tensor.tolist()]
    for shard in megatron_shards([spec])
]))
"""

FOUND = """
import importlib.util, json, sys
print(json.dumps([n for n in sys.argv[1:] if importlib.util.find_spec(n)]))
"""

#: Requirements of the package with an extra that do not hold where this runs.
UNMET = """
import json, sys
from importlib import metadata
from packaging.requirements import Requirement

unmet = []
for wanted in map(Requirement, metadata.requires("dynamo-refit")):
    if wanted.marker and not wanted.marker.evaluate({"extra": sys.argv[1]}):
        continue
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None or not wanted.specifier.contains(version, prereleases=True):
        unmet.append([str(wanted), version])
print(json.dumps(unmet))
"""


class Packages:
    """A clean environment for each set of packages that is asked for. On uv's cache:
    what it has is linked, not copied."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._wheel = build_wheel(directory)
        self._made: dict[str, CleanEnvironment] = {}

    def base(self) -> CleanEnvironment:
        return self._resolved("")

    def extra(self, name: str) -> CleanEnvironment:
        return self._resolved(f"[{name}]")

    def _resolved(self, extra: str) -> CleanEnvironment:
        if extra not in self._made:
            made = self._made[extra] = CleanEnvironment.make(
                self._directory / (extra or "base")
            )
            override = self._directory / "override.txt"
            override.write_text(ONE_NIXL)
            wanted = f"dynamo-refit{extra} @ {self._wheel.as_uri()}"
            made.install("--constraint", LOCK, "--override", override, wanted)
        return self._made[extra]

    def locked(self) -> CleanEnvironment:
        """All of cpu.lock."""
        made = CleanEnvironment.make(self._directory / "locked")
        made.install("--no-deps", "--requirement", LOCK, self._wheel)
        return made


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packages]:
    directory = tmp_path_factory.mktemp("packages")
    yield Packages(directory)
    shutil.rmtree(directory)


@pytest.fixture
def outside(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """What processes of clean environments have: nothing of this checkout's."""
    (tmp_path / "discovery").mkdir()
    foreign = ("PYTHONPATH", "VIRTUAL_ENV")
    return {n: v for n, v in environment.items() if n not in foreign}


def run(
    environment: dict[str, str], *words: object
) -> subprocess.CompletedProcess[str]:
    """Away from the checkout, whose directory would be on the path."""
    return subprocess.run(
        list(map(str, words)),
        env=environment,
        cwd=environment["DYN_FILE_KV"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def answer_of(environment: dict[str, str], *words: object) -> object:
    """The line of JSON that it ends with."""
    ended = run(environment, *words)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@asynccontextmanager
async def coordinator(
    base: CleanEnvironment, environment: dict[str, str]
) -> AsyncIterator[int]:
    """`python -m dynamo.refit`, from when it is healthy; the port of its `/metrics`."""
    port = free_port()
    child = await asyncio.create_subprocess_exec(
        *(base.python, "-m", "dynamo.refit", "--model", "tiny"),
        *("--fleet-poll-seconds", "0.1"),
        env={**environment, "DYN_SYSTEM_PORT": str(port)},
        cwd=environment["DYN_FILE_KV"],
    )
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await asyncio.to_thread(fetched, port, "health"):
                assert child.returncode is None, "it has ended"
                await asyncio.sleep(0.1)
        yield port
        child.terminate()
        assert await asyncio.wait_for(child.wait(), PATIENCE_SECONDS) == 0
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


def fetched(port: int, page: str) -> str:
    """Empty where nobody answers, or not with 200."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=2) as it:
            return it.read().decode()
    except OSError:
        return ""


async def test_the_base_package_has_coordinator_and_command_line(
    packages: Packages, outside: dict[str, str], tmp_path: Path
) -> None:
    base = packages.base()
    absent = ("torch", "vllm", "nixl", "transformers", "dynamo.common", "numba")
    assert answer_of(outside, base.python, "-c", FOUND, *absent, "msgspec") == [
        "msgspec"
    ]
    helped = run(outside, base.python, "-m", "dynamo.refit", "--help")
    assert (helped.returncode, "--commit-policy" in helped.stdout) == (0, True)
    commands = [command.callback.__name__ for command in app.registered_commands]
    listed = run(outside, base.command, "--help")
    assert {word for word in listed.stdout.split() if word in commands} == set(commands)
    for command in commands:
        helped = run(outside, base.command, command, "--help")
        assert (helped.returncode, "--namespace" in helped.stdout) == (0, True), command

    async with coordinator(base, outside) as port:
        metrics = await asyncio.to_thread(fetched, port, "metrics")
        (workers,) = (
            family
            for family in text_string_to_metric_families(metrics)
            if family.name == "dynamo_component_refit_workers"
        )
        serving = next(s for s in workers.samples if s.labels["phase"] == "serving")
        assert serving.value == 0
        assert serving.labels["dynamo_endpoint"] == "status"

        ask = [outside, base.command]
        status = await asyncio.to_thread(answer_of, *ask, "status", "--json")
        assert (status["model"], status["members"]) == ("tiny", [])
        history = await asyncio.to_thread(run, *ask, "history", "--json")
        assert (history.returncode, history.stdout) == (0, "")
        published = await asyncio.to_thread(
            run, *ask, "publish", tmp_path, "--version", 1
        )
        assert published.returncode == 1
        assert "pip install 'dynamo-refit[trainer]'" in published.stderr
        doctor = await asyncio.to_thread(run, *ask, "doctor", "--json")
        found = {f["check"]: f for f in map(json.loads, doctor.stdout.splitlines())}
        assert {c: f["level"] for c, f in found.items()} == {
            "packages": "ok",
            "event plane": "ok",
            "coordinator": "ok",
            "NIXL": "failure",
        }
        assert "pip install 'dynamo-refit[trainer]'" in found["NIXL"]["remedy"]


async def test_a_trainer_publishes_to_a_coordinator_of_the_base_package(
    packages: Packages, outside: dict[str, str], tmp_path: Path
) -> None:
    """By three lines of Python and by `dynamo-refit publish`: a worker without an
    engine reads the bytes over NIXL."""
    base, trainer = packages.base(), packages.extra("trainer")
    torch.manual_seed(1)
    linear = torch.nn.Linear(16, 300)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    saved = {"weight": torch.randn(300, 16).bfloat16(), "bias": torch.randn(300)}
    save_file(saved, checkpoint / "model.safetensors")
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")
    async with (
        fake_worker(runtime, "dynamo", "tiny") as worker,
        coordinator(base, outside),
    ):
        ended = await asyncio.to_thread(run, outside, trainer.python, "-c", TRAINER)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split() == ["completed"]
        words = ["publish", checkpoint, "--version", 2]
        ended = await asyncio.to_thread(run, outside, trainer.command, *words)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.splitlines()[-1] == "version 2 is served"
    runtime.shutdown()
    expected = {1: dict(linear.named_parameters()), 2: saved}
    assert worker.served.keys() == expected.keys()
    for version, tensors in expected.items():
        held = worker.served[version]
        assert held.keys() == tensors.keys()
        for name, tensor in tensors.items():
            raw = tensor.detach().reshape(-1).view(torch.uint8)
            assert torch.equal(held[name], raw), (version, name)


def test_megatron_parameters_get_their_names(
    packages: Packages, outside: dict[str, str]
) -> None:
    megatron = packages.extra("megatron")
    both = torch.arange(24.0).view(8, 3)
    # The second of two ranks: its half of gate, then its half of up.
    assert answer_of(outside, megatron.python, "-c", MEGATRON) == [
        ["gate.weight", [8, 3], [4, 0], both[:4].tolist()],
        ["up.weight", [8, 3], [4, 0], both[4:].tolist()],
    ]
    imported = "from dynamo.refit.publish.publisher import WeightPublisher; print(0)"
    assert answer_of(outside, megatron.python, "-c", imported) == 0


def test_a_worker_on_a_cpu_is_what_the_lock_installs(
    packages: Packages, outside: dict[str, str]
) -> None:
    worker = packages.locked()
    assert answer_of(outside, worker.python, "-c", UNMET, "cpu") == []
    helped = run(outside, worker.python, "-m", "dynamo.refit.worker", "--help")
    assert helped.returncode == 0, helped.stderr
    for flag in ("--refit-staging", "--refit-admission", "--model", "--endpoint"):
        assert flag in helped.stdout
