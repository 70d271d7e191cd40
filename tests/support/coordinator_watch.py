# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A reconciler under watch: whatever it hears, is it allowed to say what it says?

Keeps its own account of votes, commits, leases and ends, from the inputs and the
actions alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dynamo.refit.coordinator.actions import (
    Action,
    CommitAnswered,
    FleetSeen,
    GiveBackLease,
    Input,
    PrepareAnswered,
    Publish,
    ReleasePeer,
    SendAbort,
    SendAdmit,
    SendCommit,
    SendFence,
    SendPrepare,
    SendServe,
    ServeAnswered,
    TakeLease,
    Unanswered,
)
from dynamo.refit.coordinator.policy import GRACE_SECONDS, Policy
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.events import (
    Event,
    RefitCompleted,
    RefitFailed,
    RefitRefused,
    RefitStarted,
    RefitSuperseded,
    WeightVersionReady,
)
from dynamo.refit.protocol import (
    CommitStep,
    Committed,
    FleetMember,
    Refused,
    Stepped,
    Vote,
    WeightsServed,
)

CommitReply = Committed | Stepped | Refused

OUTCOMES = {
    RefitCompleted: "completed",
    RefitFailed: "failed",
    RefitSuperseded: "superseded",
    RefitRefused: "refused",
}


def _is_fenced(member: FleetMember) -> bool:
    return member.status.phase == "fenced"


@dataclass
class Open:
    """The transaction that has started and not ended."""

    version: int
    members: set[int]
    catch_up: bool
    began: float
    ready: WeightVersionReady | None = None
    #: Asked to stage, and not answered; what those that have answered said.
    asked: set[int] = field(default_factory=set)
    #: Let down by the last peer, and not sent to another source since.
    unserved: set[int] = field(default_factory=set)
    votes: dict[int, bool] = field(default_factory=dict)
    #: Told to change, and those of them that have not answered: what and when.
    told: set[int] = field(default_factory=set)
    busy: dict[int, tuple[CommitStep, float]] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)

    def has_changed(self, worker: int) -> None:
        self.busy.pop(worker, None)
        self.refused.discard(worker)
        self.changed.add(worker)

    def commit_answered(
        self, worker: int, reply: Committed | Stepped | Refused | Unanswered
    ) -> None:
        if worker not in self.told & self.members:
            return
        if isinstance(reply, Committed) and reply.fingerprint == self.ready.fingerprint:
            self.has_changed(worker)
        elif isinstance(reply, Unanswered) or worker not in self.busy:
            return
        elif not isinstance(reply, Stepped):
            del self.busy[worker]
            self.refused.add(worker)
        elif reply.step == self.busy[worker][0]:
            del self.busy[worker]


