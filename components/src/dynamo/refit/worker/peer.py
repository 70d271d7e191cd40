# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A replica as a source: its ranks' images, offered as a trainer offers its tensors.

Another worker reads the manifest, the fingerprints and then the bytes as it does a
trainer's. Knows who reads and until when, and nothing of coordinators, epochs or
pauses.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from dynamo.refit.errors import ManifestInvalid, PeerUnsuitable, SourceLost
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.manifest import (
    Manifest,
    Shard,
    Source,
    TensorEntry,
    encode_manifest,
    image_prefix,
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
from dynamo.refit.worker.ranks import HeldVersion, Ranks


@dataclass(frozen=True)
class _Lease:
    """One reader of a version, until ``ends`` (monotonic seconds): the encoded manifest
    that it is given, its digest, and the fingerprint of every tensor in it."""

    held: HeldVersion
    digest: str
    payload: bytes
    tensors: np.ndarray
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
        self._leases: dict[str, _Lease] = {}
        # Ranks are asked in turn: who comes last must not withdraw what another has
        # just been promised.
        self._turn = asyncio.Lock()

    async def serve(self, request: ServeWeights) -> WeightsServed:
        """Let somebody read a version.

        Raises:
            PeerUnsuitable: it is not held here, or not in tensors alone.
            RanksFailed: a rank says so.
        """
        async with self._turn:
            held = self._ranks.held(request.version, request.fingerprint)
            ends = time.monotonic() + request.seconds
            try:
                offered = await self._ranks.offer(held, request.seconds)
                slot, sources = as_sources(offered)
                # The engine's requests go through this loop, too.
                lease = await asyncio.to_thread(_lease, held, offered, sources, ends)
            except Exception:
                await self._withdraw_unread(held.version)
                raise
            announcement_id = f"peer-{uuid.uuid4().hex}"
            self._leases[announcement_id] = lease
        return WeightsServed(
            announcement_id=announcement_id,
            manifest_digest=lease.digest,
            slot=slot,
            runtime_fingerprint=version_fingerprint(lease.tensors),
        )

    def manifest(self, request: GetManifest) -> ManifestReply:
        """
        Raises:
            SourceLost: nobody may read it now.
        """
        for lease in self._leases.values():
            if lease.digest == request.manifest_digest:
                return ManifestReply(payload=lease.payload)
        raise SourceLost(
            f"no manifest {request.manifest_digest[:12]} is served here: ask the "
            "coordinator for a source"
        )

    def fingerprints(self, request: GetFingerprints) -> FingerprintsReply:
        """Those of the images, which were compared here with what was proven.

        Raises:
            SourceLost: the announcement has ended, or the version was given up.
        """
        lease = self._leases.get(request.announcement_id)
        if lease is None or time.monotonic() > lease.ends:
            raise SourceLost(f"announcement {request.announcement_id} has ended here")
        self._ranks.held(lease.held.version, lease.held.fingerprint)
        return FingerprintsReply(payload=lease.tensors.tobytes())

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
    model: str, offered: Sequence[Offered], sources: tuple[Source, ...]
) -> Manifest:
    """The images that all ranks hold, rank by rank."""
    tensors = []
    for number, reply in enumerate(offered):
        for held in reply.tensors:
            shard = Shard(
                source=number,
                region=0,
                byte_offset=held.byte_offset,
                offset=(0,) * len(held.shape),
                shape=held.shape,
            )
            tensors.append(
                TensorEntry(
                    name=image_prefix(number) + held.name,
                    dtype=held.dtype,
                    shape=held.shape,
                    shards=(shard,),
                )
            )
    return Manifest(
        model=model,
        tensors=tuple(tensors),
        sources=sources,
        layouts=tuple(reply.layout for reply in offered),
    )


def _lease(
    held: HeldVersion,
    offered: Sequence[Offered],
    sources: tuple[Source, ...],
    ends: float,
) -> _Lease:
    manifest = compose(held.model, offered, sources)
    try:
        payload = encode_manifest(manifest)
    except ManifestInvalid as error:
        raise PeerUnsuitable(
            f"nobody would read what the ranks of this replica hold ({error}): read "
            "from the trainer"
        ) from error
    return _Lease(
        held=held,
        digest=manifest.fingerprint(),
        payload=payload,
        tensors=np.concatenate([np.frombuffer(r.parts, "<u8") for r in offered]),
        ends=ends,
    )
