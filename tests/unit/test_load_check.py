# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A plan that is not what the loader does is caught before a version is served."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.rank.capture import capture_load, describe_parameters
from dynamo.refit.rank.conversion import Conversion, RuntimeForm
from dynamo.refit.rank.load_check import (
    check_other_tensors,
    compare_with_live,
    rehearse,
    rehearse_conversions,
)
from dynamo.refit.rank.processing import LayerFailed
from dynamo.refit.rank.slices import ReadSlice
from dynamo.refit.rank.twin import same_bits
from tests.support.toy_models import (
    COLUMNS,
    Toy,
    checkpoint,
    copy_slices,
    entries,
    live_of,
    twin_of,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

TENSORS = checkpoint(1)
PUBLISHED = entries(TENSORS)

CONFIG = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))


@pytest.fixture
def twin() -> Toy:
    return twin_of(copy_slices)


@pytest.fixture
def live() -> Toy:
    return live_of(copy_slices, TENSORS.items())


@pytest.fixture
def slices(twin: Toy) -> list[ReadSlice]:
    return list(capture_load(twin, PUBLISHED).slices)


def _compare(live: Toy, twin: Toy, slices: list[ReadSlice]) -> None:
    form = RuntimeForm(live, twin, CONFIG)
    compare_with_live(TENSORS.items(), slices, [], form)


def _moved(slices: list[ReadSlice]) -> list[ReadSlice]:
    """``gate`` one row further down, and ``up`` one row less far."""
    gate, up, scale = slices
    return [
        replace(gate, offset=gate.offset + COLUMNS),
        replace(up, offset=up.offset - COLUMNS),
        scale,
    ]


def _exchanged(slices: list[ReadSlice]) -> list[ReadSlice]:
    gate, up, scale = slices
    return [replace(gate, offset=up.offset), replace(up, offset=gate.offset), scale]


BROKEN = [(_moved, "layer.weight"), (_exchanged, "layer.weight")]


def test_true_slices_pass(twin: Toy, live: Toy, slices: list[ReadSlice]) -> None:
    before = {name: id(tensor) for name, tensor in twin.named_parameters()}
    rehearse(twin, PUBLISHED, describe_parameters(twin, live), slices)
    assert {name: id(t) for name, t in twin.named_parameters()} == before
    assert twin.layer.weight.is_meta
    _compare(live, twin, slices)


@pytest.mark.parametrize(("broken", "named"), BROKEN)
def test_made_up_tensors_tell_broken_slices(
    twin: Toy, live: Toy, slices: list[ReadSlice], broken, named: str
) -> None:
    parameters = describe_parameters(twin, live)
    with pytest.raises(LayoutRefused, match="other values") as refused:
        rehearse(twin, PUBLISHED, parameters, broken(slices))
    assert refused.value.tensor == named


@pytest.mark.parametrize(("broken", "named"), BROKEN)
def test_the_live_parameters_tell_broken_slices(
    twin: Toy, live: Toy, slices: list[ReadSlice], broken, named: str
) -> None:
    with pytest.raises(LayoutRefused, match="start checkpoint") as refused:
        _compare(live, twin, broken(slices))
    assert refused.value.tensor == named


