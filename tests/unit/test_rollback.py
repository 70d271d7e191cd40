# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A fleet goes back: to what, as which version, from whose copies, and how it ends."""

from __future__ import annotations

import asyncio

import pytest

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.coordinator.actions import (
    Action,
    GiveBackLease,
    PrepareAnswered,
    Publish,
    SendCommit,
    SendPrepare,
    SendServe,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.component import Coordinator
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.coordinator.rollback import (
    NothingKept,
    RollbackRefused,
    announce_rollback,
)
from dynamo.refit.errors import Failure
from dynamo.refit.events import (
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.protocol import FleetMember, Prepare, Refused, Rollback
from tests.support.fleet import (
    POLICY,
    STAGE_DEADLINE,
    V6,
    V7,
    aborts,
    commits,
    committed,
    committing,
    events,
    failure,
    fences,
    fleet,
    joiner,
    leased,
    member,
    new,
    of_type,
    prepares,
    ready,
    serves,
    voted,
    without,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

#: Brings back version 5 on a fleet that serves 6.
BACK = ready(
    7,
    "r7",
    endpoint="",
    instance=0,
    manifest="",
    weights="weights-5",
    restores=5,
)


def serving_6(worker: int, kept: int | None = 5) -> FleetMember:
    return member(worker, 6, kept=kept)


def announced(
    *members: FleetMember, newest: int | None = None, **wish: object
) -> WeightVersionReady:
    return announce_rollback(
        Rollback(announcement="r7", **wish), members, "tiny", newest
    )


def recalls(*workers: int, what: WeightVersionReady = BACK) -> list[Action]:
    return [SendPrepare(worker, what, recall=True) for worker in workers]


def no_copy(worker: int, what: WeightVersionReady = BACK) -> PrepareAnswered:
    why = Failure(
        kind="NoWayBack",
        message="no copy of version 5 is kept here",
        stage="stage",
        worker=worker,
    )
    return PrepareAnswered(worker, what.announcement, Refused(failure=why))


def going_back(*members: FleetMember) -> tuple[Reconciler, list[Action]]:
    """A reconciler that has just heard of it, and what it does."""
    reconciler = new(*members)
    return reconciler, reconciler.handle(BACK, 10.0)


# --- what it stands for -----------------------------------------------------------


def test_it_is_the_next_version_with_the_weights_of_the_one_before() -> None:
    assert announced(serving_6(1), serving_6(2)) == BACK


def test_the_number_is_above_everything_that_was_heard_of() -> None:
    """Also above a version that failed: the trainer may know it by that number."""
    assert announced(serving_6(1), newest=8).version == 9
    assert announced(serving_6(1), newest=8, version=12).version == 12
    for version in (8, 7, 0):
        with pytest.raises(RollbackRefused, match=r"not above 8.*take 9"):
            announced(serving_6(1), newest=8, version=version)
    with pytest.raises(RollbackRefused, match="not above 6"):
        announced(serving_6(1), version=6)


def test_where_copies_differ_the_newest_one_is_gone_back_to() -> None:
    """A worker that joined late came from an older version straight to this one."""
    mixed = serving_6(1, kept=3), serving_6(2, kept=5), serving_6(3, kept=None)
    assert announced(*mixed).restores == 5
    back = announced(*mixed, to=3)
    assert (back.version, back.restores, back.weights) == (7, 3, "weights-3")


def test_another_version_than_wished_for_is_refused_with_what_there_is() -> None:
    mixed = serving_6(1, kept=5), serving_6(2, kept=5), serving_6(3, kept=3)
    with pytest.raises(NothingKept) as refused:
        announced(*mixed, to=4)
    assert str(refused.value) == (
        "no worker keeps a copy of version 4 (kept: version 5 by 2 workers, version 3 "
        "by 1 worker): publish the old weights again: dynamo-refit publish DIR "
        "--version 7"
    )


@pytest.mark.parametrize(
    "members",
    [
        (serving_6(1, kept=None), serving_6(2, kept=None)),
        # It is about to go.
        (member(1, 6, "fenced", kept=5), serving_6(2, kept=None)),
        (joiner(1),),
    ],
)
def test_without_a_copy_it_is_refused_with_the_way_out(
    members: tuple[FleetMember, ...],
) -> None:
    with pytest.raises(NothingKept) as refused:
        announced(*members, newest=6)
    said = str(refused.value)
    assert "no worker keeps a copy of a version before" in said
    assert "when another version was staged since" in said
    assert said.endswith("dynamo-refit publish DIR --version 7")


def test_without_a_worker_it_is_refused() -> None:
    wish = Rollback(announcement="r7", version=7, to=5, weights="weights-5")
    with pytest.raises(NothingKept, match="no worker"):
        announce_rollback(wish, (), None, None)


def test_what_was_decided_before_is_not_decided_again() -> None:
    """The wish of somebody whose coordinator is gone, when some or all have changed."""
    decided = {"version": 7, "to": 5, "weights": "weights-5"}
    changed = member(1, 7, weights="weights-5", kept=6)
    for members in ((serving_6(1),), (changed, serving_6(2)), (changed,)):
        assert announced(*members, newest=7, **decided) == BACK
    with pytest.raises(RollbackRefused):
        announced(serving_6(1), version=7, weights="weights-5")


class SilentCalls:
    """A test fake of :class:`dynamo.refit.rpc.Caller` that nobody answers."""

    def __init__(self) -> None:
        self.prepares: list[Prepare] = []

    async def call(
        self, path: str, instance: int, request: Prepare, *_: object
    ) -> None:
        self.prepares.append(request)
        await asyncio.get_running_loop().create_future()


async def test_a_wish_that_is_repeated_starts_one_rollback() -> None:
    """Its number stays what it was, and the worker is told whose weights it takes."""
    config = CoordinatorConfig(
        namespace="ns",
        model="tiny",
        worker_components=("backend",),
        fleet_poll_seconds=1.0,
        policy=POLICY,
    )
    calls, told = SilentCalls(), []
    coordinator = Coordinator(config, calls, told.append, epoch=9)
    running = asyncio.create_task(coordinator.run())
    wish, seen = Rollback(announcement="r7"), fleet(serving_6(1))
    for _ in range(3):
        status = coordinator.roll_back(wish, seen)
        assert (status.version, status.restores, status.weights, status.outcome) == (
            7,
            5,
            "weights-5",
            None,
        )
        async with asyncio.timeout(5):
            while not calls.prepares:
                await asyncio.sleep(0)
    [prepare] = calls.prepares
    assert (prepare.version, prepare.restores, prepare.weights) == (7, 5, "weights-5")
    assert (prepare.epoch, prepare.endpoint, prepare.manifest) == (9, "", "")
    assert [event.restores for event in told if isinstance(event, RefitStarted)] == [5]
    # Another wish is another version, which supersedes the first.
    status = coordinator.roll_back(Rollback(announcement="again"), seen)
    assert status.version == 8
    async with asyncio.timeout(5):
        while coordinator.roll_back(wish, seen).outcome is None:
            await asyncio.sleep(0)
    ended = coordinator.roll_back(wish, seen)
    assert (ended.version, ended.outcome) == (7, "superseded")
    assert "superseded by version 8" in ended.detail
    running.cancel()


# --- how it goes ------------------------------------------------------------------


def test_everyone_takes_its_own_copy_and_no_trainer_is_asked() -> None:
    reconciler, actions = going_back(serving_6(1), serving_6(2))
    started = RefitStarted(model="tiny", version=7, workers=(1, 2), restores=5)
    assert actions == [Publish(started), *recalls(1, 2)]
    assert reconciler.handle(voted(1, BACK), 11.0) == []
    assert reconciler.handle(voted(2, BACK), 12.0) == commits(BACK, 1, 2)
    assert reconciler.handle(committed(1, BACK), 13.0) == []
    completed = RefitCompleted(
        model="tiny",
        version=7,
        announcement="r7",
        weights="weights-5",
        workers=(1, 2),
        seconds=4.0,
        restores=5,
    )
    assert reconciler.handle(committed(2, BACK), 14.0) == [
        Publish(completed),
        GiveBackLease(BACK, "completed", ""),
    ]
    assert reconciler.completed == 7
    ended = reconciler.ended("r7")
    assert (ended.outcome, ended.detail) == ("completed", "")
    # Repeats are told the same, and start nothing.
    assert events(reconciler.handle(BACK, 20.0)) == []
    assert reconciler.transaction is None


def test_who_has_no_copy_reads_it_from_those_that_have() -> None:
    reconciler, actions = going_back(
        serving_6(1), serving_6(2, kept=None), serving_6(3, kept=4)
    )
    assert of_type(actions, SendPrepare) == recalls(1)
    actions = reconciler.handle(voted(1, BACK), 11.0)
    assert actions == [SendServe(1, 2, BACK), SendServe(1, 3, BACK)]
    for reader in (2, 3):
        answer = serves(1, reader, BACK)
        assert reconciler.handle(answer, 12.0) == [
            SendPrepare(reader, BACK, 1, answer.reply)
        ]
    reconciler.handle(voted(2, BACK), 13.0)
    actions = reconciler.handle(voted(3, BACK), 13.0)
    assert of_type(actions, SendCommit) == commits(BACK, 1, 2, 3)


def test_a_copy_with_another_fingerprint_is_none() -> None:
    """The same number, of another job's weights."""
    other = member(2, 6, kept=5, kept_weights="of another job")
    _, actions = going_back(serving_6(1), other)
    assert of_type(actions, SendPrepare) == recalls(1)


def test_who_finds_its_copy_gone_reads_from_another() -> None:
    reconciler, _ = going_back(serving_6(1), serving_6(2))
    assert reconciler.handle(no_copy(1), 11.0) == []
    assert reconciler.handle(voted(2, BACK), 12.0) == [SendServe(2, 1, BACK)]
    reconciler.handle(serves(2, 1, BACK), 13.0)
    assert of_type(reconciler.handle(voted(1, BACK), 14.0), SendCommit) == commits(
        BACK, 1, 2
    )


def test_when_every_copy_is_gone_it_fails_and_nothing_has_changed() -> None:
    reconciler, _ = going_back(serving_6(1), serving_6(2, kept=None))
    failed, *rest = reconciler.handle(no_copy(1), 11.0)[-2:]
    assert isinstance(failed.event, RefitFailed)
    assert (failed.event.version, failed.event.restores) == (7, 5)
    assert failed.event.failure.kind == "NoWayBack"
    assert failed.event.serving == ((1, 6), (2, 6))
    assert rest == [GiveBackLease(BACK, "failed", str(failed.event.failure))]
    assert reconciler.ended("r7").outcome == "failed"
    assert "no copy of version 5" in reconciler.ended("r7").detail
    assert reconciler.completed == 6


def test_nobody_with_a_copy_is_no_source() -> None:
    """The statuses were newer than what the wish was made from."""
    _, actions = going_back(serving_6(1, kept=None))
    [_, failed] = events(actions)
    assert isinstance(failed, RefitFailed)
    assert failed.failure.kind == "NoSource"
    assert "no worker has a copy of version 5 any more" in failed.failure.message
    assert fences(actions) == {}


def test_a_worker_that_does_not_answer_fails_it_for_all() -> None:
    reconciler, _ = going_back(serving_6(1), serving_6(2))
    reconciler.handle(voted(1, BACK), 11.0)
    actions = reconciler.handle(Tick(), 10.0 + STAGE_DEADLINE + 1)
    assert aborts(actions) == {1: 7, 2: 7}
    [event] = events(actions)
    assert isinstance(event, RefitFailed)
    assert event.failure.worker == 2


def test_a_vote_for_other_weights_is_none() -> None:
    reconciler, _ = going_back(serving_6(1))
    actions = reconciler.handle(voted(1, BACK, weights="weights-4"), 11.0)
    [event] = events(actions)
    assert event.failure.kind == "FingerprintMismatch"


# --- among other versions -----------------------------------------------------------


def test_it_supersedes_what_is_being_staged() -> None:
    """What was being staged has overwritten the copies: it says so, and fails."""
    reconciler = new(serving_6(1), serving_6(2))
    reconciler.handle(V7, 1.0)
    reconciler.handle(leased(V7), 2.0)
    back = announced(serving_6(1), serving_6(2), newest=reconciler.newest)
    assert back.version == 8
    actions = reconciler.handle(back, 3.0)
    assert aborts(actions) == {1: 7, 2: 7}
    assert events(actions)[0] == RefitSuperseded(version=7, by=8)
    assert of_type(actions, SendPrepare) == recalls(1, 2, what=back)


def test_one_that_waits_for_a_commit_finds_the_copies_that_it_made() -> None:
    """Before the workers have said what they keep now."""
    reconciler = committing(V7, serving_6(1), serving_6(2))
    # 1 has changed, and 2 is about to.
    changed = member(1, 7, kept=6)
    back = announced(changed, member(2, 6, kept=None), newest=7)
    assert (back.version, back.restores) == (8, 6)
    assert of_type(reconciler.handle(back, 5.0), SendPrepare) == []
    for worker in (1, 2):
        reconciler.handle(committed(worker, V7), 6.0)
    actions = reconciler.handle(Tick(), 6.25)
    assert of_type(actions, SendPrepare) == recalls(1, 2, what=back)


def test_a_newer_version_supersedes_it() -> None:
    reconciler, _ = going_back(serving_6(1))
    newer = ready(8)
    actions = reconciler.handle(newer, 11.0)
    assert aborts(actions) == {1: 7}
    assert events(actions)[0] == RefitSuperseded(version=7, by=8)
    assert reconciler.ended("r7").outcome == "superseded"
    assert of_type(actions, TakeLease)


@pytest.mark.parametrize("served", [7, 8])
def test_it_is_stale_when_its_number_was_taken(served: int) -> None:
    """By a trainer that was quicker."""
    reconciler = new(member(1, served, kept=6))
    refused, release = reconciler.handle(BACK, 1.0)
    assert isinstance(refused.event, RefitRefused)
    assert refused.event.reason == "stale"
    assert release.outcome == "refused"
    assert reconciler.ended("r7").outcome == "refused"


def test_a_trainer_goes_on_with_the_number_after_it() -> None:
    reconciler, _ = going_back(serving_6(1))
    reconciler.handle(voted(1, BACK), 11.0)
    reconciler.handle(committed(1, BACK), 12.0)
    [refused] = events(reconciler.handle(V7, 13.0))
    assert (refused.reason, refused.version) == ("stale", 7)
    assert "serves other weights as version 7" in refused.detail
    reconciler.handle(ready(8), 14.0)
    assert reconciler.transaction.ready.version == 8


def test_a_second_one_goes_back_to_what_the_first_replaced() -> None:
    back = member(1, 7, weights="weights-5", kept=6)
    again = announced(back, newest=7)
    assert (again.version, again.restores, again.weights) == (8, 6, "weights-6")


# --- after a coordinator's end ------------------------------------------------------


def test_a_new_coordinator_finds_it_done() -> None:
    reconciler = new(member(1, 7, weights="weights-5", kept=6))
    [event] = events(reconciler.handle(BACK, 1.0))
    assert (event.version, event.seconds, event.restores) == (7, None, 5)
    assert reconciler.ended("r7").outcome == "completed"


def test_a_new_coordinator_finishes_what_was_half_done() -> None:
    """1 has changed; 2 still has its copy, and need not read from 1."""
    changed = member(1, 7, weights="weights-5", kept=6)
    reconciler = new(changed)
    reconciler.handle(BACK, 1.0)
    actions = reconciler.handle(fleet(changed, serving_6(2)), 2.0)
    what = reconciler.transaction.ready
    assert of_type(actions, SendPrepare) == recalls(2, what=what)
    assert what.restores == 5
    actions = reconciler.handle(voted(2, what), 3.0)
    assert without(actions, Publish) == commits(what, 2)


def test_joiners_read_it_from_those_that_serve_it() -> None:
    changed = member(1, 7, weights="weights-5", kept=6)
    reconciler = new(changed)
    reconciler.handle(BACK, 1.0)
    actions = reconciler.handle(fleet(changed, joiner(2)), 2.0)
    assert of_type(actions, SendServe) == [
        SendServe(1, 2, reconciler.transaction.ready)
    ]
    assert not of_type(actions, TakeLease)


def test_the_newest_number_is_known_from_whatever_there_is() -> None:
    assert new().newest is None
    assert new(member(1, 4), member(2, 6)).newest == 6
    reconciler = new(member(1, 4))
    reconciler.handle(V6, 1.0)
    assert reconciler.newest == 6


def test_refusals_of_an_ordinary_version_are_what_they_were() -> None:
    """A copy is nothing that a trainer's version could come from."""
    reconciler = new(serving_6(1))
    reconciler.handle(ready(7, weights="weights-5"), 1.0)
    actions = reconciler.handle(leased(ready(7)), 2.0)
    assert of_type(actions, SendPrepare) == prepares(ready(7, weights="weights-5"), 1)
    answer = PrepareAnswered(1, "a7", Refused(failure=failure(1)))
    [event] = events(reconciler.handle(answer, 3.0))
    assert event.restores is None
