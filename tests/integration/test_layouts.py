# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Every kind of model, from one, two and three sources, into one and two ranks: after
each of several refits every live parameter of every rank equals the slow golden path,
byte for byte. The ranks are vLLM's, without an engine; the sources are raw agents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo.refit.manifest import ALIGNMENT
from dynamo.refit.protocol import Describe, StagingChoice
from dynamo.refit.rank.limits import LIMITS
from tests.support.megatron_sources import MegatronSources
from tests.support.rank_group import RankGroup, RanksRefused
from tests.support.raw_sources import CUTS, RawSources, cut, name_cut, shapes
from tests.support.variants import VARIANTS, checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

RANKS = (1, 2)
SHARDS = (1, 2, 3)

SERVED = {f"{v}-tp{ranks}": (v, ranks) for v in VARIANTS for ranks in RANKS}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawSources]:
    with RawSources(max(SHARDS), tmp_path_factory.mktemp("sources")) as sources:
        yield sources


@pytest.fixture(scope="module")
def groups(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[int, RankGroup]]:
    """The ranks of each tensor-parallel size; they import while others work."""
    logs = tmp_path_factory.mktemp("ranks")
    groups = {size: RankGroup(size, logs) for size in RANKS}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A variant and its number of ranks. Of module scope, so that pytest runs all
    tests of one after another, and it is loaded once."""
    return SERVED[request.param]


@pytest.fixture
def variant(served: tuple[str, int]) -> str:
    return served[0]


@pytest.fixture
def ranks(served: tuple[str, int]) -> int:
    return served[1]


@pytest.fixture
def group(groups: dict[int, RankGroup], variant: str, ranks: int) -> RankGroup:
    """The ranks with ``variant`` loaded, and its plain layout checked once."""
    group, start = groups[ranks], checkpoint(variant, "A")
    if group.model != start or group.talk.staging != "auto":
        group.load(start)
        assert differences(group, start) == []
    return group


def differences(group: RankGroup, golden: Path) -> list[str]:
    """The live parameters, rank by rank, that are not those of ``golden``."""
    live, wanted = group.digests(), group.golden(golden)
    assert [rank.keys() for rank in live] == [rank.keys() for rank in wanted]
    return [
        f"rank {number}: {name}"
        for number, (there, expected) in enumerate(zip(live, wanted, strict=True))
        for name in expected
        if there[name] != expected[name]
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_tensor_is_cut_in_every_way(variant: str) -> None:
    """That is what the matrix below rests on."""
    tensors = shapes(checkpoint(variant, "A"))
    for part in ("self_attn.o_proj.weight", "self_attn.k_proj.weight"):
        cuts = {name_cut(name) for name, _, _ in tensors if name.endswith(part)}
        assert cuts == set(CUTS)
    for name, _, shape in tensors:
        blocks = cut(name, shape, 3)
        assert len(blocks) == (1 if name_cut(name) == "one source" else 3), name
        sizes = {block.shape for block in blocks}
        assert len(sizes) >= (2 if name_cut(name) in ("rows", "columns") else 1), name


def test_golden_digests_tell_weights_and_ranks_apart(
    group: RankGroup, variant: str, ranks: int
) -> None:
    a, b = (group.golden(checkpoint(variant, weights)) for weights in "AB")
    assert len(a) == ranks
    for rank in range(ranks):
        assert [name for name in a[rank] if a[rank][name] == b[rank][name]] == []
    if ranks > 1:
        split = "model.layers.0.self_attn.o_proj.weight"
        assert a[0][split] != a[1][split]


@pytest.mark.parametrize("shards", SHARDS)
def test_refits_equal_the_golden_path(
    group: RankGroup, sources: RawSources, variant: str, ranks: int, shards: int
) -> None:
    """Four cycles through both slots; only the first one builds anything."""
    held = sources.hold(checkpoint(variant, "A"), shards)
    for cycle, weights in enumerate("BCAB"):
        golden = checkpoint(variant, weights)
        votes = group.refit(held.write(cycle % 2, golden))
        assert differences(group, golden) == [], f"cycle {cycle}"
        assert [vote.rank for vote in votes] == list(range(ranks))
        for vote in votes:
            built = vote.counters
            work = built.allocations, built.registrations, built.descriptor_builds
            assert (vote.session == "warm") == (cycle > 0)
            assert (work == (0, 0, 0)) == (cycle > 0)
    held.release()


def test_sources_that_come_back_elsewhere(
    group: RankGroup, sources: RawSources, variant: str, ranks: int
) -> None:
    """New agents at new addresses, the same layout: buffers stay, requests do not."""
    used = []
    for weights, moves in zip("BCAB", (True, True, False, True), strict=True):
        golden = checkpoint(variant, weights)
        if moves:
            used.append(sources.hold(golden, 3))
        votes = group.refit(used[-1].write(1, golden))
        assert differences(group, golden) == []
        if len(used) > 1:
            expected = "re-addressed" if moves else "warm"
            assert {vote.session for vote in votes} == {expected}
            assert all(vote.counters.allocations == 0 for vote in votes)
            assert all(vote.counters.registrations == 0 for vote in votes)
    addresses = {tuple(held.manifest.shard_addresses(1)) for held in used}
    assert len(addresses) == len(used) == 3
    for held in used:
        held.release()


def test_a_layout_changes_and_changes_back(
    group: RankGroup, sources: RawSources, variant: str, ranks: int
) -> None:
    """The trainer is cut in two, then in three, then in two as before."""
    held = {shards: sources.hold(checkpoint(variant, "A"), shards) for shards in (2, 3)}
    for shards, weights in zip((2, 3, 3, 2, 2), "BCABC", strict=True):
        golden = checkpoint(variant, weights)
        group.refit(held[shards].write(0, golden))
        assert differences(group, golden) == []
    for each in held.values():
        each.release()


@pytest.mark.parametrize(
    "served",
    [name for name in SERVED if name.startswith(("qwen3-tied", "qwen3moe"))],
    indirect=True,
)
def test_a_source_that_vanishes_fails_one_cycle(
    group: RankGroup, sources: RawSources, variant: str, ranks: int
) -> None:
    """Nothing live changes, and the next cycle, from a restarted source, is good."""
    first, second = checkpoint(variant, "B"), checkpoint(variant, "C")
    held = sources.hold(first, 3)
    version = held.write(0, first)
    group.refit(version)

    sources.kill(1)
    with pytest.raises(RanksRefused) as refused:
        group.talk.stage(version)
    assert {failure.kind for failure in refused.value.failures} == {"TransferFailed"}
    assert len(refused.value.failures) == ranks
    assert differences(group, first) == []
    with pytest.raises(RanksRefused, match="NothingStaged"):
        group.talk.install()
    assert differences(group, first) == []

    sources.restart(1)
    again = sources.hold(first, 3)
    for slot, golden in enumerate((second, first)):
        group.refit(again.write(slot, golden))
        assert differences(group, golden) == []
    again.release()


def test_an_install_is_undone(
    group: RankGroup, sources: RawSources, variant: str, ranks: int
) -> None:
    held = sources.hold(checkpoint(variant, "A"), 2)
    group.refit(held.write(0, checkpoint(variant, "B")))
    for slot in (1, 0):
        group.talk.stage(held.write(slot, checkpoint(variant, "C")))
        group.talk.install()
        assert differences(group, checkpoint(variant, "C")) == []
        group.talk.restore()
        assert differences(group, checkpoint(variant, "B")) == []
    held.release()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranks", [2])
@pytest.mark.parametrize("staging", ["host", "host-no-undo"])
def test_other_places_to_stage(
    groups: dict[int, RankGroup],
    sources: RawSources,
    variant: str,
    ranks: int,
    staging: StagingChoice,
) -> None:
    """With a way back in host memory, and in half of the memory without one."""
    group = groups[ranks]
    group.load(checkpoint(variant, "A"), staging)
    held = sources.hold(checkpoint(variant, "A"), 3)
    for cycle, weights in enumerate("BCA"):
        golden = checkpoint(variant, weights)
        version = held.write(cycle % 2, golden)
        votes = group.refit(version)
        assert {vote.memory.mode for vote in votes} == {staging}
        if cycle == 0:
            images = 2 if staging == "host" else 1
            described = group.call(Describe(staging=staging))
            for vote, rank in zip(votes, described, strict=True):
                # Scratch; the shadows were there before the version.
                assert vote.counters.allocations == 1
                arenas = vote.memory.host_nbytes - 2 * LIMITS["cpu"].scratch
                padding = rank.parameters * ALIGNMENT
                assert 0 <= arenas - images * rank.nbytes < images * padding
        assert differences(group, golden) == [], f"cycle {cycle}"
    held.release()


@pytest.mark.parametrize("variant", ["uneven-vocabulary", "qwen3moe"])
def test_megatron_shards_reach_every_rank(
    groups: dict[int, RankGroup], variant: str, tmp_path: Path
) -> None:
    """Two ranks as Megatron-Core lays them out (fused QKV, gate and up in one, experts,
    a padded vocabulary), published by the product; three versions."""
    group = groups[2]
    group.load(checkpoint(variant, "A"))
    with MegatronSources(checkpoint(variant, "A"), 2, tmp_path) as sources:
        published = {tensor.name: tensor.shape for tensor in sources.manifest.tensors}
        served = shapes(checkpoint(variant, "A"))
        assert published == {name: shape for name, _, shape in served}
        for cycle, weights in enumerate("BCA"):
            golden = checkpoint(variant, weights)
            votes = group.refit(sources.write(cycle % 2, golden))
            assert differences(group, golden) == [], f"cycle {cycle}"
            session = "warm" if cycle else "cold"
            assert [vote.session for vote in votes] == [session] * 2
