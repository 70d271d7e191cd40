# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Live parameters: overwritten where they are, and guarded against moving."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dynamo.refit.errors import PointerMoved
from dynamo.refit.manifest import (
    ALIGNMENT,
    Manifest,
    Region,
    Shard,
    Source,
    TensorEntry,
)
from dynamo.refit.rank.install import LiveParameters, parameter_views
from dynamo.refit.rank.plan import Parameter, Plan, ReadSlice, make_plan

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class TiedModel(nn.Module):
    """An embedding that is the output layer, too, a norm, a scalar and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, dtype=torch.bfloat16)
        self.norm = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.randn(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens).float() * self.norm * self.scale
        return self.head(hidden.bfloat16())


@pytest.fixture
def model() -> TiedModel:
    return TiedModel()


@pytest.fixture
def plan(model: TiedModel) -> Plan:
    """All parameters of ``model``, each from a whole tensor of its name."""
    tensors, slices, parameters = [], [], []
    for name, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        box = tuple((0, size) for size in shape)
        shard = Shard(
            source=0, region=0, byte_offset=0, offset=(0,) * len(shape), shape=shape
        )
        tensors.append(
            TensorEntry(name=name, dtype=dtype, shape=shape, shards=(shard,))
        )
        slices.append(ReadSlice(name, box, name, 0, tensor.stride()))
        parameters.append(Parameter(name, shape, dtype))
    source = Source(
        agent="trainer-0",
        metadata=b"",
        memory="DRAM",
        device=0,
        slots=((Region(1 << 32, 1 << 16),),),
    )
    manifest = Manifest(model="tiny", tensors=tuple(tensors), sources=(source,))
    return make_plan(manifest, parameters, slices, rank=0, scratch_limit=0)


def _staged(plan: Plan) -> list[torch.Tensor]:
    """Random values in an arena, as a pull leaves them."""
    views = parameter_views(torch.zeros(plan.arena_nbytes, dtype=torch.uint8), plan)
    for view in views:
        view.normal_()
    return views


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _addresses(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def _assert_equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


# The copies.


def test_copy_from_overwrites_in_place_under_every_name(
    model: TiedModel, plan: Plan
) -> None:
    addresses, frequencies = _addresses(model), model.frequencies.clone()
    staged = _staged(plan)
    LiveParameters(model, plan).copy_from(staged)

    new = dict(zip((p.name for p in plan.parameters), staged, strict=True))
    assert new.keys() == {"embed.weight", "norm", "scale"}
    tied = {"head.weight": new["embed.weight"], "frequencies": frequencies}
    _assert_equal(model, new | tied)
    assert _addresses(model) == addresses
    assert model.head.weight is model.embed.weight


def test_copy_from_is_seen_by_the_next_step(model: TiedModel, plan: Plan) -> None:
    tokens = torch.arange(6)
    LiveParameters(model, plan).copy_from(_staged(plan))
    other = TiedModel()
    other.load_state_dict(model.state_dict())

    assert torch.equal(model(tokens), other(tokens))


def test_copy_from_leaves_ordinary_parameters(model: TiedModel, plan: Plan) -> None:
    LiveParameters(model, plan).copy_from(_staged(plan))

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert not parameter.is_inference(), name


def test_copy_to_takes_what_is_live_and_leaves_it(model: TiedModel, plan: Plan) -> None:
    before, backup = _state(model), _staged(plan)
    LiveParameters(model, plan).copy_to(backup)

    _assert_equal(model, before)
    for parameter, saved in zip(plan.parameters, backup, strict=True):
        assert torch.equal(saved, before[parameter.name]), parameter.name


def test_a_backup_undoes_an_install(model: TiedModel, plan: Plan) -> None:
    before, backup, staged = _state(model), _staged(plan), _staged(plan)
    kept = [tensor.clone() for tensor in staged]
    live = LiveParameters(model, plan)
    live.copy_to(backup)
    live.copy_from(staged)
    assert not torch.equal(model.norm, before["norm"])
    live.copy_from(backup)

    _assert_equal(model, before)
    assert all(map(torch.equal, staged, kept))


# The guard.


def _replace_data(model: TiedModel) -> None:
    model.norm.data = model.norm.data.clone()


def _replace_parameter(model: TiedModel) -> None:
    model.norm = nn.Parameter(model.norm.data.clone())


def _delete(model: TiedModel) -> None:
    del model.norm


def _replace_embedding(model: TiedModel) -> None:
    """Both names move: they are one tensor."""
    model.embed.weight.data = model.embed.weight.data.clone()


def _replace_buffer(model: TiedModel) -> None:
    model.frequencies = model.frequencies.clone()


def _untie_by_the_second_name(model: TiedModel) -> None:
    """The output layer reads bytes from now on that no install writes."""
    model.head.weight = nn.Parameter(model.head.weight.data.clone())


@pytest.mark.parametrize(
    ("move", "name"),
    [
        (_replace_data, "norm"),
        (_replace_parameter, "norm"),
        (_delete, "norm"),
        (_replace_embedding, "embed.weight"),
        (_replace_buffer, "frequencies"),
        (_untie_by_the_second_name, "head.weight"),
    ],
)
def test_a_tensor_that_moved_is_named_and_nothing_is_written(
    model: TiedModel, plan: Plan, move: Callable[[TiedModel], None], name: str
) -> None:
    live = LiveParameters(model, plan)
    live.check_addresses()
    move(model)
    before = _state(model)

    with pytest.raises(PointerMoved, match="restart this worker") as caught:
        live.check_addresses()
    assert caught.value.tensor == name
    with pytest.raises(PointerMoved) as caught:
        live.copy_from(_staged(plan))
    assert caught.value.tensor == name
    _assert_equal(model, before)


# The views.


def test_views_have_the_parameters_dtypes_and_shapes(
    model: TiedModel, plan: Plan
) -> None:
    buffer = torch.zeros(plan.arena_nbytes, dtype=torch.uint8)
    views = parameter_views(buffer, plan)

    found = {
        p.name: (view.dtype, tuple(view.shape))
        for p, view in zip(plan.parameters, views, strict=True)
    }
    assert found == {
        "embed.weight": (torch.bfloat16, (6, 4)),
        "norm": (torch.float32, (4,)),
        "scale": (torch.float32, ()),
    }


def test_views_alias_the_buffer_where_the_plan_says(
    model: TiedModel, plan: Plan
) -> None:
    buffer = torch.zeros(plan.arena_nbytes, dtype=torch.uint8)
    views = parameter_views(buffer, plan)

    assert list(plan.offsets.values()) == [0, ALIGNMENT, 2 * ALIGNMENT]
    for number, (parameter, view) in enumerate(
        zip(plan.parameters, views, strict=True)
    ):
        start = plan.offsets[parameter.name]
        assert view.data_ptr() == buffer.data_ptr() + start
        buffer[start : start + parameter.nbytes] = number + 1
        raw = view.reshape(-1).view(torch.uint8)
        assert raw.tolist() == [number + 1] * parameter.nbytes
    written = sum(parameter.nbytes for parameter in plan.parameters)
    assert int(buffer.count_nonzero()) == written == 48 + 16 + 4
