# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The ``torch.distributed`` store (c10d) over which the ranks of a trainer's job meet.

All keys are below ``refit/<model>/<component>/<generation>``; a generation is one life
of rank 0's publisher. The connection is the publisher's own, and nothing waits in it:
c10d sets up the trainer's communicators over the same store.
"""

from __future__ import annotations

import time
from typing import TypeVar

import msgspec
import torch.distributed as dist

from dynamo.refit.errors import RefitError, SourceLost, StoreMissing
from dynamo.refit.publish.job import JobState, Payload, RankState

#: The largest value that is put into the store; a payload goes in pieces.
MAX_VALUE_BYTES = 1_000_000

#: A state that has not changed is written again this often, as the rank's heartbeat.
BEAT_SECONDS = 1.0

#: A rank that has not written its state for so long has given its place to a process
#: that comes as the same rank.
VACANT_SECONDS = 3.0

#: How often states are polled: while somebody waits for a slot, and otherwise.
POLL_SECONDS = 0.02
IDLE_SECONDS = 0.1

S = TypeVar("S", RankState, JobState)


def store_of_job(
    given: dist.Store | None, world_size: int, model: str, component: str
) -> dist.Store | None:
    """A connection to ``given``, or to the store of the default process group, for the
    keys of one publisher; a rank that is alone needs none.

    Raises:
        StoreMissing: there is no store.
    """
    if world_size == 1:
        return None
    if given is None:
        if not dist.is_initialized():
            raise StoreMissing(
                f"{world_size} trainer ranks meet over a torch.distributed store: call "
                "init_process_group() first, or pass store=TCPStore(host, port, "
                "is_master=rank == 0, wait_for_workers=False)"
            )
        # It has no public name; see tests/unit/test_upstream_contract.py.
        given = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"refit/{model}/{component}", given.clone())


def store_error(error: Exception) -> RefitError:
    """What ends a rank's publisher when ``error`` ends its use of the store; torch
    raises RuntimeErrors of several kinds."""
    if isinstance(error, RefitError):
        return error
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return SourceLost(
        "the store of this trainer job, and so the other ranks, does not answer: "
        f"{first}; start all ranks again"
    )


class Generation:
    """Of one rank in one generation, for one thread. States are never deleted, since a
    read of what is not there waits."""

    def __init__(self, store: dist.Store, number: int, rank: int) -> None:
        self.number = number
        self._store = dist.PrefixStore(str(number), store)
        self._rank = rank
        self._present: set[int] = set()
        self._occupant: RankState | None = None
        self._occupied_at = 0.0
        self._written: RankState | JobState | None = None
        self._beat = 0
        self._due = 0.0

    @staticmethod
    def newest(store: dist.Store) -> int:
        """The number of the newest generation; 0 before there is any."""
        return store.add("generation", 0)

    @classmethod
    def begin(cls, store: dist.Store) -> Generation:
        """A new one, for rank 0."""
        return cls(store, store.add("generation", 1), 0)

    def write(self, state: RankState | JobState) -> None:
        """Write this rank's state if it has changed, or the heartbeat is due."""
        now = time.monotonic()
        if state == self._written and now < self._due:
            return
        self._written, self._due = state, now + BEAT_SECONDS
        self._beat += 1
        state = msgspec.structs.replace(state, beat=self._beat)
        self._store.set(f"state/{self._rank}", msgspec.msgpack.encode(state))

    def has_place(self) -> bool:
        """Whether this rank may join: no publisher of the rank is or was in this
        generation, or its process has died. One that has left was closed, and a
        publisher after it belongs to the next generation."""
        now = time.monotonic()
        own = range(self._rank, self._rank + 1)
        occupant = self.read(own, RankState).get(self._rank)
        if occupant is None:
            return True
        if occupant != self._occupant:
            self._occupant, self._occupied_at = occupant, now
        return not occupant.left and now - self._occupied_at > VACANT_SECONDS

    def read(self, ranks: range, kind: type[S]) -> dict[int, S]:
        """The states of those of ``ranks`` that have one."""
        for rank in ranks:
            if rank not in self._present and self._store.check([f"state/{rank}"]):
                self._present.add(rank)
        present = [rank for rank in ranks if rank in self._present]
        if not present:
            return {}
        values = self._store.multi_get([f"state/{rank}" for rank in present])
        decode = msgspec.msgpack.Decoder(kind).decode
        return dict(zip(present, map(decode, values), strict=True))

    def put(self, key: str, payload: Payload) -> None:
        """In pieces of at most :data:`MAX_VALUE_BYTES`."""
        value = msgspec.msgpack.encode(payload)
        starts = range(0, len(value), MAX_VALUE_BYTES)
        for piece, start in enumerate(starts):
            self._store.set(f"{key}/{piece}", value[start : start + MAX_VALUE_BYTES])
        # Last, since a reader polls for it.
        self._store.set(key, str(len(starts)))

    def holds(self, key: str) -> bool:
        """Whether there is a payload."""
        return self._store.check([key])

    def payload(self, key: str) -> Payload:
        """One that is there."""
        value = b"".join(self._store.get(piece) for piece in self._pieces(key))
        return msgspec.msgpack.decode(value, type=Payload)

    def delete(self, key: str) -> None:
        """Of a payload that is there."""
        for piece in self._pieces(key):
            self._store.delete_key(piece)
        self._store.delete_key(key)

    def _pieces(self, key: str) -> list[str]:
        return [f"{key}/{piece}" for piece in range(int(self._store.get(key)))]
