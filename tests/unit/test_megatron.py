# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's parameters, published under Hugging Face names and read back by
address, are the checkpoint they were made from, bit for bit."""

from __future__ import annotations

import ctypes

import pytest
import torch
from modelexpress_rl.train.engines.megatron.aliases import MegatronTensorSpec

from dynamo.refit.errors import ManifestInvalid, UnsupportedConfiguration
from dynamo.refit.publish import megatron
from dynamo.refit.publish.megatron import bridge_shards, megatron_shards
from dynamo.refit.publish.torch_state import InPlaceBuffers, SnapshotBuffers
from tests.support.megatron import (
    ATTENTION,
    Shape,
    assert_same,
    megatron_rank,
    random_checkpoint,
    read_back,
    spec_of,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def one_spec(**changes: object) -> MegatronTensorSpec:
    """A column-parallel parameter, changed as a test wants it."""
    fields = {
        "name": "decoder.odd.weight",
        "tensor": torch.zeros(4, 3),
        "role": "column",
        "hf_names": ("model.odd.weight",),
        "global_shape": (8, 3),
        "placement_kind": "SHARD",
        "shard_axis": 0,
        "local_shard_range": (0, 4),
    }
    return MegatronTensorSpec(**{**fields, **changes})


@pytest.mark.parametrize(("heads", "groups", "head_dim", "tp"), ATTENTION)
def test_all_ranks_together_hold_the_checkpoint(
    heads: int, groups: int, head_dim: int, tp: int
) -> None:
    shape = Shape(heads, groups, head_dim)
    checkpoint = random_checkpoint(shape)
    # Shards are views: what they are of has to live until it is read.
    kept = [
        list(megatron_rank(checkpoint, shape, tp=tp, rank=rank)) for rank in range(tp)
    ]
    ranks = [
        megatron_shards([spec_of(p, shape) for p in rank], vocab_size=shape.vocab)
        for rank in kept
    ]
    assert_same(read_back(ranks), checkpoint)
    # Written by the optimizer, seen by the reader.
    for parameter in kept[0]:
        parameter.local.fill_(0.5)
    assert all((shard.tensor == 0.5).all() for shard in ranks[0])


@pytest.mark.parametrize("buffers_class", [InPlaceBuffers, SnapshotBuffers])
def test_both_ways_to_hold_a_version_take_the_shards(buffers_class: type) -> None:
    """At the published addresses lies what the shards say; in place, each parameter is
    registered once, however many blocks it has."""
    shape = Shape(8, 2, 4)
    checkpoint = random_checkpoint(shape)
    parameters = list(megatron_rank(checkpoint, shape, tp=4, rank=1))
    shards = megatron_shards(
        [spec_of(p, shape) for p in parameters], vocab_size=shape.vocab
    )
    buffers = buffers_class(shards)
    buffers.write(0)
    regions = buffers.regions[0]
    in_place = buffers_class is InPlaceBuffers
    assert len(regions) == (len(parameters) if in_place else 1)
    blocks = {(shard.name, shard.box): shard.tensor for shard in shards}
    read = 0
    for entry in buffers.entries:
        for shard in entry.shards:
            address = regions[shard.region].address + shard.byte_offset
            tensor = blocks[entry.name, shard.box].reshape(-1).view(torch.int16)
            data = ctypes.string_at(address, 2 * tensor.numel())
            assert data == tensor.numpy().tobytes()
            read += 1
    assert read == len(blocks)


@pytest.mark.parametrize(("tp", "ep"), [(1, 4), (2, 2), (3, 1)])
def test_experts_over_expert_parallel_ranks(tp: int, ep: int) -> None:
    """Everything but the experts is there ``ep`` times: equal boxes, replicas."""
    shape = Shape(6, 3, 4)
    checkpoint = random_checkpoint(shape)
    kept = [
        list(megatron_rank(checkpoint, shape, tp=tp, rank=rank, ep=ep, ep_rank=e))
        for e in range(ep)
        for rank in range(tp)
    ]
    ranks = [
        megatron_shards([spec_of(p, shape) for p in rank], vocab_size=shape.vocab)
        for rank in kept
    ]
    assert_same(read_back(ranks), checkpoint)
    embeddings = [s for r in ranks for s in r if s.name == "model.embed_tokens.weight"]
    assert len(embeddings) == tp * ep


def test_experts_stacked_in_one_parameter() -> None:
    """One by one, as views of the stack, and as the stack itself."""
    stack = torch.randn(4, 6, 3).to(torch.bfloat16)
    names = [f"experts.{expert}.down_proj.weight" for expert in range(4)]
    for first in (0, 2):
        local = stack[first : first + 2].clone()
        views = megatron_shards(
            [
                one_spec(
                    name=f"fc2.{expert}",
                    tensor=local[expert - first],
                    role="expert_row",
                    hf_names=(names[expert],),
                    global_shape=(6, 3),
                    shard_axis=1,
                    local_shard_range=(0, 3),
                )
                for expert in (first, first + 1)
            ]
        )
        assert [shard.name for shard in views] == names[first : first + 2]
        assert all(
            torch.equal(shard.tensor, stack[first + i]) for i, shard in enumerate(views)
        )
        (whole,) = megatron_shards(
            [
                one_spec(
                    tensor=local,
                    role="expert_column",
                    global_shape=(4, 6, 3),
                    local_shard_range=(first, first + 2),
                )
            ]
        )
        assert whole.box == ((first, first + 2), (0, 6), (0, 3))
        assert whole.tensor.data_ptr() == local.data_ptr()


@pytest.mark.parametrize(
    ("vocab", "divisible", "rows"),
    [
        (48, 8, [16, 16, 16]),
        (50, 8, [24, 24, 2]),
        (20, 16, [16, 4, None]),
        (10, 64, [10, None, None]),
    ],
)
def test_padding_of_the_vocabulary_is_left_out(
    vocab: int, divisible: int, rows: list[int | None]
) -> None:
    """A rank may hold some rows of padding, or nothing else."""
    shape = Shape(6, 3, 4, vocab=vocab, divisible=divisible)
    checkpoint = random_checkpoint(shape)
    kept, ranks = [], []
    for rank, expected in enumerate(rows):
        parameters = list(megatron_rank(checkpoint, shape, tp=3, rank=rank))
        kept.append(parameters)
        specs = [spec_of(p, shape) for p in parameters]
        shards = megatron_shards(specs, vocab_size=vocab)
        ranks.append(shards)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            mine = [s.tensor.shape[0] for s in shards if s.name == name]
            assert mine == ([] if expected is None else [expected])
    assert_same(read_back(ranks), checkpoint)


def test_without_vocab_size_nothing_is_cut_off() -> None:
    spec = one_spec(name="output_layer.weight", local_shard_range=(4, 8))
    (shard,) = megatron_shards([spec])
    assert (shard.shape, shard.box) == ((8, 3), ((4, 8), (0, 3)))
    role = one_spec(role="vocab_parallel", local_shard_range=(4, 8))
    (shard,) = megatron_shards([role], vocab_size=5)
    assert (shard.shape, shard.box) == ((5, 3), ((4, 5), (0, 3)))


def test_the_head_counts_of_one_rank_will_do() -> None:
    """Older descriptions have them in place of the model's."""
    shape = Shape(8, 4, 4)
    checkpoint = random_checkpoint(shape)
    (name,) = (n for n in checkpoint if n.endswith("0.self_attn.k_proj.weight"))
    kept, ranks = [], []
    for rank in range(2):
        parameters = list(megatron_rank(checkpoint, shape, tp=2, rank=rank))
        kept.append(parameters)
        (qkv,) = (p for p in parameters if name in p.hf)
        spec = spec_of(qkv, shape)
        spec.extras.clear()
        spec.extras.update(head_dim="4", num_heads_local="4", num_kv_heads_local="2")
        ranks.append(megatron_shards([spec]))
    assert_same(read_back(ranks), {n: checkpoint[n] for n in qkv.hf})


