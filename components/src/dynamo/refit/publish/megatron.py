# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core parameters of one trainer rank, under Hugging Face names.

With Megatron-Bridge (its conversion tasks say what every parameter is):

    tasks = bridge.get_conversion_tasks(model)
    shards = bridge_shards(
        tasks,
        model[0].config,
        tensor_parallel_size=tp, tensor_parallel_rank=tp_rank,
        expert_tensor_parallel_size=etp, expert_tensor_parallel_rank=etp_rank,
        vocab_size=hf_config.vocab_size,
    )
    publisher = WeightPublisher("my-model", shards, ...)

Without it, describe each parameter with a ``MegatronTensorSpec`` and call
:func:`megatron_shards`. The parameters are not copied: every shard is a view.

Which rows of a fused parameter are which part of which checkpoint tensor is known to
ModelExpress (``modelexpress_rl``); this module turns its addresses into views, cuts
off the padding of the vocabulary, and refuses what ModelExpress would take for
something else. It knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dynamo.refit.errors import ManifestInvalid, UnsupportedConfiguration
from dynamo.refit.publish.shard import LocalShard

try:
    from modelexpress_rl.inference.reshard.megatron.layout import SUPPORTED_ROLES
    from modelexpress_rl.train.engines.megatron.aliases import (
        MegatronTensorSpec,
        build_hf_aliases,
    )
    from modelexpress_rl.train.engines.megatron.selection import (
        build_megatron_tensor_specs,
    )
except ImportError as error:
    _missing: ImportError | None = error
else:
    _missing = None

#: Megatron-Core's parameters with one row per token, which it pads to a multiple of
#: ``make_vocab_size_divisible_by`` times the tensor-parallel size. Source:
#: ``GPTModel`` in megatron/core/models/gpt/gpt_model.py.
VOCABULARY = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "output_layer.bias",
)

#: Megatron-Bridge's mappings that only split and shard: no element changes or moves.
#: Source: megatron/bridge/models/conversion/param_mapping.py.
PLAIN_MAPPINGS = frozenset(
    {
        "AutoMapping",
        "ColumnParallelMapping",
        "DirectMapping",
        "GatedMLPMapping",
        "QKVMapping",
        "ReplicatedMapping",
        "RowParallelMapping",
    }
)


def megatron_shards(
    specs: Sequence[MegatronTensorSpec], *, vocab_size: int | None = None
) -> list[LocalShard]:
    """This rank's parameters as blocks of Hugging Face tensors.

    Covers fused QKV (interleaved per KV group, also with fewer groups than ranks),
    gate and up in one parameter, experts one by one or stacked, column, row and
    replicated parameters. A rank may hold no part of some tensors.

    Args:
        specs: what each parameter of this rank is; ``spec.tensor`` has the rank's
            part, contiguous, on any device.
        vocab_size: rows of the checkpoint's embedding and output layer. Give it
            wherever Megatron pads them; the rows above it are left out.

    Returns:
        Views of the specs' tensors: what is written into those is what is published.
        A parameter that gets other storage (``parameter.data = ...``) needs new ones.

    Raises:
        ManifestInvalid: a parameter cannot be expressed under Hugging Face names
            without moving elements; it names the Megatron parameter.
        UnsupportedConfiguration: ModelExpress is not installed.
    """
    _require_modelexpress()
    shards: list[LocalShard] = []
    origins: dict[tuple, str] = {}
    for spec in specs:
        for shard in _shards_of(spec):
            if vocab_size is not None and _is_vocabulary(spec):
                shard = _without_padding(spec, shard, vocab_size)
                if shard is None:
                    continue
            first = origins.setdefault((shard.name, shard.box), spec.name)
            if first != spec.name:
                raise ManifestInvalid(
                    f"it and {first!r} are both described as {shard.box} of "
                    f"{shard.name!r}",
                    tensor=spec.name,
                )
            shards.append(shard)
    return shards


def bridge_shards(
    conversion_tasks: Sequence[Any],
    transformer_config: Any,
    *,
    tensor_parallel_size: int,
    tensor_parallel_rank: int,
    expert_tensor_parallel_size: int = 1,
    expert_tensor_parallel_rank: int = 0,
    vocab_size: int | None = None,
) -> list[LocalShard]:
    """:func:`megatron_shards` of a model that Megatron-Bridge converted.

    Args:
        conversion_tasks: what ``bridge.get_conversion_tasks(model)`` returns on this
            rank; parameters of other pipeline stages are passed over.
        transformer_config: the model's ``TransformerConfig``, for the head counts.
        vocab_size: see :func:`megatron_shards`.

    Raises:
        ManifestInvalid: as :func:`megatron_shards`, or a mapping that computes,
            permutes, or stacks experts.
        UnsupportedConfiguration: ModelExpress is not installed.
    """
    _require_modelexpress()
    tasks = [task for task in conversion_tasks if task is not None]
    for task in tasks:
        _check_mapping(task)
    known = {
        "transformer_config": transformer_config,
        "tensor_parallel_size": tensor_parallel_size,
        "tensor_parallel_rank": tensor_parallel_rank,
        "expert_tensor_parallel_size": expert_tensor_parallel_size,
        "expert_tensor_parallel_rank": expert_tensor_parallel_rank,
    }
    try:
        specs = build_megatron_tensor_specs(conversion_tasks=tasks, **known)
    # RuntimeError: a rank without tensors, and NotImplementedError is one, too.
    except (RuntimeError, ValueError) as error:
        name = _refused_task(tasks, known)
        raise ManifestInvalid(str(error), tensor=name) from error
    return megatron_shards(specs, vocab_size=vocab_size)


