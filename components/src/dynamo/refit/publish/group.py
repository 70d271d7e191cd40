# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What rank 0 of a trainer job decides: who takes part, and who has written what.

Pure: requests and the time go in, replies and errors come out; the shell around it is
:mod:`dynamo.refit.publish.lead`. Every request may come again (an answer was lost) and
in any order that a network can make of them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from dynamo.refit.errors import (
    FingerprintMismatch,
    ManifestInvalid,
    RefitError,
    SourceLost,
)
from dynamo.refit.protocol import (
    Join,
    Released,
    SlotTaken,
    TakeSlot,
    WriteFailed,
    Written,
)
from dynamo.refit.publish.merge import Merged, RankPart, merge
from dynamo.refit.publish.publication import Publication, PublicationLog


@dataclass
class Member:
    """One life of a rank. ``turn`` counts its publications; the last one it took part
    in is ``publication``, and it is past the one with the number ``after``."""

    name: str
    rank: int
    part: RankPart
    after: int
    turn: int = 0
    publication: Publication | None = None
    left: bool = False


class Group:
    """The ranks of one trainer job; ``log`` has their publications.

    Args:
        name: what all ranks of the job call it.
        life: differs for every rank 0 there ever is.
        ready_seconds: from the first rank's slot to the last one's bytes.
    """

    def __init__(
        self,
        name: str,
        life: str,
        *,
        world_size: int,
        slots: int,
        in_place: bool,
        ready_seconds: float,
    ) -> None:
        self.name = name
        self.world_size = world_size
        self.merged: Merged | None = None
        self.log = PublicationLog(
            life, slots=slots, in_place=in_place, ready_seconds=ready_seconds
        )
        self._members: dict[int, Member] = {}
        self._names: dict[str, Member] = {}
        self._fault: RefitError | None = None
        self._warned: set[str] = set()

    def join(self, request: Join, part: RankPart, now: float) -> None:
        """Take a rank in. One that was there before is replaced: its memory is gone.

        Raises:
            ManifestInvalid: this rank does not fit to the others, who go on. Where
                the ranks do not fit together from the start, :meth:`missing` raises.
        """
        rank = request.rank
        known = self._members.get(rank)
        if known is not None and known.name == request.member:
            return
        self._check_place(request)
        member = Member(request.member, rank, part, self.log.last)
        members = {**self._members, rank: member}
        if len(members) == self.world_size and self._fault is None:
            try:
                self.merged = merge({r: m.part for r, m in members.items()})
            except ManifestInvalid as error:
                if self.merged is not None:
                    raise
                self._fault = error
        self._members = members
        self._names = {m.name: m for m in members.values()}
        if known is not None:
            self.log.fail_all(f"trainer rank {rank} was restarted", now)

    def missing(self, member: str) -> tuple[int, ...]:
        """The ranks that have not joined, told to ``member``.

        Raises:
            ManifestInvalid: the ranks do not fit together.
            SourceLost: ``member`` was replaced, or rank 0 has closed.
        """
        self._member(member)
        return tuple(r for r in range(self.world_size) if r not in self._members)

    def take_slot(self, request: TakeSlot, now: float) -> SlotTaken:
        """The slot for a version: the same for all ranks, the next one in turn.

        A rank takes part in the oldest publication of ``version`` that came after its
        last one, and begins a new one if there is none.

        Raises:
            LeaseHeld: what is in the slot is being read. Every rank is told so once.
        """
        member = self._member(request.member)
        if request.turn < member.turn:
            raise SourceLost(f"turn {request.turn} of rank {member.rank} is over")
        if request.turn > member.turn:
            publication = self.log.next_of(request.version, member.after)
            if publication is None:
                publication = self.log.open(request.version, now)
            member.turn, member.publication = request.turn, publication
            member.after = publication.number
            publication.takers.add(member.name)
            if member.rank == 0:
                publication.in_flight = request.in_flight
        publication = member.publication
        if publication.refused is not None:
            raise publication.refused
        return SlotTaken(
            announcement_id=publication.announcement_id, slot=publication.slot
        )

    def written(self, request: Written, now: float) -> None:
        """A rank's bytes are there; with the last rank's the version is ready.

        What comes too late is forgotten. A version of which two ranks hold different
        bytes ends with FingerprintMismatch.
        """
        member = self._member(request.member)
        publication = self.log.find(request.announcement_id)
        if publication.verdict is not None or publication.ready:
            return
        fingerprints = np.frombuffer(request.fingerprints, dtype="<u8")
        if len(fingerprints) != member.part.blocks:
            raise ManifestInvalid(
                f"trainer rank {member.rank} reports {len(fingerprints)} fingerprints "
                f"of {member.part.blocks} blocks",
                rank=member.rank,
            )
        publication.written[member.rank] = fingerprints
        if len(publication.written) < self.world_size:
            return
        try:
            publication.complete(self.merged.add_up(publication.written))
        except FingerprintMismatch as error:
            publication.decide(error, now)

    def write_failed(self, request: WriteFailed, error: RefitError, now: float) -> None:
        """A rank cannot write: the publication ends with its ``error`` everywhere."""
        self._member(request.member)
        publication = self.log.find(request.announcement_id)
        if not publication.ready:
            publication.decide(error, now)

    def end_of(self, member: str, announcement_id: str) -> Released | None:
        """How a publication ended, told to ``member``; ``None`` while it is out.

        Raises:
            RefitError: the one it ended with.
            SourceLost: it is not known (any more), or ``member`` is not.
        """
        publication = self.log.find(announcement_id)
        if not publication.ended:
            self._member(member)
            return None
        publication.told.add(member)
        if isinstance(publication.verdict, RefitError):
            raise publication.verdict
        return publication.verdict

    def state(self) -> Hashable:
        """Differs whenever :meth:`missing` or :meth:`end_of` may answer otherwise."""
        ended = tuple(p.number for p in self.log if p.ended)
        return (self.merged is not None, self._fault is not None, ended)

    def expire(self, now: float) -> bool:
        """See :meth:`PublicationLog.expire`."""
        return self.log.expire(now, range(self.world_size))

    def leave(self, name: str, now: float) -> None:
        """A member's memory goes; what is out ends, and nothing can be leased."""
        member = self._names.get(name)
        if member is not None and not member.left:
            member.left = True
            self.log.fail_all(f"trainer rank {member.rank} was closed", now)

    def close(self, reason: str) -> None:
        """Rank 0 ends: everything that is out ends with ``reason``."""
        if self._fault is None:
            self._fault = SourceLost(reason)
        self.log.close(SourceLost(reason))

    def all_told(self, but: str) -> bool:
        """After :meth:`close`: every member except ``but`` knows why it has ended.

        Where the ranks never came together that is why; else it is the ends of the
        publications that the member took part in.
        """
        present = {m.name for m in self._members.values() if not m.left} - {but}
        if self.merged is not None:
            ends = [p for p in self.log if p.refused is None]
            return all(p.takers & present <= p.told for p in ends)
        if isinstance(self._fault, ManifestInvalid):
            return len(self._warned - {but}) >= self.world_size - 1
        return present <= self._warned

    def _check_place(self, request: Join) -> None:
        error = None
        if request.world_size != self.world_size:
            error = ManifestInvalid(
                f"world_size is {request.world_size} on trainer rank {request.rank} "
                f"and {self.world_size} on rank 0",
                rank=request.rank,
            )
        elif not 0 <= request.rank < self.world_size:
            error = ManifestInvalid(
                f"there is no trainer rank {request.rank} of {self.world_size}",
                rank=request.rank,
            )
        if error is None:
            return
        if self.merged is None and self._fault is None:
            self._fault = error
        self._warned.add(request.member)
        raise error

    def _member(self, name: str) -> Member:
        """Who asks.

        Raises:
            ManifestInvalid, SourceLost: the group has ended; or another process has
                this one's rank.
        """
        if self._fault is not None:
            self._warned.add(name)
            raise self._fault
        member = self._names.get(name)
        if member is None or member.left:
            raise SourceLost(
                "rank 0 does not know this rank: it was closed, or another process has "
                "joined as the same rank"
            )
        return member
