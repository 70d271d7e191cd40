# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's side: make versions readable, announce them, know when they are free.

    publisher = WeightPublisher("my-model", dict(model.named_parameters()))
    handle = publisher.publish(version=step)
    handle.wait()                       # or: await handle.released()

With FSDP2 (or any DTensors) every rank does the same:

    dist.init_process_group(...)
    fully_shard(model)
    publisher = WeightPublisher(
        "my-model", dict(model.named_parameters()),
        rank=dist.get_rank(), world_size=dist.get_world_size(),
    )
    handle = publisher.publish(version=step)    # on every rank; blocks for the copy
    handle.wait()                               # ends alike on every rank

Nothing is gathered: each rank registers its own shards, and a version is announced
when all of them are written. The ranks meet over the store of torch.distributed, and
never in a collective.

The publisher owns the NIXL registration of the weights, the manifest, the
fingerprints and the leases; it knows nothing about workers. It runs on threads of its
own, so a trainer that computes for seconds still answers: one lets UCX answer readers
that connect, one fingerprints what was written, and the others are
:class:`RankZero`'s or :class:`OtherRank`'s.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dynamo.refit.errors import SourceLost, failure_from
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import InFlightPolicy
from dynamo.refit.publish.endpoint import WeightsEndpoint
from dynamo.refit.publish.group import Group
from dynamo.refit.publish.handle import PublishedVersion
from dynamo.refit.publish.job import Report
from dynamo.refit.publish.memory import Mode, RankMemory
from dynamo.refit.publish.other_rank import OtherRank
from dynamo.refit.publish.rank_zero import RankZero
from dynamo.refit.publish.settings import (
    check_in_flight,
    check_settings,
    version_number,
)
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.publish.store import POLL_SECONDS, store_of_job
from dynamo.refit.tracing import current_traceparent

logger = logging.getLogger(__name__)

#: UCX answers a connecting reader only when this process polls.
PROGRESS_SECONDS = 0.002

#: How long all ranks may take to join, and each thread to stop.
START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class PublisherCounters:
    """What a rank's publisher had to build and send so far.

    A publication into buffers that were used before adds to ``published`` only.
    ``manifests_built`` and ``manifests_sent`` are rank 0's.
    """

    registrations: int
    fingerprint_batches: int
    manifests_built: int
    manifests_sent: int
    published: int


