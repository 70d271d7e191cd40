# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""UCX is told something only where it would choose TCP between two of its own."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from dynamo.refit.transport import ucx

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.mark.parametrize(
    ("variables", "nvlinks", "needed"),
    [
        (["PATH"], 0, True),
        (["PATH"], 18, False),
        (["PATH"], None, False),
        (["PATH", "UCX_TLS"], 0, False),
        (["UCX_NET_DEVICES"], 0, False),
        (["UCX_LOG_LEVEL", "UCX_PROTO_INFO"], 0, True),
        (["UCX_LOG_LEVEL", "UCX_TLS"], 0, False),
    ],
)
def test_reads_are_allowed_where_no_link_is_and_nobody_chose(
    variables: list[str], nvlinks: int | None, needed: bool
) -> None:
    assert ucx.needs_reads(variables, nvlinks) is needed


class FakeNvml(SimpleNamespace):
    """A test fake of pynvml: GPUs with so many links, of which so many are up."""

    NVML_NVLINK_MAX_LINKS = 18

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801
        pass

    class NVMLError_InvalidArgument(NVMLError):  # noqa: N801
        pass

    def __init__(self, *gpus: list[int], fails: bool = False) -> None:
        super().__init__(gpus=gpus, fails=fails, open=0)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.fails:
            raise self.NVMLError("no driver")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> list[int]:  # noqa: N802
        return self.gpus[index]

    def nvmlDeviceGetNvLinkState(self, gpu: list[int], link: int) -> int:  # noqa: N802
        if not gpu:
            raise self.NVMLError_NotSupported
        if link >= len(gpu):
            raise self.NVMLError_InvalidArgument
        return gpu[link]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("UCX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield monkeypatch
    monkeypatch.undo()
    os.environ.pop(ucx.READS, None)


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ([[]], "y"),
        ([[0, 0]], "y"),
        ([[0, 0], [0, 1]], None),
        ([[1] * 18], None),
    ],
)
def test_every_gpu_s_links_are_counted(
    environment: pytest.MonkeyPatch, gpus: list[list[int]], told: str | None
) -> None:
    nvml = FakeNvml(*gpus)
    environment.setattr(ucx, "pynvml", nvml)
    ucx.allow_reads_on_one_gpu()
    assert os.environ.get(ucx.READS) == told
    assert nvml.open == 0


def test_what_the_operator_set_stays(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(ucx, "pynvml", FakeNvml([]))
    environment.setenv(ucx.READS, "n")
    ucx.allow_reads_on_one_gpu()
    assert os.environ[ucx.READS] == "n"


@pytest.mark.parametrize("nvml", [None, FakeNvml(fails=True)])
def test_where_links_cannot_be_counted_nothing_is_set(
    environment: pytest.MonkeyPatch, nvml: FakeNvml | None
) -> None:
    environment.setattr(ucx, "pynvml", nvml)
    ucx.allow_reads_on_one_gpu()
    assert ucx.READS not in os.environ


@pytest.mark.parametrize("chosen", [None, "n", "y"])
def test_tables_of_reads_are_asked_for_unless_the_operator_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setenv(ucx.TABLES, "")
    monkeypatch.delenv(ucx.TABLES)
    if chosen is not None:
        monkeypatch.setenv(ucx.TABLES, chosen)
    ucx.show_reads()
    assert os.environ[ucx.TABLES] == (chosen or "*memory read*")