def test_a_transform_that_the_slices_lack_is_caught_twice(
    live: Toy, slices: list[ReadSlice]
) -> None:
    """As if the capture had not seen it."""

    def doubled(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        copy_slices(toy, name, tensor * 2 if name == "scale" else tensor)

    twin = twin_of(doubled)
    with pytest.raises(LayoutRefused) as refused:
        rehearse(twin, PUBLISHED, describe_parameters(twin, live), slices)
    assert refused.value.tensor == "scale"
    live = live_of(doubled, TENSORS.items())
    with pytest.raises(LayoutRefused) as refused:
        _compare(live, twin, slices)
    assert refused.value.tensor == "scale"


def test_one_changed_bit_of_the_live_model_is_caught(
    twin: Toy, live: Toy, slices: list[ReadSlice]
) -> None:
    live.layer.weight.data.view(torch.int32)[4, 2] ^= 1
    with pytest.raises(LayoutRefused) as refused:
        _compare(live, twin, slices)
    assert refused.value.tensor == "layer.weight"


def test_a_loader_that_fails_on_real_tensors_is_named(
    live: Toy, slices: list[ReadSlice]
) -> None:
    def fail(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        raise ValueError("not today")

    twin = twin_of(fail)
    with pytest.raises(LayoutRefused, match="ValueError: not today"):
        rehearse(twin, PUBLISHED, describe_parameters(twin, live), slices)
    assert twin.layer.weight.is_meta


def test_a_layer_that_is_quantized_while_it_is_loaded_is_not_quantized_here(
    live: Toy, slices: list[ReadSlice]
) -> None:
    """vLLM wraps the loaders of such layers: a made-up layer has no kernels to run."""

    def load(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        parameter.data.copy_(tensor)

    @functools.wraps(load, assigned=("__doc__",))
    def online_process_loader(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        raise AssertionError("quantized")

    def loader(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "scale":
            toy.scale.weight_loader(toy.scale, tensor)
        else:
            copy_slices(toy, name, tensor)

    twin = twin_of(loader)
    twin.scale.weight_loader = online_process_loader
    rehearse(twin, PUBLISHED, describe_parameters(twin, live), slices)
    assert twin.scale.weight_loader is online_process_loader


def test_bits_are_compared_and_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


# Tensors that no version fills.


def _check_others(live: nn.Module, twin: nn.Module) -> None:
    form = RuntimeForm(live, twin, CONFIG)
    check_other_tensors(live, twin, form.live().values())


def test_constructed_tensors_views_and_kv_caches_pass(twin: Toy, live: Toy) -> None:
    live.layer.rows = live.layer.weight.data[1:]
    live.layer.kv_cache = torch.rand(8)
    live.layer.empty = torch.rand(0)
    _check_others(live, twin)


def _change_a_buffer(live: Toy) -> str:
    live.layer.table.mul_(3)
    return "layer.table"


def _add_an_attribute(live: Toy) -> str:
    live.layer.fused = live.layer.weight.data * 2
    return "layer.fused"


def _add_a_buffer(live: Toy) -> str:
    live.register_buffer("norms", live.layer.weight.data.norm(dim=0))
    return "norms"


@pytest.mark.parametrize("change", [_change_a_buffer, _add_an_attribute, _add_a_buffer])
def test_what_would_go_stale_is_named(twin: Toy, live: Toy, change) -> None:
    named = change(live)
    with pytest.raises(LayoutRefused, match=named) as refused:
        _check_others(live, twin)
    assert refused.value.tensor == named


def test_a_view_of_a_parameter_that_moved_away_is_named(twin: Toy, live: Toy) -> None:
    """Mamba's ``conv_weights``, on a CPU whose convolutions are packed."""
    twin.layer.rows = twin.layer.weight.data[1:]
    live.layer.rows = live.layer.weight.data[1:].clone()
    with pytest.raises(LayoutRefused, match=r"layer\.rows"):
        _check_others(live, twin)


# What the loader fills.


def doubled(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """The scale is more than a copy, and a buffer is filled with it."""
    copy_slices(toy, name, tensor * 2 if name == "scale" else tensor)
    if name == "scale":
        toy.layer.table.copy_(tensor[:3])


def _loaded(
    twin: Toy, live: Toy
) -> tuple[RuntimeForm, list[ReadSlice], list[Conversion]]:
    form = RuntimeForm(live, twin, CONFIG)
    geometry = capture_load(twin, PUBLISHED)
    return form, list(geometry.slices), form.conversions(geometry, PUBLISHED)


def test_what_the_loader_fills_is_compared_too() -> None:
    twin, live = twin_of(doubled), live_of(doubled, TENSORS.items())
    form, slices, conversions = _loaded(twin, live)
    assert [c.outputs for c in conversions] == [("layer.table", "scale")]
    rehearse_conversions(conversions, form)
    compare_with_live(TENSORS.items(), slices, conversions, form)
    check_other_tensors(live, twin, form.live(["layer.table", "scale"]).values())
    assert torch.equal(live.scale, TENSORS["scale"] * 2)
    assert torch.equal(twin.layer.table, torch.arange(3.0))

    live.layer.table[2] += 1
    with pytest.raises(LayoutRefused, match="start checkpoint") as refused:
        compare_with_live(TENSORS.items(), slices, conversions, form)
    assert refused.value.tensor == "layer.table"


def test_a_loader_that_makes_another_form_than_is_live_is_refused() -> None:
    twin, live = twin_of(doubled), live_of(doubled, TENSORS.items())
    live.layer.table = torch.zeros(5)
    form, _, conversions = _loaded(twin, live)
    with pytest.raises(
        LayoutRefused, match=r"float32 \(3,\).*float32 \(5,\)"
    ) as refused:
        rehearse_conversions(conversions, form)
    assert refused.value.tensor == "layer.table"


def test_a_loader_that_fails_on_real_tensors_alone_is_refused() -> None:
    """It may look at values, where a tensor of the meta device has none."""

    def reject(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_meta and name == "scale":
            raise ValueError("not these numbers")
        doubled(toy, name, tensor)

    twin, live = twin_of(reject), live_of(doubled, TENSORS.items())
    form, _, conversions = _loaded(twin, live)
    with pytest.raises(LayerFailed, match="not these numbers") as refused:
        rehearse_conversions(conversions, form)
    assert refused.value.tensor == "layer.table"
