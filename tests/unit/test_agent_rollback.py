# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What an agent does when it is to go back: from its ranks' copies, proven as any
version, or refused by name. Everything around it is faked, as in ``test_agent.py``."""

from __future__ import annotations

import pytest

from dynamo.refit.errors import Failure, FingerprintMismatch, RefitError
from dynamo.refit.events import WorkerRefitted, WorkerStaged
from dynamo.refit.protocol import (
    Aborted,
    Committed,
    GetFingerprints,
    GetManifest,
    Install,
    Recall,
    Refused,
    ServeWeights,
    Stage,
    Stepped,
    Vote,
    WeightsServed,
)
from tests.support.fake_replica import (
    EPOCH,
    WORKER,
    Bench,
    abort,
    commit,
    fingerprints_of,
    refusal,
    weights_of,
)

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.fixture(params=[False, True], ids=["in a pause", "in a step"])
async def bench(request: pytest.FixtureRequest) -> Bench:
    """Serves version 6, and served 5 before."""
    bench = Bench()
    bench.engine.installs_in_step = request.param
    await bench.committed(5)
    await bench.committed(6)
    return bench


def kept(bench: Bench) -> tuple[int | None, str]:
    status = bench.agent.status()
    return status.kept_version, status.kept_weights


def contents(bench: Bench) -> set[int]:
    """Whose weights are live, whatever their version is called now."""
    return {rank.shadows[rank.live_shadow] for rank in bench.engine.ranks}


async def recalled(
    bench: Bench, version: int, restores: int, **changes: object
) -> Vote:
    vote = await bench.agent.answer(bench.rollback(version, restores, **changes))
    assert isinstance(vote, Vote), vote
    return vote


async def refused(
    bench: Bench, version: int, restores: int, **changes: object
) -> Failure:
    reply = await bench.agent.answer(bench.rollback(version, restores, **changes))
    return refusal(reply)


async def test_the_weights_of_before_are_served_as_a_new_version(bench: Bench) -> None:
    """Nothing is asked of a trainer, and the proof is the old fingerprint."""
    assert kept(bench) == (5, weights_of(5))
    asked = len(bench.trainer.requests)
    vote = await recalled(bench, 7, 5)
    assert (vote.version, vote.weights) == (7, weights_of(5))
    assert [rank.rank for rank in vote.ranks] == [0, 1]
    assert bench.events[-1] == WorkerStaged(worker=WORKER, version=7, ranks=vote.ranks)
    assert contents(bench) == {6}
    assert kept(bench) == (5, weights_of(5))

    committed = await bench.agent.answer(commit(7))
    assert isinstance(committed, Committed)
    assert (committed.version, committed.weights) == (7, weights_of(5))
    bench.assert_serving(7)
    assert contents(bench) == {5}
    assert len(bench.trainer.requests) == asked
    refitted = bench.events[-1]
    assert isinstance(refitted, WorkerRefitted)
    assert (refitted.version, refitted.weights) == (7, weights_of(5))
    assert refitted.kv_epoch.startswith("7-")
    assert (bench.agent.status().weights, *kept(bench)) == (
        weights_of(5),
        6,
        weights_of(6),
    )


async def test_it_goes_back_and_forth_and_then_on(bench: Bench) -> None:
    for version, restores, is_in_fact in ((7, 5, 5), (8, 6, 6), (9, 7, 5), (10, 8, 6)):
        weights = weights_of(is_in_fact)
        await recalled(bench, version, restores, weights=weights)
        assert isinstance(await bench.agent.answer(commit(version)), Committed)
        assert contents(bench) == {is_in_fact}
        bench.assert_serving(version)
    # A warm cycle: the manifest is known, and so is what the ranks read of it.
    manifests = len(bench.trainer.asked(GetManifest))
    await bench.committed(11)
    assert len(bench.trainer.asked(GetManifest)) == manifests
    assert not bench.engine.asked(Stage)[-1].want_reads
    assert kept(bench) == (10, weights_of(6))


async def test_a_repeated_prepare_recalls_once(bench: Bench) -> None:
    assert await recalled(bench, 7, 5) == await recalled(bench, 7, 5)
    assert len(bench.engine.asked(Recall)) == 1


async def test_nothing_is_kept_of_start_up_weights() -> None:
    bench = Bench()
    for version, restores in ((5, 4), (7, 5)):
        assert kept(bench) == (None, "")
        failure = await refused(bench, version + 1, restores)
        assert failure.kind == "NoWayBack"
        assert f"no copy of version {restores}" in failure.message
        assert "(kept: nothing)" in failure.message
        if version == 5:
            await bench.committed(5)
    bench.assert_serving(5)


async def test_direct_staging_keeps_nothing() -> None:
    bench = Bench()
    for rank in bench.engine.ranks:
        rank.direct = True
    await bench.committed(5)
    await bench.committed(6)
    assert kept(bench) == (None, "")
    assert (await refused(bench, 7, 5)).kind == "NoWayBack"
    bench.assert_serving(6)


@pytest.mark.parametrize("ended", ["aborted", "failed", "staged"])
async def test_another_version_s_stage_takes_the_copy(bench: Bench, ended: str) -> None:
    if ended == "failed":
        bench.engine.ranks[1].wrong = {0: 1}
        assert refusal(await bench.agent.answer(bench.prepare(7)))
        bench.engine.ranks[1].wrong = {}
    else:
        await bench.staged(7)
    if ended == "aborted":
        assert await bench.agent.answer(abort(7)) == Aborted(version=7)
    assert kept(bench) == (None, "")
    assert (await refused(bench, 8, 5)).kind == "NoWayBack"
    bench.assert_serving(6)


async def test_a_trainer_that_cannot_be_asked_takes_no_copy(bench: Bench) -> None:
    """It failed before a rank was told to stage."""
    bench.trainer.error = RefitError("gone")
    other = bench.other_manifest.fingerprint()
    assert refusal(await bench.agent.answer(bench.prepare(7, manifest=other)))
    await recalled(bench, 8, 5)


@pytest.mark.parametrize(
    ("restores", "weights"),
    [(4, weights_of(4)), (5, weights_of(4)), (6, weights_of(6))],
)
async def test_only_what_is_kept_and_only_with_its_fingerprint(
    bench: Bench, restores: int, weights: str
) -> None:
    failure = await refused(bench, 7, restores, weights=weights)
    assert failure.kind == "NoWayBack"
    assert f"(kept: version 5 ({weights_of(5)}))" in failure.message
    assert bench.engine.asked(Recall) == []
    await recalled(bench, 7, 5)


async def test_a_copy_that_is_not_what_it_was_is_refused(bench: Bench) -> None:
    """The parts that a rank finds do not add up to the old fingerprints."""
    bench.engine.ranks[0].wrong = {0: 1}
    assert (await refused(bench, 7, 5)).kind == "FingerprintMismatch"
    bench.assert_serving(6)
    assert contents(bench) == {6}


async def test_a_rank_that_finds_its_copy_spoiled_ends_the_hope(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Recall] = [FingerprintMismatch("1 block", tensor="w")]
    failure = await refused(bench, 7, 5)
    assert (failure.kind, failure.rank, failure.tensor) == (
        "FingerprintMismatch",
        1,
        "w",
    )
    assert kept(bench) == (None, "")
    bench.assert_serving(6)


async def test_a_rank_that_is_busy_leaves_the_copy(bench: Bench) -> None:
    bench.engine.ranks[1].fail[Recall] = [RefitError("busy")]
    assert (await refused(bench, 7, 5)).message == "busy"
    await recalled(bench, 8, 5)


async def test_an_abort_leaves_the_copy(bench: Bench) -> None:
    await recalled(bench, 7, 5)
    assert await bench.agent.answer(abort(7)) == Aborted(version=7)
    bench.assert_serving(6)
    assert kept(bench) == (5, weights_of(5))
    await recalled(bench, 8, 5)
    assert isinstance(await bench.agent.answer(commit(8)), Committed)
    assert contents(bench) == {5}


async def test_an_install_that_fails_for_good_leaves_both(bench: Bench) -> None:
    """What was live is live again, and what was to come can still be recalled."""
    bench.engine.ranks[1].fail[Install] = [RefitError("no memory")] * 2
    await recalled(bench, 7, 5)
    assert isinstance(await bench.agent.answer(commit(7)), Refused)
    bench.assert_serving(6)
    assert contents(bench) == {6}
    assert kept(bench) == (5, weights_of(5))
    await recalled(bench, 8, 5)
    assert isinstance(await bench.agent.answer(commit(8)), Committed)
    assert contents(bench) == {5}
    assert kept(bench) == (6, weights_of(6))


async def test_one_that_is_sent_back_at_the_barrier_keeps_both(bench: Bench) -> None:
    """Another replica could not install."""
    await recalled(bench, 7, 5)
    for step in ("pause", "install"):
        reply = await bench.agent.answer(commit(7, step=step, hold_seconds=30.0))
        assert reply == Stepped(version=7, step=step)
    assert contents(bench) == {5}
    assert await bench.agent.answer(abort(7)) == Aborted(version=7)
    bench.assert_serving(6)
    assert (contents(bench), *kept(bench)) == ({6}, 5, weights_of(5))
    await recalled(bench, 8, 5)
    assert isinstance(await bench.agent.answer(commit(8)), Committed)
    assert contents(bench) == {5}


async def test_others_may_read_what_was_recalled(bench: Bench) -> None:
    """As the new version, with the old fingerprints."""
    await recalled(bench, 7, 5)
    ask = ServeWeights(version=7, weights=weights_of(5), epoch=EPOCH, seconds=60.0)
    served = await bench.agent.answer(ask)
    assert isinstance(served, WeightsServed)
    request = GetFingerprints(announcement=served.announcement)
    reply = await bench.agent.answer(request)
    assert reply.payload == fingerprints_of(5).tobytes()


async def test_a_version_that_is_older_than_the_served_one_is_none(
    bench: Bench,
) -> None:
    """A rollback goes forward, too."""
    with pytest.raises(RefitError, match="version 6 is served here: 5 is older"):
        await bench.agent.answer(bench.rollback(5, 5))
