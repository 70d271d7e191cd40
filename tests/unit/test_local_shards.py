# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""DTensors as blocks: what the ranks of a mesh say they hold is the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.publish.merge import RankPart, merge
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.publish.torch_state import (
    InPlaceBuffers,
    NoBuffers,
    SnapshotBuffers,
    local_shards,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

R, S0, S1 = Replicate(), Shard(0), Shard(1)


@contextmanager
def being(rank: int, world_size: int) -> Iterator[None]:
    """One rank of a job whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def held_by_each(
    mesh: tuple[int, ...], make: Callable[[], dict[str, torch.Tensor]]
) -> dict[int, list[LocalShard]]:
    """What every rank of ``mesh`` holds of the tensors that it makes."""
    held = {}
    for rank in range(math.prod(mesh)):
        with being(rank, math.prod(mesh)):
            held[rank] = local_shards(make())
    return held


def merged(held: dict[int, list[LocalShard]]) -> Manifest:
    """The manifest of all ranks; they must tile every tensor."""
    parts = {}
    for rank, shards in held.items():
        buffers = SnapshotBuffers(shards) if shards else NoBuffers(2)
        source = Source(
            agent=f"rank {rank}",
            metadata=b"",
            memory="DRAM",
            device=0,
            slots=buffers.regions,
        )
        parts[rank] = RankPart(
            model="tiny",
            mode="snapshot",
            slots=2,
            tensors=tuple(buffers.entries),
            source=source if shards else None,
        )
    return merge(parts).manifest


def assert_parts_of(full: torch.Tensor, held: dict[int, list[LocalShard]]) -> None:
    for shards in held.values():
        for shard in shards:
            cut = tuple(slice(*side) for side in shard.box)
            assert torch.equal(shard.current(), full[cut])
    (entry,) = merged(held).tensors
    assert entry.shape == tuple(full.shape)


@pytest.mark.parametrize(
    ("mesh", "placements", "shape"),
    [
        ((3,), (S0,), (7, 4)),
        ((3,), (S0,), (4, 5)),  # the last rank's part is empty: 2, 2, 0
        ((4,), (S0,), (1,)),
        ((2,), (S1,), (3, 5)),
        ((2,), (R,), ()),
        ((2, 2), (R, S0), (5, 4)),
        ((2, 2), (S0, R), (5, 4)),
        ((2, 2), (S0, S1), (5, 7)),
        ((2, 2), (S1, S0), (3, 3)),
        ((2, 2), (S0, S0), (7, 2)),  # the first rank's half in two, then the second's
        ((2, 3), (S1, S1), (2, 11)),
        ((2, 2), (R, R), (3, 3)),
        ((2, 2), (_StridedShard(0, split_factor=2), S0), (8, 3)),
        ((2, 2), (_StridedShard(0, split_factor=2), S1), (1, 4)),
        ((2, 2, 2), (R, S1, S0), (5, 7)),
    ],
)
def test_every_placement_that_is_a_block(
    mesh: tuple[int, ...], placements: tuple[Placement, ...], shape: tuple[int, ...]
) -> None:
    """Compared with what torch itself gives to each rank of the full tensor."""
    full = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)

    def make() -> dict[str, torch.Tensor]:
        device_mesh = init_device_mesh("cpu", mesh)
        return {
            "w": distribute_tensor(full, device_mesh, placements, src_data_rank=None)
        }

    assert_parts_of(full, held_by_each(mesh, make))


def test_a_strided_part_that_is_not_one_block_is_refused() -> None:
    """Without the tensor-parallel dimension after it, each rank has rows apart."""
    full = torch.arange(8.0).reshape(8, 1)
    with being(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        placements = (_StridedShard(0, split_factor=2),)
        weight = distribute_tensor(full, mesh, placements, src_data_rank=None)
        assert weight.to_local().flatten().tolist() == [0, 1, 4, 5]
        with pytest.raises(ManifestInvalid, match="is not one block") as caught:
            local_shards({"good": torch.zeros(2), "w": weight})
    assert caught.value.tensor == "w"
    assert "redistribute()" in str(caught.value)


def test_a_partial_sum_is_refused() -> None:
    with being(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        weight = DTensor.from_local(torch.ones(2), mesh, (Partial(),))
        with pytest.raises(ManifestInvalid, match="no block of the tensor") as caught:
            local_shards({"w": weight})
    assert caught.value.tensor == "w"


def test_a_rank_outside_of_the_mesh_has_nothing() -> None:
    with being(2, 3):
        mesh = dist.DeviceMesh("cpu", [0, 1])
        weight = DTensor.from_local(torch.ones(2), mesh, (R,), run_check=False)
        assert local_shards({"w": weight}) == []


def test_a_snapshot_follows_a_parameter_to_new_storage() -> None:
    """FSDP2 moves shards that were loaded, at the first forward pass."""
    with being(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(torch.zeros(3, 2), mesh, (S0,), src_data_rank=None)
        snapshot = SnapshotBuffers(local_shards({"w": weight}))
        in_place = InPlaceBuffers(local_shards({"w": weight}))
        weight._local_tensor = torch.ones(1, 2)
        snapshot.write(0)
        assert snapshot.views(0)[0].tolist() == [[1, 1]]
        with pytest.raises(ManifestInvalid, match="storage was replaced"):
            in_place.write(0)
        weight._local_tensor = torch.ones(2, 2)
        with pytest.raises(ManifestInvalid, match=r"had \(1, 2\) .* has \(2, 2\) now"):
            snapshot.write(0)


def test_blocks_of_one_name_are_one_tensor() -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    shards = [
        LocalShard("q", (4, 2), (0, 0), fused[0:2]),
        LocalShard("k", (2, 2), (0, 0), fused[2:4]),
        LocalShard("q", (4, 2), (2, 0), fused[4:6]),
    ]
    for buffers in (InPlaceBuffers(shards), SnapshotBuffers(shards)):
        buffers.write(0)
        assert [entry.name for entry in buffers.entries] == ["q", "k"]
        assert [len(entry.shards) for entry in buffers.entries] == [2, 1]
        firsts = [view.flatten()[0].item() for view in buffers.views(0)]
        assert firsts == [0, 8, 4]


def test_blocks_of_one_name_must_be_alike() -> None:
    shards = [
        LocalShard("q", (4,), (0,), torch.zeros(2)),
        LocalShard("q", (4,), (2,), torch.zeros(2, dtype=torch.float16)),
    ]
    with pytest.raises(ManifestInvalid, match=r"another of torch\.float16") as caught:
        SnapshotBuffers(shards)
    assert caught.value.tensor == "q"
