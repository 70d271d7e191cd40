# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line's exit codes and one-line errors, where nothing has to run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynamo.refit import cli
from dynamo.refit.cli.report import Report, is_last
from dynamo.refit.cli.words import describe
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    WorkerFenced,
    WorkerRefitted,
)
from dynamo.refit.protocol import CommitTimings

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dynamo-refit", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("publish", "nowhere", "--version", 1), "nowhere is no directory"),
        (("publish", ".", "--version", 1), "has no *.safetensors: give the directory"),
        (("publish", ".", "--version", "new"), "Invalid value for '--version'"),
        (("publish", ".", "--version", -1), "Invalid value for '--version'"),
        (("publish", "."), "Missing option '--version'"),
        (("publish", ".", "--version", 1, "--policy", "drop"), "'--policy'"),
        (("publish", ".", "--version", 1, "--timeout", 0), "'--timeout'"),
        *(
            (
                ("publish", ".", "--version", 1, "--timeout", seconds),
                f"'--timeout': '{seconds}' is no number of seconds above 0",
            )
            for seconds in ("nan", "inf", "-1", "soon")
        ),
        (("publish", "--version", 1), "Missing argument 'DIR'"),
        (("doctor", "--model", "."), "No such option"),
        (("unpublish",), "No such command 'unpublish'"),
    ],
)
def test_bad_arguments_end_with_2(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    words: tuple,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err


def test_an_invalid_checkpoint_is_one_line_with_the_tensor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert run(monkeypatch, "publish", tmp_path, "--version", 1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dynamo-refit: ")
    assert "model.safetensors is cut short or corrupt" in line


def test_without_the_trainers_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'")

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert run(monkeypatch, "publish", ".", "--version", 1) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No module named 'torch'" in line
    assert "pip install 'dynamo-refit[trainer]'" in line


def test_the_other_commands_load_neither_torch_nor_nixl() -> None:
    check = "import sys, dynamo.refit.cli; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert not {"torch", "nixl", "safetensors"} & set(ended.stdout.split())


def test_the_last_event_of_a_version_is_the_coordinators() -> None:
    failure = Failure(kind="StagingCancelled", message="no commit", stage="vote")
    by_worker = RefitFailed(version=3, failure=failure, serving=((1, 2),), epoch=0)
    by_coordinator = RefitFailed(version=3, failure=failure, serving=(), epoch=17)
    assert not is_last(by_worker)
    assert is_last(by_coordinator)
    assert not is_last(RefitStarted(model="m", version=3, workers=(1, 2)))


async def test_workers_are_told_of_whose_events_come_after_the_last_one(
    capsys: pytest.CaptureFixture,
) -> None:
    """Events of two publishers have no order: those of the completed version's workers
    are waited for, and nothing after them."""

    def refitted(worker: int) -> WorkerRefitted:
        return WorkerRefitted(
            worker=worker,
            version=3,
            fingerprint="f",
            kv_epoch="3-0",
            in_flight="continue",
            timings=CommitTimings(
                pause_ms=0.0,
                install_ms=1.0,
                copy_ms=0.0,
                resume_ms=0.0,
                stall_ms=1.5,
                probe_ms=0.0,
                verify_ms=0.0,
            ),
        )

    completed = RefitCompleted(
        version=3, announcement_id="a", fingerprint="f", workers=(1, 2), seconds=1.0
    )

    async def events() -> AsyncIterator[Event]:
        for event in (refitted(2), completed, refitted(1), refitted(9)):
            yield event

    report = Report(version=3, as_json=False)
    async with report.following(events(), caller=None, namespace="n"):
        await report.last_event()
    told = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[2] for line in told] == [
        "worker 2 serves it, stall 1.5 ms",
        "completed: 2 workers refitted in 1.00 s",
        "worker 1 serves it, stall 1.5 ms",
    ]


def test_events_are_told_in_one_line() -> None:
    started = RefitStarted(model="m", version=3, workers=(1, 2))
    assert describe(started) == "staging on 2 workers"
    failure = Failure(kind="PointerMoved", message="it moved", stage="install")
    fenced = WorkerFenced(worker=7, version=3, failure=failure)
    told = "worker 7 was taken out of service: install: PointerMoved: it moved"
    assert describe(fenced) == told
