# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Manifests with one thing wrong, made from a good one; and processes of sources that
can be stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from dynamo.refit.manifest import Manifest, Region, Shard, TensorEntry
from tests.support.raw_sources import RawSources

Spoil = Callable[[Manifest], Manifest]


def entry(manifest: Manifest, name: str) -> TensorEntry:
    return next(tensor for tensor in manifest.tensors if tensor.name == name)


def with_tensor(manifest: Manifest, name: str, **changes: Any) -> Manifest:
    """``manifest`` with fields of one tensor replaced."""
    changed = msgspec.structs.replace(entry(manifest, name), **changes)
    return msgspec.structs.replace(
        manifest,
        tensors=tuple(changed if t.name == name else t for t in manifest.tensors),
    )


def without_tensor(manifest: Manifest, name: str) -> Manifest:
    tensors = tuple(t for t in manifest.tensors if t.name != name)
    return msgspec.structs.replace(manifest, tensors=tensors)


def and_tensor(manifest: Manifest, tensor: TensorEntry) -> Manifest:
    return msgspec.structs.replace(manifest, tensors=(*manifest.tensors, tensor))


def with_shards(
    manifest: Manifest, name: str, *boxes: tuple[Sequence[int], Sequence[int]]
) -> Manifest:
    """One tensor lies in ``(offset, shape)`` shards at the start of source 0."""
    shards = (shard_at(0, offset, shape) for offset, shape in boxes)
    return with_tensor(manifest, name, shards=tuple(shards))


def with_shape(manifest: Manifest, name: str, shape: Sequence[int]) -> Manifest:
    """One tensor has another shape, in one shard at the start of source 0."""
    spoiled = with_tensor(manifest, name, shape=tuple(shape))
    return with_shards(spoiled, name, ((0,) * len(shape), shape))


def shard_at(byte_offset: int, offset: Sequence[int], shape: Sequence[int]) -> Shard:
    return Shard(
        source=0,
        region=0,
        byte_offset=byte_offset,
        offset=tuple(offset),
        shape=tuple(shape),
    )


def with_regions(manifest: Manifest, move: Callable[[Region], Region]) -> Manifest:
    """Every region of every source is said to be where ``move`` puts it."""
    sources = []
    for source in manifest.sources:
        slots = tuple(tuple(map(move, regions)) for regions in source.slots)
        sources.append(msgspec.structs.replace(source, slots=slots))
    return msgspec.structs.replace(manifest, sources=tuple(sources))


def moved(nbytes: int) -> Callable[[Region], Region]:
    return lambda region: Region(region.address + nbytes, region.nbytes)


def with_metadata(manifest: Manifest, metadata: bytes) -> Manifest:
    sources = tuple(
        msgspec.structs.replace(source, metadata=metadata)
        for source in manifest.sources
    )
    return msgspec.structs.replace(manifest, sources=sources)


def repeated_tensor(tensor: TensorEntry, count: int) -> bytes:
    """An encoded manifest of ``count`` times the same tensor, made without the
    tensors."""
    head, tail = msgspec.msgpack.encode(
        Manifest(model="huge", tensors=(), sources=())
    ).split(msgspec.msgpack.encode("tensors") + b"\x90")
    array = b"\xdd" + count.to_bytes(4, "big")
    body = msgspec.msgpack.encode(tensor) * count
    return b"".join([head, msgspec.msgpack.encode("tensors"), array, body, tail])


class StoppableSources(RawSources):
    """Source processes that can be stopped in their tracks, and go on."""

    def stop(self, number: int) -> None:
        os.kill(self._children[number].process.pid, signal.SIGSTOP)

    def resume(self, number: int) -> None:
        os.kill(self._children[number].process.pid, signal.SIGCONT)

    def recover(self) -> None:
        """All of them run again; those that were killed hold nothing."""
        for number, child in enumerate(self._children):
            if child.process.poll() is None:
                self.resume(number)
            else:
                self.restart(number)

    def close(self) -> None:
        self.recover()
        super().close()
