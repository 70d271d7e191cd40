# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""What this rank's loader reads, learned from the loader itself.

ModelExpress's placeholders go through the meta twin's own ``load_weights`` and record
which slice of which tensor lands where: there is no table per model. Whatever else the
loader writes is recorded, too. Where it does more than copy slices, it runs once more
on tensors of the meta device, and it is followed which of them make up what it writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from modelexpress.refit.reshard import (
    UnsupportedReshard,
    build_lazy_weights,
    capture_weights,
)
from modelexpress.refit.reshard.slice_plan import resolve_slice
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dynamo.refit.errors import LayoutRefused
from dynamo.refit.manifest import TensorEntry
from dynamo.refit.rank import boxes
from dynamo.refit.rank.load_trace import (
    REPLACED,
    ZEROED,
    LoadRecorder,
    SourceTrace,
    vocabulary_padding,
)
from dynamo.refit.rank.runtime_layout import find_layout
from dynamo.refit.rank.slices import Parameter, ReadSlice

logger = init_logger("vllm.dynamo_refit")

#: Characters of a loader's own message that a refusal repeats: vLLM's may list every
#: parameter of a module.
LONGEST_CAUSE = 300

#: Tensors that a refusal names.
MOST_NAMES = 8


def describe_parameters(twin: nn.Module, live: nn.Module) -> list[Parameter]:
    """The parameters to fill, as they are loaded, in the model's order; aliases once.

    Raises:
        RefitError: the live model holds one of them in a way that no version could
            be installed into; see :func:`find_layout`.
    """
    placeholders = find_layout(twin, live).placeholders
    unloaded = vocabulary_padding(twin)
    return [
        Parameter.of(name, planned, unloaded.get(name, 0))
        for name, planned in twin.named_parameters()
        if name not in placeholders
    ]


@dataclass(frozen=True)
class LoadGeometry:
    """What this rank's loader makes of published tensors.

    ``slices`` are the copies of boxes that fill the *sliced* parameters. ``loaded``
    are the other tensors of the model that the loader writes, parameters and buffers:
    by name, the published tensors that each of them is made of. Of some of these
    ``unfilled`` elements are not made of anything.
    """

    slices: tuple[ReadSlice, ...]
    loaded: Mapping[str, frozenset[str]]
    unfilled: Mapping[str, int] = field(default_factory=dict)


def capture_load(twin: nn.Module, tensors: Sequence[TensorEntry]) -> LoadGeometry:
    """What ``twin``'s loader copies, and what it computes, of ``tensors``.

    A parameter is sliced if all that the loader does to it is to copy boxes of tensors
    that no loaded tensor is made of.

    Raises:
        LayoutRefused: the loader rejects a tensor, or needs its values to know what
            to do with it; names the tensors.
    """
    recorder = LoadRecorder(twin)
    copies, unread, at_once = _run_with_placeholders(twin, tensors, recorder)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    computed = recorder.computed
    slices = []
    for copy in copies:
        try:
            box, strides = resolve_slice(copy, shapes[copy.src_name])
        except UnsupportedReshard as error:
            computed.setdefault(copy.param_name, str(error))
            continue
        slices.append(
            ReadSlice(
                tensor=copy.src_name,
                box=tuple((int(lo), int(hi)) for lo, hi in box),
                parameter=copy.param_name,
                offset=int(copy.dest_offset),
                strides=tuple(int(stride) for stride in strides),
            )
        )
    _forget_padding(computed, recorder.zeroed, vocabulary_padding(twin))
    if at_once and not (computed or unread or recorder.copies_elsewhere):
        return LoadGeometry(tuple(slices), {})
    trace = _trace_sources(twin, tensors)
    made_of = trace.written
    filled: Counter[str] = Counter()
    for piece in slices:
        filled[piece.parameter] += boxes.volume(piece.box)
    for name in made_of:
        # A loader that waits for several tensors may keep a placeholder back.
        if filled[name] != trace.filled(name):
            computed.setdefault(name, "the loader does more than copy slices to it")
    if replaced := {
        name: reason
        for name, reason in computed.items()
        if name not in made_of or reason == REPLACED
    }:
        raise refuse_tensors(replaced)
    loaded = _close(set(computed), unread, made_of)
    unfilled = {
        name: trace.elements[name] - trace.filled(name) for name in sorted(loaded)
    }
    return LoadGeometry(
        slices=tuple(piece for piece in slices if piece.parameter not in loaded),
        loaded={name: frozenset(made_of[name]) for name in sorted(loaded)},
        unfilled={name: number for name, number in unfilled.items() if number > 0},
    )


def _close(
    loaded: set[str], sources: set[str], made_of: Mapping[str, set[str]]
) -> set[str]:
    """``loaded``, and whatever else is made of the same tensors or of ``sources``: a
    tensor is read whole or in slices, not both."""
    sources = sources.union(*(made_of[name] for name in loaded))
    while more := {
        name
        for name, parts in made_of.items()
        if name not in loaded and not parts.isdisjoint(sources)
    }:
        loaded = loaded | more
        sources = sources.union(*(made_of[name] for name in more))
    return loaded


def refuse_tensors(reasons: Mapping[str, str]) -> LayoutRefused:
    """The refusal of tensors that a refit would get wrong, with the first's reason."""
    names = list(reasons)
    listed = ", ".join(names[:MOST_NAMES])
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return LayoutRefused(
        f"not just copies of slices of what is published: {listed}{more}; "
        f"{names[0]}: {_shorten(reasons[names[0]])}",
        tensor=names[0],
    )


class _CountedLoader:
    """As much of ``twin`` as ModelExpress uses; counts the calls of its loader."""

    def __init__(self, twin: nn.Module) -> None:
        self.calls = 0
        self.named_parameters = twin.named_parameters
        self._load = twin.load_weights

    def load_weights(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.calls += 1
        self._load(weights)


def _run_with_placeholders(
    twin: nn.Module, tensors: Sequence[TensorEntry], recorder: LoadRecorder
) -> tuple[Sequence[Any], set[str], bool]:
    """The copies of placeholders; the tensors with which the loader does what a
    placeholder cannot; and whether it took all of them at once."""
    loader = _CountedLoader(twin)
    lazy = build_lazy_weights(
        [(t.name, getattr(torch, t.dtype), t.shape) for t in tensors]
    )
    try:
        with recorder.recording():
            result = capture_weights(
                loader, lazy, default_weight_loader=default_weight_loader
            )
    except Exception as error:
        # Of a tensor that the loader rejects, or of a placeholder only: whoever loads
        # them without placeholders finds out.
        logger.debug("dynamo-refit: placeholders cannot be loaded: %s", error)
        return (), {tensor.name for tensor in tensors}, False
    return result.copies, set(result.unsupported), loader.calls == 1


def _trace_sources(twin: nn.Module, tensors: Sequence[TensorEntry]) -> SourceTrace:
    """Which ``tensors`` each tensor of ``twin`` is made of.

    Raises:
        LayoutRefused: the loader rejects a tensor; names it.
    """
    planned = [
        (t.name, torch.empty(t.shape, dtype=getattr(torch, t.dtype), device="meta"))
        for t in tensors
    ]
    trace = SourceTrace(twin, planned)
    try:
        with torch.no_grad(), trace:
            twin.load_weights(iter(planned))
    except Exception as error:
        # The loaders raise whatever they like (mostly bare assertions), without the
        # tensor's name: find it by loading one tensor at a time.
        raise _blame(twin, planned, error) from error
    return trace


def _blame(
    twin: nn.Module, planned: Sequence[tuple[str, torch.Tensor]], cause: Exception
) -> LayoutRefused:
    for name, tensor in planned:
        try:
            with torch.no_grad(), SourceTrace(twin, [(name, tensor)]):
                twin.load_weights(iter([(name, tensor)]))
        except Exception as error:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return LayoutRefused(
                f"published with shape {tuple(tensor.shape)} as {dtype}; the engine's "
                f"loader rejects it: {type(error).__name__}: {_shorten(str(error))}",
                tensor=name,
            )
    return LayoutRefused(
        f"the engine's loader rejects the tensors together: "
        f"{type(cause).__name__}: {_shorten(str(cause))}"
    )


def _shorten(message: str) -> str:
    message = " ".join(message.split())
    if len(message) <= LONGEST_CAUSE:
        return message
    return f"{message[:LONGEST_CAUSE]}..."


def _forget_padding(
    computed: dict[str, str],
    zeroed: Mapping[str, tuple[int, ...]],
    padding: Mapping[str, int],
) -> None:
    """Drop from ``computed`` what was only zeroed where it pads the vocabulary: the
    staging buffers are zero there, too."""
    for name, sizes in zeroed.items():
        if computed.get(name) == ZEROED and max(sizes) <= padding.get(name, 0):
            del computed[name]
