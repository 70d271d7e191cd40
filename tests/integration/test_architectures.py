# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Telling architectures of the survey: refitted bit for bit, or refused when the worker
starts, by the names of the tensors. All of them are judged by ``make survey``."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from safetensors.torch import load_file

from tests.support.architectures import ARCHITECTURES, checkpoint
from tests.support.survey import Outcome, Survey
from tests.survey.page import PAGE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

REFITTED = {
    "qwen3": "fused projections",
    "gemma3": "a tied embedding",
    "phi3": "a checkpoint that is fused already",
    "qwen3moe": "an expert is a tensor of its own",
    "deepseekv3": "MLA derives tensors from its weights",
    "glm4moe": "the router's correction is a buffer in transformers",
    "qwen3next": "its loader assigns to an index",
    "gptoss": "its loader copies experts through another tensor",
    "bloom": "its loader reorders queries, keys and values",
    "falcon": "its loader joins them again",
    "mamba": "its loader computes the decay of what is published",
    "mamba2": "kernels read a view of a packed convolution",
    "nemotronh": "experts, attention and Mamba-2 in one model",
    "apertus": "buffers are filled by the loader",
}

#: The tensor that a refusal has to name, as a pattern.
REFUSED = {
    # vLLM's loader skips the tensor that is published for it.
    "laguna": r"routed_experts\.e_score_correction_bias",
}


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survey]:
    with Survey(2, tmp_path_factory.mktemp("survey")) as survey:
        yield survey


@pytest.mark.parametrize("architecture", REFITTED)
def test_refitted(survey: Survey, architecture: str) -> None:
    finding = survey.judge(architecture)
    assert (finding.outcome, finding.reason) == (Outcome.REFITTED, "")


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_at_start(survey: Survey, architecture: str) -> None:
    finding = survey.judge(architecture)
    assert finding.outcome is Outcome.REFUSED, finding
    assert re.search(rf"\S*{REFUSED[architecture]}\b", finding.reason), finding.reason


@pytest.mark.parametrize("architecture", [*REFITTED, *REFUSED])
def test_no_tensor_is_alike_in_two_checkpoints(architecture: str) -> None:
    """Otherwise a tensor that a refit leaves alone would not be seen."""
    one, two = (
        load_file(checkpoint(architecture, seed) / "model.safetensors")
        for seed in (1, 2)
    )
    assert [name for name in one if one[name].equal(two[name])] == []


@pytest.mark.parametrize("architecture", ["gemma3", "deepseekv3", "qwen3next"])
def test_the_comparison_sees_every_parameter(survey: Survey, architecture: str) -> None:
    one, two = (checkpoint(architecture, seed) for seed in (1, 2))
    ranks = survey.ranks
    ranks.serve(one)
    assert ranks.differences(one) == []
    parameters = {
        f"{name} of rank {rank}"
        for rank, digests in enumerate(ranks.digests())
        for name in digests
    }
    assert parameters - set(ranks.differences(two)) == set()


def test_the_page_speaks_of_every_architecture() -> None:
    rows = re.findall(r"^\| ([\w-]+) \|", PAGE.read_text(), re.M)
    assert set(rows) - {"architecture"} == set(ARCHITECTURES), "run: make survey"
