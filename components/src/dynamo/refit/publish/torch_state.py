# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer rank's tensors as memory that can be registered and read.

:func:`local_shards` says which block of which tensor this rank holds. Two ways to
hold a version of them: :class:`InPlaceBuffers` are the trainer's own tensors, which
must not change while a version is out; :class:`SnapshotBuffers` are copies in
arenas, one arena per slot, so that the trainer goes on at once. Both have their
blocks in the order of ``entries``, and of the shards in each entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

# What torch's own checkpoints use; it has no other public way to a shard's offset.
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dynamo.refit import manifest
from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.host_memory import host_zeros
from dynamo.refit.manifest import Region, TensorEntry, align
from dynamo.refit.publish.shard import LocalShard


class InPlaceBuffers:
    """The trainer's own tensors: one region per storage they lie in, one slot.

    Args:
        shards: this rank's blocks, contiguous and all on one device.

    Raises:
        ManifestInvalid: a block is not contiguous, or is on another device, or is of
            another dtype or full shape than the one before it of that name.
    """

    slots = 1

    def __init__(self, shards: Sequence[LocalShard]) -> None:
        self._blocks = _grouped(shards)
        self.device = _device(self._blocks)
        for block in self._blocks:
            if not block.tensor.is_contiguous():
                raise ManifestInvalid(
                    "not contiguous: publish with mode='snapshot', or a contiguous "
                    "copy",
                    tensor=block.name,
                )
        self._addresses = [block.tensor.data_ptr() for block in self._blocks]
        storages: dict[int, int] = {}
        regions: list[Region] = []
        places: list[tuple[int, int]] = []
        for block in self._blocks:
            storage = block.tensor.untyped_storage()
            base = storage.data_ptr()
            if base not in storages:
                storages[base] = len(regions)
                regions.append(Region(base, storage.nbytes()))
            places.append((storages[base], block.tensor.data_ptr() - base))
        self.entries = _entries(self._blocks, places)
        self.regions = (tuple(regions),)

    def views(self, slot: int) -> list[torch.Tensor]:
        """What is read of each block."""
        return [block.tensor.detach() for block in self._blocks]

    def write(self, slot: int) -> None:
        """Nothing to copy; wait until the device has written what it was told to.

        Raises:
            ManifestInvalid: a tensor is not where it was registered any more.
        """
        for block, address in zip(self._blocks, self._addresses, strict=True):
            if _current(block).data_ptr() != address:
                raise ManifestInvalid(
                    "its storage was replaced since the publisher was made: write "
                    "into it, or make a new publisher",
                    tensor=block.name,
                )
        _synchronize(self.device)


class SnapshotBuffers:
    """Copies of the tensors: ``slots`` arenas, each one registered region.

    Args:
        shards: as for :class:`InPlaceBuffers`, but any strides will do.
        slots: how many versions can be out at a time.
    """

    def __init__(self, shards: Sequence[LocalShard], slots: int = 2) -> None:
        self._blocks = _grouped(shards)
        self.device = _device(self._blocks)
        self.slots = slots
        offsets, end = [], 0
        for block in self._blocks:
            offsets.append(end)
            end += align(block.tensor.nbytes)
        self.entries = _entries(self._blocks, [(0, offset) for offset in offsets])
        arenas = [_zeros(end, self.device) for _ in range(slots)]
        self.regions = tuple((Region(arena.data_ptr(), end),) for arena in arenas)
        self._copies = [
            [
                arena[offset : offset + block.tensor.nbytes]
                .view(block.tensor.dtype)
                .view(block.tensor.shape)
                for offset, block in zip(offsets, self._blocks, strict=True)
            ]
            for arena in arenas
        ]

    def views(self, slot: int) -> list[torch.Tensor]:
        """What is read of each block."""
        return self._copies[slot]

    @torch.no_grad()
    def write(self, slot: int) -> None:
        """Copy the tensors as they are now into ``slot``; returns when it is done."""
        now = [_current(block) for block in self._blocks]
        torch._foreach_copy_(self._copies[slot], now)
        _synchronize(self.device)


class NoBuffers:
    """What a rank holds that has nothing to publish, in a job of several ranks."""

    device = torch.device("cpu")
    entries: tuple[TensorEntry, ...] = ()

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.regions: tuple[tuple[Region, ...], ...] = ((),) * slots

    def views(self, slot: int) -> list[torch.Tensor]:
        """Nothing."""
        return []

    def write(self, slot: int) -> None:
        """Nothing to do."""


def local_shards(tensors: Mapping[str, torch.Tensor]) -> list[LocalShard]:
    """The blocks that this rank holds of ``tensors``.

    A plain tensor is a whole one. Of a DTensor (FSDP2's ``fully_shard``, tensor
    parallelism, a mesh of both) it is what this rank has after all of its mesh's
    dimensions, by ``Shard`` on any dimension, even or not, and ``Replicate``; a rank
    that has nothing of it, or is not in its mesh, has no block of it.

    Args:
        tensors: checkpoint (Hugging Face) name to tensor.

    Raises:
        ManifestInvalid: a tensor has a placement that is not a plain block of it.
    """
    shards: list[LocalShard] = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            shape = tuple(tensor.shape)
            shards.append(LocalShard(name, shape, (0,) * len(shape), tensor))
        elif (shard := _dtensor_shard(name, tensor)) is not None:
            shards.append(shard)
    return shards


