# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Whose image a rank may take for its own, and what it reads of it."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import msgspec
import pytest
import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from dynamo.refit.errors import PeerUnsuitable
from dynamo.refit.manifest import Manifest, Shard, TensorEntry
from dynamo.refit.protocol import HeldTensor
from dynamo.refit.rank.image import (
    check_image,
    held_tensors,
    read_image,
    runtime_layout,
    tensors_of_image,
)
from dynamo.refit.rank.slices import ArenaLayout, Parameter

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


def entry(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> TensorEntry:
    shard = Shard(
        source=0, region=0, byte_offset=0, offset=(0,) * len(shape), shape=shape
    )
    return TensorEntry(name=name, dtype=dtype, shape=shape, shards=(shard,))


IMAGES = Manifest(
    model="tiny",
    tensors=(entry("rank 0: w", (4, 2)), entry("rank 1: w", (3, 2))),
    sources=(),
    layouts=("form 0", "form 1"),
)


def test_each_rank_reads_its_own_image() -> None:
    assert tensors_of_image(IMAGES, 1, 2, "form 1") == {"w": IMAGES.tensors[1]}
    assert tensors_of_image(IMAGES, 0, 2, "form 0") == {"w": IMAGES.tensors[0]}


@pytest.mark.parametrize(
    ("rank", "ranks", "layout"), [(0, 1, "form 0"), (0, 2, "form 1"), (2, 3, "form 1")]
)
def test_images_of_another_layout_are_refused(
    rank: int, ranks: int, layout: str
) -> None:
    with pytest.raises(PeerUnsuitable, match="has 2 ranks, or keeps") as refused:
        tensors_of_image(IMAGES, rank, ranks, layout)
    assert refused.value.rank == rank


LIVE = {"w": torch.zeros(4, 2, dtype=torch.bfloat16), "scale": torch.zeros(3)}
WHOLE = {"w": entry("-", (4, 2)), "scale": entry("-", (3,), "float32")}


def test_an_image_of_all_that_is_live_is_read_whole() -> None:
    check_image(WHOLE, LIVE)
    parameters, slices = read_image(WHOLE)
    assert parameters == [
        Parameter("w", (4, 2), "bfloat16"),
        Parameter("scale", (3,), "float32"),
    ]
    assert [(s.box, s.parameter, s.offset, s.strides) for s in slices] == [
        (((0, 4), (0, 2)), "w", 0, (2, 1)),
        (((0, 3),), "scale", 0, (1,)),
    ]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"w": entry("-", (2, 4))}, "w"),
        ({"w": entry("-", (4, 2), "float16")}, "w"),
        ({"scale": None}, "scale"),
        ({"bias": entry("-", (4,))}, "bias"),
    ],
    ids=["shape", "dtype", "missing", "more"],
)
def test_an_image_of_something_else_is_refused_by_name(
    changed: dict[str, TensorEntry | None], named: str
) -> None:
    tensors = {n: t for n, t in (WHOLE | changed).items() if t is not None}
    with pytest.raises(PeerUnsuitable, match="read from the trainer") as refused:
        check_image(tensors, LIVE)
    assert refused.value.tensor == named


def test_what_lies_in_a_shadow_is_told_in_the_order_of_memory() -> None:
    parameters = [Parameter("w", (4, 2), "bfloat16"), Parameter("b", (3,), "float32")]
    assert held_tensors(ArenaLayout(parameters, ["b"])) == (
        HeldTensor("b", "float32", (3,), 0),
        HeldTensor("w", "bfloat16", (4, 2), 256),
    )


class Backend(enum.Enum):
    ONE = 1
    OTHER = 2


class Method(QuantizeMethodBase):
    """Does nothing, in one way or another."""

    def __init__(self, backend: Backend = Backend.ONE) -> None:
        self.backend = backend
        self.kernel = object()

    create_weights = apply = None


class OtherMethod(Method):
    """Does nothing, too."""


def form(
    method: QuantizeMethodBase | None = None, **held: torch.Tensor
) -> SimpleNamespace:
    """A test fake of :class:`dynamo.refit.rank.conversion.RuntimeForm`."""
    held = LIVE | held
    layer = SimpleNamespace(
        name="layer", live=SimpleNamespace(quant_method=method or Method())
    )
    return SimpleNamespace(
        held=held | {"cache": torch.zeros(5)},
        plain={"w": held["w"]},
        made={"scale": held["scale"]},
        layers=(layer,),
    )


def test_equal_forms_have_one_layout_in_every_process() -> None:
    """Addresses of what a method holds are not in it, nor is what no version fills."""
    other = form()
    other.held["cache"] = torch.zeros(7)
    assert runtime_layout(form(), 0, 2) == runtime_layout(other, 0, 2)


OTHERS = {
    "rank": lambda: runtime_layout(form(), 1, 2),
    "ranks": lambda: runtime_layout(form(), 0, 1),
    "stride": lambda: runtime_layout(form(w=LIVE["w"].T.contiguous().T), 0, 2),
    "dtype": lambda: runtime_layout(form(w=LIVE["w"].half()), 0, 2),
    "method": lambda: runtime_layout(form(OtherMethod()), 0, 2),
    "backend": lambda: runtime_layout(form(Method(Backend.OTHER)), 0, 2),
}


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_changes_the_meaning_of_bytes_is_another_layout(what: str) -> None:
    assert OTHERS[what]() != runtime_layout(form(), 0, 2)


def test_images_and_published_tensors_have_different_layouts() -> None:
    published = msgspec.structs.replace(IMAGES, layouts=())
    assert published.layout_fingerprint() != IMAGES.layout_fingerprint()
    other = msgspec.structs.replace(IMAGES, layouts=("form 0", "form 2"))
    assert other.layout_fingerprint() != IMAGES.layout_fingerprint()
