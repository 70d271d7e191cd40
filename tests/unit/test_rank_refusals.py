# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a rank refuses before anything is staged, by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynamo.refit.errors import PackedWeights, UnsupportedConfiguration
from dynamo.refit.rank.capture import describe_parameters
from dynamo.refit.rank.extension import check_supported

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def config(**changed: object) -> SimpleNamespace:
    settings = {
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_eplb": False,
        "worker_cls": "auto",
        "lora_config": None,
        "inductor_compile_config": {},
        **changed,
    }
    return SimpleNamespace(
        lora_config=settings.pop("lora_config"),
        load_config=SimpleNamespace(load_format="auto"),
        kv_transfer_config=None,
        ec_transfer_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(
            inductor_compile_config=settings.pop("inductor_compile_config")
        ),
        parallel_config=SimpleNamespace(**settings),
    )


def test_tensor_parallel_is_supported() -> None:
    check_supported(config())


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("data_parallel_size", 4, "data_parallel_size"),
        ("enable_expert_parallel", True, "enable_expert_parallel"),
        ("enable_eplb", True, "enable_eplb"),
        ("lora_config", object(), "enable_lora"),
        ("inductor_compile_config", {"max_autotune": True}, "max_autotune"),
    ],
)
def test_refused_settings(setting: str, value: object, named: str) -> None:
    with pytest.raises(UnsupportedConfiguration, match=named):
        check_supported(config(**{setting: value}))


def test_a_parameter_that_was_packed_away_is_named() -> None:
    """As vLLM's CPU build does: an empty parameter where the weight was."""
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")
    live = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert [p.name for p in describe_parameters(twin, live)] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    live[1].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(PackedWeights, match="plain layout") as refused:
        describe_parameters(twin, live)
    assert refused.value.tensor == "1.weight"


def test_a_parameter_of_another_dtype_is_named() -> None:
    twin = nn.Linear(4, 4).to("meta")
    live = nn.Linear(4, 4).to(torch.float16)
    with pytest.raises(PackedWeights, match="float16") as refused:
        describe_parameters(twin, live)
    assert refused.value.tensor == "weight"
