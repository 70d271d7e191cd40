# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Functions that take the place of a layer's own, and go again."""

from __future__ import annotations

import pytest

from dynamo.refit.rank.processing import Function

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class Layer:
    """Its kernel is a method of its class, unless it has one of its own."""

    def kernel(self) -> str:
        return "of the class"


@pytest.mark.parametrize("own", [None, lambda: "its own"], ids=["absent", "present"])
def test_what_was_there_before_a_function_is_there_again(own: object) -> None:
    layer = Layer()
    if own is not None:
        layer.kernel = own
    before = dict(vars(layer)), layer.kernel()
    first = Function(layer, "kernel", lambda: "first").install()
    second = Function(layer, "kernel", lambda: "second").install()
    assert layer.kernel() == "second"
    again = second.install()
    assert layer.kernel() == "first"
    first.install()
    assert (vars(layer), layer.kernel()) == before
    # Undone twice, as a restore may be.
    first.install()
    assert (vars(layer), layer.kernel()) == before
    again.install()
    assert layer.kernel() == "second"
