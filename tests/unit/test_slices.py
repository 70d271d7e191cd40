# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a rank's loader reads, refused by name where it does not make up a model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import ALIGNMENT, ITEMSIZE, Box
from dynamo.refit.rank.slices import (
    CONVERTIBLE,
    ArenaLayout,
    Parameter,
    ReadSlice,
    check_slices,
)
from tests.support.layouts import (
    Layout,
    SourceMemory,
    make_manifest,
    make_tensor,
    one_slice,
    read,
    whole,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def _check(layout: Layout) -> None:
    check_slices(layout.manifest.tensors, layout.parameters, layout.slices)


def _refusal(layout: Layout) -> tuple[str | None, str]:
    """The tensor and the cause; a plan refuses it likewise."""
    with pytest.raises(LayoutRefused) as caught:
        _check(layout)
    with pytest.raises(LayoutRefused) as planned:
        layout.plan()
    assert str(planned.value) == str(caught.value)
    return caught.value.tensor, str(caught.value)


def _gate_up(
    slices: Sequence[tuple[str, Box, int]],
    *,
    dtype: str = "bfloat16",
    parameter: str = "gate_up",
    unloaded: int = 0,
) -> Layout:
    """``gate`` and ``up`` of 4 x 8, fused into a parameter of 8 x 8."""
    memory = SourceMemory()
    tensors = {name: make_tensor(memory, name, (4, 8)) for name in ("gate", "up")}
    return Layout(
        make_manifest(*tensors.values(), memory=memory),
        (
            Parameter("before", (), dtype, unloaded=1),
            Parameter("gate_up", (8, 8), dtype, unloaded),
            Parameter("after", (8, 8), dtype, unloaded=64),
        ),
        tuple(read(tensors[n], parameter, box, start) for n, box, start in slices),
    )


GATE_UP = [("gate", whole((4, 8)), 0), ("up", whole((4, 8)), 32)]


def test_the_fused_parameter_of_the_refusals_is_sound() -> None:
    _check(_gate_up(GATE_UP))


def test_a_tensor_that_is_not_published_is_refused() -> None:
    layout = _gate_up(GATE_UP)
    lora = ReadSlice("lora", whole((4, 8)), "gate_up", 0, (8, 1))
    tensor, cause = _refusal(
        Layout(layout.manifest, layout.parameters, (*layout.slices, lora))
    )

    assert tensor == "lora"
    assert cause == "this tensor is not published"


def test_a_parameter_with_a_missing_tensor_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP[:1]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 32 of its 64 elements")


def test_a_parameter_that_nothing_fills_is_refused() -> None:
    tensor, cause = _refusal(_gate_up([]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 0 of its 64 elements")


def test_a_parameter_that_is_filled_twice_is_refused() -> None:
    tensor, cause = _refusal(_gate_up([*GATE_UP, GATE_UP[0]]))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 96 of its 64 elements")


def test_padding_that_is_filled_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, unloaded=8))

    assert tensor == "gate_up"
    assert cause.startswith("the published tensors fill 64 of its 56 elements")


def test_a_slice_into_an_unknown_parameter_is_refused() -> None:
    tensor, cause = _refusal(_gate_up(GATE_UP, parameter="gate_up_proj"))

    assert tensor == "gate"
    assert cause == (
        "the loader writes 'gate_up_proj', which is not a parameter of the live model"
    )


def test_a_slice_that_reaches_past_its_tensor_is_refused() -> None:
    """The element counts add up, and the last rows would stay as they were."""
    past = [("gate", ((0, 5), (0, 8)), 0), ("up", ((0, 3), (0, 8)), 40)]
    tensor, cause = _refusal(_gate_up(past))

    assert tensor == "gate"
    assert cause == "the loader reads ((0, 5), (0, 8)) of shape (4, 8)"


def test_slices_that_overlap_and_leave_a_gap_are_refused() -> None:
    """The element counts add up, and 8 elements would stay as they were."""
    tensor, cause = _refusal(_gate_up([GATE_UP[0], ("up", whole((4, 8)), 24)]))

    assert tensor == "gate_up"
    assert cause == "slices overlap in it, and leave other elements out"


@pytest.mark.parametrize("offset", [128, 33, -1])
def test_a_slice_that_reaches_out_of_its_parameter_is_refused(offset: int) -> None:
    """The element counts add up, and a neighbour in the arena would be written."""
    tensor, cause = _refusal(_gate_up([GATE_UP[0], ("up", whole((4, 8)), offset)]))

    assert tensor == "gate_up"
    assert cause == "a slice is written outside it"


def test_slices_that_interleave_are_told_from_slices_that_overlap() -> None:
    """Rows of gate and up in turns, as an interleaved SwiGLU holds them."""
    layout = _gate_up([])
    interleaved = tuple(
        ReadSlice(name, whole((4, 8)), "gate_up", start, (16, 1))
        for name, start in (("gate", 0), ("up", 8))
    )
    _check(Layout(layout.manifest, layout.parameters, interleaved))

    on_top = (interleaved[0], ReadSlice("up", whole((4, 8)), "gate_up", 0, (16, 1)))
    tensor, cause = _refusal(Layout(layout.manifest, layout.parameters, on_top))
    assert tensor == "gate_up"
    assert cause == "slices overlap in it, and leave other elements out"


# Dtypes.


@pytest.mark.parametrize(
    ("published", "held"), [*itertools.product(sorted(CONVERTIBLE), repeat=2)]
)
def test_floats_are_converted(published: str, held: str) -> None:
    layout = one_slice((4, 8), whole((4, 8)), dtype=published, held=held)
    _check(layout)

    plan = layout.plan()
    assert [piece.converts for piece in plan.pieces] == [published != held]
    assert plan.nbytes == 32 * ITEMSIZE[published]
    assert plan.arena.parameters[0].nbytes == 32 * ITEMSIZE[held]


@pytest.mark.parametrize(
    ("published", "held"),
    [
        (published, held)
        for published, held in itertools.product(sorted(ITEMSIZE), repeat=2)
        if published != held and not {published, held} <= CONVERTIBLE
    ],
)
def test_whatever_else_differs_is_refused(published: str, held: str) -> None:
    """Eight-bit floats would need scales, and integers are no weights."""
    layout = one_slice((4, 8), whole((4, 8)), dtype=published, held=held)
    tensor, cause = _refusal(layout)

    assert tensor == "w"
    assert cause == (
        f"published as {published}, the engine holds w as {held}: publish it as {held}"
    )


# The arena.


def test_parameters_lie_in_order_and_aligned() -> None:
    parameters = [
        Parameter("scalar", (), "float32"),
        Parameter("full", (2, 128), "int8"),
        Parameter("long", (1, 129), "bfloat16"),
        Parameter("last", (1,), "bool"),
    ]
    layout = ArenaLayout(parameters)

    assert ALIGNMENT == 256
    assert layout.parameters == tuple(parameters)
    assert layout.offsets == {"scalar": 0, "full": 256, "long": 512, "last": 1024}
    assert layout.nbytes == 1280
    assert [p.nbytes for p in parameters] == [4, 256, 258, 1]
