# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""An install between two steps, on real ranks that agree over their own gloo group:
when the call returns, all of them are new, or all are byte for byte as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.refit.errors import Failure
from dynamo.refit.protocol import Install, Installed, RankReply, Refused
from graphs.tiny_model import make_checkpoint
from tests.support.child import ChildFailed
from tests.support.ordered_rank import OrderedRanks
from tests.support.raw_sources import Held, RawSources

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

MODELS = Path(__file__).resolve().parents[2] / ".cache" / "models"
SEEDS = {"A": 1, "B": 2, "C": 3}
RANKS = (1, 2)
ROW_PARALLEL = "model.layers.1.self_attn.o_proj.weight"

#: A rank of a group of so many.
EACH = [(ranks, rank) for ranks in RANKS for rank in range(ranks)]


def checkpoint(weights: str) -> Path:
    return make_checkpoint(MODELS / f"in-step-{weights}", seed=SEEDS[weights])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with RawSources(1, tmp_path_factory.mktemp("sources")) as sources:
        yield sources.hold(checkpoint("A"), 1)


@pytest.fixture(scope="module")
def groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[int, OrderedRanks]]:
    """The ranks of each tensor-parallel size; they import while others work."""
    logs = tmp_path_factory.mktemp("ranks")
    groups = {size: OrderedRanks(size, logs) for size in RANKS}
    yield groups
    for group in groups.values():
        group.close()


def serving_b(group: OrderedRanks, held: Held) -> OrderedRanks:
    """The ranks after one refit, from A to B, in step."""
    if group.model is None:
        group.load(checkpoint("A"))
    stage(group, held, "B")
    assert_installed(install(group))
    assert group.digests() == group.golden(checkpoint("B"))
    return group


def stage(group: OrderedRanks, held: Held, weights: str) -> None:
    group.talk.stage(held.write(0, checkpoint(weights)))


def install(group: OrderedRanks) -> list[RankReply]:
    """What every rank answers to an install of what is staged."""
    return group.call(Install(version=group.talk._version, in_step=True))


def assert_installed(replies: list[RankReply]) -> None:
    assert [reply.rank for reply in replies] == list(range(len(replies)))
    assert all(isinstance(reply, Installed) for reply in replies)


def assert_refused(replies: list[RankReply], rank: int) -> Failure:
    """All ranks have refused, and ``rank`` with a reason of its own; that reason."""
    assert all(isinstance(reply, Refused) for reply in replies), replies
    failures = [reply.failure for reply in replies]
    assert [failure.rank for failure in failures] == list(range(len(replies)))
    assert {failure.stage for failure in failures} == {"install"}
    own = failures.pop(rank)
    assert {failure.kind for failure in failures} <= {"InstallUndone"}
    return own


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_has_the_golden_bytes(
    groups: dict[int, OrderedRanks], held: Held, ranks: int
) -> None:
    group = serving_b(groups[ranks], held)
    for weights in "CABC":
        stage(group, held, weights)
        group.scribble()
        assert_installed(install(group))
        assert group.digests() == group.golden(checkpoint(weights))
        group.talk.verify()


@pytest.mark.parametrize("ranks", RANKS)
def test_repeating_it_is_safe(
    groups: dict[int, OrderedRanks], held: Held, ranks: int
) -> None:
    group = serving_b(groups[ranks], held)
    stage(group, held, "C")
    for _ in range(3):
        assert_installed(install(group))
    assert group.digests() == group.golden(checkpoint("C"))
    group.talk.verify()


@pytest.mark.parametrize("step", ["install", "after_install"])
@pytest.mark.parametrize(("ranks", "rank"), EACH)
def test_one_rank_that_fails_takes_all_back(
    groups: dict[int, OrderedRanks], held: Held, ranks: int, rank: int, step: str
) -> None:
    """Before it has written, and after; the repeat is good."""
    group = serving_b(groups[ranks], held)
    stage(group, held, "C")
    group.order(rank, **{step: "no luck today"})
    failure = assert_refused(install(group), rank)
    assert (failure.kind, failure.message) == ("RuntimeError", "no luck today")
    assert group.digests() == group.golden(checkpoint("B"))

    assert_installed(install(group))
    assert group.digests() == group.golden(checkpoint("C"))
    group.talk.verify()


