# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer's tensors as memory that can be registered and read.

Two ways to hold a version: :class:`InPlaceBuffers` are the trainer's own
tensors, which must not change while a version is out; :class:`SnapshotBuffers`
are copies in arenas, one arena per slot, so that the trainer goes on at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dynamo.refit.errors import ManifestInvalid
from dynamo.refit.manifest import Region, Shard, TensorEntry, align


class InPlaceBuffers:
    """The trainer's own tensors: one region per storage they lie in, one slot.

    Args:
        tensors: checkpoint name to contiguous tensor, all on one device.

    Raises:
        ManifestInvalid: a tensor is not contiguous, or is on another device.
    """

    slots = 1

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.device = check_tensors(tensors)
        self._tensors = dict(tensors)
        self._addresses = {name: t.data_ptr() for name, t in tensors.items()}
        storages: dict[int, int] = {}
        regions: list[Region] = []
        self.entries: list[TensorEntry] = []
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            base = storage.data_ptr()
            if base not in storages:
                storages[base] = len(regions)
                regions.append(Region(base, storage.nbytes()))
            offset = tensor.data_ptr() - base
            self.entries.append(_entry(name, tensor, storages[base], offset))
        self.regions = (tuple(regions),)

    def write(self, slot: int) -> None:
        """Nothing to copy; wait until the device has written what it was told to.

        Raises:
            ManifestInvalid: a tensor is not where it was registered any more.
        """
        for name, tensor in self._tensors.items():
            if tensor.data_ptr() != self._addresses[name]:
                raise ManifestInvalid(
                    "its storage was replaced since the publisher was made: write "
                    "into it, or make a new publisher",
                    tensor=name,
                )
        _synchronize(self.device)


class SnapshotBuffers:
    """Copies of the tensors: ``slots`` arenas, each one registered region.

    Args:
        tensors: as for :class:`InPlaceBuffers`, but any strides will do.
        slots: how many versions can be out at a time.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], slots: int = 2) -> None:
        self.device = check_tensors(tensors, contiguous=False)
        self.slots = slots
        self._tensors = list(tensors.values())
        self.entries: list[TensorEntry] = []
        offsets, end = [], 0
        for name, tensor in tensors.items():
            self.entries.append(_entry(name, tensor, 0, end))
            offsets.append(end)
            end += align(tensor.nbytes)
        self._arenas = [
            torch.zeros(end, dtype=torch.uint8, device=self.device)
            for _ in range(slots)
        ]
        self.regions = tuple((Region(a.data_ptr(), end),) for a in self._arenas)
        self._copies = [
            [
                arena[offset : offset + tensor.nbytes]
                .view(tensor.dtype)
                .view(tensor.shape)
                for offset, tensor in zip(offsets, self._tensors, strict=True)
            ]
            for arena in self._arenas
        ]

    @torch.no_grad()
    def write(self, slot: int) -> None:
        """Copy the tensors as they are now into ``slot``; returns when it is done."""
        torch._foreach_copy_(self._copies[slot], self._tensors)
        _synchronize(self.device)


def check_tensors(
    tensors: Mapping[str, torch.Tensor], *, contiguous: bool = True
) -> torch.device:
    """The device all ``tensors`` are on.

    Raises:
        ManifestInvalid: see :class:`InPlaceBuffers`.
    """
    if not tensors:
        raise ManifestInvalid("there are no tensors to publish")
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ManifestInvalid(
                f"on {tensor.device}, the first tensor on {device}: publish from one "
                "device per trainer rank",
                tensor=name,
            )
        if contiguous and not tensor.is_contiguous():
            raise ManifestInvalid(
                "not contiguous: publish with mode='snapshot', or a contiguous copy",
                tensor=name,
            )
    return device


def _entry(name: str, tensor: torch.Tensor, region: int, offset: int) -> TensorEntry:
    shape = tuple(tensor.shape)
    whole = Shard(
        source=0,
        region=region,
        byte_offset=offset,
        offset=(0,) * len(shape),
        shape=shape,
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(name=name, dtype=dtype, shape=shape, shards=(whole,))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
