# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer's tensors as readers see them: the bytes at the published addresses."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.manifest import ALIGNMENT, ITEMSIZE, Manifest, Region, Source
from dynamo.refit.publish.torch_state import (
    InPlaceBuffers,
    SnapshotBuffers,
    local_shards,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

Buffers = InPlaceBuffers | SnapshotBuffers
BOTH = [InPlaceBuffers, SnapshotBuffers]


def _manifest(buffers: Buffers) -> Manifest:
    """The manifest that a publisher makes of ``buffers``; it validates."""
    source = Source(
        agent="trainer-0",
        metadata=b"",
        memory="DRAM",
        device=0,
        slots=buffers.regions,
    )
    manifest = Manifest(model="tiny", tensors=buffers.entries, sources=(source,))
    manifest.validate()
    return manifest


def _read(buffers: Buffers, slot: int = 0) -> dict[str, bytes]:
    """What lies at the published addresses of ``slot``."""
    manifest = _manifest(buffers)
    addresses = manifest.shard_addresses(slot)
    return {
        tensor.name: ctypes.string_at(
            address, math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
        )
        for tensor, address in zip(manifest.tensors, addresses, strict=True)
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order."""
    packed = tensor.detach().clone(memory_format=torch.contiguous_format)
    return packed.reshape(-1).view(torch.uint8).numpy().tobytes()


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    raw = torch.randint(0, 2, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    if dtype != torch.bool:
        raw.random_(0, 256)
    return raw.view(dtype).reshape(shape)


# In place.


def test_each_storage_is_a_region_and_its_bytes_are_the_tensors() -> None:
    tensors = {
        "weight": nn.Parameter(_random(4, 6)),
        "norm": _random(6, dtype=torch.float32),
        "scale": _random(dtype=torch.float32),
    }
    buffers = InPlaceBuffers(local_shards(tensors))

    assert buffers.slots == 1
    assert buffers.device == torch.device("cpu")
    assert buffers.regions == (
        tuple(Region(t.data_ptr(), t.nbytes) for t in tensors.values()),
    )
    assert _read(buffers) == {name: _bytes(t) for name, t in tensors.items()}
    described = [(e.name, e.dtype, e.shape) for e in buffers.entries]
    assert described == [
        ("weight", "bfloat16", (4, 6)),
        ("norm", "float32", (6,)),
        ("scale", "float32", ()),
    ]


def test_views_of_one_storage_share_its_region() -> None:
    fused = _random(10, 8)
    tensors = {"up": fused[4:], "other": _random(3), "gate": fused[:4]}
    buffers = InPlaceBuffers(local_shards(tensors))

    assert [region.nbytes for region in buffers.regions[0]] == [160, 6]
    (up,), (other,), (gate,) = (entry.shards for entry in buffers.entries)
    assert (up.region, up.byte_offset) == (0, 4 * 8 * 2)
    assert (other.region, other.byte_offset) == (1, 0)
    assert (gate.region, gate.byte_offset) == (0, 0)
    assert _read(buffers) == {name: _bytes(t) for name, t in tensors.items()}


def test_tied_tensors_are_the_same_bytes_under_two_names() -> None:
    embedding = nn.Parameter(_random(4, 6))
    buffers = InPlaceBuffers(local_shards({"embed": embedding, "head": embedding}))

    assert len(buffers.regions[0]) == 1
    assert _read(buffers) == dict.fromkeys(("embed", "head"), _bytes(embedding))


def test_in_place_means_that_the_next_step_is_seen() -> None:
    weight = _random(4, 6)
    buffers = InPlaceBuffers(local_shards({"weight": weight}))
    before = _read(buffers)["weight"]
    weight.view(torch.uint8).bitwise_not_()
    buffers.write(0)

    assert _read(buffers)["weight"] == _bytes(weight) != before


@pytest.mark.parametrize("view", ["transposed", "column", "expanded", "strided"])
def test_a_tensor_that_is_not_contiguous_is_refused_by_name(view: str) -> None:
    whole = _random(4, 6)
    made = {
        "transposed": whole.t(),
        "column": whole[:, 1:3],
        "expanded": whole[:1].expand(3, 6),
        "strided": whole[::2],
    }[view]

    with pytest.raises(ManifestInvalid, match="mode='snapshot'") as caught:
        InPlaceBuffers(local_shards({"whole": whole, "k_proj.weight": made}))
    assert caught.value.tensor == "k_proj.weight"
    assert str(caught.value).startswith("not contiguous")


# Both ways.


@pytest.mark.parametrize("buffers", BOTH)
def test_tensors_on_two_devices_are_refused_by_name(buffers: type[Buffers]) -> None:
    elsewhere = torch.empty(4, device="meta")

    with pytest.raises(ManifestInvalid) as caught:
        buffers(local_shards({"here": _random(4), "there": elsewhere}))
    assert caught.value.tensor == "there"
    assert str(caught.value).startswith("on meta, the first tensor on cpu")


@pytest.mark.parametrize("buffers", BOTH)
def test_no_tensors_are_refused(buffers: type[Buffers]) -> None:
    with pytest.raises(ManifestInvalid, match="no tensors to publish"):
        buffers(local_shards({}))


@pytest.mark.parametrize("buffers", BOTH)
@pytest.mark.parametrize("dtype", sorted(ITEMSIZE))
def test_every_dtype_of_a_manifest_can_be_published(
    buffers: type[Buffers], dtype: str
) -> None:
    tensor = _random(3, 5, dtype=getattr(torch, dtype))
    published = buffers(local_shards({"weight": tensor}))
    published.write(0)

    assert published.entries[0].dtype == dtype
    assert _read(published) == {"weight": _bytes(tensor)}


@pytest.mark.parametrize("buffers", BOTH)
def test_a_dtype_that_no_manifest_has_is_refused_by_name(
    buffers: type[Buffers],
) -> None:
    published = buffers(local_shards({"phase": torch.zeros(2, dtype=torch.complex64)}))

    with pytest.raises(ManifestInvalid, match="complex64") as caught:
        _manifest(published)
    assert caught.value.tensor == "phase"


# Snapshots.


def test_a_snapshot_keeps_its_version_while_the_trainer_goes_on() -> None:
    weight = nn.Parameter(_random(4, 6, dtype=torch.float32).nan_to_num())
    buffers = SnapshotBuffers(local_shards({"weight": weight}))
    assert _read(buffers) == {"weight": bytes(weight.nbytes)}

    buffers.write(0)
    taken = _bytes(weight)
    with torch.no_grad():
        weight.zero_().add_(1)

    assert _read(buffers)["weight"] == taken != _bytes(weight)


def test_slots_are_independent() -> None:
    weight, bias = _random(4, 6), _random(6)
    buffers = SnapshotBuffers(local_shards({"weight": weight, "bias": bias}), slots=3)
    versions = []
    for slot in (0, 1, 2, 1):
        weight.view(torch.uint8).random_(0, 256)
        bias.view(torch.uint8).random_(0, 256)
        versions.append({"weight": _bytes(weight), "bias": _bytes(bias)})
        buffers.write(slot)

    assert buffers.slots == _manifest(buffers).slots == 3
    assert _read(buffers, 0) == versions[0]
    assert _read(buffers, 1) == versions[3]
    assert _read(buffers, 2) == versions[2]


def test_every_slot_is_one_region_of_the_same_size() -> None:
    sizes = [(3,), (200,), (), (128,)]
    tensors = {f"w{i}": _random(*shape) for i, shape in enumerate(sizes)}
    buffers = SnapshotBuffers(local_shards(tensors), slots=2)

    (first,), (second,) = buffers.regions
    assert first.nbytes == second.nbytes == 256 + 512 + 256 + 256
    low, high = sorted((first.address, second.address))
    assert low + first.nbytes <= high
    places = [entry.shards[0].byte_offset for entry in buffers.entries]
    assert places == [0, 256, 768, 1024]


def test_tied_tensors_are_copied_under_both_names() -> None:
    embedding = _random(4, 6)
    buffers = SnapshotBuffers(local_shards({"embed": embedding, "head": embedding}))
    buffers.write(1)

    assert _read(buffers, 1) == dict.fromkeys(("embed", "head"), _bytes(embedding))


def test_a_snapshot_leaves_gradients_alone() -> None:
    weight = nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    buffers = SnapshotBuffers(local_shards({"weight": weight}))
    buffers.write(0)
    loss.backward()

    assert weight.grad.tolist() == [2.0] * 4


def test_a_snapshot_is_of_the_parameter_as_it_is_now() -> None:
    """Trainers put new storage behind a parameter: ``.data =``, ``module.to()``."""
    weight = nn.Parameter(torch.zeros(4))
    buffers = SnapshotBuffers(local_shards({"weight": weight}))
    weight.data = torch.ones(4)
    buffers.write(0)

    assert _read(buffers)["weight"] == _bytes(weight)


@st.composite
def strided_tensors(draw: st.DrawFn) -> torch.Tensor:
    """A view with permuted dimensions, steps and an offset into its storage."""
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    dtype = getattr(torch, draw(st.sampled_from(sorted(ITEMSIZE))))
    steps = [draw(st.integers(1, 2)) for _ in shape]
    starts = [draw(st.integers(0, 2)) for _ in shape]
    rows = list(zip(shape, steps, starts, strict=True))
    whole = _random(*(start + n * step for n, step, start in rows), dtype=dtype)
    cut = tuple(slice(start, start + n * step, step) for n, step, start in rows)
    return whole[cut].permute(draw(st.permutations(range(len(shape)))))


@settings(max_examples=60, deadline=None)
@given(tensors=st.lists(strided_tensors(), min_size=1, max_size=4))
def test_snapshots_of_any_strides_are_row_major(tensors: list[torch.Tensor]) -> None:
    named = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    buffers = SnapshotBuffers(local_shards(named))
    buffers.write(1)

    assert _read(buffers, 1) == {name: _bytes(t) for name, t in named.items()}
    assert _read(buffers, 0) == {name: bytes(t.nbytes) for name, t in named.items()}
    places = [entry.shards[0].byte_offset for entry in buffers.entries]
    assert all(place % ALIGNMENT == 0 for place in places)
    ends = [*places[1:], buffers.regions[0][0].nbytes]
    for tensor, start, end in zip(tensors, places, ends, strict=True):
        assert start + tensor.nbytes <= end
