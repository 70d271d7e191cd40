# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One manifest, and one fingerprint per tensor, from what each trainer rank has.

Pure data in and out. A source per rank that holds anything; equal boxes of different
ranks are replicas, and the different ones must make each tensor up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from dynamo.refit.errors import FingerprintMismatch, ManifestInvalid
from dynamo.refit.manifest import (
    Box,
    Manifest,
    Shard,
    Source,
    TensorEntry,
    encode_manifest,
)

#: Ranks that an error lists with what they hold.
LISTED_RANKS = 8


class RankPart(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one trainer rank of ``world_size`` holds; its shards' ``source`` is 0.

    ``source`` is ``None`` for a rank that holds nothing.
    """

    model: str
    mode: str
    slots: int
    tensors: tuple[TensorEntry, ...]
    source: Source | None
    world_size: int = 1

    @property
    def blocks(self) -> int:
        """How many blocks it holds, and so fingerprints it reports."""
        return sum(len(tensor.shards) for tensor in self.tensors)


@dataclass(frozen=True)
class Merged:
    """The manifest of all ranks, and which block of which rank is which box of it.
    ``encoded`` is the manifest as workers get it.

    Boxes are numbered over all tensors; ``boxes_of_rank`` has the box of every block
    of a rank, in its part's order, ``tensor_of_box`` the number of its tensor.
    """

    manifest: Manifest
    encoded: bytes
    boxes_of_rank: Mapping[int, np.ndarray]
    tensor_of_box: np.ndarray

    def add_up(self, written: Mapping[int, np.ndarray]) -> np.ndarray:
        """The fingerprint of each tensor (uint64, the manifest's order).

        Args:
            written: per rank the fingerprint of each block of its part.

        Raises:
            FingerprintMismatch: two ranks hold different bytes of the same box.
        """
        values = np.zeros(len(self.tensor_of_box), dtype=np.uint64)
        holder = np.full(len(self.tensor_of_box), -1)
        for rank, fingerprints in sorted(written.items()):
            boxes = self.boxes_of_rank[rank]
            new = holder[boxes] < 0
            values[boxes[new]] = fingerprints[new]
            holder[boxes[new]] = rank
            differ = np.flatnonzero(values[boxes] != fingerprints)
            if len(differ):
                self._refuse(int(boxes[differ[0]]), int(holder[boxes[differ[0]]]), rank)
        totals = np.zeros(len(self.manifest.tensors), dtype=np.uint64)
        np.add.at(totals, self.tensor_of_box, values)
        return totals

    def _refuse(self, box: int, first: int, second: int) -> None:
        name = self.manifest.tensors[self.tensor_of_box[box]].name
        raise FingerprintMismatch(
            f"trainer ranks {first} and {second} hold different bytes of the same "
            f"block of {name!r}: their replicas have diverged, so nothing is announced",
            tensor=name,
            rank=second,
        )


def merge(parts: Mapping[int, RankPart]) -> Merged:
    """The manifest that the ranks' ``parts`` make up.

    Raises:
        ManifestInvalid: the ranks disagree, overlap or leave a gap; it names the
            tensor and the rank. Or they hold more blocks than a manifest can list.
    """
    sources: list[Source] = []
    kinds: dict[str, tuple[str, tuple[int, ...], int]] = {}
    shards: dict[str, list[Shard]] = {}
    numbers: dict[tuple[str, Box], int] = {}
    boxes_of_rank: dict[int, np.ndarray] = {}
    for rank, part in sorted(parts.items()):
        _check_settings(parts, rank)
        boxes = []
        for tensor in part.tensors:
            _check_kind(kinds, tensor, rank)
            for shard in tensor.shards:
                shard = msgspec.structs.replace(shard, source=len(sources))
                shards.setdefault(tensor.name, []).append(shard)
                key = (tensor.name, shard.box)
                boxes.append(numbers.setdefault(key, len(numbers)))
        boxes_of_rank[rank] = np.array(boxes, dtype=np.int64)
        if part.source is not None:
            sources.append(part.source)
    manifest = Manifest(
        model=next(iter(parts.values())).model,
        tensors=tuple(
            TensorEntry(name=name, dtype=dtype, shape=shape, shards=tuple(shards[name]))
            for name, (dtype, shape, _) in kinds.items()
        ),
        sources=tuple(sources),
    )
    _validate(manifest, parts)
    order = {name: number for number, name in enumerate(kinds)}
    tensor_of_box = np.array([order[name] for name, _ in numbers], dtype=np.int64)
    encoded = encode_manifest(manifest)
    return Merged(manifest, encoded, boxes_of_rank, tensor_of_box)


def _check_settings(parts: Mapping[int, RankPart], rank: int) -> None:
    first = min(parts)
    for setting in ("model", "mode", "slots"):
        mine, theirs = getattr(parts[rank], setting), getattr(parts[first], setting)
        if mine != theirs:
            raise ManifestInvalid(
                f"{setting} is {mine!r} on trainer rank {rank} and {theirs!r} on rank "
                f"{first}: make the publishers alike on all ranks",
                rank=rank,
            )


def _check_kind(
    kinds: dict[str, tuple[str, tuple[int, ...], int]], tensor: TensorEntry, rank: int
) -> None:
    kind = (tensor.dtype, tensor.shape, rank)
    dtype, shape, first = kinds.setdefault(tensor.name, kind)
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ManifestInvalid(
            f"{tensor.dtype} {tensor.shape} on trainer rank {rank}, {dtype} {shape} on "
            f"rank {first}",
            tensor=tensor.name,
            rank=rank,
        )


def _validate(manifest: Manifest, parts: Mapping[int, RankPart]) -> None:
    """As :meth:`Manifest.validate`, and the error says which rank holds what."""
    try:
        manifest.validate()
    except ManifestInvalid as error:
        if error.tensor is None or len(parts) == 1:
            raise
        held = _held(parts, error.tensor)
        rank = _first_overlap(held)
        listed = "; ".join(
            f"rank {r} holds {', '.join(map(str, boxes))}"
            for r, boxes in list(held.items())[:LISTED_RANKS]
        )
        more = len(held) - LISTED_RANKS
        raise ManifestInvalid(
            f"{error} ({listed}{f'; and {more} ranks more' if more > 0 else ''})",
            tensor=error.tensor,
            rank=rank if rank is not None else max(held),
        ) from error


def _held(parts: Mapping[int, RankPart], name: str) -> dict[int, list[Box]]:
    held: dict[int, list[Box]] = {}
    for rank, part in sorted(parts.items()):
        for tensor in part.tensors:
            if tensor.name == name:
                held[rank] = [shard.box for shard in tensor.shards]
    return held


def _first_overlap(held: Mapping[int, list[Box]]) -> int | None:
    """The first rank with a box that meets another one, and is not a replica of it."""
    seen: list[Box] = []
    for rank, boxes in held.items():
        for box in boxes:
            for other in seen:
                pairs = zip(box, other, strict=False)
                meet = all(a < d and c < b for (a, b), (c, d) in pairs)
                if meet and box != other:
                    return rank
            seen.append(box)
    return None
