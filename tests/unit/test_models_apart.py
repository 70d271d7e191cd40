# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Two models in one namespace are two fleets: weights of one never reach the other."""

from __future__ import annotations

from typing import Any

import pytest

from dynamo.refit.args import parse_args
from dynamo.refit.cli.fleet import fetch_status
from dynamo.refit.coordinator.actions import FleetSeen, SendPrepare, Tick
from dynamo.refit.coordinator.fleet import FleetWatch, SeveralModels
from dynamo.refit.coordinator.reconciler import Reconciler
from dynamo.refit.errors import OtherModel, RefitError
from dynamo.refit.events import RefitCompleted, RefitStarted, WorkerJoined
from dynamo.refit.protocol import (
    Abort,
    Admit,
    Commit,
    Fence,
    FleetStatus,
    GetStatus,
    Prepare,
    ServeWeights,
    WorkerStatus,
    to_wire,
)
from dynamo.refit.rpc import unary
from tests.support.fake_replica import EPOCH, Bench, commit
from tests.support.fleet import (
    POLICY,
    V5,
    committed,
    events,
    fences,
    fleet,
    leased,
    member,
    new,
    of_type,
    ready,
    voted,
)

pytestmark = [
    pytest.mark.unit,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.timeout(30),
]

THEIRS = "code-model"


# --- the reconciler -----------------------------------------------------------


def test_a_version_goes_to_the_workers_of_its_model_only() -> None:
    reconciler = new(1, member(2, model=THEIRS))
    [start] = events(reconciler.handle(V5, 1.0))
    assert isinstance(start, RefitStarted) and start.workers == (1,)
    actions = reconciler.handle(leased(V5), 2.0)
    assert [a.worker for a in of_type(actions, SendPrepare)] == [1]
    reconciler.handle(voted(1, V5), 3.0)
    [done] = events(reconciler.handle(committed(1, V5), 4.0))
    assert isinstance(done, RefitCompleted) and done.workers == (1,)
    assert reconciler.serving() == ((1, 5),)


@pytest.mark.parametrize("theirs", [None, 3, 5, 9])
def test_one_of_another_model_is_neither_caught_up_admitted_nor_fenced(
    theirs: int | None,
) -> None:
    reconciler = new(member(1, 5))
    joined = member(2, theirs, model=THEIRS, admitted=False)
    for second in range(200):
        now = 10.0 + second
        actions = reconciler.handle(fleet(member(1, 5), joined), now)
        assert actions + reconciler.handle(Tick(), now) == []
    assert sorted(reconciler.fleet) == [1]


def test_another_model_s_version_makes_no_number_stale_here() -> None:
    reconciler = new(member(1, 4), member(2, 9, model=THEIRS))
    [start] = events(reconciler.handle(V5, 1.0))
    assert isinstance(start, RefitStarted)


def test_without_a_model_it_takes_the_first_worker_s_and_keeps_it() -> None:
    reconciler = Reconciler(None, POLICY)
    reconciler.handle(fleet(member(1), member(2, model=THEIRS)), 0.0)
    assert (reconciler.model, sorted(reconciler.fleet)) == ("tiny", [1])
    actions = reconciler.handle(fleet(member(2, model=THEIRS)), 1.0)
    assert (reconciler.model, reconciler.fleet) == ("tiny", {})
    assert events(actions, WorkerJoined) == [] and fences(actions) == {}


def test_an_announcement_of_another_coordinator_s_model_is_left_to_it() -> None:
    """Refused here, the trainer's handle would end, whatever the other one does."""
    reconciler = new(1)
    theirs = ready(7, "theirs", model=THEIRS)
    seen = FleetSeen((member(1),), other_models=frozenset({THEIRS}))
    reconciler.handle(seen, 1.0)
    assert reconciler.handle(theirs, 2.0) == []
    assert reconciler.desired is None


def test_it_is_left_to_it_also_if_it_came_before_the_first_worker() -> None:
    reconciler = Reconciler(None, POLICY)
    reconciler.handle(ready(7, "theirs", model=THEIRS), 0.0)
    seen = FleetSeen((member(1),), other_models=frozenset({THEIRS}))
    assert [type(e) for e in events(reconciler.handle(seen, 1.0))] == [WorkerJoined]
    assert events(reconciler.handle(V5, 2.0), RefitStarted)


# --- the fleet's view ---------------------------------------------------------


