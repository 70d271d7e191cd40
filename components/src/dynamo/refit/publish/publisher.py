# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The trainer's side: make versions readable, announce them, know when they are free.

    publisher = WeightPublisher("my-model", dict(model.named_parameters()))
    handle = publisher.publish(version=step)
    handle.wait()                       # or: await handle.released()

With FSDP2 (or any DTensors) every rank does the same, under ``torchrun --rdzv-id JOB``
or with a ``group`` that is new for every start of the job:

    fully_shard(model)
    publisher = WeightPublisher(
        "my-model", dict(model.named_parameters()),
        rank=dist.get_rank(), world_size=dist.get_world_size(),
    )
    handle = publisher.publish(version=step)    # on every rank; blocks for the copy
    handle.wait()                               # ends alike on every rank

Nothing is gathered: each rank registers its own shards, and a version is announced
when all of them are written. The ranks talk over Dynamo, not over torch.distributed.

The publisher owns the NIXL registration of the weights, the manifest, the
fingerprints and the leases; it knows nothing about workers. It runs on threads of its
own, so a trainer that computes for seconds still answers: an event loop with the
Dynamo runtime, one that lets UCX answer readers that connect, and one that
fingerprints what was written.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import queue
import threading
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import uvloop
from dynamo.runtime import DistributedRuntime

from dynamo.refit.errors import SourceLost, failure_from
from dynamo.refit.manifest import Manifest
from dynamo.refit.protocol import (
    AwaitGroup,
    AwaitRelease,
    GroupReply,
    GroupRequest,
    InFlightPolicy,
    Join,
    TakeSlot,
    Waiting,
    WriteFailed,
    Written,
)
from dynamo.refit.publish.follower import Follower
from dynamo.refit.publish.group import Group
from dynamo.refit.publish.handle import PublishedVersion, Release
from dynamo.refit.publish.lead import Lead
from dynamo.refit.publish.memory import Mode, RankMemory
from dynamo.refit.publish.settings import (
    check_in_flight,
    check_settings,
    group_of_environment,
    version_number,
)
from dynamo.refit.publish.shard import LocalShard
from dynamo.refit.rpc import runtime_from_environment
from dynamo.refit.tracing import current_traceparent

logger = logging.getLogger(__name__)

#: UCX answers a connecting reader only when this process polls.
PROGRESS_SECONDS = 0.002

#: How long each of these may take: to serve, to find the other ranks, to stop.
START_SECONDS = 60.0

