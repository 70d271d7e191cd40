# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A rank's shadows as a source for other replicas: what lies in them, who may still be
reading, and what must not be overwritten meanwhile.

A shadow is registered with NIXL from the start, so a version is served from where it
is, without a copy. Nothing is written here.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from vllm.logger import init_logger

from dynamo.refit.errors import LeaseHeld, PeerUnsuitable, TransferFailed
from dynamo.refit.manifest import ITEMSIZE, Box, Region, Source
from dynamo.refit.protocol import HeldBlock
from dynamo.refit.rank import boxes
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.pipeline import Submit
from dynamo.refit.rank.plan import Piece, Plan
from dynamo.refit.rank.slices import ArenaLayout
from dynamo.refit.transport.nixl import NixlAgent, memory_of

logger = init_logger("vllm.dynamo_refit")

#: Contiguous parts that one box may fall into: the experts of a fused tensor do.
MAX_RUNS = 512

#: UCX answers a reader that connects when it is polled: enough for that, and no load.
PROGRESS_SECONDS = 0.002

#: After a poll that failed: the log is to stay readable.
FAILURE_SECONDS = 1.0

#: A reader that comes too late is still answered for this long: it then finds out from
#: the bytes at once, and not from its own deadline.
LINGER_SECONDS = 30.0

#: Between two looks at whether a stage that waits for readers was cancelled.
WAIT_SECONDS = 0.05


# --- what is held -----------------------------------------------------------


def as_source(arena: Arena, agent: NixlAgent) -> Source:
    """``arena`` as readers see it: every shadow is a slot, of one region."""
    buffers = [shadow.buffer.bytes for shadow in arena.shadows]
    memory, device = memory_of(buffers[0].device)
    return Source(
        agent=agent.name,
        metadata=agent.metadata(),
        memory=memory,
        device=device,
        slots=tuple((Region(b.data_ptr(), b.numel()),) for b in buffers),
    )


def find_blocks(plan: Plan, layout: ArenaLayout) -> tuple[HeldBlock, ...]:
    """The boxes of published tensors that lie in an arena of ``layout`` as they were
    published, in as few blocks as that takes.

    They do not depend on how a trainer cut its tensors, so that a reader's plan holds
    for every version that comes with the same names and shapes.

    Raises:
        PeerUnsuitable: a parameter has not the bytes that were published.
    """
    pieces: dict[int, list[Piece]] = defaultdict(list)
    for piece in plan.pieces:
        if piece.parameter in plan.intake.offsets:
            raise PeerUnsuitable(
                "it is served in another form than it is published in, which is all "
                "that is kept: read from the trainer",
                tensor=piece.parameter,
            )
        pieces[piece.tensor].append(piece)
    return tuple(
        block
        for tensor in sorted(pieces)
        for block in _blocks_of_tensor(tensor, pieces[tensor], layout)
    )


def _blocks_of_tensor(
    tensor: int, pieces: Sequence[Piece], layout: ArenaLayout
) -> list[HeldBlock]:
    # Pieces that meet are equal: two parameters may be loaded from one tensor.
    wanted = sum(boxes.volume(box) for box in {piece.box for piece in pieces})
    found: list[HeldBlock] = []
    for parameter in dict.fromkeys(piece.parameter for piece in pieces):
        mine = [p for p in pieces if p.parameter == parameter and not p.converts]
        blocks = _blocks_of_parameter(tensor, mine, layout)
        if _volume(blocks) == wanted:
            return blocks
        found += blocks
    every = list({block.box: block for block in found}.values())
    if _volume(every) != wanted:
        raise _unsuitable(pieces)
    return every


def _volume(blocks: Sequence[HeldBlock]) -> int:
    return sum(boxes.volume(block.box) for block in blocks)


