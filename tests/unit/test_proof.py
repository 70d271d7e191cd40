# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The proof as data: every tiling over ranks passes, every single fault is named."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dynamo.refit.errors import FingerprintMismatch, LayoutRefused
from dynamo.refit.manifest import Box, Manifest, TensorEntry
from dynamo.refit.worker.proof import Proof

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

MODULUS = 2**64


def manifest(*shapes: tuple[int, ...]) -> Manifest:
    """Tensors ``t0``, ``t1``, ... of these shapes; where they lie is of no interest."""
    tensors = tuple(
        TensorEntry(name=f"t{number}", dtype="bfloat16", shape=shape, shards=())
        for number, shape in enumerate(shapes)
    )
    return Manifest(model="tiny", tensors=tensors, sources=())


@dataclass
class Held:
    """What the ranks of a replica read, and the parts that they came to."""

    manifest: Manifest
    reads: list[list[tuple[int, Box]]]
    parts: list[np.ndarray]
    published: np.ndarray

    def check(self) -> None:
        Proof(self.manifest, self.reads).check(self.published, self.parts)

    def readers(self, tensor: int) -> list[int]:
        return [
            rank
            for rank, reads in enumerate(self.reads)
            if any(number == tensor for number, _ in reads)
        ]

    def holders(self, read: tuple[int, Box]) -> list[int]:
        return [rank for rank, reads in enumerate(self.reads) if read in reads]


def part_of(read: tuple[int, Box]) -> int:
    """The right part of a block: any number that depends on it."""
    return hash((0x5EED, read)) % MODULUS


def held_by(
    shapes: Sequence[tuple[int, ...]], reads: Sequence[Sequence[tuple[int, Box]]]
) -> Held:
    """Ranks that hold the right bytes of what they read."""
    blocks = {read for rank in reads for read in rank}
    published = [0] * len(shapes)
    for read in blocks:
        published[read[0]] = (published[read[0]] + part_of(read)) % MODULUS
    return Held(
        manifest(*shapes),
        [list(rank) for rank in reads],
        [np.array([part_of(read) for read in rank], dtype="<u8") for rank in reads],
        np.array(published, dtype="<u8"),
    )


@st.composite
def tilings(draw: st.DrawFn) -> Held:
    """Some tensors, each cut into a grid; each block read by one rank or by more."""
    shapes = draw(
        st.lists(
            st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4
        )
    )
    ranks = draw(st.integers(1, 4))
    reads: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    for number, shape in enumerate(shapes):
        pieces = []
        for size in shape:
            cuts = draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
            pieces.append(list(itertools.pairwise([0, *sorted(cuts), size])))
        for box in itertools.product(*pieces):
            readers = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
            for rank in readers:
                reads[rank].append((number, box))
    return held_by(shapes, [draw(st.permutations(rank)) for rank in reads])


def mismatch(held: Held) -> FingerprintMismatch:
    with pytest.raises(FingerprintMismatch) as caught:
        held.check()
    return caught.value


def layout_refused(held: Held) -> tuple[str | None, str]:
    with pytest.raises(LayoutRefused) as caught:
        Proof(held.manifest, held.reads)
    return caught.value.tensor, str(caught.value)


ERRORS = st.integers(1, MODULUS - 1)


# --- any tiling ---------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(held=tilings())
def test_right_parts_of_any_tiling_pass_and_pass_again(held: Held) -> None:
    proof = Proof(held.manifest, held.reads)
    for _ in range(2):
        proof.check(held.published, held.parts)


@settings(max_examples=300, deadline=None)
@given(held=tilings(), error=ERRORS, data=st.data())
def test_any_wrong_part_is_found_and_its_tensor_named(
    held: Held, error: int, data: st.DataObject
) -> None:
    rank, number = data.draw(
        st.sampled_from(
            [(r, n) for r, p in enumerate(held.parts) for n in range(len(p))]
        )
    )
    read = held.reads[rank][number]
    part = int(held.parts[rank][number])
    held.parts[rank][number] = (part + error) % MODULUS
    caught = mismatch(held)
    assert caught.tensor == f"t{read[0]}"
    # Where one rank alone can be at fault it is named, and never another one.
    if held.readers(read[0]) == [rank]:
        assert caught.rank == rank
    assert caught.rank in (rank, None)


