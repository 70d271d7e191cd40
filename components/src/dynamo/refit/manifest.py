# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a weight version is: tensors, the shards they lie in, and where to read them.

A manifest describes a *layout* and the *addresses* of it, not one version: a
publisher that writes each version into the same buffers keeps its manifest, and
a version is then a ``slot`` of it. Pure data: no torch, no NIXL.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np

from dynamo.refit.errors import ManifestInvalid

#: Bytes per element of the dtypes that weights are published in (torch's names).
ITEMSIZE = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

#: Tensors start at multiples of this in an arena, the publisher's and the ranks': a
#: cache line pair, and what CUDA's vectorised copies like.
ALIGNMENT = 256

#: The largest models have some ten thousands of tensors (one per expert); a manifest
#: beyond these bounds is a mistake, and is refused before it costs memory.
MAX_TENSORS = 200_000
MAX_MANIFEST_BYTES = 64 << 20

#: Addresses are below this: they are computed with as signed numbers.
MAX_ADDRESS = 1 << 63

#: Different blocks of one tensor: each one is compared with each other.
MAX_BOXES = 4096

Box = tuple[tuple[int, int], ...]


def align(nbytes: int) -> int:
    """``nbytes``, up to the next multiple of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A registered range of a source's memory: ``nbytes`` from ``address``."""

    address: int
    nbytes: int


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One NIXL agent that serves shards.

    ``metadata`` is the agent's NIXL metadata. ``slots[s][r]`` is region ``r`` of
    slot ``s``; every slot has the same regions with the same sizes, so that a
    shard is addressed alike in all of them.
    """

    agent: str
    metadata: bytes
    memory: Literal["DRAM", "VRAM"]
    device: int
    slots: tuple[tuple[Region, ...], ...]


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """A row-major block of a tensor: ``shape`` elements from ``offset`` on.

    It lies contiguously at ``byte_offset`` of region ``region`` of source
    number ``source``.
    """

    source: int
    region: int
    byte_offset: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        """Per dimension ``(start, stop)`` in the full tensor's coordinates."""
        return tuple((o, o + s) for o, s in zip(self.offset, self.shape, strict=True))


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A full tensor under its checkpoint (Hugging Face) name, and its shards."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]


