# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""How Megatron-Core lays a model out over ranks, written down a second time; and how
a reader of a manifest puts published shards together.

Megatron-Core is not installed here. This makes each rank's parameters from a
Hugging Face state dict, as ``GPTModel`` holds them:

- ``linear_qkv``: per KV group its query heads, its key head, its value head; these
  rows, one after the other, are cut into ``tp`` equal runs, wherever that falls;
- ``linear_fc1`` of a gated MLP: the rank's part of gate, then its part of up;
- the vocabulary is filled up with rows until it divides;
- experts are split over expert-parallel ranks, each one over ``tp`` ranks.

Sources: megatron/core/transformer/attention.py (``get_query_key_value_tensors``),
mlp.py (``sharded_state_dict`` of a gated ``linear_fc1``), and
megatron/core/tensor_parallel/layers.py.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from modelexpress_rl.train.engines.megatron.aliases import MegatronTensorSpec

from dynamo.refit.manifest import Manifest, Region, Shard, Source, TensorEntry
from dynamo.refit.publish.shard import LocalShard

PADDING = -12345.0

#: What ModelExpress calls each kind of parameter.
ROLES = {
    "qkv": "qkv_column",
    "gated": "gated_mlp_column",
    "column": "column",
    "row": "row",
    "same": "replicated",
}

#: Whose names differ: replicated parameters of a layer, as Hugging Face and Megatron
#: call them.
REPLICATED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
}

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