#: How long rank 0 is asked to wait before it says that nothing has changed.
WAIT_SECONDS = 5.0


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
        rank: this rank's number; rank 0 serves workers and the other ranks.
        world_size: how many ranks publish.
        group: what all ranks of this start of the job, and no others, call it.
            Default: ``TORCHELASTIC_RUN_ID``, if torchrun was given an id.
        ready_seconds: how long after the first rank the last one may write a version
            (rank 0's counts); after that its handles end with SourceLost.

    The discovery backend and the planes come from Dynamo's environment
    (``DYN_DISCOVERY_BACKEND``, ``DYN_REQUEST_PLANE``, ``DYN_EVENT_PLANE``, ...).

    Raises:
        ValueError: an argument is not allowed; says what is.
        ManifestInvalid: the tensors cannot be published as they are, or the ranks'
            tensors do not fit together or are too many blocks; on every rank.
        SourceLost: not all ranks have come within :data:`START_SECONDS`.
        GroupUnnamed: there are several ranks and no ``group``.
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
        group: str | None = None,
        ready_seconds: float = 300.0,
    ) -> None:
        self.model = model
        self.rank = rank
        self.world_size = world_size
        self._namespace = namespace or os.environ.get("DYN_NAMESPACE", "dynamo")
        check_settings(
            model=model,
            mode=mode,
            namespace=self._namespace,
            component=component,
            rank=rank,
            world_size=world_size,
            ready_seconds=ready_seconds,
        )
        self._component = component
        self._mode = mode
        self._ready_seconds = ready_seconds
        self._name = f"{component}-{rank}-{uuid.uuid4().hex[:12]}"
        self._group = group or group_of_environment(world_size, self._name)
        self._memory = RankMemory(
            self._name, tensors, mode, may_be_empty=world_size > 1
        )
        #: Turns, slots and copies are of one publication at a time.
        self._publishing = threading.Lock()
        self._turn = 0
        self._in_slot: dict[int, PublishedVersion] = {}
        self._open: set[PublishedVersion] = set()
        self._due: queue.SimpleQueue[PublishedVersion | None] = queue.SimpleQueue()
        self._closing = False
        self._stopped = threading.Event()
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._start()

    @property
    def manifest(self) -> Manifest | None:
        """Every rank's tensors, on rank 0; it changes when a rank is restarted."""
        merged = self._seat.group.merged if isinstance(self._seat, Lead) else None
        return merged.manifest if merged is not None else None

    @property
    def counters(self) -> PublisherCounters:
        """What was built and sent since this publisher was made."""
        lead = self._seat if isinstance(self._seat, Lead) else None
        return PublisherCounters(
            registrations=self._memory.registrations,
            fingerprint_batches=self._memory.batches,
            manifests_built=lead.manifests_built if lead else 0,
            manifests_sent=lead.manifests_sent if lead else 0,
            published=self._turn,
        )

    def publish(
        self, version: int, *, in_flight: InFlightPolicy | None = None
    ) -> PublishedVersion:
        """Make the tensors as they are now readable as ``version``.

        Blocks for the copy only (``snapshot``), never for a reader or another rank; a
        thread that publishes meanwhile waits for it. The version is announced when it
        is fingerprinted and every rank has written.

        Args:
            version: an integer from 0 to 2**63 - 1, higher than what was served before.
            in_flight: overrides the coordinator's in-flight policy (rank 0's counts).

        Raises:
            LeaseHeld: the buffer that is due is still being read: wait for the
                handle of the version before the last.
            SourceLost: rank 0 does not answer, or the publisher is closed.
            ManifestInvalid: a tensor is not what it was when the publisher was made.
            TypeError, ValueError: ``version`` is no such number, or ``in_flight`` no
                policy.
        """
        version = version_number(version)
        check_in_flight(in_flight)
        with self._publishing:
            self._turn += 1
            taken = self._ask(
                TakeSlot(
                    member=self._name,
                    turn=self._turn,
                    version=version,
                    in_flight=in_flight,
                    traceparent=current_traceparent(),
                )
            )
            published = PublishedVersion(version, taken.announcement_id, taken.slot)
            self._in_slot[taken.slot] = published
            self._open.add(published)
            self._on_loop(self._follow(published))
            try:
                self._memory.write(taken.slot)
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
        # The loop may have ended by itself.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel)
        self._threads[0].join(2 * START_SECONDS)
        self._stopped.set()
        for thread in self._threads[1:]:
            thread.join(START_SECONDS)
        self._memory.close()

    def __enter__(self) -> WeightPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- set-up ---------------------------------------------------------------

    def _start(self) -> None:
        """Start the threads; returns when all ranks have joined."""
        self._loop = uvloop.new_event_loop()
        runs = {
            "refit-publisher": self._serve,
            "refit-nixl": self._progress,
            "refit-fingerprint": self._fingerprint,
        }
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in runs.items()
        ]
        self._seat = self._main_task = None
        for thread in self._threads:
            thread.start()
        try:
            self._started.result(3 * START_SECONDS)
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
            written = Written(
                member=self._name,
                announcement_id=published.announcement_id,
                fingerprints=folded.astype("<u8").tobytes(),
            )
            self._report(published, written)

    def _give_up(self, published: PublishedVersion, error: Exception) -> None:
        failure = failure_from(
            error, stage="publish", rank=self.rank, version=published.version
        )
        failed = WriteFailed(
            member=self._name,
            announcement_id=published.announcement_id,
            failure=failure,
        )
        self._report(published, failed)

    def _report(
        self, published: PublishedVersion, report: Written | WriteFailed
    ) -> None:
        """Tell rank 0, without waiting for it."""
        try:
            self._on_loop(self._tell(published, report))
        except SourceLost as error:
            published.end(error)

    # --- the event loop's side ------------------------------------------------

    def _on_loop(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise SourceLost("this publisher is closed") from error

    def _cancel(self) -> None:
        if self._main_task is not None:
            self._main_task.cancel()

    def _ask(self, request: GroupRequest) -> GroupReply:
        try:
            return self._on_loop(self._seat.ask(request)).result(START_SECONDS)
        except concurrent.futures.CancelledError as error:
            raise SourceLost("this publisher is closed") from error

    def _serve(self) -> None:
        """The loop's thread. However it ends, nobody waits for it any longer."""
        cause: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            cause = error
        if not self._started.done():
            self._started.set_exception(cause)
        elif not isinstance(cause, asyncio.CancelledError):
            logger.error("the publisher's event loop ended", exc_info=cause)
        closed = SourceLost("the publisher was closed before the release")
        for published in list(self._open):
            published.end(closed)

    async def _main(self) -> None:
        self._main_task = asyncio.current_task()
        if self._closing:
            raise asyncio.CancelledError
        self._seat = self._take_seat(runtime_from_environment())
        try:
            await self._seat.start()
            await self._join()
            self._started.set_result(None)
            await self._seat.run()
        finally:
            await self._seat.stop()

    def _take_seat(self, runtime: DistributedRuntime) -> Lead | Follower:
        if self.rank > 0:
            path = f"{self._namespace}.{self._component}.weights"
            return Follower(runtime, path, self._name)
        group = Group(
            self._group,
            self._name,
            world_size=self.world_size,
            slots=self._memory.slots,
            in_place=self._mode == "in_place",
            ready_seconds=self._ready_seconds,
        )
        return Lead(runtime, self._namespace, self._component, self._name, group)

    async def _join(self) -> None:
        """Join, and wait until the other ranks have."""
        request = Join(
            group=self._group,
            member=self._name,
            rank=self.rank,
            world_size=self.world_size,
            part=msgspec.msgpack.encode(self._memory.part(self.model)),
        )
        await self._seat.join(request, START_SECONDS)
        deadline = self._loop.time() + START_SECONDS
        waiting = AwaitGroup(member=self._name, seconds=WAIT_SECONDS)
        while missing := (await self._seat.ask(waiting)).missing:
            if self._loop.time() > deadline:
                raise SourceLost(
                    f"trainer ranks {list(missing)} of {self.world_size} have not "
                    f"joined {self._group!r} within {START_SECONDS:g} s"
                )

    async def _tell(
        self, published: PublishedVersion, report: Written | WriteFailed
    ) -> None:
        try:
            await self._seat.ask(report)
        # A task's outermost line: the handle must not wait for what is lost.
        except Exception as error:
            published.end(error)

    async def _follow(self, published: PublishedVersion) -> None:
        """End the handle when rank 0 says so, or is gone."""
        waiting = AwaitRelease(
            member=self._name,
            announcement_id=published.announcement_id,
            seconds=WAIT_SECONDS,
        )
        try:
            while isinstance(reply := await self._seat.ask(waiting), Waiting):
                pass
            published.end(Release(reply.outcome, reply.detail))
        # A task's outermost line: a handle never hangs.
        except Exception as error:
            published.end(error)
        self._open.discard(published)
