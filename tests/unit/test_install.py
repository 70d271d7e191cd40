# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Live parameters: overwritten where they are, and guarded against moving."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn

from dynamo.refit.errors import PackedWeights, PointerMoved
from dynamo.refit.rank import install
from dynamo.refit.rank.install import LiveParameters
from dynamo.refit.rank.slices import ArenaLayout, Parameter

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
        self.workspace = torch.zeros(3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens).float() * self.norm * self.scale
        return self.head(hidden.bfloat16())


@pytest.fixture
def model() -> TiedModel:
    return TiedModel()


@pytest.fixture
def layout(model: TiedModel) -> ArenaLayout:
    return ArenaLayout(
        [
            Parameter(name, tuple(p.shape), str(p.dtype).removeprefix("torch."))
            for name, p in model.named_parameters()
        ]
    )


def _staged(layout: ArenaLayout) -> list[torch.Tensor]:
    """Random values, as a pull leaves them in an arena."""
    return [
        torch.randn(parameter.shape).to(getattr(torch, parameter.dtype))
        for parameter in layout.parameters
    ]


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


def test_what_was_queued_before_a_failure_is_waited_for_too(
    model: TiedModel, layout: ArenaLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = mock.Mock()
    monkeypatch.setattr(install, "_clock", lambda device: clock)
    live = LiveParameters(model, layout)
    with pytest.raises(RuntimeError):
        live.copy_from([torch.zeros(1, 2, 3) for _ in layout.parameters])
    assert [call[0] for call in clock.method_calls] == ["start", "stop"]


def test_copy_from_overwrites_in_place_under_every_name(
    model: TiedModel, layout: ArenaLayout
) -> None:
    addresses, frequencies = _addresses(model), model.frequencies.clone()
    staged = _staged(layout)
    LiveParameters(model, layout).copy_from(staged)

    new = dict(zip((p.name for p in layout.parameters), staged, strict=True))
    assert new.keys() == {"embed.weight", "norm", "scale"}
    tied = {"head.weight": new["embed.weight"], "frequencies": frequencies}
    _assert_equal(model, new | tied)
    assert _addresses(model) == addresses
    assert model.head.weight is model.embed.weight


def test_copy_from_is_seen_by_the_next_step(
    model: TiedModel, layout: ArenaLayout
) -> None:
    tokens = torch.arange(6)
    LiveParameters(model, layout).copy_from(_staged(layout))
    other = TiedModel()
    other.load_state_dict(model.state_dict())

    assert torch.equal(model(tokens), other(tokens))


def test_copy_from_leaves_ordinary_parameters(
    model: TiedModel, layout: ArenaLayout
) -> None:
    LiveParameters(model, layout).copy_from(_staged(layout))

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert not parameter.is_inference(), name


def test_copy_to_takes_what_is_live_and_leaves_it(
    model: TiedModel, layout: ArenaLayout
) -> None:
    before, backup = _state(model), _staged(layout)
    LiveParameters(model, layout).copy_to(backup)

    _assert_equal(model, before)
    for parameter, saved in zip(layout.parameters, backup, strict=True):
        assert torch.equal(saved, before[parameter.name]), parameter.name


def test_a_backup_undoes_an_install(model: TiedModel, layout: ArenaLayout) -> None:
    before, backup, staged = _state(model), _staged(layout), _staged(layout)
    kept = [tensor.clone() for tensor in staged]
    live = LiveParameters(model, layout)
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


def _replace_bare_tensor(model: TiedModel) -> None:
    """As a kernel would that allocates its workspace again."""
    model.workspace = torch.zeros(3)


def _drop_bare_tensor(model: TiedModel) -> None:
    model.workspace = None


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
        (_replace_bare_tensor, "workspace"),
        (_drop_bare_tensor, "workspace"),
        (_untie_by_the_second_name, "head.weight"),
    ],
)
def test_a_tensor_that_moved_is_named_and_nothing_is_written(
    model: TiedModel, layout: ArenaLayout, move: Callable[[TiedModel], None], name: str
) -> None:
    live = LiveParameters(model, layout)
    live.check_addresses()
    move(model)
    before = _state(model)

    with pytest.raises(PointerMoved, match="restart this worker") as caught:
        live.check_addresses()
    assert caught.value.tensor == name
    with pytest.raises(PointerMoved) as caught:
        live.copy_from(_staged(layout))
    assert caught.value.tensor == name
    _assert_equal(model, before)


# What needs more than a copy.


@pytest.mark.parametrize("form", ["empty", "dtype", "strides"])
def test_a_parameter_in_another_form_is_not_copied_into(
    model: TiedModel, layout: ArenaLayout, form: str
) -> None:
    """Who processes it is not known here, so that a copy would be wrong."""
    model.embed.weight = nn.Parameter(
        {
            "empty": torch.empty(0, dtype=torch.bfloat16),
            "dtype": torch.zeros(6, 4),
            "strides": torch.zeros(4, 6, dtype=torch.bfloat16).t(),
        }[form]
    )
    with pytest.raises(PackedWeights) as caught:
        LiveParameters(model, layout)
    assert caught.value.tensor == "embed.weight"


def test_a_backup_is_complete_where_everything_is_copied(
    model: TiedModel, layout: ArenaLayout
) -> None:
    live = LiveParameters(model, layout)
    assert live.can_copy_out
    assert live.processed == frozenset()
