# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One rank's side of a refit: stage into the session, install, restore, verify.

Owns the NIXL agent, the model's arena, the sessions and the versions. Staging and
verifying run on a background thread while the model serves; conversions, install and
restore run on the model's thread, between two steps.
"""

from __future__ import annotations

import gc
import uuid

import numpy as np
from vllm.logger import init_logger

from dynamo.refit import fingerprint
from dynamo.refit.errors import NoWayBack, PeerUnsuitable
from dynamo.refit.manifest import CheckedManifest, Manifest
from dynamo.refit.protocol import (
    Offer,
    Offered,
    RankVote,
    SessionUse,
    Stage,
    Staged,
    StagingChoice,
)
from dynamo.refit.rank import host_copy
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.conversion import RuntimeForm
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.handover import Handover
from dynamo.refit.rank.image import held_tensors, runtime_layout, tensors_of_image
from dynamo.refit.rank.install import LiveModel
from dynamo.refit.rank.limits import LIMITS
from dynamo.refit.rank.loads import Filling, Loads
from dynamo.refit.rank.model_arena import ModelArena
from dynamo.refit.rank.offer import Offers
from dynamo.refit.rank.plan import Plan, make_plan
from dynamo.refit.rank.runtime_parts import whole_parts
from dynamo.refit.rank.session import Session
from dynamo.refit.rank.sessions import KeptSessions
from dynamo.refit.rank.slices import IntakeLayout, order_of_arrival
from dynamo.refit.rank.streams import new_stream, one_thread, use_stream
from dynamo.refit.rank.versions import Version, Versions
from dynamo.refit.transport import ucx
from dynamo.refit.transport.nixl import NixlAgent

logger = init_logger("vllm.dynamo_refit")

#: Bytes a second of a rank's reads below which they are said to be slow: what one
#: socket has. And the bytes from which on a rate says something.
SLOW_RATE, SLOW_NBYTES = 1e9, 64 << 20


class RankStager:
    """Stages versions for one rank and installs them.

    Args:
        form: what this rank's engine computes with.
        rank: the rank in its tensor-parallel group of ``ranks``.
    """

    def __init__(self, form: RuntimeForm, rank: int, ranks: int) -> None:
        self._rank = rank
        self._ranks = ranks
        self._device = next(form.model.parameters()).device
        self._limits = LIMITS[self._device.type]
        self._loads = Loads(form)
        #: Fingerprint of the form in which this rank computes.
        self.layout = runtime_layout(form, rank, ranks)
        self._live = LiveModel(form.model, self._loads.filled)
        ucx.show_reads()
        # Half a second, so before the first refit.
        self._agent = NixlAgent(f"refit-{rank}-{uuid.uuid4().hex[:12]}")
        self._sessions = KeptSessions()
        self._versions = Versions()
        #: The conversions of the pull that is under way.
        self.handover: Handover | None = None
        self._stream = new_stream(self._device)
        self._follower = one_thread("refit-follower", self._device)
        self._offers = Offers(self._agent, self._follower.submit)
        self.memory = ModelArena(
            self._agent, self._loads, self._live, self._device, ranks, self._offers.know
        )
        fingerprint.warm_up(self._device)
        if self._device.type == "cuda":
            host_copy.warm_up()

    @property
    def parameters(self) -> int:
        """How many parameters this rank loads."""
        return len(self._loads.form.parameters)

    def stage(self, request: Stage, checked: CheckedManifest, limit: Limit) -> Staged:
        """Bring the version into the arena.

        Blocks the calling thread, also while other replicas read what it would
        overwrite.

        Raises:
            RefitError: whatever went wrong, typed; nothing is staged then, the live
                parameters are untouched, and a session that was there before is
                kept unless bytes may still arrive in its buffers.
        """
        cycle = Cycle()
        self._versions.staged = None
        with self._offers.overwriting(self.memory.arena, limit), self._offers.agent_use:
            return self._stage(request, checked, limit, cycle)

    def _stage(
        self, request: Stage, checked: CheckedManifest, limit: Limit, cycle: Cycle
    ) -> Staged:
        use_stream(self._stream)
        # The last install reads what is about to be overwritten.
        self._live.wait()
        self._sessions.abandoned.sweep(self._offers.holds)
        self._sessions.evict()
        session, use = self._find_session(checked, request, cycle)
        if use != "warm":
            self._address(session, checked, cycle)
        try:
            with cycle.time("pull"):
                parts = self._pull(session, request.slot, limit, cycle)
        except BaseException as error:
            self._retire(session, error)
            raise
        self._sessions.put_in_place(session)
        if use != "warm":
            _warn_if_slow(
                self._rank, session.plan, checked.manifest, cycle.ms["wire"] / 1e3
            )
        if use == "cold":
            # As vLLM does at its start: what stays is not looked through again and
            # again, while no token can be made.
            gc.freeze()
        self._versions.staged = Version(
            request.version,
            session.live_parts,
            session.landed,
            tuple(session.functions),
        )
        return Staged(
            vote=RankVote(
                rank=self._rank,
                nbytes=session.plan.wire_nbytes,
                memory=session.memory,
                session=use,
                counters=cycle.counters(),
                timings=cycle.timings(),
                can_undo=session.arena.old is not None,
                converted=session.converted,
            ),
            parts=parts.astype("<u8").tobytes(),
            # A plan that is made anew may have its pieces in another order.
            reads=session.reads if request.want_reads or use == "cold" else (),
        )

    def _find_session(
        self, checked: CheckedManifest, request: Stage, cycle: Cycle
    ) -> tuple[Session, SessionUse]:
        held = [
            session
            for session in self._sessions.all
            if request.staging in ("auto", session.memory.mode)
        ]
        for session in held:
            if session.addressed_to == checked.digest:
                cycle.built["hits"] += 1
                return session, "warm"
        for session in held:
            if session.layout == checked.layout:
                cycle.built["hits"] += 1
                return session, "re-addressed"
        self._sessions.make_room()
        return self._build_session(checked, request.staging, cycle), "cold"

    def _build_session(
        self, checked: CheckedManifest, staging: StagingChoice, cycle: Cycle
    ) -> Session:
        manifest = checked.manifest
        with cycle.time("plan"):
            filling = self._filling(manifest)
            first = order_of_arrival(manifest, filling.slices)
            layout = self.memory.arrange(self.memory.layout(filling.live, first))
            memory = self.memory.plan_memory(staging)
            conversions = filling.conversions
            intake = IntakeLayout([c.inputs for c in conversions], self._limits.scratch)
            plan = make_plan(
                manifest,
                filling.parameters,
                filling.slices,
                rank=self._rank,
                limits=self._limits,
                arena=layout,
                intake=intake,
            )
        logger.info(
            "dynamo-refit: rank %d stages in mode %s: %d bytes on the device, %d in "
            "host memory; %d bytes come in %d runs",
            self._rank,
            memory.mode,
            memory.device_nbytes,
            memory.host_nbytes,
            plan.wire_nbytes,
            plan.descriptors,
        )
        if self.memory.arena is None:
            self.memory.make(filling.live, layout, memory, cycle)
        return Session(
            self._agent,
            checked.layout,
            plan,
            memory,
            self.memory.arena,
            self._live.filled,
            cycle,
            conversions,
            self._loads.form.convert,
        )

    def _filling(self, manifest: Manifest) -> Filling:
        if not manifest.layouts:
            return self._loads.filling(manifest.tensors)
        tensors = tensors_of_image(manifest, self._rank, self._ranks, self.layout)
        return self._loads.filling_of_image(tensors)

    def _address(
        self, session: Session, checked: CheckedManifest, cycle: Cycle
    ) -> None:
        try:
            with cycle.time("prepare"):
                session.address(checked.manifest, checked.digest, cycle)
        except BaseException:
            if session not in self._sessions.all:
                session.close()
            raise

    def _pull(
        self, session: Session, slot: int, limit: Limit, cycle: Cycle
    ) -> np.ndarray:
        """The version's bytes in the arena."""
        with cycle.time("backup"):
            self.memory.begin()
        self.handover = handover = session.hand_over()
        try:
            return session.pull(slot, limit, self._follower.submit, cycle, handover)
        finally:
            self.handover = None

    def _retire(self, session: Session, error: BaseException) -> None:
        if not self._sessions.retire(session, error):
            self.memory.arena = None

    # --- after a stage ----------------------------------------------------------

    def check(self, version: int) -> None:
        """Whether :meth:`install` could begin, without writing anything.

        Raises:
            NothingStaged, PointerMoved: as :meth:`install`.
        """
        self._versions.require_staged(version)
        self._live.check_addresses()

    def install(self, version: int) -> None:
        """Put the staged ``version`` into the live parameters.

        Between two steps only; see :meth:`LiveModel.copy_from` for when it is
        done. Repeating it is safe.

        Raises:
            NothingStaged: another version, or none, is staged.
            PointerMoved: a live tensor has moved; before the copy nothing was
                written, after it everything is.
        """
        self._versions.require_staged(version)
        self._live.copy_from(self.memory.arena.staged)
        self.memory.arena.installed()
        self._versions.installed()
        # What is staged is what the current session pulled.
        self._sessions.installed()

    def restore(self, version: int) -> None:
        """Put back what was live before ``version`` was installed, as an install does.

        Raises:
            NoWayBack: there is no copy of it.
        """
        self._versions.require_staged(version)
        arena = self.memory.arena
        if not arena.memory.can_undo:
            raise NoWayBack(
                f"{arena.memory.mode} staging keeps no copy of the old weights: give "
                "this worker the memory for mode host"
            )
        if arena.old is None:
            raise NoWayBack(
                "the copy of what was live was not whole when the next version came"
            )
        self._live.copy_from(arena.old)
        arena.restored()
        self._versions.restored()

    def verify(self, version: int) -> float:
        """Compare the live weights with ``version``, which was installed last; the
        milliseconds that the device wrote for the install.

        Blocks until they are written, and for one read of them.

        Raises:
            FingerprintMismatch: names a parameter that is something else.
            NothingStaged: another version, or none, was installed last.
        """
        live = self._versions.require_live(version)
        use_stream(self._stream)
        with self._offers.agent_use:
            self._sessions.evict()
        copy_ms = self._live.wait()
        live.parts.check(live.landed, self._rank)
        self.memory.keep()
        return copy_ms

    def discard(self) -> None:
        """Forget what is staged; the session stays. Others may not read it any more,
        unless it is live."""
        staged = self._versions.staged
        if staged is not None and self.memory.arena is not None:
            live = self.memory.arena, self.memory.arena.live
            self._offers.end(staged.number, besides=live)
        self._versions.staged = None

    # --- peers ------------------------------------------------------------------

    def offer(self, request: Offer) -> Offered | None:
        """Let others read a version from the shadow that has it; ``None``: ask again,
        the shadow is being compared with what was staged.

        Raises:
            PeerUnsuitable: no shadow has it, or not all of it.
            FingerprintMismatch: the shadow was written by something else.
        """
        held, arena, shadow = self._find_copy(request)
        source = self._offers.add(request.version, arena, shadow, request.seconds)

        def find() -> np.ndarray:
            image = arena.shadows[shadow]
            held.parts.in_shadow(image).check(held.landed, self._rank)
            names = [tensor.name for tensor in held_tensors(arena.layout)]
            return whole_parts(image.by_name[name] for name in names).fold()

        parts = self._offers.parts(request.version, shadow, find)
        if parts is None:
            return None
        return Offered(
            rank=self._rank,
            slot=shadow,
            source=source,
            tensors=held_tensors(arena.layout),
            parts=parts.astype("<u8").tobytes(),
            layout=self.layout,
        )

    def withdraw(self, version: int) -> None:
        """Nobody reads ``version`` here any more."""
        self._offers.end(version)

    def _find_copy(self, request: Offer) -> tuple[Version, Arena, int]:
        """The version, and the shadow that has it."""
        arena = self.memory.arena
        held, shadow = self._versions.staged, arena and arena.target
        if request.live:
            held, shadow = self._versions.live, arena and arena.live
        if held is None or held.number != request.version or shadow is None:
            raise PeerUnsuitable(
                f"this rank's staging buffers do not have version {request.version} "
                "any more: read the one that is served now, or from another replica"
            )
        if held.functions:
            raise PeerUnsuitable(
                "this engine keeps packed weights in functions, which cannot be read: "
                "read from the trainer"
            )
        return held, arena, shadow


def _warn_if_slow(rank: int, plan: Plan, manifest: Manifest, seconds: float) -> None:
    # Conversions wait for the model's steps, and reads for them.
    if plan.intake.groups:
        return
    if plan.wire_nbytes < SLOW_NBYTES or plan.wire_nbytes > SLOW_RATE * seconds:
        return
    sources = ", ".join(manifest.sources[number].agent for number in plan.sources)
    logger.warning(
        "dynamo-refit: rank %d read from %s at %.2f GB/s, the speed of a socket: see "
        "UCX's table of memory reads in this log, and run dynamo-refit doctor here",
        rank,
        sources,
        plan.wire_nbytes / seconds / 1e9,
    )
