# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Who reads a version from whom, until everyone holds it.

The trainer serves a bounded number of readers; whoever holds the version serves
others, so that a large fleet fills as a tree does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from dynamo.refit.coordinator.actions import (
    Action,
    ReleasePeer,
    SendPrepare,
    SendServe,
    ServeAnswered,
)
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import Failure, RefitError, failure_from
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import Refused, Vote


class NoSource(RefitError):
    """Neither the trainer nor a worker has the version any more."""


@dataclass
class Reader:
    """A worker that needs the version; ``peer`` is where it reads, ``None`` the
    trainer, and ``lease`` what that peer calls it."""

    state: Literal["waiting", "asking", "reading", "staged"] = "waiting"
    peer: int | None = None
    lease: str | None = None
    refused: Failure | None = None
    direct: bool = False


class Staging:
    """The readers of one version.

    Args:
        ready: the version.
        readers: workers that need it.
        holders: workers that serve it already.
        policy: bounds the readers of each source.
    """

    def __init__(
        self,
        ready: WeightVersionReady,
        readers: Iterable[int],
        holders: Iterable[int],
        policy: Policy,
    ) -> None:
        self.readers = {worker: Reader() for worker in sorted(readers)}
        self.holders = set(holders)
        #: The trainer's lease is held.
        self.from_trainer = False
        self.failures: dict[int, Failure] = {}
        self._ready = ready
        self._policy = policy
        self._bad: set[int] = set()

    @property
    def asked(self) -> set[int]:
        """The workers that may have something of it staged."""
        readers = self.readers.items()
        reading = {w for w, r in readers if r.state in ("reading", "staged")}
        return reading | set(self.failures)

    @property
    def done(self) -> bool:
        return all(reader.state == "staged" for reader in self.readers.values())

    @property
    def direct(self) -> bool:
        """A worker installs straight from its source, and has no way back."""
        return any(reader.direct for reader in self.readers.values())

    def assign(self) -> list[Action]:
        """Send every waiting reader to a source that has room for it."""
        actions: list[Action] = []
        room = self._room()
        for worker, reader in list(self.readers.items()):
            if reader.state != "waiting":
                continue
            if room.get(None, 0) > 0:
                source = None
                reader.state = "reading"
                actions.append(SendPrepare(worker, self._ready))
            else:
                peers = [peer for peer in room if peer is not None and room[peer] > 0]
                if not peers:
                    break
                source = max(peers, key=lambda peer: (room[peer], -peer))
                reader.state, reader.peer = "asking", source
                actions.append(SendServe(source, worker, self._ready))
            room[source] -= 1
        under_way = any(r.state in ("asking", "reading") for r in self.readers.values())
        if not under_way and not room:
            self._out_of_sources()
        return actions

    def _room(self) -> dict[int | None, float]:
        """How many more readers each source takes."""
        readers = self.readers.values()
        room: dict[int | None, float] = {}
        if self.from_trainer:
            room[None] = self._policy.direct_readers or math.inf
        staged = {w for w, r in self.readers.items() if r.state == "staged"}
        for peer in sorted((self.holders | staged) - self._bad):
            room[peer] = self._policy.peer_readers
        busy = Counter(r.peer for r in readers if r.state in ("asking", "reading"))
        return {source: room[source] - busy[source] for source in room}

    def _out_of_sources(self) -> None:
        for worker, reader in list(self.readers.items()):
            if reader.state == "waiting":
                error = NoSource(
                    "the trainer does not keep it any more, and no worker can serve "
                    "it: publish a new version"
                )
                self.fail(worker, reader.refused or self._failure(error, worker))

    def served(self, answer: ServeAnswered) -> list[Action]:
        """A peer has answered whether ``reader`` may read from it."""
        reader = self.readers.get(answer.reader)
        wanted = reader is not None and (reader.state, reader.peer) == (
            "asking",
            answer.peer,
        )
        if isinstance(answer.reply, Refused):
            if wanted:
                self._wait_for_another(reader, answer.reply.failure)
            return []
        if not wanted:
            return [ReleasePeer(answer.peer, answer.reply.announcement)]
        reader.state, reader.lease = "reading", answer.reply.announcement
        return [SendPrepare(answer.reader, self._ready, answer.peer, answer.reply)]

    def answered(self, worker: int, reply: Vote | Refused) -> list[Action]:
        """A reader has voted, or says why it cannot."""
        reader = self.readers.get(worker)
        if reader is None or reader.state != "reading":
            return []
        released = self._release(reader)
        if isinstance(reply, Vote):
            reader.state = "staged"
            reader.direct = any(rank.memory.mode == "direct" for rank in reply.ranks)
        elif reader.peer is None:
            self.fail(worker, reply.failure)
        else:
            self._wait_for_another(reader, reply.failure)
        return released

    def _wait_for_another(self, reader: Reader, failure: Failure) -> None:
        """Its peer may be at fault: nobody reads from there any more."""
        self._bad.add(reader.peer)
        reader.state, reader.peer, reader.refused = "waiting", None, failure

    def fail(self, worker: int, failure: Failure) -> None:
        """The worker will not hold the version."""
        self.failures[worker] = failure
        self.readers.pop(worker)

    def forget(self, worker: int) -> list[Action]:
        """The worker is gone."""
        self.holders.discard(worker)
        reader = self.readers.pop(worker, None)
        return self._release(reader) if reader is not None else []

    def late(self) -> list[int]:
        """Those that have not voted."""
        return [w for w, reader in self.readers.items() if reader.state != "staged"]

    def release_all(self) -> list[Action]:
        return [a for reader in self.readers.values() for a in self._release(reader)]

    def _release(self, reader: Reader) -> list[Action]:
        if reader.lease is None:
            return []
        lease, reader.lease = reader.lease, None
        return [ReleasePeer(reader.peer, lease)]

    def _failure(self, error: RefitError, worker: int) -> Failure:
        return failure_from(
            error, stage="preparing", worker=worker, version=self._ready.version
        )
