# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Only what a loader copies is taken for a slice; whatever else it fills is known by
name, with the tensors that it is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.rank.capture import (
    LONGEST_CAUSE,
    LoadGeometry,
    capture_load,
    refuse_tensors,
)
from dynamo.refit.rank.slices import ReadSlice
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
WEIGHT = (
    ReadSlice("gate", HALF, "layer.weight", 0, (COLUMNS, 1)),
    ReadSlice("up", HALF, "layer.weight", ROWS // 2 * COLUMNS, (COLUMNS, 1)),
)
SCALE = ReadSlice("scale", ((0, ROWS),), "scale", 0, (1,))


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
    geometry = capture_load(twin_of(loader), PUBLISHED)
    assert geometry == LoadGeometry((*WEIGHT, SCALE), {})


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
        capture_load(twin_of(keep_a_number), PUBLISHED)
    assert refused.value.tensor == "scale"


def join_tensors(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """Falcon's queries, keys and values; placeholders do not know how."""
    if name == "scale":
        toy.scale.data.copy_(torch.cat([tensor[3:], tensor[:3]]))
    else:
        copy_slices(toy, name, tensor)


def reorder_rows(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """Llama-4's rotary embedding: a copy is made on the way."""
    if name == "scale":
        toy.scale.data.copy_(tensor.view(2, 3).t().reshape(ROWS))
    else:
        copy_slices(toy, name, tensor)


def copy_then_look_at_it(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """ModelExpress keeps the copies of a tensor that then turned out not to do."""
    copy_slices(toy, name, tensor)
    if name == "scale":
        tensor + 1


@pytest.mark.parametrize(
    "loader",
    [
        exponentiate,
        scale_in_place,
        scale_several_in_place,
        copy_through_scratch,
        compute_from_the_source,
        set_a_part_to_zero,
        join_tensors,
        reorder_rows,
        copy_then_look_at_it,
    ],
)
def test_what_the_loader_computes_is_left_to_it(loader: Loader) -> None:
    geometry = capture_load(twin_of(loader), PUBLISHED)
    assert geometry == LoadGeometry(WEIGHT, {"scale": frozenset({"scale"})})


@pytest.mark.parametrize("loader", [replace_the_parameter, replace_the_storage])
def test_what_the_loader_replaces_is_refused_by_name(loader: Loader) -> None:
    with pytest.raises(LayoutRefused, match="puts another tensor") as refused:
        capture_load(twin_of(loader), PUBLISHED)
    assert refused.value.tensor == "scale"
    assert "layer.weight" not in str(refused.value)


class Joining(Toy):
    """Waits for two tensors before it loads them, as MLA's indexers do."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        waiting = {}
        for name, tensor in weights:
            waiting[name] = tensor
            if name == "scale":
                copy_slices(self, name, tensor)
            elif {"gate", "up"} <= waiting.keys():
                rows = torch.stack([waiting["gate"], waiting["up"]], 1)
                self.layer.weight.data.copy_(rows.flatten(0, 1))


def test_all_that_a_parameter_is_made_of_is_known() -> None:
    twin = twin_of(copy_slices)
    twin.__class__ = Joining
    geometry = capture_load(twin, PUBLISHED)
    assert geometry.loaded == {"layer.weight": frozenset({"gate", "up"})}
    assert geometry.slices == (SCALE,)


def share_a_tensor(toy: Toy, name: str, tensor: torch.Tensor) -> None:
    """The scale is copied, and a buffer is computed of the same tensor."""
    copy_slices(toy, name, tensor)
    if name == "scale":
        toy.layer.table.copy_(tensor[:3] * 2)


def test_a_tensor_is_read_whole_or_in_slices_and_not_both() -> None:
    geometry = capture_load(twin_of(share_a_tensor), PUBLISHED)
    made_of = frozenset({"scale"})
    assert geometry.loaded == {"layer.table": made_of, "scale": made_of}
    assert geometry.slices == WEIGHT


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
        (derive_the_buffer, "layer.table"),
        (derive_an_attribute, "layer.table_of_ones"),
    ],
)
def test_what_is_derived_of_nothing_that_is_published_is_refused(
    loader: Loader, named: str
) -> None:
    with pytest.raises(LayoutRefused, match=rf"{named}\b") as refused:
        capture_load(twin_of(loader), PUBLISHED)
    assert refused.value.tensor == named


def test_a_buffer_that_the_loader_fills_is_loaded() -> None:
    geometry = capture_load(twin_of(fill_the_buffer), PUBLISHED)
    assert set(geometry.loaded) == {"layer.table", "scale"}


def test_a_loader_s_own_refusal_names_the_tensor_and_is_short() -> None:
    def refuse(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        if name == "up":
            raise KeyError("a list of every parameter, " * 1000)
        copy_slices(toy, name, tensor)

    with pytest.raises(LayoutRefused, match="KeyError") as refused:
        capture_load(twin_of(refuse), PUBLISHED)
    assert refused.value.tensor == "up"
    assert len(str(refused.value)) < 2 * LONGEST_CAUSE


def test_many_tensors_are_named_in_one_line() -> None:
    refused = refuse_tensors({f"t{n}": "lost" for n in range(50)})
    assert re.search(r": t0, t1, .* and 42 more; t0: lost$", str(refused))
    assert refused.tensor == "t0"


def test_what_is_written_nowhere_fills_nothing() -> None:
    def lose(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        torch.empty(tensor.shape, device="meta").copy_(tensor)

    assert capture_load(twin_of(lose), PUBLISHED) == LoadGeometry((), {})


def _missing(loader: Loader, *left_out: str) -> LoadGeometry:
    published = [tensor for tensor in PUBLISHED if tensor.name not in left_out]
    return capture_load(twin_of(loader), published)


def test_what_the_loader_leaves_as_it_was_constructed_is_counted() -> None:
    """Otherwise a parameter of which a tensor is missing would be half zeros."""

    def double(toy: Toy, name: str, tensor: torch.Tensor) -> None:
        """Computes each half, and then something of all there is."""
        copy_slices(toy, name, tensor * 2 if name != "scale" else tensor)
        if name != "scale":
            toy.layer.weight.data.copy_(-toy.layer.weight.data)

    assert _missing(double).unfilled == {}
    assert _missing(double, "up").unfilled == {"layer.weight": ROWS // 2 * COLUMNS}
    assert _missing(double, "up").loaded == {"layer.weight": frozenset({"gate"})}
