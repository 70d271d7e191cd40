# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The publications of a trainer job: which is in which slot, leased until when, and
how each one ended. Pure; the time goes in.

A publication goes

    open ──(every rank has written, replicas agree)──> ready ──(released)──> ended

and from open or ready to its end at once when its slot is taken, a rank leaves or is
replaced, or it is not ready in time. Two rules hold throughout. A slot is given out
only while nobody holds a lease on what is in it; from then on that cannot be leased.
And an end shows only when no lease is left, since with ``in_place`` the trainer then
writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dynamo.refit.errors import LeaseHeld, RefitError, SourceLost, failure_from
from dynamo.refit.fingerprint import version_fingerprint
from dynamo.refit.protocol import InFlightPolicy, ReleaseOutcome
from dynamo.refit.publish.handle import Release
from dynamo.refit.publish.job import PublicationState

#: Ended publications that are remembered, for ranks that are behind.
KEPT = 64


@dataclass
class Publication:
    """One version, from the first rank that takes its slot.

    ``verdict`` is how it ends; it has ``ended`` when nobody can be reading it any more.
    ``fingerprint`` is there once it is ready, ``fingerprints`` are the tensors' as
    little-endian uint64. One that is ``refused`` has no slot. ``leased_until`` is by
    the epoch of the coordinator that holds the lease.
    """

    number: int
    announcement_id: str
    version: int
    slot: int
    deadline: float
    refused: LeaseHeld | None = None
    in_flight: InFlightPolicy | None = None
    written: dict[int, np.ndarray] = field(default_factory=dict)
    fingerprints: bytes = b""
    fingerprint: str = ""
    announced: bool = False
    in_slot: bool = True
    leased_until: dict[int, float] = field(default_factory=dict)
    verdict: Release | RefitError | None = None
    ended: bool = False

    @property
    def ready(self) -> bool:
        """Every rank has written it, and it was or will be announced."""
        return bool(self.fingerprint)

    def leased(self, now: float) -> bool:
        """Somebody may be reading the bytes."""
        return any(now < until for until in self.leased_until.values())

    def complete(self, totals: np.ndarray) -> None:
        """Make it ready; ``totals`` has the fingerprint of every tensor."""
        self.fingerprints = totals.astype("<u8").tobytes()
        self.fingerprint = version_fingerprint(totals)
        self.written = {}

    def decide(self, verdict: Release | RefitError, now: float) -> None:
        """Settle how it ends, unless that is settled, and end it if nobody reads."""
        if self.verdict is None:
            self.verdict = verdict
        self.ended = self.ended or not self.leased(now)

    def state(self) -> PublicationState:
        """What the ranks are to know of it."""
        end = self.verdict if self.ended else None
        failed = isinstance(end, RefitError)
        return PublicationState(
            number=self.number,
            announcement_id=self.announcement_id,
            version=self.version,
            slot=self.slot,
            refused=self.refused is not None,
            release=None if failed else end,
            failure=failure_from(end, stage="publish") if failed else None,
        )


