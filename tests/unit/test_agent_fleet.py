# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What an agent does as one of several: barriers, drains, admission, fences. The
engine, its ranks and routing are fakes; see ``tests/support/fake_replica.py``."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dynamo.refit.errors import NothingStaged, RefitError, StaleEpoch
from dynamo.refit.events import RefitFailed, WorkerFenced, WorkerRefitted
from dynamo.refit.protocol import (
    Aborted,
    Admit,
    Committed,
    Done,
    Fence,
    Install,
    Refused,
    Restore,
    Stepped,
    Vote,
)
from dynamo.refit.worker import agent as agent_module
from tests.support.fake_replica import (
    EPOCH,
    WORKER,
    Bench,
    abort,
    commit,
    refusal,
    weights_of,
)
from tests.support.fake_replica import until as happens

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

HOLD = 30.0


@pytest.fixture
def bench() -> Bench:
    return Bench()


async def step(bench: Bench, name: str, hold: float = HOLD) -> Any:
    return await bench.agent.answer(commit(6, step=name, hold_seconds=hold))


async def at(bench: Bench, name: str, hold: float = HOLD) -> None:
    """Version 5 serves, 6 waits at the barrier's ``name``."""
    await bench.committed(5)
    bench.engine.steps.clear()
    await bench.staged(6)
    assert await step(bench, "pause", hold) == Stepped(version=6, step="pause")
    if name == "install":
        assert await step(bench, "install") == Stepped(version=6, step="install")


def refitted(bench: Bench) -> list[int]:
    return [e.version for e in bench.events if isinstance(e, WorkerRefitted)]


def no_install(bench: Bench) -> None:
    """One rank cannot install, at the first try and at the second."""
    bench.engine.ranks[1].fail[Install] = [RefitError("no memory")] * 2


# --- the barrier --------------------------------------------------------------


@pytest.mark.parametrize("in_step", [False, True])
async def test_it_pauses_installs_and_resumes_as_it_is_told(
    bench: Bench, in_step: bool
) -> None:
    bench.engine.installs_in_step = in_step
    await at(bench, "pause")
    assert (bench.engine.paused, bench.engine.live()) == (True, [5, 5])
    assert await step(bench, "install") == Stepped(version=6, step="install")
    assert (bench.engine.paused, bench.engine.live()) == (True, [6, 6])
    assert refitted(bench) == [5]
    reply = await step(bench, "resume")
    assert isinstance(reply, Committed)
    assert bench.engine.steps == [
        "pause", "install", "epoch", "resume", "probe", "verify",
    ]  # fmt: skip
    bench.assert_serving(6)
    assert bench.routing.labelled == [5, 6]
    # The last call may be repeated, and is answered alike.
    assert await step(bench, "resume") == reply


@pytest.mark.parametrize("way", ["in step", "in a pause", "at a barrier"])
async def test_it_is_labelled_as_soon_as_the_new_weights_serve(
    bench: Bench, way: str
) -> None:
    """Not when they are checked: clients ask the router for a version by its label."""
    bench.engine.installs_in_step = way == "in step"
    if way == "at a barrier":
        await at(bench, "install")
    else:
        await bench.committed(5)
        await bench.staged(6)
    labels: dict[str, list[int]] = {}
    bench.engine.on_step = lambda name: labels.update({name: [*bench.routing.labelled]})
    may_probe, probe = asyncio.Event(), bench.engine.probe

    async def probe_a_full_engine() -> None:
        await may_probe.wait()
        await probe()

    bench.engine.probe = probe_a_full_engine
    order = "resume" if way == "at a barrier" else "all"
    committing = asyncio.create_task(step(bench, order))
    await happens(lambda: bench.routing.labelled == [5, 6])
    assert (bench.engine.live(), bench.engine.paused) == ([6, 6], False)
    # With nothing of it in the way of the resume.
    assert labels["epoch"] == labels.get("resume", [5]) == [5]
    may_probe.set()
    assert isinstance(await committing, Committed)
    assert (bench.routing.labelled, refitted(bench)) == ([5, 6], [5, 6])