@dataclass(frozen=True)
class Shape:
    """The numbers of a model; ``divisible`` is ``make_vocab_size_divisible_by``."""

    heads: int
    groups: int
    head_dim: int
    hidden: int = 8
    ffn: int = 12
    expert_ffn: int = 24
    experts: int = 4
    vocab: int = 50
    divisible: int = 8

    @classmethod
    def of(cls, checkpoint: Path) -> Shape:
        """The numbers of a Hugging Face checkpoint of a Qwen3 model."""
        config = json.loads((checkpoint / "config.json").read_text())
        return cls(
            heads=config["num_attention_heads"],
            groups=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            expert_ffn=config.get("moe_intermediate_size", 0),
            experts=config.get("num_local_experts", 0),
            vocab=config["vocab_size"],
        )

    def padded_vocab(self, tp: int) -> int:
        step = self.divisible * tp
        return -(-self.vocab // step) * step


@dataclass(frozen=True)
class Parameter:
    """A rank's part of a Megatron parameter.

    ``axis`` is ``None`` for a replicated one; ``ranks`` and ``rank`` are of the group
    that it is cut over. ``hf`` are the checkpoint's names, in Megatron's order.
    """

    name: str
    kind: str
    local: torch.Tensor
    hf: tuple[str, ...]
    axis: int | None
    ranks: int
    rank: int

    @property
    def global_shape(self) -> tuple[int, ...]:
        shape = list(self.local.shape)
        if self.axis is not None:
            shape[self.axis] *= self.ranks
        return tuple(shape)

    @property
    def range(self) -> tuple[int, int] | None:
        if self.axis is None:
            return None
        extent = self.local.shape[self.axis]
        return self.rank * extent, (self.rank + 1) * extent


def random_checkpoint(shape: Shape) -> dict[str, torch.Tensor]:
    """A state dict under Hugging Face names: a dense layer 0, an MoE layer 1."""
    generator = torch.Generator().manual_seed(7)

    def fresh(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16)

    made = {
        "model.embed_tokens.weight": fresh(shape.vocab, shape.hidden),
        "model.norm.weight": fresh(shape.hidden),
        "lm_head.weight": fresh(shape.vocab, shape.hidden),
    }
    rows = {"q": shape.heads, "k": shape.groups, "v": shape.groups}
    for layer in ("model.layers.0", "model.layers.1"):
        for part, heads in rows.items():
            name = f"{layer}.self_attn.{part}_proj"
            made[f"{name}.weight"] = fresh(heads * shape.head_dim, shape.hidden)
            made[f"{name}.bias"] = fresh(heads * shape.head_dim)
        width = shape.heads * shape.head_dim
        made[f"{layer}.self_attn.o_proj.weight"] = fresh(shape.hidden, width)
        made[f"{layer}.input_layernorm.weight"] = fresh(shape.hidden)
    made |= _mlp("model.layers.0.mlp", shape.ffn, shape.hidden, fresh)
    made["model.layers.1.mlp.gate.weight"] = fresh(shape.experts, shape.hidden)
    for expert in range(shape.experts):
        name = f"model.layers.1.mlp.experts.{expert}"
        made |= _mlp(name, shape.expert_ffn, shape.hidden, fresh)
    return made


def _mlp(name, ffn, hidden, fresh) -> dict[str, torch.Tensor]:
    return {
        f"{name}.gate_proj.weight": fresh(ffn, hidden),
        f"{name}.up_proj.weight": fresh(ffn, hidden),
        f"{name}.down_proj.weight": fresh(hidden, ffn),
    }


def megatron_rank(
    checkpoint: dict[str, torch.Tensor],
    shape: Shape,
    *,
    tp: int,
    rank: int,
    ep: int = 1,
    ep_rank: int = 0,
) -> Iterator[Parameter]:
    """Every parameter of rank ``(rank, ep_rank)``."""

    def cut(name, kind, whole, hf, axis):
        part = whole if axis is None else whole.chunk(tp, dim=axis)[rank]
        return Parameter(name, kind, part.contiguous(), hf, axis, tp, rank)

    def gated(name, prefix):
        hf = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        halves = [checkpoint[h].chunk(tp, dim=0)[rank] for h in hf]
        return Parameter(name, "gated", torch.cat(halves), hf, 0, tp, rank)

    for name, hf in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        padded = torch.full((shape.padded_vocab(tp), shape.hidden), PADDING)
        padded = padded.to(torch.bfloat16)
        padded[: shape.vocab] = checkpoint[hf]
        yield cut(name, "column", padded, (hf,), 0)
    norm = "model.norm.weight"
    yield cut("decoder.final_layernorm.weight", "same", checkpoint[norm], (norm,), None)
    mine = shape.experts // ep
    for layer in _layers(checkpoint):
        here, there = f"decoder.layers.{layer}", f"model.layers.{layer}"
        for what in ("weight", "bias"):
            hf = tuple(f"{there}.self_attn.{p}_proj.{what}" for p in "qkv")
            if hf[0] in checkpoint:
                fused = _interleave(*(checkpoint[h] for h in hf), shape)
                name = f"{here}.self_attention.linear_qkv.{what}"
                yield cut(name, "qkv", fused, hf, 0)
        hf = f"{there}.self_attn.o_proj.weight"
        name = f"{here}.self_attention.linear_proj.weight"
        yield cut(name, "row", checkpoint[hf], (hf,), 1)
        for theirs, ours in REPLICATED.items():
            if (hf := f"{there}.{theirs}") in checkpoint:
                yield cut(f"{here}.{ours}", "same", checkpoint[hf], (hf,), None)
        if (hf := f"{there}.mlp.down_proj.weight") in checkpoint:
            yield gated(f"{here}.mlp.linear_fc1.weight", f"{there}.mlp")
            yield cut(f"{here}.mlp.linear_fc2.weight", "row", checkpoint[hf], (hf,), 1)
            continue
        for expert in range(ep_rank * mine, (ep_rank + 1) * mine):
            experts = f"{there}.mlp.experts.{expert}"
            yield gated(f"{here}.mlp.experts.linear_fc1.weight{expert}", experts)
            hf = f"{experts}.down_proj.weight"
            name = f"{here}.mlp.experts.linear_fc2.weight{expert}"
            yield cut(name, "row", checkpoint[hf], (hf,), 1)


def _layers(checkpoint: dict[str, torch.Tensor]) -> list[int]:
    prefix = "model.layers."
    return sorted({int(n.split(".")[2]) for n in checkpoint if n.startswith(prefix)})


def spec_of(parameter: Parameter, shape: Shape) -> MegatronTensorSpec:
    """What ModelExpress is told of a parameter."""
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


def _interleave(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """Row by row: which row of q, k or v each row of ``linear_qkv`` is."""
    per_group = shape.heads // shape.groups
    rows = []
    for group in range(shape.groups):
        for head in range(group * per_group, (group + 1) * per_group):
            for i in range(shape.head_dim):
                rows.append(q[head * shape.head_dim + i])
        for source in (k, v):
            for i in range(shape.head_dim):
                rows.append(source[group * shape.head_dim + i])
    return torch.stack(rows)


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
