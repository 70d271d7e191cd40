# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What is kept from one cycle to the next: plan, scratch, prepared reads, views.

Built aside and put in place whole; a warm cycle posts its reads again and builds
nothing. It never writes live weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from dynamo.refit.errors import TransferFailed
from dynamo.refit.fingerprint import Batch, Part, version_fingerprint
from dynamo.refit.manifest import Box, Manifest
from dynamo.refit.protocol import MemoryUse
from dynamo.refit.rank import bounce, boxes
from dynamo.refit.rank.bounce import Bounce
from dynamo.refit.rank.buffers import Arena, RegisteredBuffer, views_of
from dynamo.refit.rank.conversion import Conversion, Converted
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.handover import Handover
from dynamo.refit.rank.install import synchronize
from dynamo.refit.rank.pipeline import Pipeline, Submit
from dynamo.refit.rank.plan import Piece, Plan, Wave
from dynamo.refit.rank.processing import Function
from dynamo.refit.rank.requests import Requests
from dynamo.refit.rank.runtime_parts import RuntimeParts, piece_view, whole_parts
from dynamo.refit.transport.nixl import NixlAgent

#: Makes what a conversion makes of its inputs, by name.
Convert = Callable[[Conversion, Mapping[str, torch.Tensor]], Converted]


class Session:
    """The plan and the requests of one layout on one rank.

    Args:
        agent: registers scratch and makes the requests.
        layout: the manifest's layout fingerprint.
        plan: what goes where.
        memory: the staging mode, and what it takes.
        arena: where a staged version waits; scratch and intake are beside it.
        live: by name, the live tensors that a version fills.
        conversions: what is made of what is read, in the order of the plan's intake.
        convert: makes it.
    """

    def __init__(
        self,
        agent: NixlAgent,
        layout: str,
        plan: Plan,
        memory: MemoryUse,
        arena: Arena,
        live: Mapping[str, torch.Tensor],
        cycle: Cycle,
        conversions: Sequence[Conversion] = (),
        convert: Convert | None = None,
    ) -> None:
        self.layout = layout
        self.plan = plan
        self.memory = memory
        self.arena = arena
        self._agent = agent
        self._requests: Requests | None = None
        self._former: Requests | None = None
        #: Made when a source in host memory is met first.
        self._bounced: Bounce | None = None
        self._wave_nbytes = [wave.nbytes for wave in plan.waves]
        self._conversions = conversions
        self._convert = convert
        read = [p for p in plan.pieces if p.parameter not in plan.intake.offsets]
        converted = [name for each in conversions for name in each.outputs]
        self._by_name = sorted(range(len(converted)), key=converted.__getitem__)
        self.live_parts = RuntimeParts(read, converted, live)
        #: What of the pull's parts are of pieces that are served as they are read.
        self._read = np.array(
            [p.parameter not in plan.intake.offsets for p in plan.pieces], dtype=bool
        )
        # At least a byte: NIXL does not register nothing.
        nbytes = max(plan.scratch_nbytes, 1)
        self._scratch = RegisteredBuffer(agent, nbytes, arena.device, cycle)
        # As in an arena: memory that torch hands out again must not be registered.
        with ExitStack() as undo:
            undo.callback(self._scratch.close)
            # NIXL does not read into it: it is not registered.
            intake = torch.empty(
                plan.intake.nbytes, dtype=torch.uint8, device=arena.device
            )
            self._intake = views_of(intake, plan.intake)
            # Nothing comes into what pads a vocabulary.
            self._padded = [
                [self._intake[p.name] for p in group if p.unloaded]
                for group in plan.intake.groups
            ]
            self._works = [
                [
                    _WaveWork(wave, self._scratch.bytes, shadow.by_name | self._intake)
                    for wave in plan.waves
                ]
                for shadow in arena.shadows
            ]
            self._converted = [
                whole_parts(shadow.by_name[name] for name in converted)
                for shadow in arena.shadows
            ]
            undo.pop_all()
        #: The local work of the shadow that was pulled into last.
        self._current = self._works[0]
        self._converted_parts = np.zeros(len(converted), dtype=np.uint64)
        #: What was converted for it and is no tensor.
        self.functions: list[Function] = []

    @property
    def addressed_to(self) -> str | None:
        """Fingerprint of the manifest that the prepared requests read from; ``None``
        when a source was loaded anew since they were prepared."""
        if self._requests is None or self._requests.stale:
            return None
        return self._requests.manifest

    @property
    def reads(self) -> tuple[tuple[int, Box], ...]:
        """What the parts of :meth:`pull` are of: tensor numbers and boxes."""
        return self.plan.reads

    def address(self, manifest: Manifest, fingerprint: str, cycle: Cycle) -> None:
        """Prepare the requests for every slot of ``manifest``.

        Those of the manifest before it are kept until a pull has worked.

        Raises:
            TransferFailed: a source is refused; the session is as it was.
        """
        self._forget_former()
        memories = {manifest.sources[n].memory for n in self.plan.sources}
        if self._bounced is None and any(
            bounce.is_needed(memory, self.arena.device) for memory in memories
        ):
            self._bounced = Bounce(self._agent, cycle)
        requests = Requests(
            self._agent,
            manifest,
            fingerprint,
            self.plan,
            [shadow.buffer.bytes for shadow in self.arena.shadows],
            self._scratch.bytes,
            cycle,
            self._bounced,
        )
        self._former, self._requests = self._requests, requests

    def hand_over(self) -> Handover:
        """The conversions of the next pull, for the model's thread.

        Not kept here: they refer to this session, and a session that is closed has to
        be free at once, without a collection of garbage.
        """
        self.functions = []
        convert = self._convert_into(self.arena.target)
        return Handover(len(self._conversions), convert)

    def pull(
        self,
        slot: int,
        limit: Limit,
        submit: Submit,
        cycle: Cycle,
        handover: Handover,
    ) -> np.ndarray:
        """Read every byte of ``slot`` into the arena's target; the parts of its
        fingerprint, uint64, as ``reads``.

        Args:
            submit: runs local work in order, on one other thread.
            handover: of this pull.

        Raises:
            TransferFailed: a source broke off. StagingCancelled: see ``limit``.
                After either, :meth:`poll_active` says whether bytes may still arrive.
            LayerFailed: something could not be made of what was read.
        """
        if self._requests is None:
            raise TransferFailed("the session has no prepared requests")
        shadow = self.arena.target
        self._current = self._works[shadow]
        limit.progress.nbytes = 0
        limit.progress.total_nbytes = self.plan.wire_nbytes
        settle = functools.partial(self._settle, cycle, limit, handover)
        pipeline = Pipeline(limit, submit, settle)
        try:
            for number, reads in enumerate(self._requests.waves[shadow][slot]):
                cycle.first_read()
                pipeline.post(number, self.plan.waves[number].half, reads)
            pipeline.drain()
        finally:
            # Whatever happened, nobody works on these buffers after this.
            self._requests.give_up()
            pipeline.join()
            cycle.add("wire", pipeline.wire_seconds)
        with cycle.time("convert"):
            handover.wait(handover.total, limit)
            self._converted_parts = self._converted[shadow].fold()
        self.live_parts.prepare()
        self._forget_former()
        return np.concatenate([work.parts for work in self._current])

    def _settle(
        self, cycle: Cycle, limit: Limit, handover: Handover, number: int
    ) -> None:
        """What follows the arrival of a wave, on the follower's thread."""
        wave = self.plan.waves[number]
        handover.wait(wave.after, limit)
        for begun in wave.begins:
            for tensor in self._padded[begun]:
                tensor.zero_()
        with cycle.time("fingerprint"):
            self._current[number].run()
        # The next wave overwrites scratch, outside of any stream.
        synchronize(self.arena.device)
        handover.offer(wave.ready)
        limit.progress.nbytes += self._wave_nbytes[number]

    def _convert_into(self, shadow: int) -> Callable[[int], None]:
        tensors = self.arena.shadows[shadow].by_name

        def convert(number: int) -> None:
            conversion = self._conversions[number]
            converted = self._convert(
                conversion, {p.name: self._intake[p.name] for p in conversion.inputs}
            )
            for name in conversion.outputs:
                tensors[name].copy_(converted.tensors[name])
            self.functions += converted.functions

        return convert

    @property
    def landed(self) -> np.ndarray:
        """What ``live_parts`` must show after the install: of what is served as it is
        read, the parts of what it became in the parameters' dtypes; and one part of
        each tensor that was converted."""
        pieces = np.concatenate([work.landed for work in self._current])
        return np.concatenate([pieces[self._read], self._converted_parts])

    @property
    def converted(self) -> str:
        """Fingerprint of what was converted last, whatever the order in which that was
        done; empty: nothing is."""
        if not self._by_name:
            return ""
        return version_fingerprint(self._converted_parts[self._by_name])

    def poll_active(self) -> bool:
        """May bytes still arrive in these buffers?"""
        return self._requests is not None and self._requests.poll_active()

    def forget_requests(self) -> None:
        """Release the prepared requests and their peers, for those that worked before
        them, if there are any; the buffers stay."""
        if self._requests is not None:
            self._requests.close()
        self._requests, self._former = self._former, None

    def _forget_former(self) -> None:
        if self._former is not None:
            self._former.close()
            self._former = None

    def close(self) -> None:
        """Give back all but the arena. Only when no read is active."""
        self._forget_former()
        self.forget_requests()
        self._scratch.close()
        if self._bounced is not None:
            self._bounced.close()


