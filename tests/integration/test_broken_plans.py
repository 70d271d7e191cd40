# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Ranks whose plan is not what vLLM's loader does: refused at the start, or at the
first version where nothing was loaded at the start; never installed. And ranks of which
one fails while it makes what the engine computes with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.architectures import checkpoint as architecture
from tests.support.broken_ranks import FAILING, BrokenRanks
from tests.support.rank_group import RanksRefused
from tests.support.raw_sources import RawSources
from tests.support.variants import checkpoint

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
    pytest.mark.timeout(180),
]

BROKEN = [
    ("row", "model.layers.1.self_attn.qkv_proj.weight"),
    ("parts", "model.layers.0.mlp.gate_up_proj.weight"),
]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenRanks]:
    with BrokenRanks(2, tmp_path_factory.mktemp("ranks")) as group:
        yield group


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawSources]:
    with RawSources(1, tmp_path_factory.mktemp("sources")) as sources:
        yield sources


@pytest.mark.parametrize(("what", "tensor"), BROKEN)
def test_a_start_from_a_checkpoint_is_refused(
    group: BrokenRanks, what: str, tensor: str
) -> None:
    group.breaks(what)
    group.load(checkpoint("qwen3", "A"))
    with pytest.raises(RanksRefused) as refused:
        group.talk.start()
    assert [f.kind for f in refused.value.failures] == ["UnsupportedConfiguration"] * 2
    assert {failure.tensor for failure in refused.value.failures} == {tensor}
    assert {failure.rank for failure in refused.value.failures} == {0, 1}


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A directory without weights, as RL jobs often start an engine from."""
    start = checkpoint("qwen3", "A")
    for file in start.iterdir():
        if not file.name.startswith("model"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize(("what", "tensor"), BROKEN)
def test_the_first_version_of_a_dummy_start_is_refused(
    group: BrokenRanks, sources: RawSources, weightless: Path, what: str, tensor: str
) -> None:
    group.breaks(what)
    group.load(weightless, load_format="dummy")
    group.talk.start()
    before = group.digests()
    held = sources.hold(checkpoint("qwen3", "B"), 1)
    version = held.write(0, checkpoint("qwen3", "B"))
    with pytest.raises(RanksRefused) as refused:
        group.talk.stage(version)
    assert {f.kind for f in refused.value.failures} == {"LayoutRefused"}
    assert {f.tensor for f in refused.value.failures} == {tensor}
    assert group.digests() == before

    group.breaks("nothing")
    group.load(weightless, load_format="dummy")
    group.refit(version)
    assert group.digests() == group.golden(checkpoint("qwen3", "B"))
    held.release()


@pytest.fixture
def nemotron(group: BrokenRanks) -> BrokenRanks:
    """Its loader computes the decay, and vLLM packs its convolutions."""
    group.breaks("nothing")
    group.load(architecture("nemotronh", 1))
    group.talk.start()
    return group


@pytest.mark.parametrize("step", FAILING)
def test_one_rank_that_fails_leaves_all_on_the_old_version(
    nemotron: BrokenRanks, sources: RawSources, step: str
) -> None:
    group, old, new = (
        nemotron,
        architecture("nemotronh", 1),
        architecture("nemotronh", 2),
    )
    held = sources.hold(new, 1)
    version = held.write(0, new)
    for _ in range(2):
        group.breaks(step)
        with pytest.raises(RanksRefused) as refused:
            group.talk.stage(version)
        assert {f.rank for f in refused.value.failures} == {1}
        (failure,) = refused.value.failures
        assert failure.message.endswith(f"{step} is broken") or (
            f"RuntimeError: {step} is broken" in failure.message
        )
        assert group.differences(old) == []

    group.breaks("nothing")
    group.talk.stage(version)
    group.talk.install()
    group.talk.verify()
    assert group.differences(new) == []
    held.release()