class PublicationLog:
    """Publications in their order; each takes the next one of ``slots`` slots.

    Args:
        life: prefix of announcements; differs for every rank 0 there ever is.
        in_place: a version that has ended cannot be leased, since its bytes may change
            without a new publication.
        ready_seconds: what is not ready by then has lost a rank.
    """

    def __init__(
        self, life: str, *, slots: int, in_place: bool, ready_seconds: float
    ) -> None:
        self.last = 0
        self._life = life
        self._slots = slots
        self._in_place = in_place
        self._ready_seconds = ready_seconds
        self._log: dict[int, Publication] = {}

    def __iter__(self) -> Iterator[Publication]:
        return iter(list(self._log.values()))

    def open(self, version: int, now: float) -> Publication:
        """A new publication in the slot whose turn it is, or a refused one."""
        self.last += 1
        slot = (self.last - 1) % self._slots
        publication = Publication(
            self.last,
            f"{self._life}-{self.last}",
            version,
            slot,
            deadline=now + self._ready_seconds,
            refused=self._held(slot, now),
        )
        if publication.refused is None:
            self._vacate(slot, version, now)
        else:
            publication.in_slot = False
            publication.decide(publication.refused, now)
        self._log[self.last] = publication
        self._forget()
        return publication

    def next_of(self, version: int, after: int) -> Publication | None:
        """The oldest publication of ``version`` later than number ``after``."""
        later = (p for number, p in self._log.items() if number > after)
        return next((p for p in later if p.version == version), None)

    def find(self, announcement_id: str) -> Publication:
        """Raises SourceLost if it is not known (any more)."""
        for publication in self._log.values():
            if (
                publication.announcement_id == announcement_id
                and not publication.refused
            ):
                return publication
        raise SourceLost(f"announcement {announcement_id} is not held here any more")

    def readable(self, announcement_id: str) -> Publication:
        """Raises SourceLost unless the bytes are all there."""
        publication = self.find(announcement_id)
        if not (publication.ready and publication.in_slot):
            raise SourceLost(
                f"announcement {announcement_id} is not held here any more"
            )
        return publication

    def acquire(
        self, announcement_id: str, epoch: int, seconds: float, now: float
    ) -> None:
        """Keep the bytes as they are until ``seconds`` from now, for the coordinator
        with ``epoch``.

        Raises:
            SourceLost: they are not all there, or may change already.
        """
        publication = self.readable(announcement_id)
        if publication.verdict is not None and self._in_place:
            raise SourceLost(
                f"version {publication.version} was released, so the trainer may be "
                "writing it"
            )
        publication.leased_until[epoch] = now + seconds

    def release(
        self,
        announcement_id: str,
        epoch: int,
        outcome: ReleaseOutcome,
        detail: str,
        now: float,
    ) -> None:
        """The coordinator with ``epoch`` reads the bytes no more, nor does one before
        it, whose workers it has taken over.

        While a newer coordinator reads, an older one's word is not how it ends.
        Of a version that was given up meanwhile, the one who has read all of it knows
        better. What is older and nobody reads ends, too: whoever has had a newer one
        refuses it, and may never have heard of it.
        """
        publication = self.find(announcement_id)
        publication.leased_until = {
            holder: until
            for holder, until in publication.leased_until.items()
            if holder > epoch
        }
        if publication.leased(now):
            return
        if outcome == "completed" and publication.ready and not publication.ended:
            publication.verdict = None
        publication.decide(Release(outcome, detail), now)
        if outcome != "refused":
            self._supersede_before(publication, outcome, now)

    def _supersede_before(
        self, newer: Publication, outcome: ReleaseOutcome, now: float
    ) -> None:
        detail = f"version {newer.version} was {outcome} before it"
        for older in self:
            open_ = older.verdict is None and not older.leased(now)
            if open_ and older.number < newer.number:
                older.decide(Release("superseded", detail), now)

    def to_announce(self) -> list[Publication]:
        """The publications that became ready since the last call."""
        ready = [p for p in self if p.ready and not p.announced and p.verdict is None]
        for publication in ready:
            publication.announced = True
        return ready

    def to_repeat(self, now: float) -> list[Publication]:
        """What was announced and has not ended, in order: the newest, and what is
        leased, since the one who holds the lease may have called in vain to end it.

        Of the others nobody needs to hear: the newer one supersedes them.
        """
        out = [p for p in self if p.announced and p.verdict is None]
        return [p for p in out if p is out[-1] or p.leased(now)]

    def expire(self, now: float, ranks: range) -> bool:
        """End what is not ready in time, and what waited for a lease; did anything?"""
        before = sum(p.ended for p in self)
        for publication in self:
            if publication.verdict is not None:
                publication.decide(publication.verdict, now)
            elif not publication.ready and now >= publication.deadline:
                absent = [rank for rank in ranks if rank not in publication.written]
                publication.decide(self._lost(publication.version, absent), now)
        return sum(p.ended for p in self) > before

    def fail_all(self, detail: str, now: float) -> None:
        """The memory that all publications lie in is not whole any more."""
        for publication in self:
            publication.in_slot = False
            if publication.verdict is None:
                publication.decide(Release("failed", detail), now)

    def close(self, error: RefitError) -> None:
        """Everything ends now, whoever reads."""
        for publication in self:
            publication.in_slot = False
            publication.leased_until = {}
            publication.decide(error, 0.0)

    def _held(self, slot: int, now: float) -> LeaseHeld | None:
        for publication in self:
            if publication.slot == slot and publication.leased(now):
                return LeaseHeld(
                    f"version {publication.version} is still being read from slot "
                    f"{slot}: await its handle's released() before publishing again"
                )
        return None

    def _vacate(self, slot: int, version: int, now: float) -> None:
        """What is in ``slot`` ends, and cannot be leased: its bytes will change."""
        detail = f"its buffer was taken for version {version}"
        for publication in self:
            if publication.slot == slot and publication.in_slot:
                publication.in_slot = False
                publication.fingerprints, publication.written = b"", {}
                publication.decide(Release("superseded", detail), now)

    def _lost(self, version: int, absent: list[int]) -> SourceLost:
        return SourceLost(
            f"version {version}: trainer ranks {absent} have not written it within "
            f"{self._ready_seconds:g} s: look for what ended or stalled them"
        )

    def _forget(self) -> None:
        """Drop the oldest of what has ended and is in no slot."""
        done = [p.number for p in self if p.ended and not p.in_slot]
        for number in done[:-KEPT]:
            del self._log[number]
