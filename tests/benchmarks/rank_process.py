# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The inside of a rank of :mod:`tests.benchmarks.ranks`.

python -m tests.benchmarks.rank_process PIPE RANK RANKS PORT
"""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from dynamo.refit.host_memory import host_zeros
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    Describe,
    Install,
    Poll,
    RankAnswer,
    RankCall,
    RankReply,
    RankRequest,
    Refused,
    Running,
    Stage,
    Verify,
)
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.pipeline import Pipeline
from dynamo.refit.rank.sessions import KeptSessions
from dynamo.refit.rank.versions import Versions
from tests.benchmarks.baselines import ModelExpressRead, PlainCopy, RawRead
from tests.benchmarks.ranks import SECONDS, CycleTimes
from tests.support.child import answer_requests
from tests.support.rank_process import RankProcess

#: As often as an agent asks a rank whether it is done: see ``worker/ranks.py``.
POLL_SECONDS = 0.02


class BenchRankProcess(RankProcess):
    """The inside of a rank; each public method is a request."""

    def __init__(self, rank: int, ranks: int, port: int) -> None:
        super().__init__(rank, ranks, port)
        self._calls = 0
        self._version = 0
        self._sent: str | None = None
        self._raw: RawRead | None = None
        self._copy: PlainCopy | None = None
        self._modelexpress: ModelExpressRead | None = None

    def load(self, directory: Path, load_format: str = "dummy") -> None:
        super().load(directory, load_format)
        self._version, self._sent = 0, None
        self._call(Describe(staging="auto"))

    def cycle(self, fingerprint: str, payload: bytes) -> CycleTimes:
        self._version += 1
        known = self._sent == fingerprint
        self._sent = fingerprint
        stage = Stage(
            version=self._version,
            manifest=fingerprint,
            slot=0,
            staging="auto",
            seconds=SECONDS,
            payload=None if known else payload,
            want_reads=True,
        )
        called = time.time()
        staged = self._finish(stage)
        timings = staged.vote.timings
        began = time.perf_counter()
        self._finish(Install(version=self._version))
        install_ms = (time.perf_counter() - began) * 1e3
        began = time.perf_counter()
        self._finish(Verify(version=self._version))
        return CycleTimes(
            vote=staged.vote,
            arrival=(timings.started_at - called) * 1e3 + timings.lead_ms,
            stage=(timings.finished_at - called) * 1e3,
            install=install_ms,
            verify=(time.perf_counter() - began) * 1e3,
            parts=staged.parts,
            reads=staged.reads,
        )

    def forget(self) -> None:
        stager = self._stager
        for session in stager._sessions.all:
            session.close()
        stager._sessions = KeptSessions()
        stager.memory.arena.close()
        stager.memory.arena = None
        stager._versions = Versions()
        gc.collect()

    def open_baselines(self, payload: bytes) -> None:
        manifest = msgspec.msgpack.decode(payload, type=Manifest)
        plan = self._stager._sessions.current.plan
        nbytes = max(plan.arena.nbytes, plan.scratch_nbytes, plan.wire_nbytes)
        here, there = host_zeros(nbytes), host_zeros(plan.wire_nbytes)
        self._raw = RawRead(manifest, plan.wire_nbytes, here)
        self._copy = PlainCopy(here[: plan.wire_nbytes], there)
        self._modelexpress = ModelExpressRead(manifest, plan, here)

    def raw(self) -> tuple[int, float]:
        return self._raw.run()

    def copy(self) -> tuple[int, float]:
        return self._copy.run()

    def modelexpress(self) -> tuple[int, float]:
        return self._modelexpress.run()

    def alone(self) -> tuple[int, float]:
        """The last cycle's reads once more, with nothing to follow them."""
        stager = self._stager
        session, shadow = stager._sessions.current, stager.memory.arena.target
        limit = Limit(time.monotonic() + SECONDS, lambda: False)
        pipeline = Pipeline(limit, stager._follower.submit, lambda number: None)
        for number, reads in enumerate(session._requests.waves[shadow][0]):
            pipeline.post(number, session.plan.waves[number].half, reads)
        pipeline.drain()
        return session.plan.wire_nbytes, pipeline.wire_seconds

    def close_baselines(self) -> None:
        self._raw.close()
        self._raw = self._copy = self._modelexpress = None
        gc.collect()

    @property
    def _stager(self) -> Any:
        return self._worker._refit._stager

    def _finish(self, request: RankRequest) -> RankReply:
        reply = self._call(request)
        wait = POLL_SECONDS / 16
        while isinstance(reply, Running):
            time.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS)
            reply = self._call(Poll(version=self._version))
        return reply

    def _call(self, request: RankRequest) -> RankReply:
        self._calls += 1
        call = msgspec.msgpack.encode(RankCall(self._calls, request))
        answer = msgspec.msgpack.decode(self.refit_call(call), type=RankAnswer)
        if isinstance(answer.reply, Refused):
            raise RuntimeError(str(answer.reply.failure))
        return answer.reply


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    answer_requests(descriptor, BenchRankProcess(rank, ranks, port))
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
