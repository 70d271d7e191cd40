# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Only what a loader copies is taken for a slice; whatever else it does is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.rank.capture import LONGEST_CAUSE, capture_slices
from dynamo.refit.rank.plan import ReadSlice
from tests.support.toy_models import (
    COLUMNS,
    ROWS,
    Loader,
    Toy,
    checkpoint,
    copy_slices,
    entries,
    half,
    twin_of,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

PUBLISHED = entries(checkpoint(1))

HALF = ((0, ROWS // 2), (0, COLUMNS))
SLICES = [
    ReadSlice("gate", HALF, "layer.weight", 0, (COLUMNS, 1)),
    ReadSlice("up", HALF, "layer.weight", ROWS // 2 * COLUMNS, (COLUMNS, 1)),
    ReadSlice("scale", ((0, ROWS),), "scale", 0, (1,)),
]


def assign_by_index(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """Qwen3-Next's convolution."""
    if name == "scale":
        toy.scale.data[:] = tensor
    else:
        first = (name == "up") * ROWS // 2
        toy.layer.weight.data[first : first + ROWS // 2] = tensor


def load_by_another_parameter_s_loader(
    toy: Toy, name: str, tensor: torch.Tensor
) -> None:
    toy.layer.weight.weight_loader = lambda _, loaded: copy_slices(toy, name, loaded)
    toy.layer.weight.weight_loader(toy.layer.weight, tensor)


@pytest.mark.parametrize(
    "loader", [copy_slices, assign_by_index, load_by_another_parameter_s_loader]
)
def test_copies_are_slices_of_the_parameter_that_they_write(loader: Loader) -> None:
    assert capture_slices(twin_of(loader), PUBLISHED) == SLICES


def exponentiate(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """vLLM's ``composed_weight_loader``: published is the logarithm of Mamba-2's A."""
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.scale.data.copy_(-torch.exp(toy.scale.float()))


def scale_in_place(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.scale.data.mul_(2)


def scale_several_in_place(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """An operation that is given a list of tensors to write."""
    copy_slices(toy, name, tensor)
    if name == "scale":
        torch._foreach_mul_([toy.scale.data], 2)


def copy_through_scratch(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """The placeholder goes to a tensor that nobody keeps, and its bytes are lost."""
    if name == "scale":
        scratch = torch.empty(ROWS, device="meta")
        scratch.copy_(tensor)
        toy.scale.data.copy_(scratch)
    else:
        copy_slices(toy, name, tensor)


def replace_the_parameter(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.scale = nn.Parameter(torch.ones(ROWS, device="meta"))


def replace_the_storage(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.scale.data = torch.ones(ROWS, device="meta")


def compute_from_the_source(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    toy_target = toy.scale.data if name == "scale" else half(toy, name)
    toy_target.copy_(tensor + 1 if name == "scale" else tensor)


def set_a_part_to_zero(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.scale.data[1:].zero_()


def test_a_value_that_leaves_for_python_is_refused() -> None:
    """Nobody could see where it goes; so a twin's parameters have no values."""

    def keep_a_number(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        copy_slices(toy, name, tensor)
        if name == "scale":
            toy.largest = float(toy.scale.max())

    with pytest.raises(LayoutRefused, match="meta") as refused:
        capture_slices(twin_of(keep_a_number), PUBLISHED)
    assert refused.value.tensor == "scale"


@pytest.mark.parametrize(
    "loader",
    [
        exponentiate,
        scale_in_place,
        scale_several_in_place,
        copy_through_scratch,
        replace_the_parameter,
        replace_the_storage,
        compute_from_the_source,
        set_a_part_to_zero,
    ],
)
def test_what_the_loader_computes_is_refused_by_name(loader: Loader) -> None:
    with pytest.raises(LayoutRefused) as refused:
        capture_slices(twin_of(loader), PUBLISHED)
    assert refused.value.tensor == "scale"
    assert "scale" in str(refused.value)
    assert "layer.weight" not in str(refused.value)


def fill_the_buffer(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.layer.table.copy_(tensor.narrow(0, 0, 3))


def derive_the_buffer(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.layer.table.copy_(torch.exp(toy.layer.table))


def derive_an_attribute(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.layer.table_of_ones = torch.ones(3)


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (fill_the_buffer, "layer.table"),
        (derive_the_buffer, "layer.table"),
        (derive_an_attribute, "layer.table_of_ones"),
    ],
)
def test_what_is_no_parameter_and_is_filled_is_refused(
    loader: Loader, named: str
) -> None:
    with pytest.raises(LayoutRefused, match=rf"{named}\b") as refused:
        capture_slices(twin_of(loader), PUBLISHED)
    assert refused.value.tensor == named


def test_a_source_that_fails_after_a_copy_leaves_no_slice() -> None:
    """ModelExpress keeps the copies of a tensor that then turned out not to do."""

    def copy_then_fail(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        copy_slices(toy, name, tensor)
        if name == "scale":
            tensor + 1

    with pytest.raises(LayoutRefused) as refused:
        capture_slices(twin_of(copy_then_fail), PUBLISHED)
    assert refused.value.tensor == "scale"


def test_a_loader_s_own_refusal_names_the_tensor_and_is_short() -> None:
    def refuse(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "up":
            raise KeyError("a list of every parameter, " * 1000)
        copy_slices(toy, name, tensor)

    with pytest.raises(LayoutRefused, match="KeyError") as refused:
        capture_slices(twin_of(refuse), PUBLISHED)
    assert refused.value.tensor == "up"
    assert len(str(refused.value)) < 2 * LONGEST_CAUSE


def test_many_tensors_are_named_in_one_line() -> None:
    published = entries({f"t{n}": torch.ones(1) for n in range(50)})

    def lose(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        torch.empty(1, device="meta").copy_(tensor)

    with pytest.raises(LayoutRefused, match=r": t0, t1, .* and 42 more; t0: "):
        capture_slices(twin_of(lose), published)
