# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Do the parts that all ranks hold make up the version that was announced?

Built once per layout from what every rank reads; after that a check is a few array
operations, whatever the number of tensors. Pure: numpy and data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynamo.refit.errors import FingerprintMismatch, LayoutRefused
from dynamo.refit.manifest import Box, Manifest, tiling_fault

#: What a rank reads, in the order of its parts: a tensor's number, and a box of it.
Reads = Sequence[tuple[int, Box]]


class Proof:
    """Which parts of which ranks make up which tensor.

    Args:
        manifest: names the tensors.
        reads: what each rank reads, rank by rank. Ranks that read the same box
            (replicated tensors) must come to the same part of its fingerprint.

    Raises:
        LayoutRefused: all ranks together do not read a tensor exactly once: it is
            not part of the served model, or has another shape there.
    """

    def __init__(self, manifest: Manifest, reads: Sequence[Reads]) -> None:
        self._names = [tensor.name for tensor in manifest.tensors]
        blocks: dict[tuple[int, Box], int] = {}
        self._block_of = [
            np.array([blocks.setdefault(read, len(blocks)) for read in rank], np.int64)
            for rank in reads
        ]
        self._tensor_of = np.array([tensor for tensor, _ in blocks], dtype=np.int64)
        boxes: list[list[Box]] = [[] for _ in manifest.tensors]
        for tensor, box in blocks:
            boxes[tensor].append(box)
        for tensor, read in zip(manifest.tensors, boxes, strict=True):
            _check_read_once(tensor.name, tensor.shape, read)

    def check(self, published: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """Compare what ranks hold with what was published.

        Args:
            published: one fingerprint per tensor, uint64, in the manifest's order.
            parts: per rank one part per read, uint64.

        Raises:
            FingerprintMismatch: names the tensor, and the rank where it is known.
        """
        held = np.zeros(len(self._tensor_of), dtype=np.uint64)
        for block_of, rank_parts in zip(self._block_of, parts, strict=True):
            held[block_of] = rank_parts
        sums = np.zeros(len(self._names), dtype=np.uint64)
        np.add.at(sums, self._tensor_of, held)
        wrong = np.flatnonzero(sums != published)
        if len(wrong):
            readers = self._readers(wrong[0])
            raise FingerprintMismatch(
                f"the staged bytes of {len(wrong)} tensors are not the published ones "
                f"(this one is read by ranks {readers}): the trainer wrote into the "
                "version while it was read, or a transfer was corrupted",
                tensor=self._names[wrong[0]],
                rank=readers[0] if len(readers) == 1 else None,
            )
        # What was held last of each block is right now: any other is not.
        for rank, block_of in enumerate(self._block_of):
            wrong = np.flatnonzero(held[block_of] != parts[rank])
            if len(wrong):
                tensor = self._tensor_of[block_of[wrong[0]]]
                raise FingerprintMismatch(
                    f"ranks hold different bytes of {len(wrong)} blocks that they both "
                    "read: a source's replicas differ, or a transfer was corrupted",
                    tensor=self._names[tensor],
                    rank=rank,
                )

    def _readers(self, tensor: int) -> list[int]:
        return [
            rank
            for rank, block_of in enumerate(self._block_of)
            if (self._tensor_of[block_of] == tensor).any()
        ]


def _check_read_once(name: str, shape: tuple[int, ...], read: list[Box]) -> None:
    if not read:
        raise LayoutRefused(
            "the engine's loader does not read this tensor: it is not part of the "
            "served model",
            tensor=name,
        )
    fault = tiling_fault(shape, read)
    if fault is not None:
        raise LayoutRefused(
            f"published with shape {shape}, but what all ranks read of it does not "
            f"make it up (the blocks {fault}): it has another shape in the served "
            "model",
            tensor=name,
        )
