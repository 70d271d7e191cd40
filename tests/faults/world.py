# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A fleet in one process and in virtual time: the product's coordinator and agents over
a network that loses, repeats and delays; engines, ranks and trainer are fakes.

What is asserted is asserted at every token: an engine makes one only if it is not
paused, all of its ranks have one version, and that is the one its worker speaks of.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dynamo.refit.args import CoordinatorConfig
from dynamo.refit.coordinator.component import (
    Coordinator,
    CoordinatorReplaced,
    next_epoch,
)
from dynamo.refit.coordinator.fleet import FleetWatch
from dynamo.refit.coordinator.policy import Policy
from dynamo.refit.errors import RefitError, failure_from
from dynamo.refit.events import Event, WeightVersionReady, WorkerRefitted
from dynamo.refit.protocol import (
    AcquireLease,
    Done,
    FingerprintsReply,
    GetFingerprints,
    GetManifest,
    ManifestReply,
    Message,
    Refused,
    ReleaseLease,
    TrainerRequest,
    WorkerRequest,
    from_wire,
    to_wire,
)
from dynamo.refit.publish.endpoint import REANNOUNCE_SECONDS
from dynamo.refit.publish.publication import Publication, PublicationLog
from dynamo.refit.rpc import PeerLost
from dynamo.refit.worker.agent import RefitAgent
from tests.faults.barrier import BarrierJudge
from tests.support.fake_replica import (
    FakeEngine,
    FakeRank,
    fingerprints_of,
    manifest,
    weights_of,
)
from tests.support.fake_routing import FakeRouting

WORKERS = "sim.backend.refit"
TRAINER = "sim.trainer.weights"

#: How long a process takes to start.
START_SECONDS = 8.0

#: How long tokens may be of other weights than the worker's label says.
LABEL_SECONDS = 0.1

#: How long a full engine lets the request wait that probes it.
PROBE_SECONDS = 2.0

#: Between two tokens of the fleet: while things go wrong, and after that.
TOKEN_SECONDS = 0.02, 0.5


class Violated(AssertionError):
    """Something happened that never may: its ``kind``, and what it was."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


@dataclass
class Network:
    """How messages travel."""

    random: random.Random
    lossy: bool = False

    def delay(self) -> float:
        if self.lossy and self.random.random() < 0.03:
            return self.random.uniform(0.5, 20.0)
        return self.random.uniform(0.0002, 0.005)

    def loses(self) -> bool:
        return self.lossy and self.random.random() < 0.03

    def repeats(self) -> bool:
        return self.lossy and self.random.random() < 0.05


class Engine(FakeEngine):
    """One that is busy."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self._draw = draw
        self.installs_in_step = draw.random() < 0.5

    async def probe(self) -> None:
        await asyncio.sleep(self._draw.uniform(0.0, PROBE_SECONDS))
        await super().probe()


