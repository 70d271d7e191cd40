# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Who reads a version from whom, until everyone holds it.

The trainer serves a bounded number of readers; whoever holds the version serves
others of its own layout, so that a large fleet fills as a tree does.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dynamo.refit.coordinator.actions import (
    Action,
    ReleasePeer,
    SendAbort,
    SendPrepare,
    SendServe,
    ServeAnswered,
)
from dynamo.refit.coordinator.commit import WorkerLeft
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import (
    Failure,
    FingerprintMismatch,
    RefitError,
    failure_from,
)
from dynamo.refit.events import WeightVersionReady
from dynamo.refit.protocol import Refused, Vote


class NoSource(RefitError):
    """Neither the trainer nor a worker has the version any more."""


@dataclass
class Reader:
    """A worker that needs the version.

    ``peer`` is where it reads, ``None`` the trainer, and ``lease`` what that peer calls
    it. ``refused`` is why it could not read from its last peer, ``unserved`` why a peer
    did not let it; ``can_undo`` is whether its install can be undone.
    """

    state: Literal["waiting", "asking", "reading", "staged"] = "waiting"
    peer: int | None = None
    lease: str | None = None
    refused: Failure | None = None
    unserved: Failure | None = None
    can_undo: bool = True


class Staging:
    """The readers of one version.

    Args:
        ready: the version.
        readers: workers that need it.
        holders: workers that serve it already.
        layouts: the form in which each worker computes; see
            :class:`dynamo.refit.protocol.WorkerStatus`.
        policy: bounds the readers of each source.
    """

    def __init__(
        self,
        ready: WeightVersionReady,
        readers: Iterable[int],
        holders: Iterable[int],
        layouts: Mapping[int, str],
        policy: Policy,
    ) -> None:
        self.readers = {worker: Reader() for worker in sorted(readers)}
        self.holders = set(holders)
        #: The trainer's lease is held.
        self.from_trainer = False
        self.failures: dict[int, Failure] = {}
        #: Those that left without it.
        self.lost: dict[int, Failure] = {}
        self._ready = ready
        self._layouts = layouts
        self._policy = policy
        self._bad: set[int] = set()
        #: May have something of it staged.
        self._asked: set[int] = set()
        #: By layout and worker, what each rank made of it; of those that made anything.
        self._converted: dict[str, dict[int, tuple[str, ...]]] = defaultdict(dict)

    @property
    def done(self) -> bool:
        return all(reader.state == "staged" for reader in self.readers.values())

    @property
    def can_undo(self) -> bool:
        """Every worker can undo an install."""
        return all(reader.can_undo for reader in self.readers.values())

    def assign(self) -> list[Action]:
        """Send every waiting reader to a source that has room for it."""
        waiting = [w for w, r in self.readers.items() if r.state == "waiting"]
        if not waiting:
            return []
        actions: list[Action] = []
        room = self._room()
        direct = room.get(None, 0)
        # By layout, those with the most room first.
        by_layout: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for peer, n in room.items():
            if peer is not None and n > 0:
                heapq.heappush(by_layout[self._layouts[peer]], (-n, peer))
        for worker in waiting:
            reader = self.readers[worker]
            peers = by_layout[self._layouts[worker]]
            if direct > 0:
                direct -= 1
                reader.state = "reading"
                self._asked.add(worker)
                actions.append(SendPrepare(worker, self._ready))
            elif peers:
                taken, peer = peers[0]
                if taken < -1:
                    heapq.heapreplace(peers, (taken + 1, peer))
                else:
                    heapq.heappop(peers)
                reader.state, reader.peer = "asking", peer
                actions.append(SendServe(peer, worker, self._ready))
        self._out_of_sources(room)
        return actions

    def _room(self) -> dict[int | None, float]:
        """How many more readers each source takes."""
        readers = self.readers.values()
        room: dict[int | None, float] = {}
        if self.from_trainer:
            room[None] = self._policy.direct_readers or math.inf
        hold = {w for w, r in self.readers.items() if r.state == "staged"}
        for peer in sorted((self.holders | hold) - self._bad):
            room[peer] = self._policy.peer_readers or math.inf
        busy = Counter(r.peer for r in readers if r.state in ("asking", "reading"))
        return {source: room[source] - busy[source] for source in room}

    def _out_of_sources(self, room: Mapping[int | None, float]) -> None:
        """Those that wait for nobody fail."""
        sources = {self._layouts[peer] for peer in room if peer is not None}
        sources |= {
            self._layouts[worker]
            for worker, reader in self.readers.items()
            if reader.state in ("asking", "reading")
        }
        for worker, reader in list(self.readers.items()):
            served = None in room or self._layouts[worker] in sources
            if reader.state == "waiting" and not served:
                why = f" ({reader.unserved})" if reader.unserved else ""
                error = NoSource(
                    "the trainer does not keep it any more, and no worker of the same "
                    f"layout can serve it{why}: publish a new version"
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
                reader.unserved = answer.reply.failure
                self._wait_for_another(reader)
            return []
        lease = answer.reply.announcement_id
        if reader is not None and (reader.peer, reader.lease) == (answer.peer, lease):
            # A repeat.
            return []
        if not wanted:
            return [ReleasePeer(answer.peer, lease)]
        reader.state, reader.lease = "reading", lease
        self._asked.add(answer.reader)
        return [SendPrepare(answer.reader, self._ready, answer.peer, answer.reply)]

    def answered(self, worker: int, reply: Vote | Refused) -> list[Action]:
        """A reader has voted, or says why it cannot."""
        reader = self.readers.get(worker)
        if reader is None or reader.state != "reading":
            return []
        if isinstance(reply, Vote):
            reader.state = "staged"
            reader.can_undo = all(rank.can_undo for rank in reply.ranks)
            return [*self._release(reader), *self._compare(worker, reader, reply)]
        released = self._release(reader)
        if reader.peer is None:
            self.fail(worker, reply.failure)
        else:
            reader.refused = reply.failure
            self._wait_for_another(reader)
        return released

    def _compare(self, worker: int, reader: Reader, vote: Vote) -> list[Action]:
        """What workers of one layout make of a version is the same. Where it is not,
        nobody knows who is right, and none of them holds the version."""
        ranks = sorted(vote.ranks, key=lambda rank: rank.rank)
        converted = tuple(rank.converted for rank in ranks)
        alike = self._converted[self._layouts[worker]]
        if not any(converted):
            if reader.peer not in alike:
                return []
            # It holds what its peer has made.
            converted = alike[reader.peer]
        alike[worker] = converted
        if len(set(alike.values())) == 1:
            return []
        by_rank = zip(ranks, *alike.values(), strict=False)
        differ = [str(rank.rank) for rank, *made in by_rank if len(set(made)) > 1]
        error = FingerprintMismatch(
            f"workers {', '.join(map(str, sorted(alike)))} compute in the same form, "
            f"and have made different weights of it in rank {', '.join(differ)}: "
            "publish it again, and replace the worker that differs from the others then"
        )
        apart = self.readers.keys() & alike
        for each in sorted(apart):
            self.fail(each, self._failure(error, each))
        return self._abort(self._asked & apart, str(error))

    def _wait_for_another(self, reader: Reader) -> None:
        """Its peer may be at fault: nobody reads from there any more."""
        self._bad.add(reader.peer)
        reader.state, reader.peer = "waiting", None

    def fail(self, worker: int, failure: Failure) -> None:
        """The worker will not hold the version."""
        self.failures[worker] = failure
        del self.readers[worker]

    def forget(self, worker: int) -> list[Action]:
        """The worker is gone."""
        self.holders.discard(worker)
        self._asked.discard(worker)
        for alike in self._converted.values():
            alike.pop(worker, None)
        reader = self.readers.pop(worker, None)
        return self._release(reader) if reader is not None else []

    def left(self, worker: int) -> list[Action]:
        """As :meth:`forget`, before the commit: the version goes on without it."""
        if worker in self.readers:
            error = WorkerLeft("left while the version was staged")
            self.lost[worker] = self._failure(error, worker)
        return self.forget(worker)

    def end(self, error: RefitError) -> list[Action]:
        """Those that have not voted by now give up."""
        actions: list[Action] = []
        for worker, reader in list(self.readers.items()):
            if reader.state != "staged":
                actions += self._release(reader)
                self.fail(worker, self._failure(error, worker))
        return actions + self._abort(self._asked & set(self.failures), str(error))

    def drop(self, reason: str) -> list[Action]:
        """Nobody is to hold the version."""
        return [*self._abort(self._asked, reason), *self.release_all()]

    def _abort(self, workers: set[int], reason: str) -> list[Action]:
        self._asked = self._asked - workers
        return [SendAbort(w, self._ready.version, reason) for w in sorted(workers)]

    def release_all(self) -> list[Action]:
        """Nobody reads any more."""
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
