# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The judge of the real faults finds what is wrong, and only that."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from dynamo.refit.events import (
    AnyEvent,
    RefitCompleted,
    RefitStarted,
    WorkerRefitted,
    WorkerStaged,
)
from graphs.client import Completion
from graphs.references import MAX_TOKENS, Answer
from tests.faults.judge import Judge, Observation, phase_at
from tests.faults.kinds import FAULTS
from tests.support.fleet import TIMINGS

pytestmark = [
    pytest.mark.unit,
    pytest.mark.faults,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.core,
]


def answer(first: int, *, tokens: int = MAX_TOKENS) -> Answer:
    made = tuple(range(first, first + tokens))
    return Answer(made, tuple(-0.5 - token / 7 for token in made))


OLD, NEW, OTHER = answer(100), answer(200), answer(300)
#: Worker 1 was there at the start, worker 2 came later; both are at version 5 from
#: second 100 on.
EXPECTED = {"A": [OLD], "B": [NEW]}
CHECKPOINTS = {None: "A", 5: "B"}


def refitted(worker: int, at: float = 100.0) -> WorkerRefitted:
    return WorkerRefitted(
        worker=worker,
        version=5,
        fingerprint="w",
        kv_epoch="5-x",
        in_flight="continue",
        timings=TIMINGS,
        at=at,
    )


#: Worker 3's is checked for two seconds after it has resumed.
CHECKED = msgspec.structs.replace(TIMINGS, verify_ms=2000.0)
LATE = msgspec.structs.replace(refitted(3, at=102.5), timings=CHECKED)

JUDGE = Judge(
    EXPECTED,
    CHECKPOINTS,
    [refitted(1), refitted(2), LATE],
    first=[1, 3],
    killed={2: 120.0},
)


def observed(
    said: Answer,
    began: float,
    ended: float,
    *,
    worker: int = 1,
    finish: str | None = "length",
    cached: int = 0,
    error: str | None = None,
    times: Sequence[float] = (),
    versions: Sequence[int | None] | None = None,
) -> Observation:
    """``times`` of its tokens are on another clock, of which only the last is known;
    the ``versions`` that it says are right unless they are given."""
    if versions is None:
        versions = [None if token < NEW.tokens[0] else 5 for token in said.tokens]
    completion = Completion(said, finish, cached, tuple(times), error, tuple(versions))
    return Observation(worker, 0, began, ended, completion)


#: A token each 0.1 s, the last one at second 101: so many come earlier than half a
#: second before the change is announced, and certainly before the change.
EVEN = [7.0 + 0.1 * n for n in range(MAX_TOKENS)]
SPAN, BEFORE = (98.6, 101.0), 8


def mixed(first: Answer, then: Answer, at: int) -> Answer:
    return Answer(
        first.tokens[:at] + then.tokens[at:], first.logprobs[:at] + then.logprobs[at:]
    )


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (observed(OLD, 90.0, 91.0), "right"),
        (observed(NEW, 101.0, 102.0), "right"),
        (observed(OLD, 99.0, 101.0), "right"),
        (observed(NEW, 99.9, 101.0), "right"),
        # Announced half a second later than it was served.
        (observed(NEW, 99.6, 99.8), "right"),
        # The other version's, before or after.
        (observed(NEW, 90.0, 91.0), "wrong"),
        (observed(OLD, 100.1, 101.0), "wrong"),
        (observed(mixed(OLD, NEW, 3), 90.0, 91.0), "wrong"),
        (observed(mixed(OLD, NEW, 3), 99.0, 101.0), "straddled"),
        (observed(mixed(OLD, OTHER, 1), 99.0, 101.0), "straddled"),
        # What came before the change was made with the old weights.
        (observed(mixed(OLD, NEW, BEFORE), *SPAN, times=EVEN), "straddled"),
        (observed(mixed(OLD, NEW, BEFORE - 1), *SPAN, times=EVEN), "wrong"),
        (observed(mixed(NEW, OLD, BEFORE), *SPAN, times=EVEN), "wrong"),
        # Never seen anywhere.
        (observed(OTHER, 99.0, 101.0), "wrong"),
        (observed(OTHER, 99.0, 101.0, cached=32), "blended"),
        (observed(OTHER, 90.0, 91.0, cached=32), "wrong"),
        # Begun after the pause, whose end is announced much later.
        (observed(OTHER, 101.5, 102.0, cached=32, worker=3), "wrong"),
        # Cut short by the change.
        (observed(answer(100, tokens=5), 99.0, 101.0), "wrong"),
        (observed(mixed(OLD, NEW, 3), 99.0, 101.0, finish="stop"), "wrong"),
        (observed(mixed(OLD, NEW, 3), 99.0, 101.0, finish=None), "wrong"),
        # A joiner's start-up weights are nobody's.
        (observed(OLD, 90.0, 91.0, worker=2), "wrong"),
        (observed(NEW, 101.0, 102.0, worker=2), "right"),
        # A worker that was killed may fail, and only it, and only from then on.
        (observed(answer(1, tokens=0), 119.0, 120.5, worker=2, error="e"), "lost"),
        (observed(answer(1, tokens=0), 110.0, 111.0, worker=2, error="e"), "wrong"),
        (observed(answer(1, tokens=0), 119.0, 120.5, error="e"), "wrong"),
    ],
)
def test_verdicts(seen: Observation, kind: str) -> None:
    verdict = JUDGE.verdict(seen)
    assert verdict.kind == kind
    assert bool(verdict.why) == (kind == "wrong")