def image_prefix(rank: int) -> str:
    """What the names of ``rank``'s tensors begin with in a manifest of images."""
    return f"rank {rank}: "


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Every tensor of a model, where its shards lie, and who serves them.

    With ``layouts`` it is one of *images*: not of what was published, but of what the
    ranks of a replica compute with, for the same ranks of other replicas. Source
    number ``n`` is rank ``n``, its tensors have the model's own names after
    :func:`image_prefix`, and ``layouts[n]`` is the fingerprint of their form.
    """

    model: str
    # More of them are refused before the first one is decoded.
    tensors: Annotated[tuple[TensorEntry, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    sources: tuple[Source, ...]
    layouts: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """How many versions the sources can hold at a time."""
        return len(self.sources[0].slots)

    @property
    def nbytes(self) -> int:
        """Bytes of one version, each tensor counted once."""
        return sum(math.prod(t.shape) * ITEMSIZE[t.dtype] for t in self.tensors)

    def layout_fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes, shard boxes and the form of images: what
        a plan rests on."""
        layout = [
            (
                t.name,
                t.dtype,
                t.shape,
                [(s.source, s.offset, s.shape) for s in t.shards],
            )
            for t in self.tensors
        ]
        return _digest([self.model, layout, self.layouts])

    def fingerprint(self) -> str:
        """SHA-256 over the whole manifest: the layout, the agents and the addresses."""
        return _digest(self)

    def shard_addresses(self, slot: int) -> list[int]:
        """The address of every shard in ``slot``, tensor by tensor, shard by shard."""
        return [
            self.sources[shard.source].slots[slot][shard.region].address
            + shard.byte_offset
            for tensor in self.tensors
            for shard in tensor.shards
        ]

    def validate(self) -> None:
        """Refuse a manifest that does not hold every element exactly once.

        Raises:
            ManifestInvalid: names the tensor and what is wrong with it.
        """
        if not self.tensors or not self.sources:
            raise ManifestInvalid("a manifest needs at least one tensor and one source")
        if len(self.tensors) > MAX_TENSORS:
            raise ManifestInvalid(
                f"{len(self.tensors)} tensors, at most {MAX_TENSORS} are read"
            )
        for source in self.sources:
            _check_slots(source, self.slots)
        seen: set[str] = set()
        for tensor in self.tensors:
            if tensor.name in seen:
                raise ManifestInvalid("the name occurs twice", tensor=tensor.name)
            seen.add(tensor.name)
            if tensor.dtype not in ITEMSIZE:
                raise ManifestInvalid(
                    f"dtype {tensor.dtype!r} is not one of {sorted(ITEMSIZE)}",
                    tensor=tensor.name,
                )
            nbytes = math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
            if max(nbytes, *tensor.shape, 0) >= MAX_ADDRESS:
                raise ManifestInvalid(
                    f"shape {tensor.shape} is more than can be addressed",
                    tensor=tensor.name,
                )
            for shard in tensor.shards:
                _check_shard(tensor, shard, self.sources)
            _check_cover(tensor)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as :func:`decode_manifest` reads it.

    Raises:
        ManifestInvalid: it is larger than what is read.
    """
    payload = msgspec.msgpack.encode(manifest)
    if len(payload) > MAX_MANIFEST_BYTES:
        shards = sum(len(tensor.shards) for tensor in manifest.tensors)
        raise ManifestInvalid(
            f"the manifest of {len(manifest.tensors)} tensors in {shards} blocks has "
            f"{len(payload)} bytes, and workers read at most {MAX_MANIFEST_BYTES}: "
            "publish larger blocks, or each block from fewer ranks"
        )
    return payload


def decode_manifest(payload: bytes) -> Manifest:
    """The manifest that a trainer sent, not validated yet.

    Raises:
        ManifestInvalid: it is too large, or no manifest at all.
    """
    if len(payload) > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(
            f"it has {len(payload)} bytes, at most {MAX_MANIFEST_BYTES} are read"
        )
    try:
        return msgspec.msgpack.decode(payload, type=Manifest)
    # Text that is not UTF-8 is a ValueError of its own.
    except (msgspec.DecodeError, ValueError) as error:
        raise ManifestInvalid(
            f"its {len(payload)} bytes cannot be decoded ({error}): trainer and worker "
            "must run the same release"
        ) from error


@dataclass(frozen=True)
class CheckedManifest:
    """A ``manifest`` that was decoded and found valid, its ``digest`` and its
    ``layout`` fingerprint: the agent and each rank find all that out once."""

    digest: str
    layout: str
    manifest: Manifest


def check_manifest(payload: bytes, digest: str) -> CheckedManifest:
    """Decode the manifest with this ``digest``; a second or more if it is large.

    Raises:
        ManifestInvalid: it is another one, or not valid.
    """
    manifest = decode_manifest(payload)
    if manifest.fingerprint() != digest:
        raise ManifestInvalid(
            "it is not the one that was announced: the trainer has another one now, "
            "or runs another release"
        )
    manifest.validate()
    return CheckedManifest(digest, manifest.layout_fingerprint(), manifest)


def _digest(data: object) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(data)).hexdigest()


def _check_slots(source: Source, slots: int) -> None:
    if len(source.slots) != slots or slots == 0:
        raise ManifestInvalid(
            f"source {source.agent!r} has {len(source.slots)} slots, the first one "
            f"{slots}"
        )
    sizes = [[region.nbytes for region in regions] for regions in source.slots]
    if any(row != sizes[0] for row in sizes):
        raise ManifestInvalid(f"source {source.agent!r}: its slots differ in size")
    for region in (region for regions in source.slots for region in regions):
        if not 0 <= region.address <= region.address + region.nbytes < MAX_ADDRESS:
            raise ManifestInvalid(
                f"source {source.agent!r}: {region.nbytes} bytes from address "
                f"{region.address:#x} are no memory"
            )


def _check_shard(tensor: TensorEntry, shard: Shard, sources: tuple) -> None:
    rank = len(tensor.shape)
    if len(shard.offset) != rank or len(shard.shape) != rank:
        raise ManifestInvalid(
            f"a shard of {len(shard.shape)} dimensions in a tensor of {rank}",
            tensor=tensor.name,
        )
    inside = all(
        0 <= start < stop <= size
        for (start, stop), size in zip(shard.box, tensor.shape, strict=True)
    )
    if not inside:
        raise ManifestInvalid(
            f"the shard {shard.box} is empty or reaches out of {tensor.shape}",
            tensor=tensor.name,
        )
    if not 0 <= shard.source < len(sources):
        raise ManifestInvalid(f"no source number {shard.source}", tensor=tensor.name)
    regions = sources[shard.source].slots[0]
    if not 0 <= shard.region < len(regions):
        raise ManifestInvalid(f"no region number {shard.region}", tensor=tensor.name)
    end = shard.byte_offset + math.prod(shard.shape) * ITEMSIZE[tensor.dtype]
    if shard.byte_offset < 0 or end > regions[shard.region].nbytes:
        raise ManifestInvalid(
            f"the shard's bytes [{shard.byte_offset}, {end}) are outside its "
            f"registered region of {regions[shard.region].nbytes} bytes",
            tensor=tensor.name,
        )


def _check_cover(tensor: TensorEntry) -> None:
    """Equal boxes are replicas; all others must be disjoint and leave no gap."""
    boxes = list(dict.fromkeys(shard.box for shard in tensor.shards))
    if len(boxes) > MAX_BOXES:
        raise ManifestInvalid(
            f"it lies in {len(boxes)} different shards, at most {MAX_BOXES} are read: "
            "publish larger blocks",
            tensor=tensor.name,
        )
    fault = tiling_fault(tensor.shape, boxes)
    if fault is not None:
        raise ManifestInvalid(f"its shards {fault}", tensor=tensor.name)


def tiling_fault(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What keeps ``boxes``, all different, from tiling ``shape``: an overlap or a gap.

    They must lie inside; ``None`` if they tile it.
    """
    if len(boxes) > 1 and shape:
        starts, stops = np.array(boxes, dtype=np.int64).transpose(2, 0, 1)
        meet = np.ones((len(boxes), len(boxes)), dtype=bool)
        for dim in range(len(shape)):
            meet &= starts[:, None, dim] < stops[None, :, dim]
        pairs = np.argwhere(np.triu(meet & meet.T, k=1))
        if len(pairs):
            first, second = pairs[0]
            return f"{boxes[first]} and {boxes[second]} overlap"
    held = sum(math.prod(stop - start for start, stop in box) for box in boxes)
    if held != math.prod(shape):
        return f"hold {held} of {math.prod(shape)} elements"
    return None