class WeightPublisher:
    """Publishes the versions of one model from one trainer rank.

    Every rank of a job makes one, and publishes the same versions in the same order.
    The constructor blocks until all ranks are there.

    Args:
        model: the served model's name, as clients send it.
        tensors: checkpoint (Hugging Face) name to tensor or DTensor, all on one
            device; or the blocks that this rank holds. The same tensors hold every
            version. May be empty on some ranks of several.
        mode: ``snapshot`` copies each version into one of two registered buffers,
            and the trainer goes on at once; ``in_place`` publishes the tensors
            themselves, which must not change until the handle is released.
        namespace: Dynamo namespace of the graph.
        component: Dynamo component this trainer shows up as.
        rank: this rank's number; rank 0 serves workers.
        world_size: how many ranks publish.
        store: where several ranks meet, over a connection of the publisher's own;
            default: the store of the default process group.
        ready_seconds: how long after the first rank the last one may write a version
            (rank 0's counts); after that its handles end with SourceLost.

    The discovery backend and the planes come from Dynamo's environment
    (``DYN_DISCOVERY_BACKEND``, ``DYN_REQUEST_PLANE``, ``DYN_EVENT_PLANE``, ...).

    Raises:
        ValueError: an argument is not allowed; says what is.
        ManifestInvalid: the tensors cannot be published as they are, or the ranks'
            tensors do not fit together or are too many blocks; on every rank.
        SourceLost: not all ranks have come within :data:`START_SECONDS`.
        StoreMissing: there are several ranks and no store.
        TransferFailed: NIXL does not register the tensors.
    """

    def __init__(
        self,
        model: str,
        tensors: Mapping[str, torch.Tensor] | Sequence[LocalShard],
        *,
        mode: Mode = "snapshot",
        namespace: str | None = None,
        component: str = "trainer",
        rank: int = 0,
        world_size: int = 1,
        store: dist.Store | None = None,
        ready_seconds: float = 300.0,
    ) -> None:
        self.model = model
        self.rank = rank
        self.world_size = world_size
        namespace = namespace or os.environ.get("DYN_NAMESPACE", "dynamo")
        check_settings(
            model=model,
            mode=mode,
            namespace=namespace,
            component=component,
            rank=rank,
            world_size=world_size,
            ready_seconds=ready_seconds,
        )
        own_store = store_of_job(store, world_size, model, component)
        name = f"{component}-{rank}-{uuid.uuid4().hex[:12]}"
        self._memory = RankMemory(name, tensors, mode, may_be_empty=world_size > 1)
        self._side: RankZero | OtherRank
        if rank == 0:
            group = Group(
                name,
                world_size=world_size,
                slots=self._memory.slots,
                in_place=mode == "in_place",
                ready_seconds=ready_seconds,
            )
            endpoint = WeightsEndpoint(namespace, component, name, group)
            self._side = RankZero(own_store, endpoint)
        else:
            self._side = OtherRank(own_store, rank, name)
        #: Slots and copies are of one publication at a time.
        self._publishing = threading.Lock()
        self._published = 0
        self._in_slot: dict[int, PublishedVersion] = {}
        self._due: queue.SimpleQueue[PublishedVersion | None] = queue.SimpleQueue()
        self._closing = False
        self._stopped = threading.Event()
        self._start()

    @property
    def manifest(self) -> Manifest | None:
        """Every rank's tensors, on rank 0; it changes when a rank is restarted."""
        if not isinstance(self._side, RankZero) or self._side.group.merged is None:
            return None
        return self._side.group.merged.manifest

    @property
    def counters(self) -> PublisherCounters:
        """What was built and sent since this publisher was made."""
        zero = self._side if isinstance(self._side, RankZero) else None
        return PublisherCounters(
            registrations=self._memory.registrations,
            fingerprint_batches=self._memory.batches,
            manifests_built=zero.endpoint.manifests_built if zero else 0,
            manifests_sent=zero.endpoint.manifests_sent if zero else 0,
            published=self._published,
        )

    def publish(
        self, version: int, *, in_flight: InFlightPolicy | None = None
    ) -> PublishedVersion:
        """Make the tensors as they are now readable as ``version``.

        Blocks for the copy only (``snapshot``), never for a reader or another rank's
        trainer; a rank other than 0 asks rank 0's publisher for the buffer, which takes
        some 10 ms. A thread that publishes meanwhile waits for it. The version is
        announced when it is fingerprinted and every rank has written.

        Args:
            version: an integer from 0 to 2**63 - 1, higher than what was served before.
            in_flight: overrides the coordinator's in-flight policy (rank 0's counts).

        Raises:
            LeaseHeld: the buffer that is due is still being read: wait for the
                handle of the version before the last.
            SourceLost: rank 0, or the store over which it is asked, does not answer;
                or the publisher is closed.
            ManifestInvalid: a tensor is not what it was when the publisher was made.
            TypeError, ValueError: ``version`` is no such number, or ``in_flight`` no
                policy.
        """
        version = version_number(version)
        check_in_flight(in_flight)
        with self._publishing:
            if self._closing:
                raise SourceLost("this publisher is closed")
            self._published += 1
            published = self._side.take(version, in_flight, current_traceparent())
            self._in_slot[published.slot] = published
            try:
                self._memory.write(published.slot)
            except Exception as error:
                self._give_up(published, error)
                raise
            self._due.put(published)
            return published

    def close(self) -> None:
        """Stop serving and give the registration back. Open handles get an error.

        Rank 0 waits for a moment until the others know how their versions ended.
        """
        self._closing = True
        self._due.put(None)
        self._side.close()
        self._stopped.set()
        for thread in self._threads:
            thread.join(START_SECONDS)
        self._memory.close()

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- set-up ---------------------------------------------------------------

    def _start(self) -> None:
        """Start the threads; returns when all ranks have joined."""
        runs = {"refit-nixl": self._progress, "refit-fingerprint": self._fingerprint}
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in runs.items()
        ]
        for thread in self._threads:
            thread.start()
        try:
            self._side.start(self._memory.part(self.model, self.world_size))
            deadline = time.monotonic() + START_SECONDS
            while missing := self._side.missing():
                if time.monotonic() > deadline:
                    raise SourceLost(
                        f"trainer ranks {list(missing)} of {self.world_size} have not "
                        f"joined within {START_SECONDS:g} s: all ranks make their "
                        "publishers at the same time"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.close()
            raise

    def _progress(self) -> None:
        while not self._stopped.wait(PROGRESS_SECONDS):
            self._memory.progress()

    # --- the fingerprints' thread ---------------------------------------------

    def _fingerprint(self) -> None:
        """Report each version that was written, in turn, with its fingerprints."""
        while (published := self._due.get()) is not None:
            # Its bytes are another version's by now, and rank 0 knows it.
            if self._closing or self._in_slot[published.slot] is not published:
                continue
            try:
                folded = self._memory.fold(published.slot)
            # A thread's outermost line: the cause goes to every rank's handle.
            except Exception as error:
                logger.exception("version %d: no fingerprints", published.version)
                self._give_up(published, error)
                continue
            encoded = folded.astype("<u8").tobytes()
            self._side.report(Report(published.announcement_id, encoded))

    def _give_up(self, published: PublishedVersion, error: Exception) -> None:
        failure = failure_from(
            error, stage="publish", rank=self.rank, version=published.version
        )
        self._side.report(Report(published.announcement_id, failure=failure))