async def test_it_is_labelled_before_it_says_that_it_serves(bench: Bench) -> None:
    """However slow discovery is: the stall is not longer for it."""
    await bench.committed(5)
    await bench.staged(6)
    may_label, label = asyncio.Event(), bench.routing.label

    async def label_slowly(version: int) -> None:
        await may_label.wait()
        await label(version)

    bench.routing.label = label_slowly
    committing = asyncio.create_task(step(bench, "all"))
    await happens(lambda: bench.engine.steps[-1] == "verify")
    await asyncio.sleep(0.05)
    assert not bench.engine.paused
    assert (committing.done(), refitted(bench)) == (False, [5])
    may_label.set()
    assert isinstance(await committing, Committed)
    assert (bench.routing.labelled, refitted(bench)) == ([5, 6], [5, 6])


@pytest.mark.parametrize("name", ["pause", "install"])
async def test_a_repeated_step_is_answered_alike(bench: Bench, name: str) -> None:
    await at(bench, name)
    assert await step(bench, name) == Stepped(version=6, step=name)
    assert bench.engine.steps.count("pause") == 1
    assert bench.engine.steps.count("install") == (name == "install")


@pytest.mark.parametrize("name", ["pause", "install"])
async def test_an_abort_at_the_barrier_leads_back(bench: Bench, name: str) -> None:
    await at(bench, name)
    assert await bench.agent.answer(abort(6)) == Aborted(version=6)
    bench.assert_serving(5)
    assert not [e for e in bench.events if isinstance(e, RefitFailed)]
    assert len(bench.engine.asked(Restore)) == (name == "install")
    assert bench.routing.labelled == [5]
    with pytest.raises(NothingStaged):
        await step(bench, "resume")


@pytest.mark.parametrize("name", ["pause", "install"])
@pytest.mark.parametrize("first", ["the abort", "the prepare"])
async def test_a_version_that_waited_is_staged_when_the_way_back_has_ended(
    bench: Bench, name: str, first: str
) -> None:
    """The coordinator sends both, and does not wait for the first one's answer."""
    await at(bench, name)
    ranks = bench.engine.call_ranks

    async def take_time(request: Any) -> list[Any]:
        if isinstance(request, Restore):
            await asyncio.sleep(0.05)
        return await ranks(request)

    bench.engine.call_ranks = take_time
    requests = [abort(6), bench.prepare(7)]
    if first == "the prepare":
        requests.reverse()
    answers = []
    for request in requests:
        answers.append(asyncio.create_task(bench.agent.answer(request)))
        await asyncio.sleep(0.01)
    replies = {type(reply): reply for reply in await asyncio.gather(*answers)}
    assert replies[Aborted] == Aborted(version=6)
    assert replies[Vote].version == 7
    assert bench.engine.live() == [5, 5] and not bench.engine.paused
    assert isinstance(await bench.agent.answer(commit(7)), Committed)
    bench.assert_serving(7)


async def test_a_version_does_not_wait_for_a_barrier_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "BACK_SECONDS", 0.05)
    await at(bench, "pause")
    with pytest.raises(RefitError, match="version 6 is being committed"):
        await bench.agent.answer(bench.prepare(7))
    assert isinstance(await step(bench, "install"), Stepped)
    assert isinstance(await step(bench, "resume"), Committed)
    bench.assert_serving(6)


async def test_who_is_replaced_while_it_waits_stages_nothing(bench: Bench) -> None:
    await at(bench, "pause")
    waiting = asyncio.create_task(bench.agent.answer(bench.prepare(7)))
    await asyncio.sleep(0.01)
    assert await bench.agent.answer(abort(6, EPOCH + 1)) == Aborted(version=6)
    with pytest.raises(StaleEpoch):
        await waiting
    bench.assert_serving(5)


async def test_without_an_order_to_install_the_old_weights_serve_on(
    bench: Bench,
) -> None:
    await at(bench, "pause", hold=0.03)
    await happens(lambda: not bench.engine.paused)
    await happens(lambda: bench.agent.status().phase == "serving")
    bench.assert_serving(5)
    assert bench.engine.steps == ["pause", "resume"]
    # Its coordinator is gone, so nobody else tells.
    [failed] = [e for e in bench.events if isinstance(e, RefitFailed)]
    assert (failed.version, failed.serving) == (6, ((WORKER, 5),))
    assert "no order to install" in failed.failure.message
    with pytest.raises(NothingStaged):
        await step(bench, "install")


