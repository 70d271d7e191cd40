# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Reads from host memory into a GPU: host to host by NIXL, then up, slice by slice.

UCX has no copy from another process' host memory into a GPU and takes TCP for it,
without a word: 0.5 GB/s on an H100. So such a read lands in pinned memory of this
process, a slice at a time, and goes up from there while the next slices come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.rank import runs
from dynamo.refit.rank.buffers import RegisteredBuffer
from dynamo.refit.rank.cycle import Cycle
from dynamo.refit.transport.nixl import Memory, NixlAgent, Read

#: Slices that are under way at a time. Where UCX copies with the CPU they come one
#: after the other, and two would do; a network wants more of them.
SLOTS = 4

#: Bytes of a slice. Nobody asks whether a pull was cancelled while :data:`SLOTS` of
#: them are copied by the CPU, some 20 ms. The plan of :mod:`memory` does not count the
#: slots.
SLOT_NBYTES = 32 << 20


def is_needed(source: Memory, target: torch.device) -> bool:
    """Must a read from ``source`` memory into ``target`` land in pinned memory?"""
    return source == "DRAM" and target.type == "cuda"


@dataclass
class _Slice:
    """A part of a read: its bytes land in ``landed``, which is in slot number ``slot``,
    and go up from there to ``targets``."""

    of: BouncedRead
    slot: int
    read: Read
    landed: list[torch.Tensor]
    targets: list[torch.Tensor]
    #: Whether it has gone up; ``None``: it has not begun to.
    is_up: Callable[[], bool] | None = None

    def post(self) -> None:
        self.is_up = None
        self.read.post()

    def done(self) -> bool:
        """Poll it; what has landed goes up, on the calling thread's stream.

        Raises:
            TransferFailed: see :meth:`Read.done`.
        """
        if self.is_up is None and self.read.done():
            torch._foreach_copy_(self.targets, self.landed, non_blocking=True)
            self.is_up = _queued(self.targets[0].device)
        return self.is_up is not None and self.is_up()


class Bounce:
    """Pinned memory in ``slots`` of ``slot_nbytes``, and the slices that come through
    it, in the order in which their reads were posted. One thread at a time calls it.
    """

    def __init__(
        self,
        agent: NixlAgent,
        cycle: Cycle,
        slots: int = SLOTS,
        slot_nbytes: int = SLOT_NBYTES,
    ) -> None:
        self._agent = agent
        self._slots = slots
        self._slot_nbytes = slot_nbytes
        on_host = torch.device("cpu")
        self._buffer = RegisteredBuffer(agent, slots * slot_nbytes, on_host, cycle)
        self._prepared = 0
        self._waiting: deque[_Slice] = deque()
        #: By slot.
        self._coming: dict[int, _Slice] = {}

    def prepare_read(
        self,
        peer: str,
        device: int,
        remote: np.ndarray,
        regions: np.ndarray,
        target: torch.Tensor,
        local: np.ndarray,
        nbytes: np.ndarray,
    ) -> BouncedRead:
        """A prepared READ of runs of bytes from host memory of ``peer``.

        Args:
            device: NIXL's number for that memory.
            remote, regions: int64, a run's address there and its region's number.
            target: where the runs go, uint8.
            local, nbytes: int64, a run's offset in ``target`` and its size.
        """
        # Neighbours in the target go up in one copy.
        order = np.argsort(local, kind="stable")
        remote, regions, local, nbytes = (
            each[order] for each in (remote, regions, local, nbytes)
        )
        read = BouncedRead(self, peer)
        try:
            for which, skipped, sizes in runs.cut(nbytes, self._slot_nbytes):
                # On from the read before it: small ones are under way together.
                slot = self._prepared % self._slots
                self._prepared += 1
                here = np.cumsum(sizes) - sizes + slot * self._slot_nbytes
                lands = runs.merge(remote[which] + skipped, here, sizes, regions[which])
                goes_up = runs.merge(local[which] + skipped, here, sizes)
                read.slices.append(
                    _Slice(
                        of=read,
                        slot=slot,
                        read=self._read(peer, device, *lands),
                        landed=_views(self._buffer.bytes, goes_up[1], goes_up[2]),
                        targets=_views(target, goes_up[0], goes_up[2]),
                    )
                )
        except BaseException:
            read.release()
            raise
        return read

    def _read(
        self,
        peer: str,
        device: int,
        remote: np.ndarray,
        here: np.ndarray,
        nbytes: np.ndarray,
    ) -> Read:
        local = here + self._buffer.bytes.data_ptr()
        return self._agent.prepare_read(
            peer,
            (np.stack([local, nbytes], axis=1), "DRAM", 0),
            (np.stack([remote, nbytes], axis=1), "DRAM", device),
        )

    def enqueue(self, slices: list[_Slice]) -> None:
        self._waiting.extend(slices)

    def advance(self) -> None:
        """Post what there is a slot for, and send up what has landed.

        Raises:
            TransferFailed: a slice did not arrive; what waits must be given up.
        """
        self._settle()
        for _ in range(self._slots):
            if not self._waiting or self._waiting[0].slot in self._coming:
                break
            following = self._waiting.popleft()
            following.post()
            self._coming[following.slot] = following
            self._settle()

    def _settle(self) -> None:
        for slot, coming in list(self._coming.items()):
            try:
                done = coming.done()
            except TransferFailed:
                del self._coming[slot]
                raise
            if done:
                del self._coming[slot]

    def has(self, read: BouncedRead) -> bool:
        """Are slices of ``read`` under way, or waiting?"""
        return any(s.of is read for s in (*self._coming.values(), *self._waiting))

    def give_up(self) -> None:
        """Post no slice that waits. Others may still land."""
        self._waiting.clear()

    def close(self) -> None:
        """Only when nothing is under way."""
        self._buffer.close()


class BouncedRead:
    """Like a :class:`Read`, through a :class:`Bounce`: done when all of it is up."""

    def __init__(self, bounce: Bounce, peer: str) -> None:
        self._bounce = bounce
        self.peer = peer
        self.slices: list[_Slice] = []

    @property
    def active(self) -> bool:
        return self._bounce.has(self)

    @property
    def stale(self) -> bool:
        return any(each.read.stale for each in self.slices)

    def post(self) -> bool:
        """Start it, after those that were posted before; True if it is done already.

        Where UCX copies with the CPU, this copies the first slices.
        """
        self._bounce.enqueue(self.slices)
        return self.done()

    def done(self) -> bool:
        """Poll it, which also drives the progress of all reads of its bounce.

        Raises:
            TransferFailed: a slice, of this read or another, did not arrive.
        """
        self._bounce.advance()
        return not self.active

    def release(self) -> None:
        """See :meth:`Read.release`."""
        for each in self.slices:
            each.read.release()
        # They refer to this, and to memory that has to be free without a collection.
        self.slices.clear()


def _views(
    buffer: torch.Tensor, starts: np.ndarray, nbytes: np.ndarray
) -> list[torch.Tensor]:
    pairs = zip(starts.tolist(), nbytes.tolist(), strict=True)
    return [buffer[start : start + size] for start, size in pairs]


def _queued(device: torch.device) -> Callable[[], bool]:
    """Tells whether what the calling thread has queued on ``device`` by now is done."""
    if device.type != "cuda":
        return lambda: True
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query
