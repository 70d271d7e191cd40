# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Layouts that nobody wrote by hand, drawn by hypothesis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from dynamo.refit.manifest import ITEMSIZE, Box, TensorEntry
from dynamo.refit.rank.slices import CONVERTIBLE, Parameter, ReadSlice
from tests.support.layouts import (
    MEMORIES,
    Layout,
    SourceMemory,
    extent,
    make_manifest,
    make_tensor,
    row_major,
    volume,
    whole,
)


@dataclass
class LayoutBuilder:
    """Draws tensors, shards and slices for one parameter after the other."""

    draw: st.DrawFn
    memory: SourceMemory
    tensors: list[TensorEntry]
    parameters: list[Parameter]
    slices: list[ReadSlice]

    def add_parameter(self) -> None:
        """A parameter that is cut along one axis into parts.

        Each part is loaded from a box of a tensor (row and column slices, heads
        of a fused checkpoint tensor), or is not loaded at all. Parts along the
        first axis are what QKV and gate/up look like, those along others have
        rows that are not contiguous in the parameter.
        """
        shape = tuple(self.draw(st.lists(st.integers(1, 6), max_size=3)))
        held = self.draw(st.sampled_from(sorted(ITEMSIZE)))
        dtype = self._published_as(held)
        name = f"p{len(self.parameters)}"
        axis = self.draw(st.integers(0, len(shape) - 1)) if shape else 0
        order = self.draw(st.permutations(range(len(shape))))
        strides = row_major(shape)
        together = self.draw(st.booleans())
        unloaded, boxes = 0, []
        for lo, hi in self._cut(shape[axis]) if shape else [(0, 1)]:
            box = list(whole(shape))
            if shape:
                box[axis] = (lo, hi)
            if self.draw(st.integers(0, 5)) == 0:
                unloaded += volume(tuple(box))
            else:
                boxes.append(tuple(box))
        self.parameters.append(Parameter(name, shape, held, unloaded))
        if together:
            margins = self._add_tensor(shape, order, dtype)
        for box in boxes:
            start = [lo for lo, _ in box] if together else [0] * len(shape)
            if not together:
                margins = self._add_tensor(extent(box), order, dtype)
            offset = sum(lo * s for (lo, _), s in zip(box, strides, strict=True))
            self._add_slice(name, offset, start, extent(box), strides, order, margins)

    def add_twin(self) -> None:
        """A second parameter that is loaded from the same tensors as the last one,
        as of a tied embedding that the engine holds twice."""
        last = self.parameters[-1]
        name = f"p{len(self.parameters)}"
        held = self._published_as(last.dtype)
        boxes = [s for s in self.slices if s.parameter == last.name]
        self.parameters.append(replace(last, name=name, dtype=held))
        self.slices += [replace(piece, parameter=name) for piece in boxes]

    def _published_as(self, held: str) -> str:
        """``held``, or now and then a dtype that can be converted to it and back."""
        if held in CONVERTIBLE and self.draw(st.booleans()):
            return self.draw(st.sampled_from(sorted(CONVERTIBLE)))
        return held

    def _add_tensor(
        self, sizes: Sequence[int], order: Sequence[int], dtype: str
    ) -> list[int]:
        """A sharded tensor around a transposed block; where the block begins.

        It may have one dimension more, of which a slice reads one index.
        """
        sizes = [sizes[dim] for dim in order]
        if len(sizes) < 3 and self.draw(st.integers(0, 3)) == 0:
            sizes.append(1)
        margin, region_number = st.integers(0, 2), st.integers(0, 1)
        before = [self.draw(margin) for _ in sizes]
        rows = zip(sizes, before, strict=True)
        shape = tuple(n + b + self.draw(margin) for n, b in rows)
        shards = []
        for box in self._shard_boxes(shape):
            for _ in range(self.draw(st.sampled_from([1, 1, 1, 2, 3]))):
                source, region = self.draw(st.integers(0, 2)), self.draw(region_number)
                gap = self.draw(st.integers(0, 9))
                shards.append(self.memory.place(box, dtype, source, region, gap))
        self.tensors.append(
            TensorEntry(
                name=f"t{len(self.tensors)}",
                dtype=dtype,
                shape=shape,
                shards=tuple(self.draw(st.permutations(shards))),
            )
        )
        return before

    def _add_slice(
        self,
        parameter: str,
        offset: int,
        start: Sequence[int],
        sizes: Sequence[int],
        strides: Sequence[int],
        order: Sequence[int],
        margins: Sequence[int],
    ) -> None:
        box = [
            (margin + start[dim], margin + start[dim] + sizes[dim])
            for margin, dim in zip(margins, order, strict=False)
        ]
        target = [strides[dim] for dim in order]
        if len(margins) > len(order):
            # What ModelExpress says for a dimension that a select drops.
            box.append((margins[-1], margins[-1] + 1))
            target.append(0)
        tensor = self.tensors[-1].name
        piece = ReadSlice(tensor, tuple(box), parameter, offset, tuple(target))
        self.slices.append(piece)

    def _cut(self, size: int) -> list[tuple[int, int]]:
        """Up to three uneven parts."""
        inner = st.sets(st.integers(1, max(size - 1, 1)), max_size=2)
        cuts = sorted(cut for cut in self.draw(inner) if cut < size)
        return list(itertools.pairwise([0, *cuts, size]))

    def _shard_boxes(self, shape: Sequence[int]) -> list[Box]:
        """Cut along one axis, and now and then along all of them."""
        grid = self.draw(st.integers(0, 4)) == 0
        axis = self.draw(st.integers(0, len(shape) - 1)) if shape else 0
        pieces = [
            self._cut(size) if grid or dim == axis else [(0, size)]
            for dim, size in enumerate(shape)
        ]
        return list(itertools.product(*pieces))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """One to four parameters from up to three sources, in two slots."""
    memory = SourceMemory(
        sources=draw(st.integers(1, 3)),
        regions=draw(st.integers(1, 2)),
        memory=draw(st.permutations(MEMORIES)),
    )
    builder = LayoutBuilder(draw, memory, [], [], [])
    for _ in range(draw(st.integers(1, 3))):
        builder.add_parameter()
    if draw(st.booleans()):
        builder.add_twin()
    if not builder.tensors:
        builder.tensors.append(make_tensor(memory, "unread", ()))
    manifest = make_manifest(*builder.tensors, memory=memory, slots=2)
    slices = draw(st.permutations(builder.slices))
    return Layout(manifest, tuple(builder.parameters), tuple(slices))
