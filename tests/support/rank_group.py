# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Real tensor-parallel ranks without an engine: vLLM's distributed environment, its
loader and the production extension, one process a rank, a pipe to each.

    with RankGroup(2, logs) as group:
        group.load(checkpoint)
        golden = group.golden(other_checkpoint)
        group.refit(held.write(0, other_checkpoint))
        assert group.digests() == golden

The conversation with the ranks is :class:`Conversation`, and nowhere else; where the
bytes come from is :mod:`tests.support.raw_sources`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from dynamo.refit.protocol import (
    Describe,
    Discard,
    Install,
    Installed,
    Poll,
    RankAnswer,
    RankCall,
    RankReply,
    RankRequest,
    RankVote,
    Refused,
    Reserve,
    Restore,
    Running,
    Stage,
    Staged,
    StagingChoice,
    StagingMode,
    Verified,
    Verify,
)
from dynamo.refit.worker.proof import Proof
from dynamo.refit.worker.ranks import ConversionSteps
from graphs.local import free_port
from tests.support.child import Child
from tests.support.raw_sources import RawVersion

#: What a rank may take to stage a tiny model.
STAGE_SECONDS = 30.0


@dataclass(frozen=True)
class Resources:
    """What a rank's process holds: resident bytes, file descriptors, threads."""

    resident: int
    descriptors: int
    threads: int


class RankGroup:
    """``ranks`` processes; every method asks all of them, and answers rank by rank."""

    #: What each process runs.
    module = "tests.support.rank_process"

    def __init__(self, ranks: int, logs: Path) -> None:
        port = free_port()
        self.model: Path | None = None
        self._children = [
            Child(
                self.module,
                [str(rank), str(ranks), str(port)],
                logs / f"rank-{rank}-of-{ranks}.log",
            )
            for rank in range(ranks)
        ]
        self._golden: dict[tuple[Path, Path], list[dict[str, str]]] = {}
        self._calls = 0
        self.talk = Conversation(self.call, "auto")

    def load(
        self, model: Path, staging: StagingChoice = "auto", load_format: str = "auto"
    ) -> None:
        """Serve ``model`` from now on, with nothing staged or cached."""
        self._ask("load", model, load_format)
        self.model = model
        self.talk = Conversation(self.call, staging)

    def refit_call(self, payload: bytes) -> list[bytes]:
        """The production entry point, ``RefitWorkerExtension.refit_call``."""
        return self._ask("refit_call", payload)

    def call(self, request: RankRequest) -> list[RankReply]:
        """Send a request to every rank; their replies."""
        self._calls += 1
        payload = msgspec.msgpack.encode(RankCall(self._calls, request))
        answers = [
            msgspec.msgpack.decode(answer, type=RankAnswer)
            for answer in self.refit_call(payload)
        ]
        assert [answer.call for answer in answers] == [self._calls] * len(answers)
        return [answer.reply for answer in answers]

    def digests(self) -> list[dict[str, str]]:
        """Per rank, the SHA-256 of every live parameter."""
        return self._ask("digests")

    def golden(self, checkpoint: Path) -> list[dict[str, str]]:
        """Per rank, what the digests must be when ``checkpoint`` is live."""
        key = (self.model, checkpoint)
        if key not in self._golden:
            self._golden[key] = self._ask("golden", checkpoint)
        return self._golden[key]

    def scribble(self, value: float = 1.5) -> None:
        """Overwrite every live parameter of every rank."""
        self._ask("scribble", value)

    def resources(self) -> list[Resources]:
        """Per rank, what its process holds after a garbage collection."""
        return [Resources(*held) for held in self._ask("resources")]

    def refit(self, version: RawVersion, *, scribble: bool = True) -> list[RankVote]:
        """Stage a version, scribble over the live parameters, install and verify it.

        The verification is the product's, and must have covered every parameter.
        """
        votes = self.talk.stage(version)
        if scribble:
            self.scribble()
        self.talk.install()
        self.talk.verify()
        return votes

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        for child in self._children:
            child.send(method, *arguments)
        return [child.receive() for child in self._children]

    def close(self) -> None:
        for child in self._children:
            child.close()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RanksRefused(Exception):
    """At least one rank refused; ``replies`` are those of all ranks."""

    def __init__(self, replies: list[RankReply]) -> None:
        refused = [reply for reply in replies if isinstance(reply, Refused)]
        super().__init__("; ".join(str(reply.failure) for reply in refused))
        self.replies = replies
        self.failures = [reply.failure for reply in refused]