QKV = {
    "role": "qkv_column",
    "hf_names": ("q", "k", "v"),
    "tensor": torch.zeros(8, 3),
    "global_shape": (16, 3),
    "local_shard_range": (0, 8),
}
GATED = {"role": "gated_mlp_column", "extras": {"gated_mlp_order": "gate_then_up"}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor": torch.zeros(3, 4).t()}, "contiguous"),
        ({"role": "mamba_in_proj"}, "'mamba_in_proj' is not one of"),
        ({"role": "row", "hf_names": ("a", "b")}, "cannot map to 2 HF tensors"),
        ({"local_shard_range": (4, 9)}, "range does not match local shape"),
        ({"local_shard_range": (8, 12)}, "reaches out of its shape"),
        ({"global_shape": (8, 2)}, "reaches out of its shape"),
        ({"placement_kind": "REPLICATE", "shard_axis": None,
          "local_shard_range": None}, "replicated shape mismatch"),
        # Taken for one column-parallel tensor by ModelExpress 0.7.0.
        (GATED, "gate and up in one parameter are two"),
        ({**GATED, "role": "expert_column"}, "gate and up in one parameter are two"),
        ({"role": "gated_mlp_column", "hf_names": ("gate", "up")}, "gated_mlp_order"),
        ({**GATED, "hf_names": ("g", "u"), "tensor": torch.zeros(3, 3),
          "global_shape": (6, 3), "local_shard_range": (0, 3)}, "must be even"),
        (QKV, "requires extras"),
        # Rows for an output gate, as Qwen3-Next has them.
        ({**QKV, "extras": {"qkv_interleave": "by_head", "head_dim": "2",
          "num_heads": "2", "num_kv_heads": "1"}}, "disagree with head metadata"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_refused_by_name(changes: dict, says: str) -> None:
    with pytest.raises(ManifestInvalid, match=says) as refused:
        megatron_shards([one_spec(**changes)])
    assert refused.value.tensor == "decoder.odd.weight"
    assert not str(refused.value).startswith("decoder.odd.weight")


def test_a_tensor_that_keeps_its_elements_elsewhere_is_refused() -> None:
    class Float8Tensor(torch.Tensor):
        """As Transformer Engine's: its data_ptr() is not where the elements are."""

    tensor = torch.zeros(4, 3).as_subclass(Float8Tensor)
    with pytest.raises(ManifestInvalid, match="Float8Tensor is no plain tensor"):
        megatron_shards([one_spec(tensor=tensor)])


def test_two_parameters_of_one_name_are_refused() -> None:
    twice = [one_spec(), one_spec(name="decoder.other.weight")]
    with pytest.raises(ManifestInvalid, match="are both described as") as error:
        megatron_shards(twice)
    assert error.value.tensor == "decoder.other.weight"


def test_a_vocabulary_larger_than_the_parameter_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="only 8 rows") as error:
        megatron_shards([one_spec(name="output_layer.weight")], vocab_size=9)
    assert error.value.tensor == "output_layer.weight"


def test_without_modelexpress_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(megatron, "_missing", ImportError("no modelexpress_rl"))
    for call in (
        lambda: megatron_shards([]),
        lambda: bridge_shards([], None, tensor_parallel_size=1, tensor_parallel_rank=0),
    ):
        with pytest.raises(UnsupportedConfiguration, match="pip install 'modelexpress"):
            call()
