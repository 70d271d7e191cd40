# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""NeMo-RL: a ``WeightSynchronizer`` whose transport is refit.

NeMo-RL's loop calls ``sync_weights()`` on the driver, while the weights are with its
policy workers (Ray actors), so there are two halves:

    class MyPolicyWorker(PolicyWorkerHooks, DTensorPolicyWorker): ...
    class MyPolicy(Policy):          # a method each that runs the worker's on all ranks
        def init_refit(self, model): ...
        def publish_refit(self, version): ...
    class RefitSynchronizer(Synchronizer, WeightSynchronizer): ...

The names of the methods are those of ``nemo_rl/weight_sync/interfaces.py``. Nothing
of NeMo-RL is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from dynamo.refit.publish.handle import Release
from dynamo.refit.publish.publisher import WeightPublisher


class PolicyWorkerHooks:
    """For each policy worker, which has these three; ``model`` is a module of DTensors.
    The workers meet in the store of their default process group, or in ``store``.

    A Megatron-Core worker publishes the shards that
    :func:`dynamo.refit.publish.megatron.bridge_shards` makes of its model.
    """

    model: nn.Module
    rank: int
    world_size: int
    store: dist.Store | None = None

    def init_refit(self, model: str) -> None:
        """Make the publisher; blocks until every worker has made its own."""
        self._publisher = WeightPublisher(
            model,
            dict(self.model.named_parameters()),
            rank=self.rank,
            world_size=self.world_size,
            store=self.store,
        )

    def publish_refit(self, version: int) -> Release:
        """Publish, and block until the fleet serves it or will not."""
        return self._publisher.publish(version).wait()

    def shutdown_refit(self) -> None:
        self._publisher.close()


class PolicyHooks(Protocol):
    """Of the policy, on the driver: the hooks above, called on all of its workers."""

    def init_refit(self, model: str) -> None: ...

    def publish_refit(self, version: int) -> Sequence[Release]: ...

    def shutdown_refit(self) -> None: ...


class Synchronizer:
    """The driver's half. Generation is not touched: no worker is called, no engine is
    paused, no cache is flushed; the coordinator does what has to be done.

    Args:
        policy: whose workers hold the weights.
        model: the served model's name.
        next_version: higher than any version that the fleet has been given.
    """

    def __init__(self, policy: PolicyHooks, model: str, next_version: int = 1) -> None:
        self._policy = policy
        self._model = model
        self._next_version = next_version
        self._stale = True

    @property
    def is_stale(self) -> bool:
        return self._stale

    def mark_stale(self) -> None:
        self._stale = True

    def init_communicator(self) -> None:
        self._policy.init_refit(self._model)

    def sync_weights(
        self, *, timer: Any = None, kv_scales: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Publish what the policy holds now; returns when the fleet serves it.

        Raises:
            NotImplementedError: there are KV scales, which are not published.
            RuntimeError: the version is not served; with the coordinator's reason.
        """
        if kv_scales:
            raise NotImplementedError("KV-cache scales do not travel with a version")
        version = self._next_version
        # Whatever happens to it, a version's number is used once.
        self._next_version += 1
        # All ranks' handles end alike.
        release = self._policy.publish_refit(version)[0]
        if release.outcome != "completed":
            raise RuntimeError(f"version {version} {release.outcome}: {release.detail}")
        self._stale = False
        return {"weight_version": float(version)}

    def shutdown(self) -> None:
        self._policy.shutdown_refit()
