# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""verl: a ``CheckpointEngine`` whose transport is refit.

    @CheckpointEngineRegistry.register("dynamo_refit")
    class RefitEngine(Engine, CheckpointEngine): ...

    actor_rollout_ref.rollout.checkpoint_engine:
      backend: dynamo_refit
      engine_kwargs: {dynamo_refit: {model: my-model}}

This is the trainer's half; verl's rollouts are then clients of Dynamo's frontend. The
names of the methods are those of ``verl/checkpoint_engine/base.py``. Nothing of
verl is imported here. verl hands over whole tensors, gathered for it on every rank, so
the master publishes alone. Where the FSDP module itself can be reached, publishing its
DTensors as in :mod:`graphs.training.fsdp` spares the gather.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from dynamo.refit.errors import RefitError
from dynamo.refit.publish.handle import PublishedVersion
from dynamo.refit.publish.publisher import WeightPublisher


class Engine:
    """Collects verl's stream of tensors in a copy of its own and publishes that one.

    Args:
        bucket_size: verl gives it to every engine; the copy holds the whole model.
        is_master: whether this trainer rank publishes.
        model: the served model's name.
        next_version: of the first one, where verl does not say its step.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        *,
        model: str,
        next_version: int = 1,
    ) -> None:
        self._is_master = is_master
        self._model = model
        self._next_version = next_version
        self._copy: dict[str, torch.Tensor] = {}
        self._publisher: WeightPublisher | None = None
        self._published: PublishedVersion | None = None

    def prepare(self) -> None:
        """Nothing to exchange: workers learn from the event where the weights are."""

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """No group has to be made, so nobody gets an argument."""
        return {}, {}

    def init_process_group(self) -> None:
        """There is none: workers come and go without the trainer's knowledge."""

    def finalize(self) -> None:
        """Keeps everything: the next version goes through the same registration."""

    @torch.no_grad()
    async def send_weights(
        self,
        weights: Iterator[tuple[str, torch.Tensor]],
        global_steps: int | None = None,
    ) -> None:
        """Publish the stream as one version; returns when the fleet serves it.

        A version whose call was cancelled may still be read: the next call waits for
        its end before it takes a tensor.

        Raises:
            RuntimeError: the version is not served; with the coordinator's reason.
        """
        if self._published is not None:
            # However it ends: nobody reads the copy then.
            with contextlib.suppress(RefitError):
                await self._published.released()
        for name, tensor in weights:
            # The others take part in the gather behind the iterator.
            if self._is_master:
                self._collect(name, tensor)
        if not self._is_master:
            return
        if self._publisher is None:
            # In place: the copy is written again only after the release, below.
            self._publisher = WeightPublisher(self._model, self._copy, mode="in_place")
        version = self._next_version if global_steps is None else global_steps
        self._next_version = version + 1
        self._published = self._publisher.publish(version)
        release = await self._published.released()
        if release.outcome != "completed":
            raise RuntimeError(f"version {version} {release.outcome}: {release.detail}")

    def _collect(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._copy:
            self._copy[name].copy_(tensor)
        else:
            self._copy[name] = tensor.detach().clone(
                memory_format=torch.contiguous_format
            )

    async def receive_weights(self) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Nothing comes this way: Dynamo's workers read the trainer's memory."""
        for nothing in ():
            yield nothing
