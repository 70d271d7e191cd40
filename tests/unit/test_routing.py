# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""A worker's place in routing, over a discovery that is a set of names."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from dynamo.refit import presence
from dynamo.refit.worker import routing as module
from dynamo.refit.worker.routing import WorkerRouting

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

OWN = 7


class Discovery:
    """The records of one worker, as everyone sees them; ``down`` refuses all calls,
    ``hangs`` answers none."""

    def __init__(self) -> None:
        self.instances: set[str] = set()
        self.card: set[str] | None = None
        self.changes: list[str] = []
        self.down = False
        self.hangs = False
        self.hanging: list[asyncio.Event] = []

    def let(self) -> None:
        self.hangs = False
        for call in self.hanging:
            call.set()

    async def change(self, what: str) -> None:
        if self.hangs:
            # Who called last is answered first.
            self.hanging.insert(0, asyncio.Event())
            await self.hanging[0].wait()
        if self.down:
            raise Exception("discovery is down")
        self.changes.append(what)

    async def update_model_taints(self, endpoint: FakeEndpoint, taints: set) -> None:
        await self.change(f"taints {sorted(taints)}")
        if self.card is None:
            raise Exception("Could not find key")
        self.card = set(taints)

    async def register_model(self) -> None:
        await self.change("model")
        self.card = set()

    def lose_everything(self) -> None:
        self.instances.clear()
        self.card = None
        self.changes.clear()


class FakeEndpoint:
    def __init__(self, discovery: Discovery, name: str) -> None:
        self.discovery = discovery
        self.name = name

    def connection_id(self) -> int:
        return OWN

    async def register_endpoint_instance(self) -> None:
        await self.discovery.change(f"+{self.name}")
        self.discovery.instances.add(self.name)

    async def unregister_endpoint_instance(self) -> None:
        await self.discovery.change(f"-{self.name}")
        if self.name not in self.discovery.instances:
            raise Exception("Unable to unregister endpoint instance from discovery")
        self.discovery.instances.remove(self.name)

    async def client(self) -> SimpleNamespace:
        return SimpleNamespace(
            instance_ids=lambda: [OWN] * (self.name in self.discovery.instances)
        )


class Worker:
    """A worker that starts: what dynamo.vllm does around its WorkerRouting."""

    def __init__(
        self,
        discovery: Discovery,
        admission: str = "coordinator",
        *,
        opened: bool = True,
    ) -> None:
        self.discovery = discovery
        self.health: list[bool] = []
        self.asleep = False
        self.may_put_back = True
        self.stopping = asyncio.Event()
        self.generate, commands, clear = (
            FakeEndpoint(discovery, name) for name in ("generate", "refit", "clear")
        )
        self.routing = WorkerRouting(
            SimpleNamespace(set_health_status=self.health.append),
            self.generate,
            commands,
            others=[self.generate, clear],
            admission=admission,
            asleep=lambda: self.asleep,
            stopping=self.stopping,
            put_back=self.put_back,
        )
        discovery.instances.add("refit")
        if opened:
            self.routing.open()
        self.starting = asyncio.create_task(self.start())

    async def start(self) -> None:
        await self.routing.register(self.discovery.register_model)
        self.discovery.changes.append("served")
        self.discovery.instances |= {"generate", "clear"}

    async def put_back(self) -> bool:
        self.discovery.changes.append("and all else")
        return self.may_put_back

    async def admitted(self) -> Worker:
        self.routing.admit()
        await self.starting
        self.discovery.changes.clear()
        return self


@pytest.fixture
def discovery(monkeypatch: pytest.MonkeyPatch) -> Discovery:
    discovery = Discovery()
    monkeypatch.setattr(module, "update_model_taints", discovery.update_model_taints)
    for name, seconds in (
        ("WATCH_SECONDS", 0.01),
        ("MISSING_SECONDS", 0.05),
        ("LOST_SECONDS", 0.2),
    ):
        monkeypatch.setattr(presence, name, seconds)
    monkeypatch.setattr(module, "SEEN_SECONDS", 0.05)
    return discovery


