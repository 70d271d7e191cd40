# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One rank's side of a refit: stage into the session, install, restore.

Owns the NIXL agent and the session. Staging runs on a background thread while
the model serves; install and restore run on the model's own thread.
"""

from __future__ import annotations

import time
import uuid
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dynamo.refit.errors import NothingStaged
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import RankVote, SessionUse, Stage, Staged, StageTimings
from dynamo.refit.rank.capture import capture_slices, describe_parameters
from dynamo.refit.rank.install import LiveParameters
from dynamo.refit.rank.plan import Plan, make_plan
from dynamo.refit.rank.session import (
    AbandonedSessions,
    CycleCounters,
    Limit,
    Session,
    Stopwatch,
)
from dynamo.refit.transport.nixl import NixlAgent

#: Bytes of contiguous pulls that are in flight before they are cut up locally.
SCRATCH_LIMIT = 256 << 20


class RankStager:
    """Stages versions for one rank and installs them.

    Args:
        model: the live model of this rank.
        twin: the same model on the meta device, see :mod:`capture`.
        rank: the rank in its tensor-parallel group.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, rank: int) -> None:
        self.parameters = describe_parameters(twin, model)
        self._model = model
        self._twin = twin
        self._rank = rank
        self._device = next(model.parameters()).device
        # Half a second, so before the first refit; later calls come from one thread
        # at a time.
        self._agent = NixlAgent(f"refit-{rank}-{uuid.uuid4().hex[:12]}")
        self._session: Session | None = None
        self._abandoned = AbandonedSessions()
        self._staged: int | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's parameters: what the staging arena takes."""
        return sum(parameter.nbytes for parameter in self.parameters)

    def stage(self, request: Stage, manifest: Manifest, limit: Limit) -> Staged:
        """Bring the version into the arena and keep a copy of what is live.

        Blocks the calling thread until the bytes are there.

        Raises:
            RefitError: whatever went wrong, typed; nothing is staged then, the live
                parameters are untouched, and a session that was there before is
                kept unless bytes may still arrive in its buffers.
        """
        self._staged = None
        self._abandoned.sweep()
        with self._beside_the_model():
            return self._stage(request, manifest, limit)

    def _stage(self, request: Stage, manifest: Manifest, limit: Limit) -> Staged:
        started, watch, counters = time.time(), Stopwatch(), CycleCounters()
        session, use = self._find_session(manifest, request.manifest, counters, watch)
        fresh = session is not self._session
        try:
            if use != "warm":
                with watch.time("prepare"):
                    session.address(manifest, request.manifest, counters)
            with watch.time("pull"):
                session.pull(request.slot, limit)
            with watch.time("backup"):
                session.live.copy_to(session.backup)
        except BaseException:
            self._retire(session)
            raise
        if fresh:
            self._replace_session(session)
        self._staged = request.version
        return Staged(
            vote=RankVote(
                rank=self._rank,
                nbytes=session.plan.wire_nbytes,
                session=use,
                counters=counters.frozen(),
                timings=_timings(started, watch),
            ),
            reads=session.plan.reads if request.want_reads else {},
        )

    def install(self, version: int) -> float:
        """Copy the staged ``version`` into the live parameters; milliseconds.

        Between two steps of the model only. Repeating it is safe.

        Raises:
            NothingStaged: another version, or none, is staged.
            PointerMoved: a live tensor has moved; before the copy nothing was
                written, after it everything was.
        """
        session = self._holding(version)
        start = time.perf_counter()
        session.live.copy_from(session.staged)
        return (time.perf_counter() - start) * 1e3

    def restore(self, version: int) -> float:
        """Put back what was live before ``version`` was installed; milliseconds."""
        session = self._holding(version)
        start = time.perf_counter()
        session.live.copy_from(session.backup)
        return (time.perf_counter() - start) * 1e3

    def discard(self) -> None:
        """Forget what is staged; the session stays."""
        self._staged = None

    def _beside_the_model(self) -> AbstractContextManager:
        """A stream of its own: copies on the model's would hold its kernels up."""
        if self._device.type != "cuda":
            return nullcontext()
        torch.cuda.set_device(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._stream)

    def _holding(self, version: int) -> Session:
        if self._session is None or self._staged != version:
            raise NothingStaged(
                f"version {version} is not staged here (staged: {self._staged})"
            )
        return self._session

    def _find_session(
        self,
        manifest: Manifest,
        fingerprint: str,
        counters: CycleCounters,
        watch: Stopwatch,
    ) -> tuple[Session, SessionUse]:
        current = self._session
        if current is not None and current.addressed_to == fingerprint:
            counters.hits += 1
            return current, "warm"
        layout = manifest.layout_fingerprint()
        if current is not None and current.layout == layout:
            counters.hits += 1
            return current, "re-addressed"
        with watch.time("plan"):
            manifest.validate()
            plan = self._plan(manifest)
            live = LiveParameters(self._model, plan)
        session = Session(
            self._agent, layout, plan, live, self._device, counters, watch
        )
        return session, "cold"

    def _plan(self, manifest: Manifest) -> Plan:
        return make_plan(
            manifest,
            self.parameters,
            capture_slices(self._twin, manifest),
            rank=self._rank,
            scratch_limit=SCRATCH_LIMIT,
        )

    def _replace_session(self, session: Session) -> None:
        if self._session is not None:
            self._session.close()
        self._session = session

    def _retire(self, session: Session) -> None:
        """After a failed pull: keep what is sound, and nothing that may change."""
        if session.poll_active():
            self._abandoned.add(session)
        elif session is self._session:
            session.forget_requests()
            return
        else:
            session.close()
        if session is self._session:
            self._session = None


def _timings(started: float, watch: Stopwatch) -> StageTimings:
    steps = ("plan", "allocate", "register", "prepare", "pull", "backup")
    return StageTimings(
        started_at=started,
        finished_at=time.time(),
        **{f"{step}_ms": watch.ms.get(step, 0.0) for step in steps},
    )