def _blocks_of_parameter(
    tensor: int, pieces: Sequence[Piece], layout: ArenaLayout
) -> list[HeldBlock]:
    """The contiguous ones; what falls into too many runs is left out."""
    # What the loader copied at once has one mapping, however the source was cut.
    cuts: dict[tuple[tuple[int, ...], int], set[Box]] = defaultdict(set)
    for piece in pieces:
        origin = piece.offset - boxes.first_element(
            piece.box, [0] * len(piece.box), piece.strides
        )
        cuts[piece.strides, origin].add(piece.box)
    blocks = []
    for (strides, origin), parts in cuts.items():
        start = layout.offsets[pieces[0].parameter]
        for box in join(parts):
            for run in _contiguous(box, strides):
                first = boxes.first_element(run, [0] * len(run), strides)
                offset = start + (origin + first) * ITEMSIZE[pieces[0].dtype]
                blocks.append(HeldBlock(tensor, run, offset))
    return blocks


def join(parts: set[Box]) -> list[Box]:
    """The disjoint ``parts`` with neighbours joined, until none can be."""
    joined = sorted(parts)
    count = 0
    while len(joined) != count:
        count = len(joined)
        for dim in range(len(joined[0])):
            joined = _join_along(joined, dim)
    return joined


def _join_along(parts: list[Box], dim: int) -> list[Box]:
    rows: dict[Box, list[tuple[int, int]]] = defaultdict(list)
    for box in sorted(parts, key=lambda box: box[dim]):
        spans = rows[box[:dim] + box[dim + 1 :]]
        if spans and spans[-1][1] == box[dim][0]:
            spans[-1] = (spans[-1][0], box[dim][1])
        else:
            spans.append(box[dim])
    return [
        (*rest[:dim], span, *rest[dim:])
        for rest, spans in rows.items()
        for span in spans
    ]


def _contiguous(box: Box, strides: Sequence[int]) -> Iterator[Box]:
    """``box`` in row-major runs of a parameter where it has ``strides``; nothing if
    they are too many."""
    sizes = boxes.extent(box)
    _, outer = boxes.run_length(sizes, boxes.row_major(sizes), strides)
    if math.prod(sizes[:outer]) > MAX_RUNS:
        return
    for place in itertools.product(*(range(lo, hi) for lo, hi in box[:outer])):
        yield (*((n, n + 1) for n in place), *box[outer:])


def _unsuitable(pieces: Sequence[Piece]) -> PeerUnsuitable:
    converted = next((piece for piece in pieces if piece.converts), None)
    if converted is not None:
        return PeerUnsuitable(
            f"published as {converted.dtype} and held in another dtype, so that its "
            "bytes are not the published ones: read from the trainer, or publish in "
            "the dtype that is served",
            tensor=converted.parameter,
        )
    return PeerUnsuitable(
        f"the engine's loader scatters it over more than {MAX_RUNS} places, so that it "
        "cannot be read here as it was published: read from the trainer",
        tensor=pieces[0].parameter,
    )


# --- who reads --------------------------------------------------------------


@dataclass
class _Open:
    """Others may read ``version`` in a shadow, until then (monotonic seconds)."""

    version: int
    arena: Arena
    shadow: int
    until: float