@pytest.mark.parametrize("ranks", RANKS)
def test_the_version_after_one_that_was_undone_for_good(
    groups: dict[int, OrderedRanks], held: Held, ranks: int
) -> None:
    group = serving_b(groups[ranks], held)
    stage(group, held, "C")
    group.order(ranks - 1, times=2, after_install="broken")
    for _ in range(2):
        assert_refused(install(group), ranks - 1)
        assert group.digests() == group.golden(checkpoint("B"))
    group.talk.discard()
    for weights in "AC":
        stage(group, held, weights)
        assert_installed(install(group))
        assert group.digests() == group.golden(checkpoint(weights))
        group.talk.verify()


@pytest.mark.parametrize("ranks", RANKS)
def test_the_first_version_can_be_undone(
    tmp_path: Path, held: Held, ranks: int
) -> None:
    """What was loaded is kept, too."""
    with OrderedRanks(ranks, tmp_path) as group:
        group.load(checkpoint("A"))
        stage(group, held, "B")
        group.order(0, after_install="broken")
        assert_refused(install(group), 0)
        assert group.digests() == group.golden(checkpoint("A"))


@pytest.mark.parametrize("ranks", RANKS)
def test_a_version_that_is_not_staged_is_refused_by_all(
    groups: dict[int, OrderedRanks], held: Held, ranks: int
) -> None:
    group = serving_b(groups[ranks], held)
    group.talk.discard()
    for reply in install(group):
        assert isinstance(reply, Refused)
        assert reply.failure.kind == "NothingStaged"
    assert group.digests() == group.golden(checkpoint("B"))


@pytest.mark.parametrize(("ranks", "rank"), EACH)
def test_a_rank_that_is_busy_votes_like_the_others(
    groups: dict[int, OrderedRanks], held: Held, ranks: int, rank: int
) -> None:
    """The others wait for its vote, whatever it says."""
    group = serving_b(groups[ranks], held)
    stage(group, held, "C")
    group.keep_busy(rank)
    failure = assert_refused(install(group), rank)
    assert "is still being worked on" in failure.message
    assert group.digests() == group.golden(checkpoint("B"))
    group.keep_busy(None)
    assert_installed(install(group))
    assert group.digests() == group.golden(checkpoint("C"))


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1)])
def test_a_parameter_that_has_moved_is_refused_before_anything_is_written(
    tmp_path: Path, held: Held, ranks: int, rank: int
) -> None:
    with OrderedRanks(ranks, tmp_path) as group:
        serving_b(group, held)
        stage(group, held, "C")
        group.move(rank, ROW_PARALLEL)
        failure = assert_refused(install(group), rank)
        assert (failure.kind, failure.tensor) == ("PointerMoved", ROW_PARALLEL)
        group.move_back()
        assert group.digests() == group.golden(checkpoint("B"))
        assert_installed(install(group))
        assert group.digests() == group.golden(checkpoint("C"))


@pytest.mark.parametrize(("ranks", "rank"), EACH)
def test_ranks_that_cannot_be_undone_end_without_an_answer(
    tmp_path: Path, held: Held, ranks: int, rank: int
) -> None:
    """One of them would do: the next step would run on a mixture."""
    with OrderedRanks(ranks, tmp_path) as group:
        serving_b(group, held)
        stage(group, held, "C")
        group.order(rank, install="cannot write", restore="cannot undo")
        with pytest.raises(ChildFailed, match="the process is gone"):
            install(group)
        assert group.exit_codes() == [1] * ranks
        logs = [path.read_text() for path in tmp_path.iterdir()]
        assert all("weights unknown, ending this process" in log for log in logs)
        assert sum("cannot undo" in log for log in logs) == 1