class Worker:
    """A replica: the product's agent over a fake engine."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.alive = True
        #: Set while the process is stopped: it answers nobody, and makes no token.
        self.stalled = False
        self.engine = Engine(world.random)
        #: Since when its tokens are of other weights than its label says.
        self.mislabelled: float | None = None
        for rank in self.engine.ranks:
            rank.name = f"worker {number} rank {rank.rank}"
            rank.peers = world.ranks
            world.ranks[rank.name] = rank
        self.routing = FakeRouting(admitted=False)
        self.began = world.now
        self.agent = RefitAgent(
            self.engine,
            Caller(world, f"worker {number}"),
            self.publish,
            self.routing,
            self.leave,
            model="tiny",
            worker=number,
        )
        self.tasks = [asyncio.ensure_future(self._start())]

    async def _start(self) -> None:
        await self.agent.start()
        self.world.workers[self.number] = self

    def publish(self, event: Event) -> None:
        if self.alive:
            self.world.deliver(event)

    def leave(self) -> None:
        """The product's fence ends here in the end of the process."""
        self.die()

    def die(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.world.workers.pop(self.number, None)
        for rank in self.engine.ranks:
            # Who reads from it now gets nothing that fits.
            rank.shadows = [0, 0]
        self.world.forget()
        for task in self.tasks:
            task.cancel()
        self.world.after(START_SECONDS, self.world.start_worker)

    @property
    def generating(self) -> bool:
        engine = self.engine
        return self.alive and not self.stalled and not engine.paused

    def make_token(self) -> None:
        live = set(self.engine.live())
        if len(live) > 1:
            raise Violated(
                "wrong_version", f"worker {self.number} made a token of {live}"
            )
        (version,) = live
        status = self.agent.status()
        said = status.version
        if version != said:
            what = f"worker {self.number} made a token of {version}, and says {said}"
            raise Violated("wrong_version", what)
        self._check_label(version)
        for rank in self.engine.ranks:
            content = rank.shadows[rank.live_shadow]
            if version is not None and weights_of(content) != status.fingerprint:
                what = f"worker {self.number} serves {content} as version {version}"
                raise Violated("wrong_version", what)
        if version is None and self.began > self.world.served_since:
            what = f"worker {self.number} joined, and serves start-up weights"
            raise Violated("wrong_version", what)
        self.world.tokens += 1

    def _check_label(self, version: int | None) -> None:
        label = self.routing.labelled[-1] if self.routing.labelled else None
        if label == version:
            self.mislabelled = None
            return
        if self.mislabelled is None:
            self.mislabelled = self.world.now
        if self.world.now - self.mislabelled > LABEL_SECONDS:
            what = f"worker {self.number} makes tokens of {version}, labelled {label}"
            raise Violated("wrong_version", what)


class Trainer:
    """A trainer of one rank: the product's log of publications, and answers."""

    def __init__(self, world: World, life: int) -> None:
        self.world = world
        self.life = life
        self.alive = True
        self.stalled = False
        self.manifest = manifest(address=0x1000 * (life + 1))
        self.payload = msgspec.msgpack.encode(self.manifest)
        self.log = PublicationLog(
            f"trainer {life}", slots=2, in_place=False, ready_seconds=math.inf
        )
        self.task = asyncio.ensure_future(self._repeat())

    def publish(self, version: int) -> bool:
        """Whether there is room for it: what is leased is not overwritten."""
        publication = self.log.open(version, self.world.now)
        if publication.refused is not None:
            return False
        publication.complete(fingerprints_of(version))
        for ready in self.log.to_announce():
            self._announce(ready)
        return True

    def _announce(self, publication: Publication) -> None:
        event = WeightVersionReady(
            model="tiny",
            version=publication.version,
            announcement_id=publication.announcement_id,
            endpoint=TRAINER,
            instance=self.life,
            manifest_digest=self.manifest.fingerprint(),
            slot=publication.slot,
            fingerprint=publication.fingerprint,
            in_flight=self.world.in_flight(),
        )
        self.world.announce(event)

    async def _repeat(self) -> None:
        while self.alive:
            await asyncio.sleep(REANNOUNCE_SECONDS)
            self.log.expire(self.world.now, range(1))
            for publication in self.log.to_repeat(self.world.now):
                self._announce(publication)

    async def answer(self, request: TrainerRequest) -> Message:
        log, now = self.log, self.world.now
        match request:
            case GetManifest():
                return ManifestReply(payload=self.payload)
            case GetFingerprints(announcement_id=name):
                return FingerprintsReply(payload=log.readable(name).fingerprints)
            case AcquireLease(announcement_id=name, epoch=epoch, seconds=seconds):
                log.acquire(name, epoch, seconds, now)
            case ReleaseLease(announcement_id=name, epoch=epoch):
                log.release(name, epoch, request.outcome, request.detail, now)
        return Done()

    def left(self) -> list[str]:
        """Handles that have not ended, and leases."""
        left = [f"announcement of {p.version}" for p in self.log if not p.ended]
        leased = [p for p in self.log if p.leased(self.world.now)]
        return left + [f"lease of {p.version}" for p in leased]

    def die(self) -> None:
        self.alive = False
        self.task.cancel()


class Caller:
    """Calls over the network; implements :class:`dynamo.refit.rpc.Caller`."""

    def __init__(self, world: World, who: str) -> None:
        self._world = world
        self._who = who
        self.cut_off = False

    def reconnect(self) -> None:
        self.cut_off = False

    async def instances(self, path: str) -> list[int]:
        if path == TRAINER:
            return [self._world.trainer.life]
        return sorted(self._world.workers) if path == WORKERS else []

    async def call(
        self, path: str, instance: int, request: Message, expected: Any, seconds: float
    ) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return from_wire(
                    await self._carry(path, instance, request, seconds), expected
                )
        except TimeoutError as error:
            raise PeerLost(f"{path} {instance} did not answer {request}") from error

    async def _carry(
        self, path: str, instance: int, request: Message, seconds: float
    ) -> Any:
        network = self._world.network
        data = to_wire(request)
        await asyncio.sleep(network.delay())
        if network.loses() or self.cut_off:
            await asyncio.sleep(seconds)
        if network.repeats():
            self._world.spawn(self._answer(path, instance, data))
        reply = await self._answer(path, instance, data)
        await asyncio.sleep(network.delay())
        if network.loses() or self.cut_off:
            await asyncio.sleep(seconds)
        return reply

    async def _answer(self, path: str, instance: int, data: Any) -> Any:
        target, kinds = self._world.find(path, instance)
        while target.stalled and target.alive:
            await asyncio.sleep(0.1)
        if not target.alive:
            raise PeerLost(f"{path} {instance} is gone")
        # A request that was taken is carried out, whoever waits for its reply.
        task = self._world.spawn(self._reply(target, from_wire(data, kinds)))
        if isinstance(target, Worker):
            target.tasks.append(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise PeerLost(f"{path} {instance} ended") from None
            raise

    async def _reply(self, target: Worker | Trainer, request: Any) -> Any:
        answer = target.answer if isinstance(target, Trainer) else target.agent.answer
        try:
            return to_wire(await answer(request))
        except RefitError as error:
            return to_wire(Refused(failure=failure_from(error, stage="simulated")))


@dataclass
class World:
    """Everything there is. ``policy`` is the coordinator's."""

    seed: int
    policy: Policy
    in_flights: tuple[str | None, ...] = (None,)
    workers: dict[int, Worker] = field(default_factory=dict)
    ranks: dict[str, FakeRank] = field(default_factory=dict)
    coordinators: list[tuple[Coordinator, Caller, list[asyncio.Task]]] = field(
        default_factory=list
    )
    events: list[Event] = field(default_factory=list)
    tokens: int = 0
    #: From when on somebody knows that the fleet serves a version.
    served_since: float = math.inf
    versions: int = 0
    started_coordinators: int = 0
    #: No two workers may serve different versions: a barrier, and nothing goes wrong.
    together: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.network = Network(self.random)
        self.loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task] = set()
        self.broken: BaseException | None = None
        self.lives = 0
        self.trainer = Trainer(self, self._life())

    @property
    def now(self) -> float:
        return self.loop.time()

    def _life(self) -> int:
        self.lives += 1
        return self.lives

    def in_flight(self) -> str | None:
        return self.random.choice(self.in_flights)

    def spawn(self, work: Any) -> asyncio.Task:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self.tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PeerLost | CoordinatorReplaced):
            self.broken = self.broken or error

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.loop.call_later(seconds, do)

    # --- processes ----------------------------------------------------------

    def start_worker(self) -> None:
        Worker(self, self._life())

    async def start_coordinator(self) -> None:
        self.started_coordinators += 1
        self.forget()
        config = CoordinatorConfig(
            namespace="sim",
            model=None,
            worker_components=("backend",),
            fleet_poll_seconds=0.5,
            policy=self.policy,
        )
        caller = Caller(self, "coordinator")
        fleet = FleetWatch(caller, config)
        seen = await fleet.look()
        epoch = max(next_epoch(seen), self._life())
        judge = BarrierJudge(caller, self.events.append, self._wrong_end)
        coordinator = Coordinator(config, judge, judge.publish, epoch)
        coordinator.hear(seen)
        tasks = [
            self.spawn(coordinator.run()),
            self.spawn(fleet.watch(coordinator.hear)),
        ]
        self.coordinators.append((coordinator, caller, tasks))

    def _wrong_end(self, what: str) -> None:
        self.broken = self.broken or Violated("wrong_end", what)

    def kill_coordinator(self) -> None:
        if self.coordinators:
            _, _, tasks = self.coordinators.pop(0)
            for task in tasks:
                task.cancel()
        self.forget()
        self.after(
            self.random.uniform(0.0, 10.0), lambda: self.spawn(self.start_coordinator())
        )

    def end_older_coordinators(self) -> None:
        """As when a deployment's old pod is at last gone."""
        for _, _, tasks in self.coordinators[:-1]:
            for task in tasks:
                task.cancel()
        del self.coordinators[:-1]

    def restart_trainer(self) -> None:
        self.trainer.die()

        def start() -> None:
            self.trainer = Trainer(self, self._life())

        self.after(self.random.uniform(0.0, 20.0), start)

    def publish(self) -> bool:
        done = self.trainer.alive and self.trainer.publish(self.versions + 1)
        self.versions += done
        return done

    # --- messages -----------------------------------------------------------

    def find(self, path: str, instance: int) -> tuple[Worker | Trainer, Any]:
        if path == WORKERS and instance in self.workers:
            return self.workers[instance], WorkerRequest
        if path == TRAINER and instance == self.trainer.life:
            return self.trainer, TrainerRequest
        raise PeerLost(f"{path} has no instance {instance}")

    def announce(self, event: WeightVersionReady) -> None:
        for coordinator, caller, _ in self.coordinators:
            if not self.network.loses() and not caller.cut_off:
                for _ in range(1 + self.network.repeats()):
                    self.after(
                        self.network.delay(), lambda to=coordinator: to.hear(event)
                    )

    def deliver(self, event: Event) -> None:
        if isinstance(event, WorkerRefitted):
            self.served_since = min(self.served_since, self.now)
        self.events.append(event)

    def forget(self) -> None:
        """When the last worker with a version is gone, a coordinator that came later
        may never have heard of it, and start-up weights are as good."""
        versions = [w.agent.status().version for w in self.workers.values()]
        if self.started_coordinators != 1 and not any(versions):
            self.served_since = math.inf

    # --- clients ------------------------------------------------------------

    async def generate(self) -> None:
        """Every engine that may makes a token, again and again."""
        while True:
            await asyncio.sleep(TOKEN_SECONDS[self.quiet])
            seen = [w for w in self.workers.values() if w.routing.seen and w.generating]
            for worker in seen:
                worker.make_token()
            versions = {worker.agent.status().version for worker in seen}
            if self.together and len(versions) > 1:
                raise Violated("wrong_version", f"two at a time: {versions}")

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken
