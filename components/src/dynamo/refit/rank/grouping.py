# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What is converted together: layers, and what the engine's loader fills for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dynamo.refit.manifest import ITEMSIZE, TensorEntry
from dynamo.refit.rank.capture import LoadGeometry
from dynamo.refit.rank.runtime_layout import ProcessedLayer

#: Bytes of published tensors that one call of the loader is given, if it takes them
#: for parameters of different layers: each call looks through the whole model.
LOADED_TOGETHER = 1 << 20


@dataclass
class Group:
    """What is converted together: layers, and tensors that the loader fills."""

    layers: list[ProcessedLayer]
    loaded: list[str]
    sources: set[str] = field(default_factory=set)


def group(
    layers: Iterable[ProcessedLayer],
    geometry: LoadGeometry,
    published: Mapping[str, TensorEntry],
) -> list[Group]:
    """``layers``, and all that the loader fills, in the groups to be converted."""
    return _load_small_together(_by_sources(layers, geometry), published)


def _by_sources(
    layers: Iterable[ProcessedLayer], geometry: LoadGeometry
) -> list[Group]:
    """The smallest groups of which none reads a tensor that another one loads."""
    groups, owners = [], {}
    for layer in layers:
        loaded = [n for n in layer.parameters.values() if n in geometry.loaded]
        groups.append(Group([layer], loaded))
        owners |= dict.fromkeys(loaded)
    groups += [Group([], [name]) for name in geometry.loaded if name not in owners]
    first: dict[str, Group] = {}
    joined: list[Group] = []
    for group in groups:
        group.sources = set().union(*(geometry.loaded[n] for n in group.loaded))
        others = {id(first[s]): first[s] for s in group.sources if s in first}
        if others:
            into, *rest = others.values()
            for other in (*rest, group):
                into.layers += other.layers
                into.loaded += other.loaded
                into.sources |= other.sources
            joined = [g for g in joined if not any(g is other for other in rest)]
            group = into
        else:
            joined.append(group)
        first |= dict.fromkeys(group.sources, group)
    return joined


def _load_small_together(
    groups: Sequence[Group], published: Mapping[str, TensorEntry]
) -> list[Group]:
    """Joins groups without layers until the loader gets :data:`LOADED_TOGETHER`."""
    joined: list[Group] = [group for group in groups if group.layers]
    room = 0
    for group in groups:
        if group.layers:
            continue
        nbytes = sum(_nbytes(published[name]) for name in group.sources)
        if nbytes > room:
            joined.append(Group([], []))
            room = max(LOADED_TOGETHER, nbytes)
        joined[-1].loaded += group.loaded
        joined[-1].sources |= group.sources
        room -= nbytes
    return joined


def _nbytes(tensor: TensorEntry) -> int:
    return math.prod(tensor.shape) * ITEMSIZE[tensor.dtype]
