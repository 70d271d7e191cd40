# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The sessions that a rank keeps between versions, and those that it gave up.

At most two are kept: the one that pulled last, and one of another layout, until the
one that replaced it is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dynamo.refit.errors import StagingCancelled, TransferFailed
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.pipeline import MAX_POLL_SECONDS
from dynamo.refit.rank.session import Session

#: How long the reads of a pull that failed may take to end. NIXL cannot call them back,
#: and a source that lives ends them in what the pull would have taken. Less than the
#: coordinator's ``GRACE_SECONDS``, for which it waits for an answer after the deadline.
SETTLE_SECONDS = 10.0

#: Buffers of pulls that were given up but may still be written to.
MAX_ABANDONED = 2


class KeptSessions:
    """The sessions that may be warm for the next version."""

    def __init__(self) -> None:
        #: The one that pulled last.
        self.current: Session | None = None
        #: Of another layout.
        self._spare: Session | None = None
        #: The one whose version was installed last.
        self.proven: Session | None = None
        self.abandoned = AbandonedSessions()

    @property
    def all(self) -> list[Session]:
        """The current one first."""
        return [s for s in (self.current, self._spare) if s is not None]

    def put_in_place(self, session: Session) -> None:
        """Make ``session`` the current one: it has pulled a version. The one before it
        stays for now: whether ranks together hold a version, and the published one, is
        not known here."""
        if session is not self.current:
            self.current, self._spare = session, self.current

    def installed(self) -> None:
        """The version of the current session is live."""
        self.proven = self.current

    def make_room(self) -> None:
        """Before another session is built: at most one is kept beside it."""
        if self._spare is None:
            return
        if self._spare is self.proven:
            self.current, self._spare = self._spare, self.current
        self._spare.close()
        self._spare = None

    def evict(self) -> None:
        """Give back the session whose successor has been installed; not during an
        install, which is in a pause."""
        if self._spare is not None and self.current is self.proven:
            self.make_room()

    def retire(self, session: Session, error: BaseException) -> bool:
        """After a failed pull: keep what is sound, and nothing that may change.
        ``False``: bytes may still arrive in the session and its arena.

        Blocks until the pull's reads have ended, for :data:`SETTLE_SECONDS` at most: a
        session that is abandoned takes the arena along, and the next version would
        have to find memory for another.
        """
        kept = self.all
        if _ends(session):
            if session not in kept:
                session.close()
            # Requests that were only given up are as good as before.
            elif not isinstance(error, StagingCancelled):
                session.forget_requests()
            return True
        self.abandoned.add(session)
        for other in kept:
            # It reads into the same arena, or its own scratch is of no use to anyone.
            if other is not session:
                other.close()
        self.current = self._spare = self.proven = None
        return False


class AbandonedSessions:
    """Sessions whose reads were given up while bytes were on their way.

    NIXL cannot call such a read back: the bytes may land at any later poll. Their
    buffers are kept, out of use, until the reads have ended.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session) -> None:
        self._sessions.append(session)

    def sweep(self, offered: Callable[[Arena], bool] = lambda _: False) -> None:
        """Give back those that have ended, but for an arena that is ``offered``: others
        still read the version before from it.

        Raises:
            TransferFailed: too many are still waiting for a source.
        """
        for session in [s for s in self._sessions if not s.poll_active()]:
            if offered(session.arena):
                continue
            self._sessions.remove(session)
            session.close()
            session.arena.close()
        if len(self._sessions) > MAX_ABANDONED:
            raise TransferFailed(
                f"{len(self._sessions)} earlier pulls were given up and their sources "
                "neither answer nor go away: stop the stuck trainer process"
            )


def _ends(session: Session) -> bool:
    """Wait until the session's reads have ended; ``False``: they have not in time."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while session.poll_active():
        if time.monotonic() > deadline:
            return False
        time.sleep(MAX_POLL_SECONDS)
    return True
