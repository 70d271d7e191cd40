# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One seed, one life of a fleet: versions come, everything that can go wrong does, and
when it stops going wrong the fleet must come to the newest version by itself."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import RefitError
from dynamo.refit.events import RefitCompleted, RefitFailed, WorkerFenced
from dynamo.refit.protocol import Install, Restore, Stage, Verify
from tests.faults.virtual_time import run
from tests.faults.world import START_SECONDS, Violated, Worker, World

#: How long faults come, in virtual seconds, and how long everything then goes well.
FAULT_SECONDS = 90.0
QUIET_SECONDS = 400.0

FAULTS = (
    "publish",
    "publish",
    "publish",
    "publish quickly",
    "kill worker",
    "stall worker",
    "kill coordinator",
    "second coordinator",
    "cut off coordinator",
    "restart trainer",
    "stall trainer",
    "stage fails",
    "stage hangs",
    "wrong bytes",
    "install fails once",
    "install fails",
    "install and undo fail",
    "live weights are wrong",
    "network",
)


@dataclass
class Result:
    """What one seed came to."""

    seed: int
    faults: int
    tokens: int
    published: int
    completed: int
    failed: int
    fenced: int


def simulate(seed: int, *, faults: bool = True) -> Result:
    """
    Raises:
        Violated: something happened that never may; the message says what.
    """
    return run(_live(seed, faults))


def draw_policy(draw: random.Random) -> Policy:
    return Policy(
        stage_seconds=draw.choice([10.0, 30.0]),
        commit_seconds=10.0,
        in_flight=draw.choice(["continue", "recompute"]),
        commit=draw.choice(["barrier", "rolling", "canary"]),
        max_unavailable=draw.choice([0, 1, 2]),
        hold_seconds=draw.choice([1.0, 5.0]),
        drain_seconds=2.0,
        quorum=draw.choice([1.0, 1.0, 0.5]),
        direct_readers=draw.choice([0, 0, 1]),
        peer_readers=draw.choice([1, 2]),
    )


async def _live(seed: int, faults: bool) -> Result:
    draw = random.Random(seed)
    policy = draw_policy(draw)
    in_flights = (None,) if policy.commit == "barrier" else (None, "drain")
    world = World(seed, policy, in_flights)
    world.together = policy.commit == "barrier" and not faults
    for _ in range(draw.randint(1, 5)):
        world.after(draw.uniform(0.0, 3.0), world.start_worker)
    world.after(draw.uniform(0.0, 5.0), lambda: world.spawn(world.start_coordinator()))
    clients = world.spawn(world.generate())
    done = await (_everything_goes_wrong(world, draw) if faults else _quiet(world))
    await _all_goes_well(world)
    clients.cancel()
    _nothing_is_left(world)
    kinds = [type(event) for event in world.events]
    return Result(
        seed=seed,
        faults=done,
        tokens=world.tokens,
        published=world.versions,
        completed=kinds.count(RefitCompleted),
        failed=kinds.count(RefitFailed),
        fenced=kinds.count(WorkerFenced),
    )


async def _quiet(world: World) -> int:
    for _ in range(7):
        await asyncio.sleep(8.0)
        world.publish()
    return 0


async def _everything_goes_wrong(world: World, draw: random.Random) -> int:
    done = 0
    end = world.now + FAULT_SECONDS
    while world.now < end:
        await asyncio.sleep(draw.choice([0.003, 0.05, 0.5, 2.0, 6.0]))
        _fault(world, draw, draw.choice(FAULTS))
        world.check()
        done += 1
    return done


def _fault(world: World, draw: random.Random, name: str) -> None:
    worker = draw.choice(
        sorted(world.workers.values(), key=lambda w: w.number) or [None]
    )
    match name:
        case "publish":
            world.publish()
        case "publish quickly":
            for number in range(draw.randint(2, 4)):
                world.after(0.01 * number, world.publish)
        case "kill coordinator":
            world.kill_coordinator()
        case "second coordinator":
            if len(world.coordinators) == 1:
                world.spawn(world.start_coordinator())
                world.after(draw.uniform(5.0, 15.0), world.end_older_coordinators)
        case "cut off coordinator":
            for _, caller, _ in world.coordinators[:1]:
                caller.cut_off = True
                world.after(draw.uniform(0.5, 20.0), lambda c=caller: c.reconnect())
        case "restart trainer":
            world.restart_trainer()
        case "stall trainer":
            _stall(world, world.trainer, draw.uniform(0.5, 15.0))
        case "network":
            world.network.lossy = not world.network.lossy
    if worker is not None:
        _fault_of_worker(world, draw, name, worker)


def _fault_of_worker(
    world: World, draw: random.Random, name: str, worker: Worker
) -> None:
    rank = draw.choice(worker.engine.ranks)
    error = RefitError("simulated")
    match name:
        case "kill worker":
            worker.die()
        case "stall worker":
            _stall(world, worker, draw.uniform(0.5, 15.0))
        case "stage fails":
            rank.fail[Stage] = [error]
        case "stage hangs":
            rank.held.add("stage")
            world.after(draw.uniform(0.5, 15.0), lambda: rank.held.discard("stage"))
        case "wrong bytes":
            rank.wrong = {0: 1}
            world.after(5.0, lambda: rank.wrong.clear())
        case "install fails once":
            rank.fail[Install] = [error]
        case "install fails":
            rank.fail[Install] = [error, error]
        case "install and undo fail":
            if not worker.engine.installs_in_step:
                rank.fail[Install] = [error, error]
                rank.fail[Restore] = [error]
        case "live weights are wrong":
            rank.fail[Verify] = [error]


def _stall(world: World, process: object, seconds: float) -> None:
    process.stalled = True

    def go_on() -> None:
        process.stalled = False

    world.after(seconds, go_on)


async def _all_goes_well(world: World) -> None:
    """From here on nothing goes wrong any more; a last version is published."""
    world.network.lossy = False
    world.quiet = True
    # A drain is refused where there is one worker only.
    world.in_flights = (None,)
    for worker in world.workers.values():
        for rank in worker.engine.ranks:
            rank.fail.clear()
            rank.held.clear()
            rank.wrong.clear()
    await asyncio.sleep(START_SECONDS + 20.0)
    world.end_older_coordinators()
    if not world.coordinators:
        await world.start_coordinator()
    end = world.now + QUIET_SECONDS
    published = False
    while world.now < end:
        await asyncio.sleep(5.0)
        world.check()
        published = published or world.publish()
        if published and _settled(world):
            return


def _settled(world: World) -> bool:
    return not any(_what_is_left(world).values())


def _what_is_left(world: World) -> dict[str, list[str]]:
    """What is not as it should be in the end, by its kind."""
    left: dict[str, list[str]] = {"left_paused": [], "leaked": [], "wrong_version": []}
    for number, worker in sorted(world.workers.items()):
        status = worker.agent.status()
        if worker.engine.paused or not worker.routing.seen:
            left["left_paused"].append(f"worker {number}")
        if status.pending is not None or status.phase != "serving":
            left["leaked"].append(f"worker {number}: {status.phase} {status.pending}")
        if status.version != world.versions:
            what = f"worker {number}: {status.version}, not {world.versions}"
            left["wrong_version"].append(what)
    left["leaked"] += world.trainer.left()
    if not world.workers:
        left["left_paused"].append("every worker")
    return left


def _nothing_is_left(world: World) -> None:
    world.check()
    for kind, what in _what_is_left(world).items():
        if what:
            raise Violated(kind, "; ".join(what))
