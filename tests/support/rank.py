# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One rank's arena and session on faked trainers, and what they should come to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from dynamo.refit.fingerprint import Part
from dynamo.refit.manifest import Box, TensorEntry
from dynamo.refit.protocol import MemoryUse, StagingMode
from dynamo.refit.rank.buffers import Arena
from dynamo.refit.rank.conversion import Conversion
from dynamo.refit.rank.cycle import Cycle, Limit
from dynamo.refit.rank.handover import Handover
from dynamo.refit.rank.limits import Limits, TransferCost
from dynamo.refit.rank.pipeline import Submit
from dynamo.refit.rank.session import Convert, Session
from dynamo.refit.rank.slices import IntakeLayout
from tests.support.fake_nixl import FakeNixlAgent, FakeTrainers
from tests.support.layouts import Layout, decoder_layer, index, raw

CPU = torch.device("cpu")

#: What a live parameter holds before a version comes into it.
OLD = 0x5A

#: Several waves of either kind.
SMALL = Limits(scratch=1024, arena=768)


def numbers(values: np.ndarray, dtype: str) -> torch.Tensor:
    """Unsigned integers as elements of ``dtype``, of the same bytes."""
    data = bytearray(values.tobytes())
    flat = torch.frombuffer(data, dtype=getattr(torch, dtype))
    return flat.reshape(values.shape)


def part_of(tensor: TensorEntry, full: Mapping[str, np.ndarray], box: Box) -> int:
    """What ``box`` contributes to the fingerprint of the published ``tensor``."""
    values = numbers(full[tensor.name], tensor.dtype)
    return Part(values[index(box)], box, tensor.shape).fold()


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in tensors.items()}


@dataclass
class Rank:
    """One rank's session on a layout that ``trainers`` hold, addressed to them.

    ``live`` has the parameters of a model without the model. ``built`` counts what all
    of this took.
    """

    layout: Layout
    trainers: FakeTrainers
    number: int = 0
    limits: Limits = SMALL
    costs: dict[str, TransferCost] | None = None
    mode: StagingMode = "host"
    intake: IntakeLayout | None = None
    conversions: Sequence[Conversion] = ()
    convert: Convert | None = None
    built: Cycle = field(default_factory=Cycle)

    def __post_init__(self) -> None:
        plan = self.layout.plan(
            rank=self.number, limits=self.limits, costs=self.costs, intake=self.intake
        )
        self.agent = FakeNixlAgent(self.trainers.manifest)
        self.live = {
            p.name: torch.full((p.nbytes,), OLD, dtype=torch.uint8)
            .view(getattr(torch, p.dtype))
            .view(p.shape)
            for p in self.layout.parameters
        }
        memory = MemoryUse(mode=self.mode, device_nbytes=0, host_nbytes=0)
        self.arena = Arena(self.agent, plan.arena, memory, CPU, self.built)
        self.session = Session(
            self.agent,
            self.trainers.manifest.layout_fingerprint(),
            plan,
            memory,
            self.arena,
            self.live,
            self.built,
            self.conversions,
            self.convert,
        )
        self.handover: Handover | None = None
        self.address()

    def address(self) -> None:
        manifest = self.trainers.manifest
        self.session.address(manifest, manifest.fingerprint(), self.built)

    def pull(
        self,
        slot: int,
        submit: Submit,
        *,
        limit: Limit | None = None,
        cycle: Cycle | None = None,
    ) -> np.ndarray:
        self.arena.begin()
        self.handover = handover = self.session.hand_over()
        limit = limit or Limit(time.monotonic() + 60, lambda: False)
        return self.session.pull(slot, limit, submit, cycle or Cycle(), handover)

    def pull_and_convert(self, slot: int, submit: Submit, step: int = 1) -> np.ndarray:
        """:meth:`pull`, while this thread is the model's: it carries out ``step``
        conversions at a time."""
        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(self.pull, slot, submit)
            while not pulling.done():
                if self.handover is not None:
                    self.handover.run(self.handover.done + step)
                time.sleep(0.0001)
            return pulling.result()

    @property
    def staged(self) -> dict[str, torch.Tensor]:
        """Where the last version went."""
        return self.arena.shadows[self.arena.target].by_name

    def loaded(self, full: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """What ``staged`` should be after a pull of ``full``."""
        expected = self.layout.loaded(full)
        return {name: values.tobytes() for name, values in expected.items()}

    def install(self) -> None:
        for name, staged in self.staged.items():
            self.live[name].copy_(staged)
        self.arena.installed()


def layer(dtype: str = "bfloat16", **options: object) -> Rank:
    """Rank 0 of the decoder layer, published as ``dtype`` in two slots."""
    layout = decoder_layer(0, dtype=dtype, slots=2)
    return Rank(layout, FakeTrainers(layout), **options)