class _WaveWork:
    """The local work of one wave, with all of its views made once.

    ``parts`` are the pieces' parts of the version's fingerprint; ``landed`` are those
    of the same boxes where they were put, which differ where a piece was converted.
    """

    def __init__(
        self,
        wave: Wave,
        scratch: torch.Tensor,
        places: Mapping[str, torch.Tensor],
    ) -> None:
        parts, placed = [], []
        for piece in wave.pieces:
            place = piece_view(piece, places[piece.parameter])
            if piece.scratch is None:
                parts.append(Part(place, piece.box, piece.shape))
            else:
                source = _scratch_view(piece, scratch)
                parts.append(Part(source, piece.box, piece.shape, copy_to=place))
            placed.append(place)
        self._arrived = Batch(parts, [p.scratch is not None for p in wave.pieces])
        self._converted = [n for n, piece in enumerate(wave.pieces) if piece.converts]
        self._placed = Batch(
            [
                Part(placed[n], wave.pieces[n].box, wave.pieces[n].shape)
                for n in self._converted
            ]
        )
        self.parts = self.landed = np.zeros(len(wave.pieces), dtype=np.uint64)

    @torch.inference_mode()
    def run(self) -> None:
        """Fingerprint what has arrived, and copy what came through scratch on."""
        self.parts = self.landed = self._arrived.fold(copy=True)
        if self._converted:
            self.landed = self.parts.copy()
            self.landed[self._converted] = self._placed.fold()


def _scratch_view(piece: Piece, scratch: torch.Tensor) -> torch.Tensor:
    dtype = getattr(torch, piece.dtype)
    start = piece.scratch.start // dtype.itemsize
    return (
        scratch[: scratch.numel() // dtype.itemsize * dtype.itemsize]
        .view(dtype)
        .as_strided(boxes.extent(piece.box), piece.scratch.strides, start)
    )