@settings(max_examples=100, deadline=None)
@given(held=tilings(), error=ERRORS, data=st.data())
def test_another_published_number_is_found_and_its_tensor_named(
    held: Held, error: int, data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(held.published) - 1))
    held.published[number] = (int(held.published[number]) + error) % MODULUS
    assert mismatch(held).tensor == f"t{number}"


@settings(max_examples=200, deadline=None)
@given(held=tilings(), data=st.data())
def test_swapped_parts_of_two_tensors_are_found(
    held: Held, data: st.DataObject
) -> None:
    places = [(r, n) for r, p in enumerate(held.parts) for n in range(len(p))]
    assume(len({held.reads[r][n][0] for r, n in places}) > 1)
    rank, number = data.draw(st.sampled_from(places))
    other_rank, other = data.draw(
        st.sampled_from(
            [
                (r, n)
                for r, n in places
                if held.reads[r][n][0] != held.reads[rank][number][0]
            ]
        )
    )
    one, two = held.parts[rank][number], held.parts[other_rank][other]
    held.parts[rank][number], held.parts[other_rank][other] = two, one
    first = min(held.reads[rank][number][0], held.reads[other_rank][other][0])
    second = max(held.reads[rank][number][0], held.reads[other_rank][other][0])
    assert mismatch(held).tensor in (f"t{first}", f"t{second}")


@settings(max_examples=200, deadline=None)
@given(held=tilings(), data=st.data())
def test_a_block_that_nobody_reads_is_found(held: Held, data: st.DataObject) -> None:
    blocks = sorted({read for reads in held.reads for read in reads})
    lost = data.draw(st.sampled_from(blocks))
    held.reads = [[read for read in reads if read != lost] for reads in held.reads]
    tensor, cause = layout_refused(held)
    assert tensor == f"t{lost[0]}"
    if any(read[0] == lost[0] for reads in held.reads for read in reads):
        shape = held.manifest.tensors[lost[0]].shape
        missing = math.prod(stop - start for start, stop in lost[1])
        left = math.prod(shape) - missing
        assert f"hold {left} of {math.prod(shape)} elements" in cause
    else:
        assert "the engine's loader does not read this tensor" in cause


@settings(max_examples=200, deadline=None)
@given(held=tilings(), data=st.data())
def test_a_block_too_many_is_found(held: Held, data: st.DataObject) -> None:
    """Any other block of a tensor that is complete already."""
    number = data.draw(st.integers(0, len(held.manifest.tensors) - 1))
    shape = held.manifest.tensors[number].shape
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    extra = (number, tuple(box))
    assume(all(extra not in reads for reads in held.reads))
    data.draw(st.sampled_from(held.reads)).append(extra)
    tensor, cause = layout_refused(held)
    assert tensor == f"t{number}"
    assert "overlap" in cause


# --- by hand ------------------------------------------------------------------

ROWS = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
WHOLE = ((0, 8),)


def two_ranks() -> Held:
    """``t0`` is split over two ranks, ``t1`` replicated, ``t2`` of rank 1 only."""
    return held_by(
        [(4, 4), (8,), ()],
        [[(0, ROWS[0]), (1, WHOLE)], [(2, ()), (1, WHOLE), (0, ROWS[1])]],
    )


def test_two_ranks_that_hold_everything_pass() -> None:
    two_ranks().check()


@pytest.mark.parametrize("error", [1, 2**32, 2**63, 2**64 - 1])
def test_a_part_of_a_split_tensor_may_be_of_either_rank(error: int) -> None:
    held = two_ranks()
    held.parts[1][2] = (int(held.parts[1][2]) + error) % MODULUS
    caught = mismatch(held)
    assert (caught.tensor, caught.rank) == ("t0", None)
    assert str(caught) == (
        "the staged bytes of 1 tensors are not the published ones (this one is read by "
        "ranks [0, 1]): the trainer wrote into the version while it was read, or a "
        "transfer was corrupted"
    )


def test_the_only_rank_that_reads_a_tensor_is_named() -> None:
    held = two_ranks()
    held.parts[1][0] ^= np.uint64(1)
    caught = mismatch(held)
    assert (caught.tensor, caught.rank) == ("t2", 1)
    assert "read by ranks [1]" in str(caught)


