# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""prime-rl: a ``WeightSender`` and a ``WeightReceiver`` whose transport is refit.

    class RefitSender(Sender, WeightSender):      # in the trainer, on every rank
        model_name = "my-model"
    class RefitReceiver(Receiver, WeightReceiver):  # in the orchestrator
        pass

The names of the methods are those of ``prime_rl/transports/weights/base.py``: its
``broadcast()`` calls ``_broadcast()`` between two markers in the step's directory, and
the orchestrator moves its policy version on when ``receive()`` returns. Nothing of
prime-rl is imported here. Where there is only ``broadcast_weights(model, step)``
(before these two classes were), it is :meth:`Sender.broadcast_weights`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from torch import nn

from dynamo.refit.publish.publisher import WeightPublisher

#: prime-rl's, raised by the sender's ``broadcast()`` when ``_broadcast()`` returns.
FINISHED_MARKER = ".finished"

POLL_SECONDS = 0.1


class World(Protocol):
    """prime-rl's view of the trainer job, as far as it is needed."""

    rank: int
    world_size: int


class Sender:
    """Publishes step N as version N, on every trainer rank, from its own shards.

    ``model_name`` is the served model's name; ``world`` is set by ``WeightSender``. The
    ranks meet in the store of the trainer's default process group.
    """

    model_name: str
    world: World
    _publisher: WeightPublisher | None = None

    def _broadcast(self, model: nn.Module, step: int, step_dir: Path) -> None:
        """As :meth:`broadcast_weights`: no file is written."""
        self.broadcast_weights(model, step)

    def broadcast_weights(self, model: nn.Module, step: int) -> None:
        """Publish the step; returns when the fleet serves it.

        Raises:
            RuntimeError: it is not served; with the coordinator's reason.
        """
        if self._publisher is None:
            self._publisher = WeightPublisher(
                self.model_name,
                dict(model.named_parameters()),
                rank=self.world.rank,
                world_size=self.world.world_size,
            )
        release = self._publisher.publish(step).wait()
        if release.outcome != "completed":
            raise RuntimeError(f"step {step} {release.outcome}: {release.detail}")


class StepMarkers(Protocol):
    """What ``WeightReceiver`` has: the step's directory, and how to let it begin."""

    def step_dir(self, step: int) -> Path: ...

    def _ack(self, step: int) -> None: ...


class Receiver:
    """The orchestrator's side: it waits, and calls no engine."""

    async def receive(self: StepMarkers, step: int) -> None:
        """Until every worker serves the step: only then has the sender finished."""
        self._ack(step)
        while not (self.step_dir(step) / FINISHED_MARKER).exists():
            await asyncio.sleep(POLL_SECONDS)
