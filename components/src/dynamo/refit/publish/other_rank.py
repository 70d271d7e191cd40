# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A trainer rank other than 0: it publishes through rank 0 of its job, over the store
that they share, and needs no Dynamo. One thread polls the store; another one ends what
waits for a store, or a rank 0, that does not answer."""

from __future__ import annotations

import queue
import threading
import time

import torch.distributed as dist

from dynamo.refit.errors import RefitError, SourceLost, error_from
from dynamo.refit.protocol import InFlightPolicy
from dynamo.refit.publish.group import LOST_SECONDS
from dynamo.refit.publish.handle import PublishedVersion
from dynamo.refit.publish.job import JobState, OwnVersions, RankState, Report
from dynamo.refit.publish.merge import RankPart
from dynamo.refit.publish.store import (
    BEAT_SECONDS,
    IDLE_SECONDS,
    POLL_SECONDS,
    Generation,
    store_error,
)

#: How long the end may take.
STOP_SECONDS = 5.0


class OtherRank:
    """The side of a publisher that is not rank 0's.

    Args:
        store: see :func:`~dynamo.refit.publish.store.store_of_job`.
        rank: this rank's number.
        member: its own name.
    """

    def __init__(self, store: dist.Store, rank: int, member: str) -> None:
        self._store = store
        self._rank = rank
        self._member = member
        self._own = OwnVersions()
        #: A version that waits for its slot, and :attr:`OwnVersions.after`.
        self._wants: tuple[int, int] | None = None
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._payloads: list[str] = []
        self._job: JobState | None = None
        self._heard_at = 0.0
        self._ended: RefitError | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        # A store that does not answer cannot be interrupted, and must not keep the
        # process from its end.
        self._threads = [
            threading.Thread(target=self._meet, name="refit-store", daemon=True),
            threading.Thread(target=self._watch, name="refit-watch", daemon=True),
        ]

    # --- for the publisher's threads ------------------------------------------

    def start(self, part: RankPart) -> None:
        """Join."""
        self._part = part
        for thread in self._threads:
            thread.start()

    def missing(self) -> tuple[int, ...]:
        """The ranks that have not joined; rank 0 where it is not there itself.

        Raises:
            ManifestInvalid: the ranks do not fit together.
            SourceLost: the job is at its end, or the store does not answer.
        """
        if self._ended is not None:
            raise self._ended
        return (0,) if self._job is None else self._job.missing

    def take(
        self, version: int, in_flight: InFlightPolicy | None, traceparent: str | None
    ) -> PublishedVersion:
        """The handle of ``version``, in the slot to write it into; waits for rank 0,
        whose ``in_flight`` and ``traceparent`` count.

        Raises:
            LeaseHeld: what is in the slot is being read.
            SourceLost: rank 0 or the store does not answer, or the job is at its end.
        """
        self._wants = (version, self._own.after)
        self._wake.set()
        try:
            while (error := self._ended or self._lost()) is None:
                publication = self._own.next_of(version, self._job.publications)
                if publication is not None:
                    handle = self._own.take(publication)
                    if self._ended is not None:
                        # Meanwhile, so that nobody else ends it.
                        self._own.end_all(self._ended)
                    return handle
                time.sleep(POLL_SECONDS)
            raise error
        finally:
            self._wants = None

    def report(self, report: Report) -> None:
        """A version is written, or will not be."""
        self._reports.put(report)
        self._wake.set()

    def close(self) -> None:
        """Tell rank 0 that this rank's memory goes."""
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self._end(SourceLost("the publisher was closed before the release"))

    # --- the store's thread ---------------------------------------------------

    def _meet(self) -> None:
        """Until this publisher is closed, or the job is at its end."""
        try:
            generation = self._join()
            while not self._closing.is_set():
                self._exchange(generation)
                self._wake.wait(IDLE_SECONDS if self._wants is None else POLL_SECONDS)
                self._wake.clear()
            generation.write(RankState(self._member, left=True))
        # A thread's outermost line: nobody waits for what is lost.
        except Exception as error:
            self._end(store_error(error))

    def _join(self) -> Generation:
        """Join the newest generation, again where a newer one begins, until all ranks
        have joined it."""
        key = f"part/{self._member}"
        generation = Generation(self._store, 0, self._rank)
        has_asked = False
        while not self._closing.is_set():
            number = Generation.newest(self._store)
            if number > generation.number:
                generation = Generation(self._store, number, self._rank)
                has_asked = False
            if number > 0 and not has_asked and generation.has_place():
                generation.put(key, self._part)
                has_asked = True
            if has_asked:
                generation.write(RankState(self._member, payloads=(key,)))
                if not generation.holds(key):
                    job = self._read_job(generation)
                    self._own.after = job.since
                    self._job = job
                    if not job.missing:
                        return generation
            time.sleep(POLL_SECONDS)
        raise SourceLost("this publisher is closed")

    def _exchange(self, generation: Generation) -> None:
        """Write what this rank wants and has, and take in what rank 0 has decided."""
        while not self._reports.empty():
            report = self._reports.get()
            key = f"report/{report.announcement_id}/{self._member}"
            generation.put(key, report)
            self._payloads.append(key)
        self._payloads = [key for key in self._payloads if generation.holds(key)]
        payloads = tuple(self._payloads)
        generation.write(RankState(self._member, wants=self._wants, payloads=payloads))
        self._job = self._read_job(generation)

    def _read_job(self, generation: Generation) -> JobState:
        """What rank 0 has decided; it ends handles.

        Raises:
            RefitError: this rank is not, or not any more, of the job; or the job is at
                its end.
        """
        job = generation.read(range(1), JobState)[0]
        if self._job is None or job.beat != self._job.beat:
            self._heard_at = time.monotonic()
        self._own.apply(job)
        if self._member in job.refused:
            raise error_from(job.refused[self._member])
        if job.failure is not None:
            generation.write(RankState(self._member, left=True))
            raise error_from(job.failure)
        return job

    # --- the end --------------------------------------------------------------

    def _lost(self) -> SourceLost | None:
        if time.monotonic() - self._heard_at < LOST_SECONDS:
            return None
        return SourceLost(
            "rank 0 of this trainer job does not answer, for more than "
            f"{LOST_SECONDS:g} s; start all ranks again"
        )

    def _watch(self) -> None:
        """Rank 0 may come back, and later versions are published then."""
        while not self._closing.wait(BEAT_SECONDS):
            lost = self._lost()
            if lost is not None:
                self._own.end_all(lost)

    def _end(self, error: RefitError) -> None:
        self._ended = self._ended or error
        self._own.end_all(error)