def test_the_first_of_several_tensors_is_named_and_all_are_counted() -> None:
    held = two_ranks()
    held.parts[0][0] ^= np.uint64(1)
    held.parts[1][0] ^= np.uint64(1)
    caught = mismatch(held)
    assert (caught.tensor, caught.rank) == ("t0", None)
    assert "bytes of 2 tensors" in str(caught)


@pytest.mark.parametrize(("rank", "number"), [(0, 1), (1, 1)])
def test_a_replica_that_differs_is_found_on_either_rank(rank: int, number: int) -> None:
    """And the rank that holds the right bytes is not blamed for it."""
    held = two_ranks()
    held.parts[rank][number] ^= np.uint64(1 << 17)
    caught = mismatch(held)
    assert caught.tensor == "t1"
    assert caught.rank in (rank, None)


def test_replicas_that_are_wrong_alike_are_found() -> None:
    """The source's bytes are wrong, and every rank has them."""
    held = two_ranks()
    for rank in range(2):
        held.parts[rank][1] ^= np.uint64(1)
    caught = mismatch(held)
    assert (caught.tensor, caught.rank) == ("t1", None)


def test_a_replica_counts_once_however_many_ranks_read_it() -> None:
    reads = [[(0, WHOLE)]] * 8
    held_by([(8,)], reads).check()


@pytest.mark.parametrize("wrong", [(), (0,), (1,), (0, 1)])
def test_a_rank_may_read_a_block_twice(wrong: tuple[int, ...]) -> None:
    """Tied weights: one tensor goes into two parameters."""
    held = held_by([(8,)], [[(0, WHOLE), (0, WHOLE)]])
    for number in wrong:
        held.parts[0][number] ^= np.uint64(1)
    if wrong:
        caught = mismatch(held)
        assert (caught.tensor, caught.rank) == ("t0", 0)
    else:
        held.check()


def test_a_tensor_that_nobody_reads_is_named() -> None:
    held = held_by([(4, 4), (8,)], [[(0, ROWS[0])], [(0, ROWS[1])]])
    assert layout_refused(held) == (
        "t1",
        "the engine's loader does not read this tensor: it is not part of the served "
        "model",
    )


def test_a_tensor_of_another_shape_in_the_served_model_is_named() -> None:
    """A vocabulary that grew by two rows: the ranks read the rows that they know."""
    held = held_by([(6, 4)], [[(0, ROWS[0])], [(0, ROWS[1])]])
    tensor, cause = layout_refused(held)
    assert tensor == "t0"
    assert cause.startswith("published with shape (6, 4), but what all ranks read")
    assert "(the blocks hold 16 of 24 elements)" in cause


def test_blocks_that_overlap_are_named() -> None:
    wide = ((1, 4), (0, 4))
    tensor, cause = layout_refused(held_by([(4, 4)], [[(0, ROWS[0])], [(0, wide)]]))
    assert tensor == "t0"
    assert f"(the blocks {ROWS[0]} and {wide} overlap)" in cause


def test_errors_of_two_ranks_that_cancel_out_are_beyond_a_sum() -> None:
    held = two_ranks()
    held.parts[0][0] = (int(held.parts[0][0]) + 5) % MODULUS
    held.parts[1][2] = (int(held.parts[1][2]) - 5) % MODULUS
    held.check()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("extra", [-1, 1])
def test_another_number_of_parts_than_reads_never_passes(rank: int, extra: int) -> None:
    held = two_ranks()
    held.parts[rank] = np.resize(held.parts[rank], len(held.parts[rank]) + extra)
    with pytest.raises((ValueError, FingerprintMismatch)):
        held.check()


@pytest.mark.timeout(30)
def test_a_large_model_is_proved_at_once() -> None:
    """20 000 tensors over 8 ranks: a check is part of every refit."""
    ranks = 8
    shape = (ranks * 16, 64)
    boxes = [((16 * rank, 16 * rank + 16), (0, 64)) for rank in range(ranks)]
    held = held_by(
        [shape] * 20_000, [[(t, box) for t in range(20_000)] for box in boxes]
    )
    proof = Proof(held.manifest, held.reads)
    proof.check(held.published, held.parts)
    held.parts[3][19_999] ^= np.uint64(1)
    with pytest.raises(FingerprintMismatch) as caught:
        proof.check(held.published, held.parts)
    assert caught.value.tensor == "t19999"