class Offers:
    """What others may read, and for how long.

    While there is something, a thread polls NIXL, which has none of its own here: it
    is what answers a reader that connects. The bytes need nobody.

    Args:
        agent: serves the arenas.
        submit: starts work on another thread.
    """

    def __init__(self, agent: NixlAgent, submit: Submit) -> None:
        #: Held by whoever calls the agent, which is for one thread at a time. A stage
        #: keeps it: its own polls answer readers, too.
        self.agent_use = threading.Lock()
        self._agent = agent
        self._submit = submit
        self._source: Source | None = None
        self._blocks: tuple[Plan, Future[tuple[HeldBlock, ...]]] | None = None
        self._changed = threading.Condition()
        self._open: list[_Open] = []
        #: What a version is coming into: it cannot be offered.
        self._taken: tuple[Arena, frozenset[int]] | None = None
        self._thread: threading.Thread | None = None

    def know(self, arena: Arena) -> None:
        """From now on ``arena`` is what is offered. With ``agent_use``.

        How others see it stays the same for as long as it is, and so does what they
        have built on that.
        """
        self._source, self._blocks = as_source(arena, self._agent), None

    def find_blocks(self, plan: Plan, arena: Arena) -> tuple[HeldBlock, ...] | None:
        """As the function, once a plan, and without waiting: ``None`` is not yet."""
        if self._blocks is None or self._blocks[0] is not plan:
            # There may be very many.
            self._blocks = plan, self._submit(find_blocks, plan, arena.layout)
        found = self._blocks[1]
        return found.result() if found.done() else None

    def add(self, version: int, arena: Arena, shadow: int, seconds: float) -> Source:
        """Let others read what is in ``shadow`` for ``seconds``, or for longer if they
        already may; where that is.

        Raises:
            PeerUnsuitable: it is being overwritten.
        """
        with self._changed:
            if self._taken is not None:
                taken, shadows = self._taken
                if taken is arena and shadow in shadows:
                    raise PeerUnsuitable(
                        f"version {version} is making room for the next one on this "
                        "rank: read that one, or from another replica"
                    )
            until = time.monotonic() + seconds
            for offer in self._current():
                if (offer.version, offer.arena, offer.shadow) == (
                    version,
                    arena,
                    shadow,
                ):
                    offer.until = max(offer.until, until)
                    return self._source
            self._open.append(_Open(version, arena, shadow, until))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(
                    target=self._poll, name="refit-offer", daemon=True
                )
                self._thread.start()
            return self._source

    def end(
        self, version: int, besides: tuple[Arena, int | None] | None = None
    ) -> None:
        """Nobody reads ``version`` any more, but for its copy in ``besides``."""
        with self._changed:
            self._open = [
                offer
                for offer in self._open
                if offer.version != version or (offer.arena, offer.shadow) == besides
            ]
            self._changed.notify_all()

    def holds(self, arena: Arena | None) -> bool:
        """May others be reading from ``arena``?"""
        with self._changed:
            return any(offer.arena is arena for offer in self._current())

    @contextmanager
    def overwriting(self, arena: Arena | None, limit: Limit) -> Iterator[None]:
        """While a version comes into ``arena``: nobody reads what it overwrites.

        Blocks until those who do have ended. All of them are bounded in time.

        Raises:
            LeaseHeld: they had not by the deadline. StagingCancelled: see ``limit``.
        """
        if arena is None:
            yield
            return
        shadows = arena.expendable
        with self._changed:
            while reading := [
                offer
                for offer in self._current()
                if offer.arena is arena and offer.shadow in shadows
            ]:
                self._await(reading[0], limit)
            self._taken = arena, shadows
        try:
            yield
        finally:
            with self._changed:
                self._taken = None

    def _await(self, reading: _Open, limit: Limit) -> None:
        left = reading.until - time.monotonic()
        if time.monotonic() > limit.deadline:
            raise LeaseHeld(
                f"version {reading.version} is being read by other replicas from the "
                "memory that the next one needs: release their leases, or prepare "
                f"again in {left:.0f} s, when they have expired"
            )
        limit.check(f"waiting for the readers of version {reading.version}")
        self._changed.wait(min(left, WAIT_SECONDS))

    def _current(self) -> list[_Open]:
        now = time.monotonic()
        self._open = [offer for offer in self._open if now < offer.until]
        return self._open

    def _poll(self) -> None:
        last_offered = time.monotonic()
        while True:
            with self._changed:
                if self._current():
                    last_offered = time.monotonic()
                elif time.monotonic() - last_offered > LINGER_SECONDS:
                    self._thread = None
                    return
            pause = PROGRESS_SECONDS
            try:
                with self.agent_use:
                    self._agent.progress()
            except TransferFailed:
                # Of one reader; the others go on, and that one finds out by itself.
                logger.exception("dynamo-refit: a reader could not be answered")
                pause = FAILURE_SECONDS
            time.sleep(pause)