def _require_modelexpress() -> None:
    if _missing is not None:
        raise UnsupportedConfiguration(
            "Megatron-Core parameters are mapped to Hugging Face names by "
            f"ModelExpress, which does not import here ({_missing}): pip install "
            "'modelexpress==0.7.*'"
        ) from _missing


def _check_mapping(task: Any) -> None:
    """Refuse what ModelExpress would take for the mapping that it is derived from."""
    kinds = type(task.mapping).__mro__
    exporter = next((c for c in kinds if "megatron_to_hf" in vars(c)), kinds[0])
    stacks = getattr(task.mapping, "is_grouped_export", False)
    if stacks or exporter.__name__ not in PLAIN_MAPPINGS:
        does = "stacks experts" if stacks else "computes what it exports"
        raise ManifestInvalid(
            f"its Megatron-Bridge mapping {kinds[0].__name__} {does}: it cannot be "
            "published in place",
            tensor=task.global_param_name,
        )


def _refused_task(tasks: Sequence[Any], known: dict[str, Any]) -> str | None:
    """The first parameter that is refused on its own: ModelExpress does not say."""
    for task in tasks:
        try:
            build_megatron_tensor_specs(conversion_tasks=[task], **known)
        except (NotImplementedError, ValueError):
            return task.global_param_name
        except RuntimeError:
            # A task of which this rank publishes nothing.
            continue
    return None


def _shards_of(spec: MegatronTensorSpec) -> list[LocalShard]:
    _check_spec(spec)
    try:
        aliases = build_hf_aliases([spec], agent_name="-")
    except ValueError as error:
        reason = str(error).removeprefix(f"{spec.name}: ")
        raise ManifestInvalid(reason, tensor=spec.name) from error
    shards = [
        LocalShard(
            name=alias.name,
            shape=tuple(alias.full_shape),
            offset=tuple(part.shard_offset),
            tensor=_view(spec, part.addr, tuple(part.shape)),
        )
        for alias in aliases
        for part in alias.shards
    ]
    for shard in shards:
        ends = zip(shard.box, shard.shape, strict=True)
        if not all(0 <= start < stop <= size for (start, stop), size in ends):
            raise ManifestInvalid(
                f"described as {shard.box} of {shard.name!r}, which reaches out of "
                f"its shape {shard.shape}",
                tensor=spec.name,
            )
    return shards


def _check_spec(spec: MegatronTensorSpec) -> None:
    """Refuse what ModelExpress would publish as an ordinary parameter, wrongly."""
    # Transformer Engine's FP8 and DTensors keep their elements elsewhere.
    if type(spec.tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ManifestInvalid(
            f"a {type(spec.tensor).__name__} is no plain tensor: publish the "
            "high-precision parameter's local tensor",
            tensor=spec.name,
        )
    if spec.role not in SUPPORTED_ROLES:
        raise ManifestInvalid(
            f"role {spec.role!r} is not one of {sorted(SUPPORTED_ROLES)}",
            tensor=spec.name,
        )
    gated = spec.role == "gated_mlp_column" or "gated_mlp_order" in spec.extras
    if gated and len(spec.hf_names) != 2:
        raise ManifestInvalid(
            f"gate and up in one parameter are two Hugging Face tensors, not "
            f"{list(spec.hf_names)}",
            tensor=spec.name,
        )


def _view(
    spec: MegatronTensorSpec, address: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """The block of ``spec.tensor`` that lies contiguously from ``address`` on."""
    elements = spec.tensor.detach().view(-1)
    first, odd = divmod(address - elements.data_ptr(), elements.element_size())
    stop = first + math.prod(shape)
    if odd or not 0 <= first < stop <= elements.numel():
        raise ManifestInvalid(
            f"ModelExpress describes a block {shape} outside of it", tensor=spec.name
        )
    return elements[first:stop].view(shape)


def _is_vocabulary(spec: MegatronTensorSpec) -> bool:
    return spec.role == "vocab_parallel" or spec.name.endswith(VOCABULARY)


def _without_padding(
    spec: MegatronTensorSpec, shard: LocalShard, vocab_size: int
) -> LocalShard | None:
    """The rows below ``vocab_size``, if this rank has any."""
    if vocab_size > shard.shape[0]:
        raise ManifestInvalid(
            f"vocab_size is {vocab_size}, but all ranks together have only "
            f"{shard.shape[0]} rows of it",
            tensor=spec.name,
        )
    rows = min(shard.tensor.shape[0], vocab_size - shard.offset[0])
    if rows <= 0:
        return None
    return LocalShard(
        name=shard.name,
        shape=(vocab_size, *shard.shape[1:]),
        offset=shard.offset,
        tensor=shard.tensor.narrow(0, 0, rows),
    )