class Conversation:
    """What a worker says to its ranks, version after version: the one place in the
    tests of ranks that knows the messages.

    Args:
        call: sends a request to every rank and returns their replies.
        staging: where versions wait.
    """

    def __init__(
        self, call: Callable[[RankRequest], list[RankReply]], staging: StagingChoice
    ) -> None:
        self._call = call
        self.staging = staging
        self._described = False
        self._sent: str | None = None
        self._version = 0

    def start(self) -> None:
        """Let every rank get ready, with the memory for a version, as a worker does
        before it is admitted; once.

        Raises:
            RanksRefused: a rank cannot be refitted.
        """
        if not self._described:
            described = self._finish(Describe(staging=self.staging))
            modes = [reply.memory.mode for reply in described]
            mode = max(modes, key=get_args(StagingMode).index)
            self._finish(Reserve(staging=mode))
            self._described = True

    def stage(
        self, version: RawVersion, seconds: float = STAGE_SECONDS
    ) -> list[RankVote]:
        """Stage a version on every rank and prove it; their votes.

        Raises:
            RanksRefused: a rank did not; nothing is staged on any rank then.
            RefitError: all of them did, but they hold something else.
        """
        self.start()
        self._version += 1
        fingerprint = version.manifest.fingerprint()
        known = self._sent == fingerprint
        request = Stage(
            version=self._version,
            manifest=fingerprint,
            slot=version.slot,
            staging=self.staging,
            seconds=seconds,
            payload=None if known else msgspec.msgpack.encode(version.manifest),
            want_reads=True,
        )
        self._sent = fingerprint
        try:
            staged = self._finish(request)
        except RanksRefused:
            self.discard()
            raise
        assert all(isinstance(reply, Staged) for reply in staged), staged
        proof = Proof(version.manifest, [reply.reads for reply in staged])
        parts = [np.frombuffer(reply.parts, dtype="<u8") for reply in staged]
        proof.check(version.fingerprints, parts)
        return [reply.vote for reply in staged]

    def install(self) -> None:
        """Make the staged version live on every rank."""
        replies = self._finish(Install(version=self._version))
        assert all(isinstance(reply, Installed) for reply in replies), replies

    def verify(self) -> None:
        """Compare what is live with it."""
        replies = self._finish(Verify(version=self._version))
        assert all(isinstance(reply, Verified) for reply in replies), replies

    def restore(self) -> None:
        """Undo the install."""
        replies = self._finish(Restore(version=self._version))
        assert all(isinstance(reply, Installed) for reply in replies), replies

    def discard(self) -> None:
        """Forget what is staged, or being staged, on every rank."""
        deadline = time.monotonic() + STAGE_SECONDS
        request = Discard(version=self._version)
        while any(isinstance(reply, Running) for reply in self._call(request)):
            assert time.monotonic() < deadline, "a rank does not let go"
            time.sleep(0.01)

    def _finish(self, request: RankRequest) -> list[RankReply]:
        """Every rank's answer to ``request``, when what it started has ended."""
        deadline = time.monotonic() + STAGE_SECONDS + 10
        replies = self._call(request)
        steps = ConversionSteps()
        while any(isinstance(reply, Running) for reply in replies):
            assert time.monotonic() < deadline, "a rank works for ever"
            time.sleep(0.005)
            poll = Poll(version=self._version, convert=steps.before)
            polled = self._call(poll)
            steps.go_on(polled)
            replies = [
                now if isinstance(before, Running) else before
                for before, now in zip(replies, polled, strict=True)
            ]
        if any(isinstance(reply, Refused) for reply in replies):
            raise RanksRefused(replies)
        return replies