def _dtensor_shard(name: str, tensor: DTensor) -> LocalShard | None:
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    for placement in tensor.placements:
        if not isinstance(placement, Shard | Replicate | _StridedShard):
            raise ManifestInvalid(
                f"placed as {placement}, which is no block of the tensor: "
                "redistribute() it to Shard or Replicate before publishing",
                tensor=name,
            )
    if mesh.get_coordinate() is None:
        return None
    held, offset = compute_local_shape_and_global_offset(shape, mesh, tensor.placements)
    _require_box(name, tensor, held, offset)
    with torch.no_grad():
        local = tensor.to_local()
    if tuple(local.shape) != tuple(held):
        raise ManifestInvalid(
            f"holds {tuple(local.shape)} where {tuple(held)} are expected from "
            f"{tensor.placements}: publish the parameter, not a padded copy",
            tensor=name,
        )
    if local.numel() == 0 and tensor.numel() > 0:
        return None
    return LocalShard(name, shape, tuple(offset), local, owner=tensor)


def _require_box(
    name: str, tensor: DTensor, held: Sequence[int], offset: Sequence[int]
) -> None:
    """Refuse strided shards whose elements do not lie side by side.

    FSDP over tensor parallelism on one dimension is written as a strided shard, and
    is one block where the sizes divide.
    """
    for placement in tensor.placements:
        if not isinstance(placement, _StridedShard):
            continue
        dim = placement.dim
        places = _places(tensor, dim)
        block = torch.arange(offset[dim], offset[dim] + held[dim])
        if held[dim] and not torch.equal(places, block):
            raise ManifestInvalid(
                f"placed as {tensor.placements} on a mesh of "
                f"{tuple(tensor.device_mesh.shape)}, this rank's part of dimension "
                f"{dim} is not one block: redistribute() it to Shard or Replicate "
                "before publishing",
                tensor=name,
            )


def _places(tensor: DTensor, dim: int) -> torch.Tensor:
    """Where this rank's elements of dimension ``dim`` are in the full tensor.

    Each mesh dimension cuts what the one before it left into ``split_factor`` runs
    and takes a share of every run. Source: ``_StridedShard`` in torch 2.13.
    """
    places = torch.arange(tensor.shape[dim])
    coordinate = tensor.device_mesh.get_coordinate()
    for mesh_dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate) or placement.dim != dim:
            continue
        ranks, rank = tensor.device_mesh.size(mesh_dim), coordinate[mesh_dim]
        factor = getattr(placement, "split_factor", 1)
        shares = [run.chunk(ranks) for run in places.chunk(factor)]
        places = torch.cat([s[rank] for s in shares if rank < len(s)] or [places[:0]])
    return places


def _grouped(shards: Iterable[LocalShard]) -> list[LocalShard]:
    """The blocks with those of one name side by side, in the order of the names."""
    names: dict[str, list[LocalShard]] = {}
    for shard in shards:
        names.setdefault(shard.name, []).append(shard)
    for name, (first, *others) in names.items():
        for other in others:
            if (other.shape, other.tensor.dtype) != (first.shape, first.tensor.dtype):
                raise ManifestInvalid(
                    f"one block is of {first.tensor.dtype} {first.shape}, another of "
                    f"{other.tensor.dtype} {other.shape}",
                    tensor=name,
                )
    return [block for blocks in names.values() for block in blocks]


def _device(blocks: Sequence[LocalShard]) -> torch.device:
    """The device all ``blocks`` are on."""
    if not blocks:
        raise ManifestInvalid("there are no tensors to publish")
    device = blocks[0].tensor.device
    for block in blocks:
        if block.tensor.device != device:
            raise ManifestInvalid(
                f"on {block.tensor.device}, the first tensor on {device}: publish "
                "from one device per trainer rank",
                tensor=block.name,
            )
    return device


def _zeros(nbytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return host_zeros(nbytes)
    buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    # Another stream may be the first that writes.
    _synchronize(device)
    return buffer


def _current(block: LocalShard) -> torch.Tensor:
    """The block as it is now; it must still have the shape that was published."""
    tensor = block.current()
    if tensor.shape != block.tensor.shape:
        raise ManifestInvalid(
            f"had {tuple(block.tensor.shape)} when the publisher was made and has "
            f"{tuple(tensor.shape)} now: make a new publisher",
            tensor=block.name,
        )
    return tensor


def _entries(
    blocks: Sequence[LocalShard], places: Sequence[tuple[int, int]]
) -> tuple[TensorEntry, ...]:
    """An entry per name; ``places`` has each block's region and offset in bytes."""
    names: dict[str, list[manifest.Shard]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for block, (region, offset) in zip(blocks, places, strict=True):
        shard = manifest.Shard(
            source=0,
            region=region,
            byte_offset=offset,
            offset=block.offset,
            shape=tuple(block.tensor.shape),
        )
        names.setdefault(block.name, []).append(shard)
        dtype = str(block.tensor.dtype).removeprefix("torch.")
        kinds[block.name] = (dtype, block.shape)
    return tuple(
        TensorEntry(name=name, dtype=dtype, shape=shape, shards=tuple(names[name]))
        for name, (dtype, shape) in kinds.items()
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
