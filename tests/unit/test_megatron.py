# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's parameters, published under Hugging Face names and read back by
address, are the checkpoint they were made from, bit for bit."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from modelexpress_rl.train.engines.megatron.aliases import MegatronTensorSpec

from dynamo.refit.errors import ManifestInvalid, UnsupportedConfiguration
from dynamo.refit.manifest import Manifest, Region, Shard, Source, TensorEntry
from dynamo.refit.publish import megatron
from dynamo.refit.publish.megatron import bridge_shards, megatron_shards
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.publish.torch_state import InPlaceBuffers, SnapshotBuffers
from tests.support.megatron import Parameter, Shape, megatron_rank, random_checkpoint

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: (heads, KV groups, head size, TP): groups per rank 4 to 1, one head for all, fewer
#: groups than ranks, ranks that end in the middle of a head.
ATTENTION = [
    (8, 4, 4, 1),
    (8, 4, 4, 2),
    (6, 3, 4, 3),
    (8, 4, 4, 4),
    (4, 1, 4, 2),
    (8, 2, 4, 4),
    (6, 2, 6, 3),
    (6, 1, 3, 3),
]

ROLES = {
    "qkv": "qkv_column",
    "gated": "gated_mlp_column",
    "column": "column",
    "row": "row",
    "same": "replicated",
}


def spec_of(parameter: Parameter, shape: Shape) -> MegatronTensorSpec:
    extras = {}
    if parameter.kind == "qkv":
        extras = {
            "qkv_interleave": "by_head",
            "head_dim": str(shape.head_dim),
            "num_heads": str(shape.heads),
            "num_kv_heads": str(shape.groups),
        }
    if parameter.kind == "gated":
        extras = {"gated_mlp_order": "gate_then_up"}
    role = ROLES[parameter.kind]
    if ".experts." in parameter.name:
        role = {"gated_mlp_column": "expert_column", "row": "expert_row"}[role]
    return MegatronTensorSpec(
        name=parameter.name,
        tensor=parameter.local,
        role=role,
        hf_names=parameter.hf,
        global_shape=parameter.global_shape,
        placement_kind="REPLICATE" if parameter.axis is None else "SHARD",
        shard_axis=parameter.axis,
        local_shard_range=parameter.range,
        extras=extras,
    )


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


def read_back(ranks: Iterable[list[LocalShard]]) -> dict[str, torch.Tensor]:
    """The tensors as a reader of a valid manifest gets them, from the addresses."""
    by_name: dict[str, list[tuple[int, LocalShard]]] = {}
    sources = []
    for number, shards in enumerate(ranks):
        # One region over everything, so that an offset is an address.
        slots = ((Region(0, 2**62),),)
        sources.append(
            Source(
                agent=f"{number}", metadata=b"", memory="DRAM", device=0, slots=slots
            )
        )
        for shard in shards:
            assert shard.tensor.is_contiguous()
            by_name.setdefault(shard.name, []).append((number, shard))
    tensors = tuple(entry_of(name, found) for name, found in by_name.items())
    manifest = Manifest(model="m", tensors=tensors, sources=tuple(sources))
    manifest.validate()
    addresses = iter(manifest.shard_addresses(0))
    whole = {}
    for tensor in tensors:
        bits = torch.zeros(tensor.shape, dtype=torch.int16)
        for shard in tensor.shards:
            data = ctypes.string_at(next(addresses), 2 * math.prod(shard.shape))
            part = torch.frombuffer(bytearray(data), dtype=torch.int16)
            place = tuple(slice(start, stop) for start, stop in shard.box)
            bits[place] = part.view(shard.shape)
        whole[tensor.name] = bits.view(torch.bfloat16)
    return whole


def entry_of(name: str, found: list[tuple[int, LocalShard]]) -> TensorEntry:
    assert {shard.tensor.dtype for _, shard in found} == {torch.bfloat16}
    (shape,) = {shard.shape for _, shard in found}
    shards = tuple(
        Shard(
            source=number,
            region=0,
            byte_offset=shard.tensor.data_ptr(),
            offset=shard.offset,
            shape=tuple(shard.tensor.shape),
        )
        for number, shard in found
    )
    return TensorEntry(name=name, dtype="bfloat16", shape=shape, shards=shards)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.int16), tensor.view(torch.int16)), name


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
    for call in (lambda: megatron_shards([]), lambda: bridge_shards([], None, **TP1)):
        with pytest.raises(UnsupportedConfiguration, match="pip install 'modelexpress"):
            call()


# --- Megatron-Bridge ----------------------------------------------------------
# Stand-ins with the names, attributes and bases that its mappings have; ModelExpress
# knows them by class name.

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