class Namespace:
    """A test fake of :class:`dynamo.refit.rpc.Caller`: statuses by path and instance,
    and nothing else."""

    def __init__(self, **models_of: dict[int, str]) -> None:
        self.models_of = models_of

    async def instances(self, path: str) -> list[int]:
        return list(self.models_of.get(path.split(".")[1], {}))

    async def call(
        self, path: str, instance: int, request: Any, *_: object
    ) -> WorkerStatus | FleetStatus:
        assert request == GetStatus()
        place = path.split(".")[1]
        model = self.models_of[place][instance]
        if place == "refit":
            return FleetStatus(
                model=model,
                epoch=instance,
                desired=None,
                completed=None,
                under_way=None,
                members=(),
            )
        return member(instance, model=model).status


def watch(namespace: Namespace, *arguments: str) -> FleetWatch:
    config = parse_args(["--worker-components", "backend,other", *arguments])
    return FleetWatch(namespace, config)


async def test_the_view_has_the_workers_of_its_model_only() -> None:
    namespace = Namespace(backend={1: "tiny", 3: "tiny"}, other={2: THEIRS})
    seen = await watch(namespace, "--model", "tiny").look()
    assert [(m.worker, m.component) for m in seen.members] == [
        (1, "backend"),
        (3, "backend"),
    ]
    assert (seen.silent, seen.other_models) == (frozenset(), {THEIRS})
    theirs = await watch(namespace, "--model", THEIRS).look()
    assert [m.worker for m in theirs.members] == [2]


async def test_a_coordinator_without_a_model_takes_the_only_one_for_good() -> None:
    namespace = Namespace(backend={1: "tiny"})
    fleet_watch = watch(namespace)
    assert [m.worker for m in (await fleet_watch.look()).members] == [1]
    namespace.models_of["other"] = {2: THEIRS}
    seen = await fleet_watch.look()
    assert [m.worker for m in seen.members] == [1]
    assert seen.other_models == {THEIRS}


async def test_where_there_are_several_it_does_not_choose() -> None:
    namespace = Namespace(backend={1: "tiny"}, other={2: THEIRS})
    with pytest.raises(SeveralModels, match=r"code-model, tiny.*each with --model"):
        await watch(namespace).look()


# --- the worker ---------------------------------------------------------------


def command_of(kind: type, model: str, bench: Bench) -> Any:
    """A command of each kind, as its coordinator would send it."""
    fields = {"model": model, "epoch": EPOCH}
    match kind.__name__:
        case "Prepare":
            return bench.prepare(6, **fields)
        case "Commit":
            return Commit(**fields, version=6, in_flight="continue")
        case "Abort":
            return Abort(**fields, version=6, reason="-")
        case "Fence":
            return Fence(**fields, version=6, fingerprint="-", reason="-")
        case "ServeWeights":
            return ServeWeights(**fields, version=5, fingerprint="-", seconds=1.0)
    return Admit(**fields)


@pytest.mark.parametrize(
    "kind",
    [Prepare, Commit, Abort, Admit, Fence, ServeWeights],
    ids=lambda k: k.__name__,
)
async def test_a_worker_refuses_every_command_for_another_model(kind: type) -> None:
    bench = Bench(admitted=False)
    await bench.agent.start()
    # The other coordinator's epoch is newer; it says nothing here.
    request = command_of(kind, THEIRS, bench)
    handler = unary(kind, bench.agent.answer, "worker")
    with pytest.raises(OtherModel):
        await bench.agent.answer(request)
    [reply] = [reply async for reply in handler(to_wire(request))]
    assert reply["type"] == "Refused" and not reply["fenced"]
    failure = reply["failure"]
    assert failure["kind"] == "OtherModel"
    assert THEIRS in failure["message"] and "'tiny'" in failure["message"]
    status = bench.agent.status()
    assert (status.epoch, status.phase, status.admitted) == (0, "serving", False)
    assert bench.fences == 0 and bench.events == []


async def test_its_own_coordinator_is_obeyed_afterwards() -> None:
    bench = Bench()
    await bench.agent.start()
    with pytest.raises(OtherModel):
        newer = bench.prepare(7, model=THEIRS, epoch=EPOCH + 100)
        await bench.agent.answer(newer)
    await bench.staged(5)
    await bench.agent.answer(commit(5))
    bench.assert_serving(5)


# --- the commands -------------------------------------------------------------


async def test_a_command_finds_the_coordinator_of_the_model() -> None:
    namespace = Namespace(refit={1: "tiny", 2: THEIRS, 3: "tiny"})
    assert (await fetch_status(namespace, "dynamo", "tiny")).epoch == 3
    assert (await fetch_status(namespace, "dynamo", THEIRS)).epoch == 2
    with pytest.raises(RefitError, match=r"2 models .*choose one with --model"):
        await fetch_status(namespace, "dynamo")
    with pytest.raises(RefitError, match="'huge' is not served here"):
        await fetch_status(namespace, "dynamo", "huge")