async def test_without_an_order_to_resume_the_new_weights_serve(bench: Bench) -> None:
    """Others may serve them already, and the coordinator may be dead."""
    await at(bench, "install", hold=0.05)
    await happens(lambda: bench.agent.status().phase == "serving")
    bench.assert_serving(6)
    assert refitted(bench) == [5, 6]
    # An abort that comes now does not find it, and a resume hears how it ended.
    assert await bench.agent.answer(abort(6)) == Aborted(version=6)
    bench.assert_serving(6)
    assert isinstance(await step(bench, "resume"), Committed)


async def test_an_abort_while_it_resumes_is_refused(bench: Bench) -> None:
    await at(bench, "install")
    resumed = asyncio.create_task(step(bench, "resume"))
    await happens(lambda: bench.engine.kv_epoch.startswith("6-"))
    with pytest.raises(RefitError, match="being committed"):
        await bench.agent.answer(abort(6))
    assert isinstance(await resumed, Committed)
    bench.assert_serving(6)


@pytest.mark.parametrize("name", ["install", "resume"])
async def test_no_step_without_the_one_before_it(bench: Bench, name: str) -> None:
    await bench.staged(6)
    with pytest.raises(NothingStaged, match="not paused"):
        await step(bench, name)
    assert bench.agent.status().phase == "staged"
    assert bench.engine.steps == []


async def test_no_resume_before_the_install(bench: Bench) -> None:
    await at(bench, "pause")
    with pytest.raises(NothingStaged, match="not waiting"):
        await step(bench, "resume")
    assert bench.engine.live() == [5, 5]


async def test_an_install_that_fails_at_the_barrier_leads_back(bench: Bench) -> None:
    await at(bench, "pause")
    no_install(bench)
    failure = refusal(await step(bench, "install"))
    assert failure.worker == WORKER
    bench.assert_serving(5)


async def test_a_pause_that_fails_leads_back(bench: Bench) -> None:
    await bench.committed(5)
    await bench.staged(6)
    bench.engine.fail["pause"] = TimeoutError("scheduler busy")
    assert refusal(await step(bench, "pause")).kind == "TimeoutError"
    bench.assert_serving(5)


async def test_it_never_goes_back(bench: Bench) -> None:
    await bench.committed(6)
    with pytest.raises(RefitError, match="6 is served here: 5 is older"):
        await bench.agent.answer(bench.prepare(5))
    bench.assert_serving(6)


# --- drain and withdrawal -----------------------------------------------------


@pytest.mark.parametrize("running", [0, 3])
async def test_a_drain_waits_out_of_sight_and_counts_what_it_cannot(
    bench: Bench, running: int
) -> None:
    await bench.staged(5)
    bench.engine.running = running
    seen: list[tuple[str, bool]] = []
    bench.engine.on_step = lambda name: seen.append((name, bench.routing.seen))
    reply = await bench.agent.answer(
        commit(5, in_flight="drain", withdraw=True, drain_seconds=0.02)
    )
    assert isinstance(reply, Committed)
    assert seen[0] == ("drain", False)
    assert {visible for _, visible in seen} == {False}
    assert bench.routing.seen
    [told] = [e for e in bench.events if isinstance(e, WorkerRefitted)]
    assert (told.in_flight, told.carried_over) == ("drain", running)
    bench.assert_serving(5)


async def test_it_is_seen_again_when_an_install_fails(bench: Bench) -> None:
    await bench.committed(5)
    await bench.staged(6)
    no_install(bench)
    refusal(await bench.agent.answer(commit(6, withdraw=True)))
    assert bench.routing.seen and bench.routing.withdrawals == 1
    bench.assert_serving(5)


async def test_it_stays_unseen_when_nobody_knows_its_weights(bench: Bench) -> None:
    await bench.staged(5)
    bench.engine.fail["verify"] = OSError("engine core died")
    refusal(await bench.agent.answer(commit(5, withdraw=True)))
    bench.assert_fenced(5, "OSError")
    assert not bench.routing.seen


# --- admission and fence --------------------------------------------------------


async def test_a_joiner_is_admitted_by_its_first_commit() -> None:
    bench = Bench(admitted=False)
    assert not bench.agent.status().admitted
    await bench.staged(5)
    assert not bench.routing.admitted
    await bench.agent.answer(commit(5))
    assert bench.agent.status().admitted
    assert bench.routing.labelled == [5]


async def test_a_joiner_whose_commit_fails_is_not_admitted() -> None:
    bench = Bench(admitted=False)
    await bench.staged(5)
    no_install(bench)
    refusal(await bench.agent.answer(commit(5)))
    assert not bench.agent.status().admitted


