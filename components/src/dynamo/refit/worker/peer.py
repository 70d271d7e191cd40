# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica as a source: what its ranks hold together, as a trainer would say it.

Another worker reads the manifest, the fingerprints and then the bytes as it does a
trainer's, and proves them against the same fingerprints. Knows who reads and until
when, and nothing of coordinators, epochs or pauses.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dynamo.refit.errors import ManifestInvalid, PeerUnsuitable, SourceLost
from dynamo.refit.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    Shard,
    Source,
    TensorEntry,
)
from dynamo.refit.protocol import (
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    Offered,
    ReleaseLease,
    ServeWeights,
    WeightsServed,
)
from dynamo.refit.worker.ranks import HeldManifest, HeldVersion, Ranks


@dataclass(frozen=True)
class _Served:
    """The manifest of what all ranks hold of a layout, and what it was made of."""

    layout: str
    sources: tuple[Source, ...]
    fingerprint: str
    payload: bytes


@dataclass(frozen=True)
class _Lease:
    """One reader of a version, until ``ends`` (monotonic seconds)."""

    held: HeldVersion
    served: _Served
    ends: float


class PeerSource:
    """Answers readers of what is staged or live on ``ranks``.

    Every ``ServeWeights`` has an announcement of its own, and the version can be read
    until the last one is released or has expired. It cannot be after the version was
    given up, and a reader that is late then finds other bytes than the fingerprints
    say.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._served: _Served | None = None
        self._leases: dict[str, _Lease] = {}
        # Ranks are asked in turn: who comes last must not withdraw what another has
        # just been promised.
        self._turn = asyncio.Lock()

    async def serve(self, request: ServeWeights) -> WeightsServed:
        """Let somebody read a version.

        Raises:
            PeerUnsuitable: it is not held here, or not as it was published.
            RanksFailed: a rank says so.
        """
        async with self._turn:
            held = self._ranks.held(request.version, request.fingerprint)
            ends = time.monotonic() + request.seconds
            try:
                served, slot = await self._offer(held, request.seconds)
            except Exception:
                await self._withdraw_unread(held.version)
                raise
            announcement_id = f"peer-{uuid.uuid4().hex}"
            self._leases[announcement_id] = _Lease(held, served, ends)
        return WeightsServed(
            announcement_id=announcement_id,
            manifest_digest=served.fingerprint,
            slot=slot,
        )

    def manifest(self, request: GetManifest) -> ManifestReply:
        """
        Raises:
            SourceLost: nobody may read it now.
        """
        for lease in self._leases.values():
            if lease.served.fingerprint == request.manifest_digest:
                return ManifestReply(payload=lease.served.payload)
        raise SourceLost(
            f"no manifest {request.manifest_digest[:12]} is served here: ask the "
            "coordinator for a source"
        )

    def fingerprints(self, request: GetFingerprints) -> FingerprintsReply:
        """Those that the version was proven with here.

        Raises:
            SourceLost: the announcement has ended, or the version was given up.
        """
        lease = self._leases.get(request.announcement_id)
        if lease is None or time.monotonic() > lease.ends:
            raise SourceLost(f"announcement {request.announcement_id} has ended here")
        self._ranks.held(lease.held.version, lease.held.fingerprint)
        return FingerprintsReply(payload=lease.held.tensors.astype("<u8").tobytes())

    async def release(self, request: ReleaseLease) -> Done:
        """One reader has ended; one that is not known has ended before."""
        async with self._turn:
            lease = self._leases.pop(request.announcement_id, None)
            if lease is not None:
                await self._withdraw_unread(lease.held.version)
        return Done()

    async def end(self) -> None:
        """Nobody reads here any more: a coordinator that goes on to the next version
        has done with this one, or is another one."""
        async with self._turn:
            versions = {lease.held.version for lease in self._leases.values()}
            self._leases.clear()
            for version in versions:
                await self._ranks.withdraw(version)

    async def _withdraw_unread(self, version: int) -> None:
        """Tell the ranks if the last reader of ``version`` is gone."""
        now = time.monotonic()
        self._leases = {
            n: lease for n, lease in self._leases.items() if now < lease.ends
        }
        if all(lease.held.version != version for lease in self._leases.values()):
            await self._ranks.withdraw(version)

    async def _offer(self, held: HeldVersion, seconds: float) -> tuple[_Served, int]:
        """What others see, made anew only if a layout or an address has changed."""
        layout = held.manifest.layout
        known = self._served is not None and self._served.layout == layout
        offered = await self._ranks.offer(held, seconds, want_blocks=not known)
        slot, sources = as_sources(offered)
        if known and self._served.sources != sources:
            offered = await self._ranks.offer(held, seconds, want_blocks=True)
            slot, sources = as_sources(offered)
            known = False
        if not known:
            # The engine's requests go through this loop, too.
            self._served = await asyncio.to_thread(
                _serve, held.manifest, offered, sources
            )
        return self._served, slot


def as_sources(offered: Sequence[Offered]) -> tuple[int, tuple[Source, ...]]:
    """The slot that the version is in, and a source per rank.

    Ranks take turns with their slots, and one that had to begin again may be a turn
    off. Then its slots are named in another order, which holds for all turns.

    Raises:
        PeerUnsuitable: ranks have different numbers of slots.
    """
    slot, count = offered[0].slot, len(offered[0].source.slots)
    sources = []
    for reply in offered:
        slots = reply.source.slots
        if len(slots) != count:
            raise PeerUnsuitable(
                f"rank {reply.rank} keeps {len(slots)} versions and rank "
                f"{offered[0].rank} keeps {count}: start all ranks with one way of "
                "staging",
                rank=reply.rank,
            )
        turn = reply.slot - slot
        slots = tuple(slots[(number + turn) % count] for number in range(count))
        sources.append(msgspec.structs.replace(reply.source, slots=slots))
    return slot, tuple(sources)


def compose(
    manifest: Manifest, offered: Sequence[Offered], sources: tuple[Source, ...]
) -> Manifest:
    """What all ranks hold of ``manifest``, under its names and in its order.

    Raises:
        PeerUnsuitable: together they do not hold every element once.
    """
    shards: list[list[Shard]] = [[] for _ in manifest.tensors]
    for source, reply in enumerate(offered):
        for block in reply.blocks:
            shards[block.tensor].append(
                Shard(
                    source=source,
                    region=0,
                    byte_offset=block.byte_offset,
                    offset=tuple(start for start, _ in block.box),
                    shape=tuple(stop - start for start, stop in block.box),
                )
            )
    composed = Manifest(
        model=manifest.model,
        tensors=tuple(
            TensorEntry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                shards=tuple(held),
            )
            for tensor, held in zip(manifest.tensors, shards, strict=True)
        ),
        sources=sources,
    )
    try:
        composed.validate()
    except ManifestInvalid as error:
        raise PeerUnsuitable(
            f"the ranks of this replica do not hold the version as it was published "
            f"({error}): read from the trainer",
            tensor=error.tensor,
        ) from error
    return composed


def _serve(
    held: HeldManifest, offered: Sequence[Offered], sources: tuple[Source, ...]
) -> _Served:
    composed = compose(held.manifest, offered, sources)
    payload = msgspec.msgpack.encode(composed)
    if len(payload) > MAX_MANIFEST_BYTES:
        raise PeerUnsuitable(
            f"its manifest would have {len(payload)} bytes, at most "
            f"{MAX_MANIFEST_BYTES} are read: read from the trainer"
        )
    return _Served(
        layout=held.layout,
        sources=sources,
        fingerprint=composed.fingerprint(),
        payload=payload,
    )
