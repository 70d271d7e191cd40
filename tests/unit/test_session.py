# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Real sessions on real memory, with NIXL and the trainers faked: what arrives, what
it adds up to, what is live, and what is built again."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import FingerprintMismatch, StagingCancelled
from dynamo.refit.fingerprint import add_up
from dynamo.refit.protocol import CacheCounters, StagingMode
from dynamo.refit.rank.conversion import Converted
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.limits import Limits, TransferCost
from dynamo.refit.rank.pipeline import Submit
from dynamo.refit.rank.processing import Function, LayerFailed
from dynamo.refit.rank.slices import IntakeLayout, Parameter
from dynamo.refit.rank.slices import whole as whole_of
from tests.support.drawn_layouts import layouts
from tests.support.fake_nixl import FakeTrainers
from tests.support.layouts import (
    ALWAYS_CONTIGUOUS,
    ALWAYS_EXACT,
    ROOMY,
    Layout,
    SourceMemory,
    decoder_layer,
    make_manifest,
    make_tensor,
    read,
    whole,
)
from tests.support.rank import SMALL, Rank, bytes_of, layer, numbers, part_of

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


@pytest.fixture(scope="module")
def follower() -> Iterator[Submit]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


# What arrives, and what it adds up to.


@pytest.mark.parametrize("costs", [ALWAYS_EXACT, ALWAYS_CONTIGUOUS, None])
@pytest.mark.parametrize("limits", [SMALL, ROOMY], ids=["small", "roomy"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("late", [0, 3])
def test_versions_arrive_in_turns_and_ranks_add_up_to_what_was_published(
    costs: dict[str, TransferCost] | None,
    limits: Limits,
    dtype: str,
    late: int,
    follower: Submit,
) -> None:
    both = [decoder_layer(number, dtype=dtype, slots=2) for number in range(2)]
    trainers = FakeTrainers(both[0])
    ranks = [
        Rank(layout, trainers, number, limits, costs)
        for number, layout in enumerate(both)
    ]
    for version, slot in enumerate([0, 1, 0, 1, 1]):
        full = both[0].random_tensors(seed=version)
        trainers.write(slot, full)
        blocks: dict[tuple, int] = {}
        for rank in ranks:
            rank.agent.late = late
            parts = rank.pull(slot, follower)
            assert parts.dtype == np.uint64
            assert bytes_of(rank.staged) == rank.loaded(full)
            for block, part in zip(rank.session.reads, parts.tolist(), strict=True):
                assert blocks.setdefault(block, part) == part
            assert not rank.session.poll_active()
            if version != 2:
                # So that shadows take turns, and one version is only staged.
                rank.install()
        for number, tensor in enumerate(trainers.manifest.tensors):
            held = [part for (of, _), part in blocks.items() if of == number]
            published = part_of(tensor, full, whole(tensor.shape))
            assert add_up(held) == published, tensor.name


def test_progress_grows_to_all_bytes_wave_by_wave(follower: Submit) -> None:
    rank = layer()
    limit = Limit(time.monotonic() + 60, lambda: False)
    progress, seen = limit.progress, []

    def submit(work: Callable[..., None], *arguments: object) -> Future:
        future = follower(work, *arguments)
        future.result()
        seen.append((progress.nbytes, progress.total_nbytes))
        return future

    for _ in range(2):
        seen.clear()
        rank.pull(0, submit, limit=limit)
        plan = rank.session.plan
        assert len(plan.waves) > 2
        waves = itertools.accumulate(wave.nbytes for wave in plan.waves)
        assert seen == [(nbytes, plan.wire_nbytes) for nbytes in waves]
        assert progress.nbytes == plan.wire_nbytes > 0


@settings(max_examples=250, deadline=None)
@given(
    layout=layouts().filter(lambda layout: layout.slices),
    number=st.integers(0, 3),
    limits=st.sampled_from([ROOMY, Limits(0, 1), Limits(300, 24), Limits(40)]),
    costs=st.sampled_from([ALWAYS_EXACT, ALWAYS_CONTIGUOUS]),
    mode=st.sampled_from(["host", "host-no-undo"]),
    late=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_the_layout_every_part_is_that_of_its_block(
    layout: Layout,
    number: int,
    limits: Limits,
    costs: dict[str, TransferCost],
    mode: StagingMode,
    late: int,
    seed: int,
) -> None:
    trainers = FakeTrainers(layout)
    rank = Rank(layout, trainers, number, limits, costs, mode)
    rank.agent.late = late
    full = layout.random_tensors(seed)
    trainers.write(1, full)
    with ThreadPoolExecutor(1) as pool:
        parts = rank.pull(1, pool.submit)

    assert bytes_of(rank.staged) == rank.loaded(full)
    tensors = trainers.manifest.tensors
    expected = [part_of(tensors[of], full, box) for of, box in rank.session.reads]
    assert parts.tolist() == expected
    rank.install()
    rank.session.live_parts.check(rank.session.landed, rank=number)


def test_one_tensor_into_two_parameters_from_three_sources(follower: Submit) -> None:
    """A tied embedding that the engine holds twice, transposed the second time."""
    memory = SourceMemory(sources=3)
    tensor = make_tensor(memory, "embed", (12, 8), dtype="float32", parts=3)
    twice = (
        read(tensor, "embed"),
        replace(read(tensor, "head"), strides=(1, 12)),
    )
    layout = Layout(
        make_manifest(tensor, memory=memory),
        (
            Parameter("embed", (12, 8), "bfloat16"),
            Parameter("head", (8, 12), "float32"),
        ),
        twice,
    )
    trainers = FakeTrainers(layout)
    rank = Rank(layout, trainers)
    full = layout.random_tensors(seed=1)
    trainers.write(0, full)
    parts = rank.pull(0, follower).tolist()

    values = numbers(full["embed"], "float32")
    assert torch.equal(rank.staged["embed"], values.bfloat16())
    assert torch.equal(rank.staged["head"], values.T)
    blocks: dict[tuple, set[int]] = {}
    for block, part in zip(rank.session.reads, parts, strict=True):
        blocks.setdefault(block, set()).add(part)
    assert [len(equal) for equal in blocks.values()] == [1, 1, 1]
    assert add_up([part for (part,) in blocks.values()]) == part_of(
        tensor, full, whole((12, 8))
    )


def test_a_pull_that_is_outrun_by_its_reads_waits_for_its_scratch() -> None:
    """Reads arrive at once, and the local work that needs their bytes is slow."""
    rank = layer("float32", limits=Limits(scratch=512))
    full = rank.layout.random_tensors(seed=3)
    rank.trainers.write(0, full)
    assert len(rank.session.plan.waves) > 4

    with ThreadPoolExecutor(1) as pool:

        def slowly(work, *args) -> Future:
            pool.submit(time.sleep, 0.002)
            return pool.submit(work, *args)

        rank.pull(0, slowly)
    assert bytes_of(rank.staged) == rank.loaded(full)


def test_waves_into_the_arena_are_all_under_way_together(follower: Submit) -> None:
    rank = layer(costs=ALWAYS_EXACT)
    rank.agent.late = 50
    rank.pull(0, follower)

    waves = rank.session.plan.waves
    assert len(waves) > 4
    assert rank.agent.peak == sum(len(wave.segments) for wave in waves)


def test_two_waves_through_scratch_are_under_way_at_a_time(follower: Submit) -> None:
    rank = layer("float32")
    rank.agent.late = 50
    rank.pull(0, follower)

    reads = [len(wave.segments) for wave in rank.session.plan.waves]
    assert len(reads) > 4
    assert rank.agent.peak == max(a + b for a, b in itertools.pairwise(reads))


# What is live.


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_flipped_bit_of_a_live_parameter_is_found(
    dtype: str, follower: Submit
) -> None:
    """Of every parameter, converted ones too."""
    rank = layer(dtype)
    rank.trainers.write(1, rank.layout.random_tensors(seed=5))
    rank.pull(1, follower)
    landed = rank.session.landed
    rank.install()
    rank.session.live_parts.check(landed, rank=1)

    for name, parameter in rank.live.items():
        word = parameter.view(-1).view(torch.int16)
        word[-1 if name != "embed" else 0] ^= 1 << 3
        with pytest.raises(FingerprintMismatch) as caught:
            rank.session.live_parts.check(landed, rank=1)
        assert (caught.value.tensor, caught.value.rank) == (name, 1)
        word[-1 if name != "embed" else 0] ^= 1 << 3
    rank.session.live_parts.check(landed, rank=1)


def test_what_landed_of_a_version_is_not_what_lands_of_the_next(
    follower: Submit,
) -> None:
    """The parts of one pull are kept while another one runs."""
    rank = layer("float32")
    first, second = rank.layout.random_tensors(seed=5), rank.layout.random_tensors(6)
    rank.trainers.write(0, first)
    rank.trainers.write(1, second)
    parts = rank.pull(0, follower)
    landed = rank.session.landed
    rank.install()
    kept = parts.copy(), landed.copy()
    later = rank.pull(1, follower)

    assert parts.tolist() == kept[0].tolist()
    assert landed.tolist() == kept[1].tolist()
    assert not (later == parts).any()
    rank.session.live_parts.check(landed, rank=0)
    with pytest.raises(FingerprintMismatch):
        rank.session.live_parts.check(rank.session.landed, rank=0)


# What is made of what arrives.


class FakeConversion:
    """A test fake of :class:`dynamo.refit.rank.conversion.Conversion`: takes in some
    parameters and some tensors whole, and turns a bit of every byte of the parameters
    over."""

    def __init__(self, parameters: list[Parameter], sources: list[Parameter]) -> None:
        self.inputs = (*sources, *parameters)
        self.outputs = tuple(parameter.name for parameter in parameters)


class FakeEngine:
    """Converts, on the thread that polls, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, bytes]] = []

    def convert(
        self, conversion: FakeConversion, inputs: dict[str, torch.Tensor]
    ) -> Converted:
        self.given.append(bytes_of(inputs))
        made = {name: turned_over(inputs[name]) for name in conversion.outputs}
        function = Function(self, "function", len(self.given))
        return Converted(made, (function,))


def turned_over(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.contiguous().view(-1).view(torch.uint8)
    return (bits ^ 1).view(tensor.dtype).view(tensor.shape)


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    layout=layouts().filter(lambda layout: layout.slices),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_conversion_is_given_all_that_it_takes_in(
    follower: Submit, data: st.DataObject, layout: Layout, seed: int
) -> None:
    """Whatever the halves of the intake, the waves and the speed of the engine are; the
    second version finds nothing of the first."""
    names = [parameter.name for parameter in layout.parameters]
    taken = data.draw(st.lists(st.sampled_from(names), unique=True))
    by_name = {parameter.name: parameter for parameter in layout.parameters}
    cuts = data.draw(st.lists(st.integers(0, len(taken)), max_size=3).map(sorted))
    bounds = list(itertools.pairwise([0, *cuts, len(taken)]))
    forms = {
        t.name: Parameter(whole_of(t.name), t.shape, t.dtype)
        for t in layout.manifest.tensors
    }
    conversions, used = [], set()
    for start, stop in bounds:
        sources = data.draw(st.sets(st.sampled_from(sorted(forms)))) - used
        used |= sources
        conversions.append(
            FakeConversion(
                [by_name[name] for name in taken[start:stop]],
                [forms[name] for name in sorted(sources)],
            )
        )
    limit = data.draw(st.sampled_from([0, 300, 1 << 20]))
    engine = FakeEngine()
    rank = Rank(
        layout,
        FakeTrainers(layout),
        limits=data.draw(st.sampled_from([SMALL, ROOMY])),
        intake=IntakeLayout([each.inputs for each in conversions], limit),
        conversions=conversions,
        convert=engine.convert,
    )
    step = data.draw(st.integers(1, 3))
    for version in range(2):
        engine.given.clear()
        full = layout.random_tensors(seed + version)
        rank.trainers.write(0, full)
        rank.pull_and_convert(0, follower, step)
        loaded = rank.loaded(full)
        expected = [
            {p.name: loaded.get(p.name) or source_bytes(full, p.name) for p in c.inputs}
            for c in conversions
        ]
        assert engine.given == expected
        staged = bytes_of(rank.staged)
        for name in names:
            turned = bytes(byte ^ 1 for byte in loaded[name])
            assert staged[name] == (turned if name in taken else loaded[name]), name
        assert [f.function for f in rank.session.functions] == list(
            range(1, len(conversions) + 1)
        )
        rank.install()
        rank.session.live_parts.check(rank.session.landed, rank=0)


def source_bytes(full: dict[str, np.ndarray], name: str) -> bytes:
    return full[name.removeprefix("all of ")].tobytes()


def test_a_converted_tensor_that_is_changed_later_is_named(follower: Submit) -> None:
    rank = converting("norm")
    rank.trainers.write(0, rank.layout.random_tensors(seed=5))
    rank.pull_and_convert(0, follower)
    rank.install()
    rank.live["norm"].view(-1).view(torch.int16)[1] ^= 4
    with pytest.raises(FingerprintMismatch) as caught:
        rank.session.live_parts.check(rank.session.landed, rank=0)
    assert caught.value.tensor == "norm"


def test_what_was_made_has_one_fingerprint_for_one_version(follower: Submit) -> None:
    """Whatever the order in which it was made; and none where nothing was."""
    layout = decoder_layer(0, dtype="bfloat16", slots=2)
    forms = layout.parameters[:3]
    made = []
    for order in (forms, forms[::-1]):
        conversions = [FakeConversion([form], []) for form in order]
        rank = Rank(
            layout,
            FakeTrainers(layout),
            intake=IntakeLayout([each.inputs for each in conversions], 0),
            conversions=conversions,
            convert=FakeEngine().convert,
        )
        for version in (1, 2, 1):
            rank.trainers.write(0, layout.random_tensors(version))
            rank.pull_and_convert(0, follower)
            made.append(rank.session.converted)
    one, two = made[:2]
    assert made == [one, two, one] * 2
    assert one != two and len(one) == len(two) == 64

    rank = layer()
    rank.pull(0, follower)
    assert rank.session.converted == ""


def converting(name: str, engine: FakeEngine | None = None) -> Rank:
    """Rank 0 of the decoder layer, one of whose parameters is converted."""
    layout = decoder_layer(0, dtype="bfloat16", slots=2)
    (form,) = (p for p in layout.parameters if p.name == name)
    conversion = FakeConversion([form], [])
    return Rank(
        layout,
        FakeTrainers(layout),
        intake=IntakeLayout([conversion.inputs], 0),
        conversions=[conversion],
        convert=(engine or FakeEngine()).convert,
    )


def test_a_conversion_that_fails_ends_the_pull_and_the_next_one_is_whole(
    follower: Submit,
) -> None:
    class Failing(FakeEngine):
        def convert(self, *arguments: object) -> Converted:
            if not self.given:
                self.given.append({})
                raise LayerFailed("no memory", tensor="norm")
            return super().convert(*arguments)

    rank = converting("norm", Failing())
    full = rank.layout.random_tensors(seed=5)
    rank.trainers.write(0, full)

    with pytest.raises(LayerFailed, match="no memory"):
        rank.pull_and_convert(0, follower)
    assert not rank.session.poll_active()
    rank.pull_and_convert(0, follower)
    norm = bytes_of(rank.staged)["norm"]
    assert norm == bytes(byte ^ 1 for byte in rank.loaded(full)["norm"])


def test_a_pull_that_nobody_converts_for_ends_at_its_deadline(follower: Submit) -> None:
    rank = converting("norm")
    rank.trainers.write(0, rank.layout.random_tensors(seed=5))
    limit = Limit(time.monotonic() + 0.2, lambda: False)
    with pytest.raises(StagingCancelled, match="the model's thread"):
        rank.pull(0, follower, limit=limit)


# What is built.


def test_a_warm_pull_builds_nothing(follower: Submit) -> None:
    rank = layer()
    plan = rank.session.plan
    segments = sum(len(wave.segments) for wave in plan.waves)
    assert rank.built.counters() == CacheCounters(
        # Two shadows and scratch. Reads from two slots into each shadow.
        allocations=3,
        registrations=3,
        descriptor_builds=4 * segments,
    )
    assert len(rank.agent.prepared) == 4 * segments
    registered = dict(rank.agent.registered)
    assert [n for ((_, n),) in registered.values()] == [
        plan.arena.nbytes,
        plan.arena.nbytes,
        plan.scratch_nbytes,
    ]

    for slot in (0, 1, 0):
        warm = Cycle()
        rank.pull(slot, follower, cycle=warm)
        assert warm.counters() == CacheCounters()
        assert warm.timings().lead_ms > 0
        assert warm.timings().wire_ms > 0
        assert warm.timings().fingerprint_ms > 0
        rank.install()
    assert len(rank.agent.prepared) == 4 * segments
    assert rank.agent.registered == registered


def test_a_session_is_addressed_to_a_trainer_that_has_started_again(
    follower: Submit,
) -> None:
    rank = layer()
    old = rank.trainers.manifest.fingerprint()
    assert rank.session.addressed_to == old
    built = rank.built.counters()
    rank.trainers = FakeTrainers(rank.layout)
    rank.agent.meet(rank.trainers.manifest)
    full = rank.layout.random_tensors(seed=8)
    rank.trainers.write(0, full)
    rank.address()
    rank.pull(0, follower)

    assert rank.session.addressed_to == rank.trainers.manifest.fingerprint() != old
    assert bytes_of(rank.staged) == rank.loaded(full)
    again = rank.built.counters()
    assert (again.allocations, again.registrations) == (3, 3)
    assert again.descriptor_builds == 2 * built.descriptor_builds
    assert len(rank.agent.held) == built.descriptor_builds
    assert rank.agent.connected == {"trainer-0": 1, "trainer-1": 1}


def test_a_closed_session_leaves_the_arena_alone() -> None:
    rank = layer()
    rank.session.close()

    assert rank.agent.held == []
    assert not rank.agent.connected
    shadow = rank.session.plan.arena.nbytes
    assert [n for ((_, n),) in rank.agent.registered.values()] == [shadow, shadow]
    rank.arena.close()
    assert rank.agent.registered == {}