@pytest.fixture
async def worker(discovery: Discovery) -> AsyncIterator[Worker]:
    worker = Worker(discovery)
    watching = asyncio.create_task(worker.routing.watch())
    yield worker
    worker.starting.cancel()
    await asyncio.wait([worker.starting])
    worker.stopping.set()
    await asyncio.wait_for(watching, 5)


async def until(condition: object, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def settle() -> None:
    """Long enough for the watch to have acted."""
    await asyncio.sleep(0.15)


# --- admission ----------------------------------------------------------------


async def test_nothing_is_in_discovery_before_the_admission(worker: Worker) -> None:
    await settle()
    assert not worker.routing.admitted
    assert worker.discovery.instances == {"refit"}
    assert worker.discovery.changes == []
    worker.routing.admit()
    await worker.starting
    assert worker.routing.admitted
    assert worker.discovery.changes == ["model", "served"]
    assert worker.discovery.instances == {"refit", "generate", "clear"}


async def test_admitting_twice_is_admitting_once(worker: Worker) -> None:
    worker.routing.admit()
    await worker.starting
    worker.routing.admit()
    await settle()
    assert worker.discovery.changes == ["model", "served"]


async def test_immediate_admission_waits_for_nobody(discovery: Discovery) -> None:
    worker = Worker(discovery, "immediate")
    assert worker.routing.admitted
    await asyncio.wait_for(worker.starting, 5)
    assert discovery.changes == ["model", "served"]


async def test_nobody_is_served_before_the_ranks_can_be_refitted(
    discovery: Discovery,
) -> None:
    worker = Worker(discovery, "immediate", opened=False)
    await settle()
    assert discovery.changes == []
    worker.routing.open()
    await asyncio.wait_for(worker.starting, 5)
    assert discovery.changes == ["model", "served"]


async def test_it_says_who_it_waits_for_and_the_way_out(
    discovery: Discovery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "REMIND_SECONDS", 0.02)
    caplog.set_level(logging.INFO, logger=module.__name__)
    worker = Worker(discovery)
    await until(lambda: len(caplog.records) >= 3)
    worker.routing.admit()
    await worker.starting
    assert "python -m dynamo.refit" in caplog.messages[0]
    assert "--refit-admission immediate" in caplog.messages[0]
    said = len(caplog.records)
    await asyncio.sleep(0.1)
    assert len(caplog.records) == said


async def test_a_process_that_is_told_to_end_waits_no_longer(worker: Worker) -> None:
    worker.starting.cancel()
    worker.stopping.set()
    with pytest.raises(SystemExit) as ended:
        await worker.routing.register(worker.discovery.register_model)
    assert ended.value.code == 0
    assert worker.discovery.instances == set()
    assert worker.discovery.changes == ["-refit"]


async def test_a_withdrawn_worker_that_is_admitted_waits_for_its_return(
    worker: Worker,
) -> None:
    await worker.routing.withdraw()
    worker.routing.admit()
    await settle()
    assert worker.discovery.changes == []
    await worker.routing.restore()
    await worker.starting
    assert worker.discovery.changes == ["model", "served"]


# --- labels -------------------------------------------------------------------


async def test_a_label_from_before_the_registration_is_there_before_routers_see_it(
    worker: Worker,
) -> None:
    await worker.routing.label(3)
    assert worker.discovery.changes == []
    worker.routing.admit()
    await worker.starting
    assert worker.discovery.changes == ["model", "taints ['weights=3']", "served"]


async def test_a_label_replaces_ours_and_keeps_the_user_s(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.label(3)
    await worker.routing.set_user_taints(worker.generate, {"gpu=h100", "fast"})
    assert worker.discovery.card == {"gpu=h100", "fast", "weights=3"}
    await worker.routing.label(4)
    assert worker.discovery.card == {"gpu=h100", "fast", "weights=4"}


async def test_a_user_cannot_drop_or_forge_the_label(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    await worker.admitted()
    await worker.routing.label(3)
    await worker.routing.set_user_taints(worker.generate, {"weights=9", "a"})
    assert worker.discovery.card == {"weights=3", "a"}
    assert "weights=9" in caplog.text
    await worker.routing.set_user_taints(worker.generate, set())
    assert worker.discovery.card == {"weights=3"}


async def test_a_user_s_taints_from_before_the_registration_are_kept(
    worker: Worker,
) -> None:
    await worker.routing.set_user_taints(worker.generate, {"a"})
    await worker.admitted()
    assert worker.discovery.card == {"a"}


async def test_a_user_hears_that_discovery_did_not_take_the_taints(
    worker: Worker,
) -> None:
    await worker.admitted()
    worker.discovery.down = True
    with pytest.raises(Exception, match="discovery is down"):
        await worker.routing.set_user_taints(worker.generate, {"a"})


async def test_a_label_that_discovery_does_not_take_follows(worker: Worker) -> None:
    """A discovery that is down must not fail the refit."""
    await worker.admitted()
    worker.discovery.down = True
    await worker.routing.label(3)
    assert worker.discovery.card == set()
    worker.discovery.down = False
    await until(lambda: worker.discovery.card == {"weights=3"})
    assert "model" not in worker.discovery.changes


# --- in and out ---------------------------------------------------------------


async def test_out_of_routing_and_back(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.withdraw()
    assert worker.discovery.instances == {"refit", "clear"}
    await worker.routing.withdraw()
    await settle()
    assert worker.discovery.changes == ["-generate"]
    await worker.routing.restore()
    assert worker.discovery.instances == {"refit", "clear", "generate"}
    await worker.routing.restore()
    await settle()
    assert worker.discovery.changes == ["-generate", "+generate"]


async def test_one_that_was_withdrawn_just_before_it_was_served_is_taken_out(
    worker: Worker,
) -> None:
    await worker.admitted()
    worker.discovery.instances.discard("generate")
    await worker.routing.withdraw()
    worker.discovery.instances.add("generate")
    await until(lambda: "generate" not in worker.discovery.instances)


async def test_a_return_while_discovery_still_shows_what_has_left_is_not_undone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch takes out what it still sees; not what has returned meanwhile."""
    await worker.admitted()
    view = {"generate"}
    seen = SimpleNamespace(look=lambda: asyncio.sleep(0, result=bool(view)))
    worker.routing._instances[worker.generate] = seen
    leaving, may_leave = asyncio.Event(), asyncio.Event()
    leave = worker.generate.unregister_endpoint_instance

    async def leave_slowly() -> None:
        leaving.set()
        await may_leave.wait()
        await leave()

    await worker.routing.withdraw()
    monkeypatch.setattr(worker.generate, "unregister_endpoint_instance", leave_slowly)
    await asyncio.wait_for(leaving.wait(), 5)
    returning = asyncio.create_task(worker.routing.restore())
    await asyncio.sleep(0.02)
    may_leave.set()
    await returning
    assert "generate" in worker.discovery.instances
    await settle()
    assert "generate" in worker.discovery.instances


async def test_a_fence_while_it_returns_keeps_it_out(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.withdraw()
    async with worker.routing._changing:
        returning = asyncio.create_task(worker.routing.restore())
        await asyncio.sleep(0.02)
        await worker.routing.fence()
    await returning
    assert "+generate" not in worker.discovery.changes


async def test_a_return_that_discovery_did_not_take_follows(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.withdraw()
    worker.discovery.down = True
    await worker.routing.restore()
    worker.discovery.down = False
    await until(lambda: "generate" in worker.discovery.instances)


async def test_a_fenced_worker_is_out_labelled_unknown_and_does_not_return(
    worker: Worker,
) -> None:
    await worker.admitted()
    await worker.routing.set_user_taints(worker.generate, {"a"})
    await worker.routing.label(3)
    await worker.routing.fence()
    assert worker.discovery.instances == {"refit", "clear"}
    assert worker.discovery.card == {"a", "weights=unknown"}
    assert worker.health == [False]
    await worker.routing.restore()
    await settle()
    assert "generate" not in worker.discovery.instances


async def test_a_fence_has_the_last_word_on_the_label(worker: Worker) -> None:
    """The label of a version whose check has failed is still on its way."""
    await worker.admitted()
    worker.discovery.hangs = True
    labelling = asyncio.create_task(worker.routing.label(3))
    await asyncio.sleep(0.02)
    fencing = asyncio.create_task(worker.routing.fence())
    await asyncio.sleep(0.02)
    worker.discovery.let()
    await asyncio.gather(labelling, fencing)
    assert worker.discovery.card == {"weights=unknown"}
    await worker.routing.label(4)
    assert worker.discovery.card == {"weights=unknown"}


async def test_a_worker_that_is_fenced_before_its_admission_never_registers(
    worker: Worker,
) -> None:
    await worker.routing.fence()
    worker.routing.admit()
    await settle()
    assert worker.discovery.changes == []
    assert not worker.starting.done()


async def test_a_fence_ends_whatever_hangs(worker: Worker) -> None:
    await worker.admitted()
    worker.discovery.hangs = True
    async with asyncio.timeout(presence.CALL_SECONDS + 1):
        await worker.routing.fence()
    assert worker.health[0] is False
    worker.discovery.hangs = False


# --- what is lost -------------------------------------------------------------


async def test_all_that_a_stall_lost_is_put_back_the_card_first(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.set_user_taints(worker.generate, {"a"})
    await worker.routing.label(3)
    worker.discovery.lose_everything()
    await until(lambda: "generate" in worker.discovery.instances)
    assert worker.discovery.instances == {"refit", "generate", "clear"}
    assert worker.discovery.card == {"a", "weights=3"}
    taints = "taints ['a', 'weights=3']"
    card = ["+refit", taints, "model", taints]
    await until(lambda: "and all else" in worker.discovery.changes)
    assert worker.discovery.changes == [*card, "+clear", "+generate", "and all else"]
    assert worker.health == []


async def test_what_else_was_lost_is_asked_for_until_it_is_there(
    worker: Worker,
) -> None:
    await worker.admitted()
    worker.may_put_back = False
    worker.discovery.lose_everything()
    await until(lambda: worker.discovery.changes.count("and all else") == 2)
    worker.may_put_back = True
    await until(lambda: worker.discovery.changes.count("and all else") == 3)
    await settle()
    assert worker.discovery.changes.count("and all else") == 3


async def test_a_withdrawn_worker_that_stalled_stays_out(worker: Worker) -> None:
    await worker.admitted()
    await worker.routing.withdraw()
    worker.discovery.lose_everything()
    await until(lambda: worker.discovery.instances == {"refit", "clear"})
    await settle()
    assert "generate" not in worker.discovery.instances


async def test_a_worker_that_waits_can_still_be_found_after_a_stall(
    worker: Worker,
) -> None:
    worker.discovery.lose_everything()
    await until(lambda: worker.discovery.instances == {"refit"})
    await settle()
    assert worker.discovery.changes == ["+refit", "and all else"]


async def test_one_that_dynamo_put_to_sleep_is_left_asleep(worker: Worker) -> None:
    await worker.admitted()
    worker.asleep = True
    worker.discovery.instances.discard("generate")
    await settle()
    assert worker.discovery.changes == []


async def test_one_that_leaves_is_not_put_back(worker: Worker) -> None:
    await worker.admitted()
    worker.stopping.set()
    worker.discovery.lose_everything()
    await settle()
    assert worker.discovery.changes == []


async def test_a_short_gap_is_left_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "MISSING_SECONDS", 5.0)
    await worker.admitted()
    worker.discovery.instances.discard("generate")
    await settle()
    assert worker.discovery.changes == []


async def test_a_worker_that_cannot_be_put_back_says_so_and_goes_on_trying(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    await worker.admitted()
    worker.discovery.lose_everything()
    worker.discovery.down = True
    await until(lambda: worker.health)
    assert worker.health[0] is False
    [first, *_] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "nobody finds it" in first.getMessage()
    worker.discovery.down = False
    await until(lambda: "generate" in worker.discovery.instances)
