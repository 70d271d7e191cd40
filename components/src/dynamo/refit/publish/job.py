# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a trainer's job keep in the store that they share, as data.

Every rank but 0 keeps one :class:`RankState` there, rank 0 one :class:`JobState` that
all of them read. What is large is a payload under a key of its own: rank 0 deletes it
when the job state takes it into account.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from dynamo.refit.errors import Failure, RefitError, SourceLost, error_from
from dynamo.refit.publish.handle import PublishedVersion, Release
from dynamo.refit.publish.merge import RankPart


class Report(msgspec.Struct, frozen=True, tag=True):
    """The payload of a rank that has written a version: ``fingerprints`` has a
    little-endian uint64 for each block of its part, in order. Or of one that will not
    write it, for ``failure``."""

    announcement_id: str
    fingerprints: bytes = b""
    failure: Failure | None = None


Payload = RankPart | Report
"""A rank joins with its part."""


class RankState(msgspec.Struct, frozen=True):
    """What a rank other than 0 wants.

    ``member`` names one life of the rank, ``beat`` counts its writes. It ``wants`` a
    slot for a version, in a publication later than one with a number: a pair of the
    two. Rank 0 has not read its ``payloads`` yet. One that has ``left`` does nothing
    more.
    """

    member: str
    beat: int = 0
    wants: tuple[int, int] | None = None
    payloads: tuple[str, ...] = ()
    left: bool = False


class PublicationState(msgspec.Struct, frozen=True):
    """A publication. It has ended when there is a ``release`` or a ``failure``; one
    that was ``refused`` never had a slot."""

    number: int
    announcement_id: str
    version: int
    slot: int
    refused: bool
    release: Release | None = None
    failure: Failure | None = None


class JobState(msgspec.Struct, frozen=True):
    """What rank 0 has decided.

    The ranks ``missing`` have not joined. The publications up to number ``since`` began
    before the last rank joined. Members that are ``refused`` are not, or not any more,
    of the job; with a ``failure`` the job is at its end. ``beat`` counts the writes.
    """

    beat: int = 0
    missing: tuple[int, ...] = ()
    since: int = 0
    publications: tuple[PublicationState, ...] = ()
    refused: dict[str, Failure] = {}
    failure: Failure | None = None


class OwnVersions:
    """What one rank publishes: ``after`` is the number of the last publication that it
    has taken part in. A handle is ended by whichever thread comes first."""

    def __init__(self) -> None:
        self.after = 0
        self._open: dict[str, PublishedVersion] = {}

    def next_of(
        self, version: int, publications: Iterable[PublicationState]
    ) -> PublicationState | None:
        """The oldest publication of ``version`` that this rank was not in yet."""
        later = (p for p in publications if p.number > self.after)
        return next((p for p in later if p.version == version), None)

    def take(self, publication: PublicationState) -> PublishedVersion:
        """Take part in ``publication``.

        Raises:
            LeaseHeld: it was refused, since what is in the slot is being read.
        """
        self.after = publication.number
        if publication.refused:
            raise error_from(publication.failure)
        name = publication.announcement_id
        handle = PublishedVersion(publication.version, name, publication.slot)
        self._open[name] = handle
        return handle

    def apply(self, job: JobState) -> None:
        """End the handles of what has ended."""
        publications = {p.announcement_id: p for p in job.publications}
        for name in list(self._open):
            known = publications.get(name)
            if known is None:
                gone = f"announcement {name} is not held on rank 0 any more"
                self._end(name, SourceLost(gone))
            elif known.failure is not None:
                self._end(name, error_from(known.failure))
            elif known.release is not None:
                self._end(name, known.release)

    def end_all(self, error: RefitError) -> None:
        """End every handle that is still open."""
        for name in list(self._open):
            self._end(name, error)

    def _end(self, name: str, end: Release | RefitError) -> None:
        handle = self._open.pop(name, None)
        if handle is not None:
            handle.end(end)
