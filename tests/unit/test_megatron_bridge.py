# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Bridge's conversion tasks as shards. Neither it nor Megatron-Core is
installed here: the mappings are stand-ins with the names, attributes and bases of the
real ones, by which ModelExpress knows them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.publish.megatron import bridge_shards
from tests.support.megatron import (
    ATTENTION,
    Parameter,
    Shape,
    assert_same,
    megatron_rank,
    random_checkpoint,
    read_back,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

TP1 = {"tensor_parallel_size": 1, "tensor_parallel_rank": 0}


class MegatronParamMapping:
    def __init__(self, hf_param: object, is_expert: bool = False) -> None:
        self.hf_param = hf_param
        self.is_expert = is_expert

    def megatron_to_hf(self, weights: torch.Tensor, module: object) -> dict:
        raise NotImplementedError("a stand-in")


def bridge_mapping(name: str, *bases: type, **members: object) -> type:
    """A mapping class of that name, with an export of its own."""
    own = {"megatron_to_hf": lambda self, weights, module: {}}
    return type(name, bases or (MegatronParamMapping,), {**own, **members})


BRIDGE = {
    "qkv": bridge_mapping("QKVMapping"),
    "gated": bridge_mapping("GatedMLPMapping"),
    "column": bridge_mapping("ColumnParallelMapping"),
    "row": bridge_mapping("RowParallelMapping"),
    "same": bridge_mapping("ReplicatedMapping"),
}


def task_of(parameter: Parameter) -> SimpleNamespace:
    """A ``WeightConversionTask``."""
    keys = {"qkv": ("q", "k", "v"), "gated": ("gate", "up")}.get(parameter.kind)
    hf = dict(zip(keys, parameter.hf, strict=True)) if keys else parameter.hf[0]
    mapping = BRIDGE[parameter.kind](hf, ".experts." in parameter.name)
    return SimpleNamespace(
        global_param_name=parameter.name,
        mapping=mapping,
        megatron_module=None,
        param_weight=torch.nn.Parameter(parameter.local),
    )


def head_counts(shape: Shape) -> SimpleNamespace:
    return SimpleNamespace(
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
    )


@pytest.mark.parametrize(("heads", "groups", "head_dim", "tp"), ATTENTION)
def test_conversion_tasks_of_megatron_bridge(
    heads: int, groups: int, head_dim: int, tp: int
) -> None:
    shape = Shape(heads, groups, head_dim)
    checkpoint = random_checkpoint(shape)
    kept, ranks = [], []
    for rank in range(tp):
        parameters = list(megatron_rank(checkpoint, shape, tp=tp, rank=rank))
        kept.append(parameters)
        elsewhere = task_of(parameters[0])
        elsewhere.param_weight = None
        ranks.append(
            bridge_shards(
                [None, elsewhere, *(task_of(p) for p in parameters)],
                head_counts(shape),
                tensor_parallel_size=tp,
                tensor_parallel_rank=rank,
                expert_tensor_parallel_size=tp,
                expert_tensor_parallel_rank=rank,
                vocab_size=shape.vocab,
            )
        )
    assert_same(read_back(ranks), checkpoint)
    # A replicated parameter is published once.
    norms = [s for shards in ranks for s in shards if s.name == "model.norm.weight"]
    assert len(norms) == 1


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        (bridge_mapping("MambaInProjMapping"), "MambaInProjMapping computes"),
        (bridge_mapping("Fused", BRIDGE["column"]), "mapping Fused computes"),
        (
            type("Stacked", (BRIDGE["gated"],), {"is_grouped_export": True}),
            "mapping Stacked stacks experts",
        ),
        (
            bridge_mapping("AutoMapping", permute_dims=(1, 0)),
            "dimension permutation",
        ),
    ],
)
def test_mappings_that_do_more_than_split_are_refused(mapping: type, says: str) -> None:
    shape = Shape(8, 4, 4)
    (norm,) = (
        p
        for p in megatron_rank(random_checkpoint(shape), shape, tp=1, rank=0)
        if p.name == "decoder.final_layernorm.weight"
    )
    good, bad = task_of(norm), task_of(norm)
    bad.global_param_name = "decoder.odd.weight"
    bad.mapping = mapping({"gate": "g", "up": "u"})
    with pytest.raises(ManifestInvalid, match=says) as refused:
        bridge_shards([good, bad], head_counts(shape), **TP1)
    assert refused.value.tensor == "decoder.odd.weight"


def test_a_rank_without_tensors_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="no ModelExpress tensors"):
        bridge_shards([], head_counts(Shape(8, 4, 4)), **TP1)
