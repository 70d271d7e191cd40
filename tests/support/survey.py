# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether an architecture is refitted: real ranks serve a checkpoint of it, take two
versions, and are compared with models that vLLM loads from these afresh.

    with Survey(2, logs) as survey:
        finding = survey.judge("qwen3")
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

from dynamo.refit import errors
from dynamo.refit.errors import Failure, RefitError
from tests.support.architectures import checkpoint
from tests.support.child import ChildFailed
from tests.support.rank_group import RankGroup, RanksRefused
from tests.support.raw_sources import RawSources

#: Of the checkpoint that is served at first, and of the versions.
SEEDS = (1, 2, 3)

#: Tensors that a finding names.
MOST_NAMES = 5

#: Trainer ranks over which each version's tensors are cut.
SOURCES = 2


class Outcome(enum.StrEnum):
    """How the survey of an architecture ended."""

    REFITTED = "refitted"
    REFUSED = "refused at start"
    #: vLLM's own loading failed.
    NOT_LOADED = "not loaded"
    # What must not be.
    REFUSED_LATE = "refused after start"
    CORRUPT = "corrupt"
    BARE = "bare exception"

    @property
    def good(self) -> bool:
        return self in (Outcome.REFITTED, Outcome.REFUSED, Outcome.NOT_LOADED)


@dataclass(frozen=True)
class Finding:
    """What the survey of an architecture found; ``served_as`` is vLLM's class."""

    architecture: str
    ranks: int
    outcome: Outcome
    reason: str = ""
    served_as: str = ""


class NotLoaded(Exception):
    """vLLM does not load a checkpoint on this machine."""


class SurveyedRanks(RankGroup):
    """A :class:`RankGroup` that can load any architecture, and say what differs."""

    module = "tests.support.surveyed_rank"

    def serve(self, model: Path) -> str:
        """Load ``model`` on every rank; the name of vLLM's class.

        Raises:
            NotLoaded: vLLM cannot. Ranks may still wait for each other then: make
                others.
        """
        try:
            self.load(model)
        except ChildFailed as failed:
            raise NotLoaded(_last_line(failed)) from failed
        return self._ask("served_as")[0]

    def differences(self, checkpoint: Path) -> list[str]:
        """The tensors that are not those of a model that vLLM loads afresh."""
        found = self._ask("differences", checkpoint)
        return [
            f"{name} of rank {rank}"
            for rank, names in enumerate(found)
            for name in names
        ]


class Survey:
    """Judges architectures one after another, on ``ranks`` ranks.

    Args:
        ranks: the tensor-parallel size.
        logs: a directory for the processes' output.
    """

    def __init__(self, ranks: int, logs: Path) -> None:
        self._size = ranks
        self._logs = logs
        self._start()

    def judge(self, architecture: str) -> Finding:
        """Serve an architecture and refit it twice; takes some seconds.

        Raises nothing: what a process of the survey raises is the finding, and another
        process takes its place.
        """
        start, *versions = (checkpoint(architecture, seed) for seed in SEEDS)
        try:
            served_as = self.ranks.serve(start)
        except NotLoaded as error:
            self._restart()
            finding = Outcome.NOT_LOADED, str(error)
            return Finding(architecture, self._size, *finding, served_as="")
        try:
            finding = self._refit(start, versions)
        except Exception as error:
            # Whatever a rank or the conversation with it comes to.
            self._restart()
            finding = Outcome.BARE, f"{type(error).__name__}: {error}"
        return Finding(architecture, self._size, *finding, served_as=served_as)

    def _refit(self, start: Path, versions: list[Path]) -> tuple[Outcome, str]:
        ranks, outcome = self.ranks, Outcome.REFUSED
        try:
            ranks.talk.start()
            outcome = Outcome.REFUSED_LATE
            held = self._sources.hold(start, SOURCES)
            for slot, version in enumerate(versions):
                ranks.talk.stage(held.write(slot, version))
                ranks.talk.install()
                ranks.talk.verify()
                if wrong := ranks.differences(version):
                    return Outcome.CORRUPT, ", ".join(wrong[:MOST_NAMES])
            held.release()
        except RanksRefused as refused:
            typed = all(is_typed(failure) for failure in refused.failures)
            return outcome if typed else Outcome.BARE, str(refused.failures[0])
        except RefitError as error:
            return outcome, f"{type(error).__name__}: {error} (tensor {error.tensor})"
        return Outcome.REFITTED, ""

    def _start(self) -> None:
        self.ranks = SurveyedRanks(self._size, self._logs)
        self._sources = RawSources(SOURCES, self._logs)

    def _restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        self.ranks.close()
        self._sources.close()

    def __enter__(self) -> Survey:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_line(failed: ChildFailed) -> str:
    """Without the name of the child's own exception."""
    return str(failed).strip().splitlines()[-1].partition("CannotLoad: ")[2]


def is_typed(failure: Failure) -> bool:
    """Whether it carries one of this package's errors."""
    kind = getattr(errors, failure.kind, None)
    return isinstance(kind, type) and issubclass(kind, RefitError)
