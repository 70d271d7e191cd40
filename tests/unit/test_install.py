# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The live model: overwritten where it is, and guarded against moving."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import nn

from dynamo.refit.errors import PointerMoved
from dynamo.refit.rank import install
from dynamo.refit.rank.install import LiveModel

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
def live(model: TiedModel) -> LiveModel:
    return _live(model)


def _live(model: TiedModel) -> LiveModel:
    filled = {name: p.detach() for name, p in model.named_parameters()}
    return LiveModel(model, filled)


def _staged(live: LiveModel) -> dict[str, torch.Tensor]:
    """Random values, as a pull leaves them in an arena."""
    return {
        name: torch.randn(tensor.shape).to(tensor.dtype)
        for name, tensor in live.filled.items()
    }


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
    model: TiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = mock.Mock()
    monkeypatch.setattr(install, "_clock", lambda device: clock)
    live = _live(model)
    with pytest.raises(RuntimeError):
        live.copy_from({name: torch.zeros(1, 2, 3) for name in live.filled})
    assert [call[0] for call in clock.method_calls] == ["start", "stop"]


def test_copy_from_overwrites_in_place_under_every_name(
    model: TiedModel, live: LiveModel
) -> None:
    addresses, frequencies = _addresses(model), model.frequencies.clone()
    new = _staged(live)
    live.copy_from(new)

    assert new.keys() == {"embed.weight", "norm", "scale"}
    tied = {"head.weight": new["embed.weight"], "frequencies": frequencies}
    _assert_equal(model, new | tied)
    assert _addresses(model) == addresses
    assert model.head.weight is model.embed.weight


def test_copy_from_is_seen_by_the_next_step(model: TiedModel, live: LiveModel) -> None:
    tokens = torch.arange(6)
    live.copy_from(_staged(live))
    other = TiedModel()
    other.load_state_dict(model.state_dict())

    assert torch.equal(model(tokens), other(tokens))


def test_copy_from_leaves_ordinary_parameters(
    model: TiedModel, live: LiveModel
) -> None:
    live.copy_from(_staged(live))

    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert not parameter.is_inference(), name


def test_copy_to_takes_what_is_live_and_leaves_it(
    model: TiedModel, live: LiveModel
) -> None:
    before, backup = _state(model), _staged(live)
    live.copy_to(backup)

    _assert_equal(model, before)
    for name, saved in backup.items():
        assert torch.equal(saved, before[name]), name


def test_a_backup_undoes_an_install(model: TiedModel, live: LiveModel) -> None:
    before, backup, staged = _state(model), _staged(live), _staged(live)
    kept = {name: tensor.clone() for name, tensor in staged.items()}
    live.copy_to(backup)
    live.copy_from(staged)
    assert not torch.equal(model.norm, before["norm"])
    live.copy_from(backup)

    _assert_equal(model, before)
    assert all(torch.equal(staged[name], kept[name]) for name in kept)


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
    model: TiedModel, live: LiveModel, move: Callable[[TiedModel], None], name: str
) -> None:
    live.check_addresses()
    move(model)
    before = _state(model)

    with pytest.raises(PointerMoved, match="restart this worker") as caught:
        live.check_addresses()
    assert caught.value.tensor == name
    with pytest.raises(PointerMoved) as caught:
        live.copy_from(_staged(live))
    assert caught.value.tensor == name
    _assert_equal(model, before)


# What is not laid out in one piece.


@torch.no_grad()
def test_a_tensor_with_gaps_is_copied_both_ways(model: TiedModel) -> None:
    """vLLM pads some weights, and holds a view without the padding."""
    padded = torch.zeros(4, 6)
    model.workspace = padded[:, :3]
    live = LiveModel(model, {"norm": model.norm.data, "workspace": model.workspace})
    staged = _staged(live)
    live.copy_from(staged)
    backup = {name: torch.empty_like(tensor) for name, tensor in staged.items()}
    live.copy_to(backup)
    assert all(torch.equal(backup[name], staged[name]) for name in staged)
    assert torch.equal(padded[:, 3:], torch.zeros(4, 3))