async def test_the_coordinator_admits_start_up_weights() -> None:
    bench = Bench(admitted=False)
    assert await bench.agent.answer(Admit(model="tiny", epoch=EPOCH)) == Done()
    assert bench.agent.status().admitted
    with pytest.raises(StaleEpoch):
        await bench.agent.answer(Admit(model="tiny", epoch=EPOCH - 1))


def fence(version: int, reason: str = "-", fingerprint: str | None = None) -> Fence:
    return Fence(
        model="tiny",
        epoch=EPOCH,
        version=version,
        fingerprint=fingerprint or weights_of(version),
        reason=reason,
    )


async def test_a_worker_is_not_fenced_for_the_version_that_it_serves(
    bench: Bench,
) -> None:
    """The reply to its commit was lost, and the coordinator believes the worst."""
    await bench.committed(5)
    with pytest.raises(RefitError, match="version 5 is what is served here"):
        await bench.agent.answer(fence(5))
    bench.assert_serving(5)
    # What it has is not what the fleet serves under that number.
    assert await bench.agent.answer(fence(5, fingerprint="others")) == Done()
    assert bench.agent.status().phase == "fenced"


async def test_a_fence_lets_running_requests_end_and_then_leaves(bench: Bench) -> None:
    await bench.committed(5)
    bench.engine.running = 2
    reply = await bench.agent.answer(fence(6, "no memory"))
    assert reply == Done()
    [event] = [e for e in bench.events if isinstance(e, WorkerFenced)]
    assert (event.worker, event.version) == (WORKER, 6)
    assert event.failure.kind == "FencedByCoordinator"
    assert "no memory" in event.failure.message
    await happens(lambda: "drain" in bench.engine.steps)
    assert not bench.routing.seen and bench.fences == 0
    bench.engine.running = 0
    await happens(lambda: bench.fences == 1)
    assert bench.agent.status().phase == "fenced"
    assert isinstance(await answer_or_refusal(bench, bench.prepare(7)), Exception)


async def test_no_fence_in_the_middle_of_a_commit(bench: Bench) -> None:
    going = await bench.committing(5)
    with pytest.raises(RefitError, match="being committed"):
        await bench.agent.answer(fence(5, "slow"))
    bench.engine.may_install.set()
    assert isinstance(await going, Committed)


async def answer_or_refusal(bench: Bench, request: Any) -> Any:
    try:
        reply = await bench.agent.answer(request)
    except RefitError as error:
        return error
    assert not isinstance(reply, Refused)
    return reply


async def test_the_version_that_is_served_is_not_staged_again(bench: Bench) -> None:
    """A coordinator that looked before the last commit; or a new one."""
    committed = await bench.committed(5)
    requests, events = len(bench.engine.requests), len(bench.events)
    for epoch in (EPOCH, EPOCH + 1):
        vote = await bench.agent.answer(bench.prepare(5, epoch=epoch))
        assert vote == Vote(version=5, fingerprint=weights_of(5), ranks=())
        assert await bench.agent.answer(commit(5, epoch)) == committed
        bench.assert_serving(5)
    assert len(bench.engine.requests) == requests
    assert len(bench.events) == events


async def test_a_staged_version_outlives_a_prepare_of_the_served_one(
    bench: Bench,
) -> None:
    await bench.committed(5)
    await bench.staged(6)
    vote = await bench.agent.answer(bench.prepare(5))
    assert vote == Vote(version=5, fingerprint=weights_of(5), ranks=())
    assert isinstance(await bench.agent.answer(commit(6)), Committed)
    bench.assert_serving(6)


async def test_other_weights_under_the_number_that_is_served_are_refused(
    bench: Bench,
) -> None:
    """What is installed, and the way back from it, go by the number."""
    await bench.committed(5)
    await bench.staged(6)
    requests = len(bench.engine.requests)
    other = bench.prepare(5, fingerprint=weights_of(6), announcement_id="a6")
    with pytest.raises(RefitError) as caught:
        await bench.agent.answer(other)
    for what in ("version 5", weights_of(5), weights_of(6), "restart this worker"):
        assert what in str(caught.value)
    assert len(bench.engine.requests) == requests
    status = bench.agent.status()
    assert (status.version, status.fingerprint) == (5, weights_of(5))
    assert status.pending == 6