class Watch:
    """One coordinator's life."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.reconciler = Reconciler("tiny", policy)
        self.open: Open | None = None
        self.present: set[int] = set()
        self.silent: frozenset[int] = frozenset()
        self.told_to_go: dict[int, tuple[int, str]] = {}
        self.heard: set[str] = set()
        self.outcomes: dict[str, str] = {}
        #: How the last announcement of a refit or a catch-up was given back.
        self.leases: Counter[str] = Counter()
        self.peer_leases: dict[tuple[int, str], int] = {}
        self.withdrawn: set[int] = set()
        #: As last seen; it stays that of a worker that left.
        self._components: dict[int, str] = {}
        self.versions: dict[int, int] = {}
        self.newest_completed = 0

    def handle(self, what: Input, now: float) -> list[Action]:
        self._take_in(what)
        actions = self.reconciler.handle(what, now)
        self._note_shown()
        for number, action in enumerate(actions):
            self._check(action, actions[:number], actions[number + 1 :], what, now)
        assert (self.reconciler.transaction is None) == (self.open is None)
        for worker, version in self.reconciler.serving():
            assert (version or 0) >= self.versions.get(worker, 0), "view taken back"
        return actions

    # --- what it hears --------------------------------------------------------

    def _take_in(self, what: Input) -> None:
        name = (
            self.open.ready.announcement_id if self.open and self.open.ready else None
        )
        match what:
            case WeightVersionReady():
                self.heard.add(what.announcement_id)
            case FleetSeen():
                self.silent = what.silent
                fenced = {m.worker for m in what.members if _is_fenced(m)}
                self._fleet_seen({m.worker for m in what.members}, fenced)
            case ServeAnswered(reply=Refused()) if what.announcement_id == name:
                self.open.unserved.add(what.reader)
            case ServeAnswered(reply=WeightsServed(announcement_id=lease)):
                if (what.peer, lease) not in self.peer_leases:
                    self.peer_leases[what.peer, lease] = 1
            case PrepareAnswered(worker=worker) if what.announcement_id == name:
                if worker in self.open.asked:
                    self.open.asked.remove(worker)
                    yes = isinstance(what.reply, Vote)
                    yes = yes and what.reply.fingerprint == self.open.ready.fingerprint
                    self.open.votes[worker] = yes
                    # Who can vote is not in a commit any more.
                    self.withdrawn.discard(worker)
            case CommitAnswered(worker=worker):
                self._commit_answered(what, name)

    def _fleet_seen(self, present: set[int], fenced: set[int]) -> None:
        gone = self.present - present
        self.present = present
        for worker in gone:
            self.told_to_go.pop(worker, None)
        self.withdrawn -= gone
        for worker in gone:
            self.versions.pop(worker, None)
        if self.open is not None:
            gone |= fenced
            for kept in (self.open.members, self.open.asked, self.open.changed):
                kept -= gone
            for worker in gone:
                self.open.busy.pop(worker, None)

    def _note_shown(self) -> None:
        """A status that shows the version is as good as the reply to its commit."""
        for worker, (version, weights) in list(self.told_to_go.items()):
            if self._shows(worker, version, weights):
                del self.told_to_go[worker]
        if self.open is None or self.open.ready is None:
            return
        ready = self.open.ready
        for worker in self.open.told & self.open.members:
            waited_for = worker in self.open.busy or worker in self.open.refused
            if waited_for and self._shows(worker, ready.version, ready.fingerprint):
                self.open.has_changed(worker)
                self.withdrawn.discard(worker)

    def _shows(self, worker: int, version: int, fingerprint: str) -> bool:
        if worker not in self.reconciler.fleet:
            return False
        status = self.reconciler.fleet[worker].status
        what = status.version, status.fingerprint
        return what == (version, fingerprint) and status.phase not in (
            "committing",
            "fenced",
        )

    def _commit_answered(self, what: CommitAnswered, name: str | None) -> None:
        worker, reply = what.worker, what.reply
        if what.announcement_id == name:
            self.open.commit_answered(worker, reply)
            if worker not in self.open.busy:
                self.withdrawn.discard(worker)
        if isinstance(reply, Committed) and worker in self.present:
            newest = max(reply.version, self.versions.get(worker, 0))
            self.versions[worker] = newest

    # --- what it says ---------------------------------------------------------

    def _check(
        self,
        action: Action,
        before: list[Action],
        after: list[Action],
        what: Input,
        now: float,
    ) -> None:
        match action:
            case TakeLease():
                self._is_open(action.ready)
                self.leases[action.ready.announcement_id] += 1
            case SendServe():
                self._is_open(action.ready)
                self._may_be_told(action.peer)
                assert action.reader in self.open.members
                assert action.peer != action.reader
                self.open.unserved.discard(action.reader)
            case SendPrepare():
                self._prepare_sent(action)
            case SendCommit():
                self._commit_sent(action, now)
            case SendAdmit(worker=worker):
                self._may_be_told(worker)
                self._admitted(worker)
            case SendFence(worker=worker):
                assert worker in self.present
                self.told_to_go[worker] = action.version, action.fingerprint
            case SendAbort(worker=worker):
                assert worker in self.present
            case ReleasePeer(peer=peer, announcement_id=lease):
                self.peer_leases[peer, lease] = 0
            case GiveBackLease():
                self._given_back(action, before, what)
            case Publish(event=event):
                self._published(event, after, now)

    def _is_open(self, ready: WeightVersionReady) -> None:
        assert self.open is not None
        if self.open.ready is None:
            self.open.ready = ready
        assert self.open.ready == ready, "two versions at a time"
        assert ready.version == self.open.version

    def _may_be_told(self, worker: int) -> None:
        assert worker in self.present
        assert worker not in self.told_to_go
        assert not _is_fenced(self.reconciler.fleet[worker])

    def _is_committing(self, worker: int) -> bool:
        return self.reconciler.fleet[worker].status.phase == "committing"

    def _prepare_sent(self, action: SendPrepare) -> None:
        self._is_open(action.ready)
        assert action.worker in self.open.members
        assert not self.open.told, "staged during the commit"
        self.open.asked.add(action.worker)
        self.open.unserved.discard(action.worker)
        if action.served is None:
            assert self.leases[action.ready.announcement_id] > 0, "nobody keeps it"
        else:
            assert self.peer_leases[action.peer, action.served.announcement_id] == 1

    def _commit_sent(self, action: SendCommit, now: float) -> None:
        self._is_open(action.ready)
        current, worker = self.open, action.worker
        assert worker in current.members
        assert current.votes.get(worker) is True, f"worker {worker} did not vote yes"
        assert action.ready.version >= self.versions.get(worker, 0)
        assert current.changed or current.catch_up or not current.refused, "went on"
        if current.busy.get(worker, ("", 0.0))[0] == action.step:
            # Its reply was lost: the same order once more.
            assert action.withdraw == (worker in self.withdrawn)
            return
        if not current.told:
            self._enough_votes(now)
        self._is_its_turn(action, now)
        current.told.add(worker)
        current.busy[worker] = action.step, now

    def _is_its_turn(self, action: SendCommit, now: float) -> None:
        """Not too many at a time, and somebody else can be sent to."""
        current, policy = self.open, self.policy
        seconds = policy.commit_seconds + GRACE_SECONDS
        drain = action.in_flight == "drain"
        if drain:
            seconds += policy.drain_seconds
        under_way = {
            w for w, (_, sent) in current.busy.items() if now <= sent + seconds
        }
        if policy.commit != "barrier" and policy.max_unavailable:
            assert len(under_way) < policy.max_unavailable
        if policy.commit == "canary" and not current.catch_up:
            assert current.changed or not under_way, "two canaries"
        silent = current.busy.keys() - under_way
        left = self._routable() - self.withdrawn - current.refused - silent
        alike = [
            w for w in left if self._component(w) == self._component(action.worker)
        ]
        assert action.withdraw == (
            drain and action.worker in left and len(alike) > 1
        ), "routers have nobody to send to, or somebody who is busy"
        if action.withdraw:
            self.withdrawn.add(action.worker)

    def _enough_votes(self, now: float) -> None:
        current = self.open
        yes = {w for w in current.members if current.votes.get(w)}
        # One that no source is left for will not vote.
        waited_for = current.members - current.votes.keys() - current.unserved
        silent = waited_for | current.asked
        late = now > current.began + self.policy.stage_seconds + GRACE_SECONDS
        assert not silent or late, "somebody had not voted yet"
        if not current.catch_up:
            every = Counter(map(self._component, current.members))
            able = Counter(map(self._component, yes))
            assert all(able[c] >= self.policy.needed(n) for c, n in every.items())

    def _component(self, worker: int) -> str:
        if worker in self.reconciler.fleet:
            self._components[worker] = self.reconciler.fleet[worker].component
        return self._components[worker]

    def _routable(self) -> set[int]:
        return {
            worker
            for worker, member in self.reconciler.fleet.items()
            if member.status.admitted and member.status.phase != "fenced"
        } - self.told_to_go.keys()

    def _admitted(self, worker: int) -> None:
        fleet = self.reconciler.fleet
        mine = fleet[worker].status.version or 0
        for other, member in fleet.items():
            if other not in self.told_to_go and member.status.phase != "fenced":
                assert (member.status.version or 0) <= mine, "behind what is served"
        assert mine or not self.silent, "behind what may be served"
        assert mine >= self.newest_completed, "behind what was served"

    # --- how it ends ----------------------------------------------------------

    def _published(self, event: Event, after: list[Action], now: float) -> None:
        match event:
            case RefitStarted():
                assert self.open is None, "two transactions at a time"
                members = set(event.workers)
                assert members and members <= self.present - self.told_to_go.keys()
                self.open = Open(event.version, members, event.catch_up, now)
                for worker in members:
                    self._component(worker)
                # Whoever is left from an earlier commit has shown how it ended.
                self.withdrawn = {w for w in self.present if self._is_committing(w)}
            case RefitCompleted():
                if event.seconds is not None:
                    self._completed(event)
                self.newest_completed = max(self.newest_completed, event.version)
                fleet = self.reconciler.fleet
                for worker in event.workers:
                    assert fleet[worker].status.version == event.version
                    assert fleet[worker].status.fingerprint == event.fingerprint
                if not event.catch_up:
                    self._ended(event, after)
            case RefitFailed():
                closed, self.open = self.open, None
                told = (event.version, event.catch_up)
                assert told == (closed.version, closed.catch_up)
                assert not closed.changed, "some have changed"
                if not closed.catch_up:
                    self._ended(event, after)
            case RefitSuperseded():
                assert event.by >= event.version
                if self.open is None or self.open.told:
                    self._ended(event, after)
                    return
                closed, self.open = self.open, None
                told = (event.version, event.catch_up)
                assert told == (closed.version, closed.catch_up)
                if not closed.catch_up:
                    self._ended(event, after)
            case RefitRefused():
                self._ended(event, after)

    def _completed(self, event: RefitCompleted) -> None:
        closed, self.open = self.open, None
        assert (closed.version, closed.catch_up) == (event.version, event.catch_up)
        assert closed.changed and closed.changed <= set(event.workers)
        excluded = {failure.worker for failure in event.excluded}
        assert closed.members <= set(event.workers) | excluded
        if not closed.catch_up:
            left_over = closed.members - set(event.workers)
            assert left_over <= self.told_to_go.keys(), "neither changed nor fenced"

    def _ended(self, event: Event, after: list[Action]) -> None:
        """The one end of an announcement, with its release."""
        assert after and isinstance(after[0], GiveBackLease), "ended, not released"
        name = after[0].ready.announcement_id
        assert after[0].outcome == OUTCOMES[type(event)]
        assert after[0].ready.version == event.version
        assert name not in self.outcomes, "ended twice"
        self.outcomes[name] = after[0].outcome

    def _given_back(
        self, action: GiveBackLease, before: list[Action], what: Input
    ) -> None:
        name = action.ready.announcement_id
        current = self.open.ready if self.open else None
        reading = current is not None and current.announcement_id == name
        assert not reading, "released while it is read"
        ended = before and isinstance(before[-1], Publish)
        if self.leases[name]:
            self.leases[name] = 0
        elif not (ended and isinstance(before[-1].event, tuple(OUTCOMES))):
            # Said again, because the trainer has not heard it.
            assert isinstance(what, WeightVersionReady) and what.announcement_id == name
            assert action.outcome == self.outcomes[name]

    def assert_all_released(self) -> None:
        assert not +self.leases
        left = [lease for lease, count in self.peer_leases.items() if count]
        assert not left, f"never released: {left}"
        assert self.heard == set(self.outcomes)