def labels(old: int, new: int, after: int = 0) -> list[int | None]:
    return [None] * old + [5] * new + [None] * after


STRADDLING = mixed(OLD, NEW, 3)


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        (observed(OLD, 90.0, 91.0, versions=labels(0, MAX_TOKENS)), True),
        (observed(NEW, 101.0, 102.0, versions=labels(MAX_TOKENS, 0)), True),
        # Meanwhile both are live, but its tokens are of one.
        (observed(OLD, 99.0, 101.0, versions=labels(0, MAX_TOKENS)), True),
        (observed(NEW, 99.0, 101.0, versions=labels(MAX_TOKENS, 0)), True),
        (observed(STRADDLING, 99.0, 101.0, versions=labels(3, 21)), False),
        (observed(STRADDLING, 99.0, 101.0, versions=labels(2, 22)), True),
        (observed(STRADDLING, 99.0, 101.0, versions=labels(4, 20)), True),
        (observed(STRADDLING, 99.0, 101.0, versions=labels(3, 20)), True),
        (observed(STRADDLING, 99.0, 101.0, versions=labels(3, 20, 1)), True),
        (observed(STRADDLING, 99.0, 101.0, versions=[4] * 3 + [5] * 21), True),
        (observed(STRADDLING, 99.0, 101.0, versions=()), True),
        # On blocks of the old weights nobody can tell, but it must say something.
        (observed(OTHER, 99.0, 101.0, cached=32, versions=labels(0, 24)), False),
        (observed(OTHER, 99.0, 101.0, cached=32, versions=labels(0, 23)), True),
    ],
)
def test_a_label_that_is_wrong_is_a_wrong_version(
    seen: Observation, wrong: bool
) -> None:
    assert (JUDGE.verdict(seen).kind == "wrong") is wrong


def test_one_token_that_differs_in_one_bit_is_seen() -> None:
    logprobs = (*NEW.logprobs[:-1], NEW.logprobs[-1] * (1 + 2**-50))
    seen = observed(Answer(NEW.tokens, logprobs), 101.0, 102.0)
    assert JUDGE.verdict(seen).kind == "wrong"


def test_how_far_a_refit_had_come() -> None:
    events: list[AnyEvent] = [
        RefitStarted(model="tiny", version=4, workers=(1, 2), at=1.0),
        RefitStarted(model="tiny", version=5, workers=(1, 2), at=10.0),
        WorkerStaged(worker=1, version=5, ranks=(), at=20.0),
        WorkerStaged(worker=2, version=5, ranks=(), at=30.0),
        refitted(1, at=40.0),
        refitted(2, at=50.0),
        RefitCompleted(
            model="tiny",
            version=5,
            announcement_id="a5",
            fingerprint="w",
            workers=(1, 2),
            seconds=50.0,
            at=60.0,
        ),
    ]
    moments = {
        9.0: "announce",
        15.0: "stage",
        25.0: "stage",
        35.0: "commit",
        45.0: "change",
        55.0: "change",
        65.0: "ended",
    }
    found = {moment: phase_at(events, 5, moment) for moment in moments}
    assert found == moments


def test_every_target_is_struck_in_every_step_that_concerns_it() -> None:
    struck = {(f.strike, f.target, f.at) for f in FAULTS if f.strike}
    for target in ("coordinator", "trainer", "worker", "rank"):
        assert {("kill", target, "stage"), ("kill", target, "install")} <= struck
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 21
    # Two rounds are enough for what `make faults` promises.
    assert 2 * len(FAULTS) >= 40
