# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What a response of a running graph may be, and how far a refit had come at a moment:
computed from events, answers and times alone. Talks to nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from dynamo.refit.events import (
    AnyEvent,
    RefitCompleted,
    RefitFailed,
    RefitStarted,
    RefitSuperseded,
    WorkerRefitted,
    WorkerStaged,
)
from graphs.client import Completion
from graphs.references import MAX_TOKENS, Answer
from tests.support.labels import begins_as, mislabelled

#: What is not in a commit's timings: the way of its replies, and the label.
SLACK_SECONDS = 0.5

#: A request may fail that began before its worker was killed, or moments after it.
BLUR_SECONDS = 1.0

END = RefitCompleted | RefitFailed | RefitSuperseded

Phase = Literal["announce", "stage", "commit", "change", "ended"]


@dataclass(frozen=True)
class Observation:
    """One response of one worker; Unix seconds."""

    worker: int
    prompt: int
    began: float
    ended: float
    completion: Completion

    def arrived_before(self, moment: float) -> int:
        """How many of its tokens, at the least: its end was seen after the last one."""
        times = self.completion.times
        return sum(time - times[-1] + self.ended < moment for time in times)


@dataclass(frozen=True)
class Verdict:
    """``right``: what its worker's version produces. ``straddled``: across a change,
    begun as one version produces it, up to the change. ``blended``: begun in the pause
    of a change, on blocks that were cached before it. ``lost``: with its worker, which
    was killed."""

    kind: Literal["right", "straddled", "blended", "lost", "wrong"]
    why: str = ""


class Judge:
    """Knows what every worker served when.

    Args:
        expected: by checkpoint, a fresh engine's answer to every prompt.
        checkpoints: which one a version is of; ``None``: what workers start with.
        changes: of all workers.
        first: the workers that were there before any version.
        killed: when a worker was killed.
    """

    def __init__(
        self,
        expected: Mapping[str, Sequence[Answer]],
        checkpoints: Mapping[int | None, str],
        changes: Iterable[WorkerRefitted],
        first: Iterable[int],
        killed: Mapping[int, float],
    ) -> None:
        self._expected = expected
        self._checkpoints = checkpoints
        self._changes = sorted(changes, key=lambda event: event.at)
        self._first = frozenset(first)
        self._killed = killed

    def verdict(self, seen: Observation) -> Verdict:
        completion = seen.completion
        if completion.error is not None:
            killed = self._killed.get(seen.worker)
            if killed is not None and seen.ended > killed - BLUR_SECONDS:
                return Verdict("lost")
            return Verdict("wrong", f"worker {seen.worker}: {completion.error}")
        before, during = self._served(seen)
        versions = before | {change.version for change in during}
        answers = [self._answer(version, seen) for version in versions]
        if wrong := self._mislabelled(seen, before, during):
            return Verdict("wrong", f"worker {seen.worker}: {wrong}")
        if completion.answer in answers:
            return Verdict("right")
        if len(versions) < 2:
            what = f"worker {seen.worker} answered unlike version {versions}"
            return Verdict("wrong", what)
        first = min(map(_earliest, during))
        made = seen.arrived_before(first)
        if before and not any(
            begins_as(completion.answer, self._answer(version, seen), made)
            for version in before
        ):
            what = f"worker {seen.worker}: {made} tokens before its change are not of"
            return Verdict("wrong", f"{what} version {before}")
        return _across(seen, answers, during)

    def _mislabelled(
        self,
        seen: Observation,
        before: set[int | None],
        during: Sequence[WorkerRefitted],
    ) -> str:
        """Why the versions that it says made its tokens are not those, or nothing."""
        served = [*before, *(change.version for change in during)]
        labels = [version for version, _ in groupby(seen.completion.versions)]
        # In the order in which they were live; some may have made no token.
        live = iter(served)
        if not all(label in live for label in labels):
            return f"it says {labels} of its tokens, and {served} were live"
        wrong = mislabelled(
            seen.completion, lambda version: self._answer(version, seen)
        )
        said = len(seen.completion.versions) == len(seen.completion.answer.tokens)
        return "" if said and _may_blend(seen, during) else wrong

    def _answer(self, version: int | None, seen: Observation) -> Answer:
        return self._expected[self._checkpoints[version]][seen.prompt]

    def _served(
        self, seen: Observation
    ) -> tuple[set[int | None], list[WorkerRefitted]]:
        """The version that its worker had before, if it had any, and the changes that
        there may have been meanwhile."""
        # Start-up weights are served by those only that were there before any version.
        before: set[int | None] = {None} if seen.worker in self._first else set()
        during: list[WorkerRefitted] = []
        for event in self._changes:
            if event.worker != seen.worker:
                continue
            if event.at < seen.began:
                before = {event.version}
            elif _earliest(event) < seen.ended:
                during.append(event)
        return before, during


def _earliest(change: WorkerRefitted) -> float:
    """Before this, no token was made with the new weights; Unix seconds."""
    timings = change.timings
    since = timings.resume_ms + timings.probe_ms + timings.verify_ms
    return change.at - since / 1e3 - SLACK_SECONDS


def _resumed(change: WorkerRefitted) -> float:
    """After this, requests have the new version's keys; Unix seconds."""
    timings = change.timings
    return change.at - (timings.probe_ms + timings.verify_ms) / 1e3 + SLACK_SECONDS


def _across(
    seen: Observation, answers: Sequence[Answer], changes: Iterable[WorkerRefitted]
) -> Verdict:
    """Of a response that is like none of the ``answers`` as a whole."""
    completion = seen.completion
    tokens = len(completion.answer.tokens)
    if (tokens, completion.finish_reason) != (MAX_TOKENS, "length"):
        what = f"worker {seen.worker}: {tokens} tokens, {completion.finish_reason!r}"
        return Verdict("wrong", f"{what}: cut short by a change")
    if _start(completion.answer) in map(_start, answers):
        return Verdict("straddled")
    if _may_blend(seen, changes):
        return Verdict("blended")
    return Verdict("wrong", f"worker {seen.worker} began as none of its versions does")


def _may_blend(seen: Observation, changes: Iterable[WorkerRefitted]) -> bool:
    """Whether it may have been admitted under the old key and computed with the new
    weights, as ``continue`` lets requests that are in flight."""
    paused = any(seen.began < _resumed(change) for change in changes)
    return seen.completion.cached_tokens > 0 and paused


def _start(answer: Answer) -> tuple[int, float]:
    return answer.tokens[0], answer.logprobs[0]


def phase_at(events: Iterable[AnyEvent], version: int, moment: float) -> Phase:
    """How far the refit to ``version`` had come at ``moment``, Unix seconds."""
    told = [e for e in events if getattr(e, "version", None) == version]
    past = [e for e in told if e.at <= moment]
    if any(isinstance(event, END) for event in past):
        return "ended"
    if any(isinstance(event, WorkerRefitted) for event in past):
        return "change"
    started = [e for e in past if isinstance(e, RefitStarted)]
    if not started:
        return "announce"
    staged = {e.worker for e in past if isinstance(e, WorkerStaged)}
    return "commit" if staged >= set(started[-1].workers) else "stage"
