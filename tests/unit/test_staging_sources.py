# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Who reads a version from whom, and that whoever served it hears of the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from msgspec.structs import replace as replace_struct

from dynamo.refit.coordinator.actions import (
    Action,
    GiveBackLease,
    ReleasePeer,
    SendAbort,
    SendCommit,
    SendPrepare,
    SendServe,
    ServeAnswered,
    TakeLease,
    Tick,
)
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.events import RefitCompleted, RefitFailed, WeightVersionReady
from dynamo.refit.protocol import FleetMember, Refused, WeightsServed
from tests.support.fleet import (
    POLICY,
    STAGE_DEADLINE,
    V5,
    V6,
    aborts,
    commits,
    committed,
    done,
    events,
    failure,
    fleet,
    joiner,
    leased,
    member,
    new,
    of_type,
    prepares,
    released,
    serves,
    serves_not,
    vote_refused,
    voted,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


#: One reader of the trainer at a time, and two of each worker.
TREE = replace(POLICY, direct_readers=1, peer_readers=2)


def asked(actions: list[Action]) -> dict[int, int]:
    """Which reader is to read from which worker."""
    return {a.reader: a.peer for a in of_type(actions, SendServe)}


def served(peer: int, reader: int) -> WeightsServed:
    return serves(peer, reader, V5).reply


# --- from workers ---------------------------------------------------------------


def test_by_default_all_read_from_the_trainer() -> None:
    reconciler = new(*range(1, 51))
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(leased(V5), 1.0) == prepares(V5, *range(1, 51))


def test_a_fleet_fills_as_a_tree_does() -> None:
    reconciler = new(1, 2, 3, 4, 5, policy=TREE)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(leased(V5), 1.0) == prepares(V5, 1)
    # The trainer is free again, and 1 takes two.
    actions = reconciler.handle(voted(1, V5), 2.0)
    assert of_type(actions, SendPrepare) == prepares(V5, 2)
    assert asked(actions) == {3: 1, 4: 1}
    # The peer agrees; 5 is the next that there is room for.
    actions = reconciler.handle(serves(1, 3, V5), 3.0)
    assert actions == [SendPrepare(3, V5, peer=1, served=served(1, 3))]
    assert reconciler.handle(serves(1, 4, V5), 3.0) == [
        SendPrepare(4, V5, peer=1, served=served(1, 4))
    ]
    actions = reconciler.handle(voted(3, V5), 4.0)
    assert actions == [ReleasePeer(1, "at 1 for 3"), SendServe(3, 5, V5)]
    assert reconciler.handle(serves(3, 5, V5), 4.0) == [
        SendPrepare(5, V5, peer=3, served=served(3, 5))
    ]
    assert reconciler.handle(voted(4, V5), 5.0) == [ReleasePeer(1, "at 1 for 4")]
    assert reconciler.handle(voted(2, V5), 6.0) == []
    release, *rest = reconciler.handle(voted(5, V5), 7.0)
    assert release == ReleasePeer(3, "at 3 for 5")
    assert rest == commits(V5, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(("trainer", "peer"), [(1, 1), (1, 2), (4, 3), (2, 0)])
def test_no_source_has_more_readers_than_it_may(trainer: int, peer: int) -> None:
    policy = replace(POLICY, direct_readers=trainer, peer_readers=peer)
    everyone = range(1, 61)
    reconciler = new(*everyone, policy=policy)
    reconciler.handle(V5, 0.0)
    actions = reconciler.handle(leased(V5), 1.0)
    reading: dict[int, int | None] = {}
    rounds = 0
    while not of_type(actions, SendCommit):
        rounds += 1
        for prepare in of_type(actions, SendPrepare):
            reading[prepare.worker] = prepare.peer
        answers = [serves(p, r, V5) for r, p in asked(actions).items()]
        many = Counter(reading.values()) + Counter(a.peer for a in answers)
        assert many.pop(None, 0) <= trainer
        assert max(many.values(), default=0) <= (peer or 60)
        answers += [voted(worker, V5) for worker in reading]
        reading = {}
        actions = [a for what in answers for a in reconciler.handle(what, 2.0)]
        assert rounds < 60
    # Those that hold it multiply: it is not one after the other.
    assert rounds <= 16


# --- when a source does not work -------------------------------------------------


def behind_two_peers() -> Reconciler:
    """3 is behind what 1 and 2 serve, and asks 1."""
    reconciler = new(member(1, 5), member(2, 5), joiner(3))
    assert reconciler.transaction is not None
    return reconciler


def catching_up(reconciler: Reconciler) -> WeightVersionReady:
    return reconciler.transaction.ready


def test_a_peer_that_cannot_serve_is_not_asked_again() -> None:
    reconciler = behind_two_peers()
    what = catching_up(reconciler)
    actions = reconciler.handle(serves_not(1, 3, what), 1.0)
    assert actions == [SendServe(2, 3, what)]


def test_a_peer_that_cannot_be_read_from_is_released_and_not_asked_again() -> None:
    reconciler = behind_two_peers()
    what = catching_up(reconciler)
    reconciler.handle(serves(1, 3, what), 1.0)
    actions = reconciler.handle(vote_refused(3, what), 2.0)
    assert actions == [ReleasePeer(1, "at 1 for 3"), SendServe(2, 3, what)]


def test_no_source_names_what_the_last_peer_said() -> None:
    """It is not the reader's fault: NoSource fences nobody."""
    reconciler = behind_two_peers()
    what = catching_up(reconciler)
    reconciler.handle(serves_not(1, 3, what), 1.0)
    [event] = events(reconciler.handle(serves_not(2, 3, what), 2.0))
    assert isinstance(event, RefitFailed)
    assert (event.failure.kind, event.failure.worker) == ("NoSource", 3)
    assert "PeerUnsuitable: packed (worker 2)" in event.failure.message
    assert "publish" in event.failure.message


def test_who_could_read_from_no_peer_says_why_itself() -> None:
    reconciler = behind_two_peers()
    what = catching_up(reconciler)
    for peer in (1, 2):
        reconciler.handle(serves(peer, 3, what), 1.0)
        actions = reconciler.handle(vote_refused(3, what), 2.0)
    [event] = events(actions)
    assert event.failure == failure(3)


def of_layout(layout: str, worker: FleetMember) -> FleetMember:
    return replace_struct(worker, status=replace_struct(worker.status, layout=layout))


def test_a_worker_reads_from_workers_of_its_own_layout() -> None:
    """Also where others have room."""
    wide, narrow = (
        [of_layout(name, member(n)) for n in numbers]
        for name, numbers in (("wide", (1, 3)), ("narrow", (2, 4)))
    )
    reconciler = new(*wide, *narrow, policy=TREE)
    reconciler.handle(V5, 0.0)
    assert reconciler.handle(leased(V5), 1.0) == prepares(V5, 1)
    # The trainer is free again; 1 could serve two.
    actions = reconciler.handle(voted(1, V5), 2.0)
    assert (of_type(actions, SendPrepare), asked(actions)) == (prepares(V5, 2), {3: 1})
    actions = reconciler.handle(voted(2, V5), 3.0)
    assert (of_type(actions, SendPrepare), asked(actions)) == (prepares(V5, 4), {})


def test_a_joiner_of_another_layout_asks_the_trainer_at_once() -> None:
    wide = [of_layout("wide", member(n)) for n in (1, 2)]
    reconciler = done(V5, *wide)
    serving = [of_layout("wide", member(n, 5)) for n in (1, 2)]
    seen = fleet(*serving, of_layout("narrow", joiner(3)))
    [lease] = of_type(reconciler.handle(seen, 4.0), TakeLease)
    assert lease.ready.version == 5


def test_a_joiner_whose_layout_nobody_has_and_no_trainer_says_so() -> None:
    """Those whose layout somebody has are served meanwhile."""
    reconciler = new(
        of_layout("wide", member(1, 5)),
        of_layout("wide", joiner(2)),
        of_layout("narrow", joiner(3)),
    )
    what = catching_up(reconciler)
    reader = reconciler.transaction.staging.readers
    assert {w: r.state for w, r in reader.items()} == {2: "asking"}
    why = reconciler.transaction.staging.failures[3]
    assert why.kind == "NoSource"
    assert "no worker of the same layout can serve it" in why.message
    actions = reconciler.handle(serves(1, 2, what), 1.0)
    assert [prepare.worker for prepare in of_type(actions, SendPrepare)] == [2]


def test_readers_of_a_bad_peer_go_back_to_the_trainer() -> None:
    reconciler = new(1, 2, 3, policy=TREE)
    reconciler.handle(V5, 0.0)
    reconciler.handle(leased(V5), 1.0)
    reconciler.handle(voted(1, V5), 2.0)
    assert reconciler.handle(serves_not(1, 3, V5), 3.0) == []
    assert asked(reconciler.handle(voted(2, V5), 4.0)) == {}
    assert reconciler.transaction.staging.readers[3].state == "reading"


def test_who_cannot_read_from_the_trainer_is_not_sent_elsewhere() -> None:
    reconciler = new(1, 2, 3, policy=TREE)
    reconciler.handle(V5, 0.0)
    reconciler.handle(leased(V5), 1.0)
    actions = reconciler.handle(vote_refused(1, V5), 2.0)
    assert of_type(actions, GiveBackLease)[0].outcome == "failed"
    assert not of_type(actions, SendPrepare)


# --- leases of peers end ----------------------------------------------------------


def reading_from_a_peer(policy: Policy = TREE) -> Reconciler:
    """1 has staged from the trainer, 2 reads from there, 3 from 1; 4 has asked 1."""
    reconciler = new(1, 2, 3, 4, policy=policy)
    reconciler.handle(V5, 0.0)
    reconciler.handle(leased(V5), 1.0)
    assert asked(reconciler.handle(voted(1, V5), 2.0)) == {3: 1, 4: 1}
    assert of_type(reconciler.handle(serves(1, 3, V5), 3.0), SendPrepare)
    return reconciler


def test_a_newer_version_releases_what_is_being_read() -> None:
    reconciler = reading_from_a_peer()
    actions = reconciler.handle(V6, 4.0)
    assert aborts(actions) == {1: 5, 2: 5, 3: 5}
    assert released(actions) == [(1, "at 1 for 3")]
    # This one had not been answered yet.
    actions = reconciler.handle(serves(1, 4, V5), 5.0)
    assert actions == [ReleasePeer(1, "at 1 for 4")]


def test_a_failure_releases_what_is_being_read() -> None:
    reconciler = reading_from_a_peer()
    actions = reconciler.handle(vote_refused(2, V5), 4.0)
    assert released(actions) == [(1, "at 1 for 3")]
    assert released(reconciler.handle(serves(1, 4, V5), 5.0)) == [(1, "at 1 for 4")]


def test_the_deadline_releases_what_is_being_read() -> None:
    reconciler = reading_from_a_peer(replace(TREE, quorum=0.25))
    actions = reconciler.handle(Tick(), STAGE_DEADLINE + 1)
    assert released(actions) == [(1, "at 1 for 3")]
    assert aborts(actions) == {2: 5, 3: 5}
    assert of_type(actions, SendCommit) == commits(V5, 1)


def test_a_reader_that_leaves_is_released() -> None:
    reconciler = reading_from_a_peer()
    actions = reconciler.handle(fleet(1, 2, 4), 4.0)
    assert released(actions) == [(1, "at 1 for 3")]


def test_a_repeat_of_a_peer_s_answer_does_not_end_the_reading() -> None:
    reconciler = reading_from_a_peer()
    assert reconciler.handle(serves(1, 3, V5), 4.0) == []
    assert released(reconciler.handle(voted(3, V5), 5.0)) == [(1, "at 1 for 3")]


def test_nobody_is_sent_to_a_worker_that_has_left() -> None:
    reconciler = reading_from_a_peer()
    actions = reconciler.handle(fleet(2, 3, 4), 4.0)
    assert asked(actions) == {}
    refused = ServeAnswered(1, 4, "a5", Refused(failure=failure(1, "gone")))
    reconciler.handle(refused, 5.0)
    actions = reconciler.handle(voted(2, V5), 6.0)
    assert of_type(actions, SendPrepare) == prepares(V5, 4)
    # Those that read from it find somebody else.
    actions = reconciler.handle(vote_refused(3, V5), 7.0)
    assert asked(actions) == {3: 2}


# --- what workers of one layout make of a version -------------------------------

AT_ONCE = replace(POLICY, max_unavailable=9)


def voting(*layouts: str, policy: Policy = AT_ONCE) -> Reconciler:
    """Workers 1, 2, ... of these layouts, all of which stage version 5."""
    reconciler = Reconciler("tiny", policy)
    members = [of_layout(name, member(n)) for n, name in enumerate(layouts, 1)]
    reconciler.handle(fleet(*members), 0.0)
    reconciler.handle(V5, 0.0)
    reconciler.handle(leased(V5), 1.0)
    return reconciler


def test_workers_that_made_the_same_of_a_version_commit_it() -> None:
    reconciler = voting("wide", "wide", "narrow", "wide")
    reconciler.handle(voted(1, V5, converted="a"), 2.0)
    reconciler.handle(voted(2, V5, converted="a"), 2.0)
    # Another form is another number, and one that read from a peer made nothing.
    reconciler.handle(voted(3, V5, converted="b"), 2.0)
    actions = reconciler.handle(voted(4, V5), 2.0)
    assert {a.worker for a in of_type(actions, SendCommit)} == {1, 2, 3, 4}


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_where_one_made_something_else_of_it_nothing_is_installed(wrong: int) -> None:
    reconciler = voting("wide", "wide", "wide")
    actions = []
    for worker in (1, 2, 3):
        made = "b" if worker == wrong else "a"
        actions += reconciler.handle(voted(worker, V5, converted=made), 2.0)
    assert of_type(actions, SendCommit) == []
    assert {a.worker for a in of_type(actions, SendAbort)} == {1, 2, 3}
    [event] = events(actions, RefitFailed)
    assert event.failure.kind == "FingerprintMismatch"
    assert event.failure.version == 5
    assert "different weights of it in rank 0: publish it again" in str(event.failure)
    assert event.serving == ((1, None), (2, None), (3, None))


def test_workers_of_another_layout_go_on_where_a_quorum_allows() -> None:
    reconciler = voting("wide", "wide", "narrow", policy=replace(AT_ONCE, quorum=0.3))
    actions = reconciler.handle(voted(3, V5, converted="c"), 2.0)
    actions += reconciler.handle(voted(1, V5, converted="a"), 2.0)
    actions += reconciler.handle(voted(2, V5, converted="b"), 2.0)
    assert [a.worker for a in of_type(actions, SendAbort)] == [1, 2]
    assert [a.worker for a in of_type(actions, SendCommit)] == [3]
    [event] = events(reconciler.handle(committed(3, V5), 3.0), RefitCompleted)
    assert [(f.kind, f.worker) for f in event.excluded] == [
        ("FingerprintMismatch", 1),
        ("FingerprintMismatch", 2),
    ]


def test_one_that_has_left_is_not_compared_with() -> None:
    reconciler = voting("wide", "wide")
    reconciler.handle(voted(1, V5, converted="a"), 2.0)
    reconciler.handle(fleet(of_layout("wide", member(2))), 2.0)
    actions = reconciler.handle(voted(2, V5, converted="b"), 2.0)
    assert [a.worker for a in of_type(actions, SendCommit)] == [2]


@pytest.mark.parametrize("read_before", [True, False])
def test_who_read_what_is_disputed_does_not_hold_the_version(read_before: bool) -> None:
    """It made nothing, and holds what its peer has made."""
    tree = replace(AT_ONCE, direct_readers=1, peer_readers=1, quorum=0.1)
    reconciler = voting("wide", "wide", "wide", policy=tree)
    actions = reconciler.handle(voted(1, V5, converted="a"), 2.0)
    assert asked(actions) == {3: 1}
    reconciler.handle(serves(1, 3, V5), 2.0)
    last = [voted(3, V5), voted(2, V5, converted="b")]
    said = [
        action
        for answer in (last if read_before else last[::-1])
        for action in reconciler.handle(answer, 2.0)
    ]
    assert of_type(said, SendCommit) == []
    assert {a.worker for a in of_type(said, SendAbort)} == {1, 2, 3}
    [event] = events(said, RefitFailed)
    assert event.failure.kind == "FingerprintMismatch"
