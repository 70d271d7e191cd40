# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What rank 0 of a trainer job decides: who takes part, and who has written what.

Pure: what the ranks say and the time go in, the job's state and errors come out; the
shell around it is :mod:`dynamo.refit.publish.rank_zero`. Whatever a rank says may come
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dynamo.refit.errors import (
    ManifestInvalid,
    RefitError,
    SourceLost,
    error_from,
    failure_from,
)
from dynamo.refit.protocol import InFlightPolicy
from dynamo.refit.publish.job import JobState, Payload, RankState, Report
from dynamo.refit.publish.merge import Merged, RankPart, merge
from dynamo.refit.publish.publication import Publication, PublicationLog

#: A rank that was not heard of for so long is lost. Its interpreter may be busy for
#: seconds.
LOST_SECONDS = 20.0


@dataclass(frozen=True)
class Member:
    """One life of a rank."""

    name: str
    rank: int
    part: RankPart


class Group:
    """The ranks of one trainer job; ``log`` has their publications.

    Args:
        life: differs for every rank 0 there ever is.
        ready_seconds: from the first rank's slot to the last one's bytes.

    Attributes:
        merged: what the ranks make up, once all have joined.
        fault: why the job is at its end.
    """

    def __init__(
        self,
        life: str,
        *,
        world_size: int,
        slots: int,
        in_place: bool,
        ready_seconds: float,
    ) -> None:
        self.world_size = world_size
        self.merged: Merged | None = None
        self.fault: RefitError | None = None
        self.log = PublicationLog(
            life, slots=slots, in_place=in_place, ready_seconds=ready_seconds
        )
        self._members: dict[int, Member] = {}
        self._names: dict[str, Member] = {}
        self._refused: dict[str, RefitError] = {}
        self._heard_at: dict[int, float] = {}
        self._since = 0

    def take_in(
        self, rank: int, state: RankState, payloads: Mapping[str, Payload], now: float
    ) -> None:
        """What a rank other than 0 says, and what of it was read now; the errors are in
        :meth:`state`."""
        for payload in (payloads[key] for key in state.payloads if key in payloads):
            with contextlib.suppress(RefitError):
                if isinstance(payload, RankPart):
                    self.join(state.member, rank, payload, now)
                else:
                    self.report(state.member, payload, now)
        if rank in self._members:
            self._heard_at[rank] = now
        with contextlib.suppress(RefitError):
            if state.left:
                self.leave(state.member, now)
            elif state.wants is not None:
                self.take_slot(state.member, *state.wants, now)

    def join(self, name: str, rank: int, part: RankPart, now: float) -> None:
        """Take a rank in. One that was there before is replaced: its memory is gone.

        Raises:
            ManifestInvalid: this rank does not fit to the others, who go on. Where
                the ranks do not fit together from the start, :attr:`fault` says so.
        """
        known = self._members.get(rank)
        if known is not None and known.name == name:
            return
        members = {**self._members, rank: Member(name, rank, part)}
        try:
            self._check_place(rank, part.world_size)
            if len(members) == self.world_size:
                self.merged = merge({r: m.part for r, m in members.items()})
        except ManifestInvalid as error:
            if self.merged is None:
                self.fault = self.fault or error
            self._refused[name] = error
            raise
        self._members = members
        self._names = {m.name: m for m in members.values()}
        self._since = self.log.last
        if known is not None:
            self._refused[known.name] = SourceLost(
                f"another process has joined as trainer rank {rank}"
            )
            self.log.fail_all(f"trainer rank {rank} was restarted", now)

    def missing(self) -> tuple[int, ...]:
        """The ranks that have not joined."""
        return tuple(r for r in range(self.world_size) if r not in self._members)

    def member(self, name: str) -> Member:
        """Who speaks.

        Raises:
            ManifestInvalid, SourceLost: the job is at its end, or ``name`` is not of
                it.
        """
        error = self.fault or self._refused.get(name)
        if error is not None:
            raise error
        if name not in self._names:
            raise SourceLost(f"{name} has not joined this trainer job")
        return self._names[name]

    def take_slot(
        self,
        name: str,
        version: int,
        after: int,
        now: float,
        in_flight: InFlightPolicy | None = None,
    ) -> Publication:
        """The publication for a version, in the slot whose turn it is: the same for all
        ranks, the oldest one of ``version`` that is later than number ``after``, or a
        new one. Of ``in_flight``, rank 0's counts.

        It may be a refused one, since what is in the slot is being read.
        """
        member = self.member(name)
        publication = self.log.next_of(version, after)
        if publication is None:
            publication = self.log.open(version, now)
        if member.rank == 0:
            publication.in_flight = in_flight
        return publication

    def report(self, name: str, report: Report, now: float) -> None:
        """A rank's bytes are there; with the last rank's the version is ready.

        What comes too late is forgotten. Where a rank cannot write, or two ranks hold
        different bytes, the publication ends with the error on every rank.
        """
        member = self.member(name)
        publication = self.log.find(report.announcement_id)
        if publication.verdict is not None or publication.ready:
            return
        try:
            publication.written[member.rank] = _fingerprints(member, report)
            if len(publication.written) == self.world_size:
                publication.complete(self.merged.add_up(publication.written))
        except RefitError as error:
            publication.decide(error, now)

    def expire(self, now: float) -> bool:
        """As :meth:`PublicationLog.expire`; and what is out ends when a rank has not
        been heard of for :data:`LOST_SECONDS`. It may come back."""
        lost = [r for r, at in self._heard_at.items() if now - at > LOST_SECONDS]
        for rank in lost:
            self.log.fail_all(f"trainer rank {rank} does not answer", now)
        return self.log.expire(now, range(self.world_size)) or bool(lost)

    def leave(self, name: str, now: float) -> None:
        """A member's memory goes; what is out ends, and nothing can be leased."""
        closed = f"trainer rank {self.member(name).rank} was closed"
        self._refused[name] = SourceLost(closed)
        self.log.fail_all(closed, now)

    def close(self, reason: str) -> None:
        """Rank 0 ends: everything that is out ends with ``reason``."""
        self.fault = self.fault or SourceLost(reason)
        self.log.close(SourceLost(reason))

    def state(self) -> JobState:
        """What all ranks are to know."""
        failures = {
            name: failure_from(error, stage="publish")
            for name, error in self._refused.items()
        }
        return JobState(
            missing=self.missing(),
            since=self._since,
            publications=tuple(publication.state() for publication in self.log),
            refused=failures,
            failure=self.fault and failure_from(self.fault, stage="publish"),
        )

    def _check_place(self, rank: int, world_size: int) -> None:
        if world_size != self.world_size:
            raise ManifestInvalid(
                f"world_size is {world_size} on trainer rank {rank} and "
                f"{self.world_size} on rank 0",
                rank=rank,
            )
        if not 0 <= rank < self.world_size:
            raise ManifestInvalid(
                f"there is no trainer rank {rank} of {self.world_size}", rank=rank
            )


def _fingerprints(member: Member, report: Report) -> np.ndarray:
    """
    Raises:
        RefitError: the rank has not written the version.
    """
    if report.failure is not None:
        raise error_from(report.failure)
    fingerprints = np.frombuffer(report.fingerprints, dtype="<u8")
    if len(fingerprints) != member.part.blocks:
        raise ManifestInvalid(
            f"trainer rank {member.rank} reports {len(fingerprints)} fingerprints "
            f"of {member.part.blocks} blocks",
            rank=member.rank,
        )
    return fingerprints
