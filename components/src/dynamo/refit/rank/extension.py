# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The class that vLLM mixes into its worker: one method, called on every rank.

At TP >= 2 a worker method that raises leaves vLLM's answer queues out of step
for good, and one that takes long stops decoding. So the method catches at its
outermost line and answers with a typed failure, long work runs on a thread and
is polled, and every answer carries the number of the call it belongs to.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.logger import init_logger

from dynamo.refit.errors import (
    Failure,
    InstallUndone,
    NothingStaged,
    RefitError,
    failure_from,
)
from dynamo.refit.manifest import CheckedManifest, check_manifest
from dynamo.refit.protocol import (
    Describe,
    Described,
    Discard,
    Done,
    Install,
    Installed,
    Offer,
    Poll,
    RankAnswer,
    RankCall,
    RankReply,
    RankRequest,
    Refused,
    Reserve,
    Restore,
    Running,
    Stage,
    Verified,
    Verify,
    Withdraw,
)
from dynamo.refit.rank.cpu_layout import keep_plain_layout
from dynamo.refit.rank.cycle import Limit
from dynamo.refit.rank.handover import Handover
from dynamo.refit.rank.reserve import leave_room_for_staging, runtime_form
from dynamo.refit.rank.stager import RankStager
from dynamo.refit.rank.supported import check_settings, settings_of_config

logger = init_logger("vllm.dynamo_refit")

# vLLM imports this module in every worker process before it loads the model; it
# is the only moment at which an extension can have a say in the layout, and in what
# memory the KV cache takes.
keep_plain_layout()
leave_room_for_staging()


def check_supported(config: VllmConfig) -> None:
    """Refuse what a refit would get wrong.

    Raises:
        UnsupportedConfiguration: names the setting.
    """
    check_settings(settings_of_config(config))


class RefitRank:
    """Carries out the requests of one rank.

    Args:
        worker: vLLM's worker object, with ``model_runner`` and ``vllm_config``.
    """

    #: What does the work.
    stager_class = RankStager

    def __init__(self, worker: object) -> None:
        check_supported(worker.vllm_config)
        self.rank = get_tensor_model_parallel_rank()
        self._ranks = get_tensor_model_parallel_world_size()
        form = runtime_form(worker)
        self._stager = self.stager_class(form, self.rank, self._ranks)
        #: One at a time: the next one replaces it.
        self._manifest: CheckedManifest | None = None
        self._job: _Job | None = None

    def answer(self, request: RankRequest) -> RankReply:
        """Carry out one request; raises a :class:`RefitError` on a refusal."""
        match request:
            case Describe():
                return self._describe(request)
            case Reserve(staging=staging):
                self._stager.memory.reserve(staging)
                return Done()
            case Stage():
                return self._stage(request)
            case Poll():
                return self._poll(request)
            case Install():
                return self._install(request)
            case Restore(version=version):
                self._require_idle()
                self._stager.restore(version)
                return Installed(rank=self.rank)
            case Verify(version=version):
                return self._start(
                    "verify", version, math.inf, lambda _: self._verify(version)
                )
            case Discard(version=version):
                return self._discard(version)
            # Whatever else is under way: others read while this rank stages.
            case Offer():
                return self._stager.offer(request) or Running()
            case Withdraw(version=version):
                self._stager.withdraw(version)
                return Done()

    def _describe(self, request: Describe) -> RankReply:
        return Described(
            rank=self.rank,
            ranks=self._ranks,
            parameters=self._stager.parameters,
            nbytes=self._stager.memory.nbytes,
            memory=self._stager.memory.plan_memory(request.staging),
            layout=self._stager.layout,
        )

    def _stage(self, request: Stage) -> RankReply:
        self._require_idle()
        if request.payload is None and not self._knows(request.manifest):
            raise RefitError(f"this rank has no manifest {request.manifest[:12]}")

        def stage(limit: Limit) -> RankReply:
            # Not on the thread that runs the model: a large one takes a second.
            if not self._knows(request.manifest):
                self._manifest = check_manifest(request.payload, request.manifest)
            return self._stager.stage(request, self._manifest, limit)

        return self._start("stage", request.version, request.seconds, stage)

    def _knows(self, digest: str) -> bool:
        return self._manifest is not None and self._manifest.digest == digest

    def _install(self, request: Install) -> RankReply:
        version = request.version
        if request.in_step:
            return self._install_in_step(version)
        self._require_idle()
        self._stager.install(version)
        return Installed(rank=self.rank)

    def _install_in_step(self, version: int) -> RankReply:
        """Install between two steps: no step may see some ranks new and others old.

        Every rank takes part in each agreement, whatever happened to it.
        """
        failure = _failure_of(self._check_install, version)
        if not self._all_ranks(failure is None):
            # Nobody has written anything.
            raise failure or InstallUndone(f"another rank cannot install {version}")
        failure = _failure_of(self._stager.install, version)
        if self._all_ranks(failure is None):
            return Installed(rank=self.rank)
        stuck = _failure_of(self._stager.restore, version)
        if not self._all_ranks(stuck is None):
            # The next step would run on a mixture: there must be none.
            _end_process()
        raise failure or InstallUndone(f"another rank failed to install {version}")

    def _check_install(self, version: int) -> None:
        self._require_idle()
        self._stager.check(version)

    def _all_ranks(self, mine: bool) -> bool:
        """Whether ``mine`` is true on every rank; blocks until all have said."""
        flag = torch.tensor([mine], dtype=torch.int32)
        if self._ranks > 1:
            group = get_tp_group().cpu_group
            try:
                torch.distributed.all_reduce(
                    flag, torch.distributed.ReduceOp.MIN, group
                )
            except Exception:
                # What the others have now, nobody here knows.
                logger.exception("dynamo-refit: the ranks cannot agree")
                _end_process()
        return bool(flag.item())

    def _verify(self, version: int) -> RankReply:
        return Verified(rank=self.rank, copy_ms=self._stager.verify(version))

    def _start(
        self,
        doing: str,
        version: int,
        seconds: float,
        work: Callable[[Limit], RankReply],
    ) -> RankReply:
        self._require_idle()
        self._job = _Job(doing, version, self.rank, seconds, work)
        return Running()

    def _poll(self, request: Poll) -> RankReply:
        job = self._job
        if job is None or job.version != request.version:
            raise NothingStaged(
                f"nothing was started for version {request.version} here"
            )
        handover = self._stager.handover
        if job.running and handover is not None and request.convert:
            handover.run(request.convert)
        return job.reply or job.so_far(handover)

    def _discard(self, version: int) -> RankReply:
        job = self._job
        if job is not None and job.version == version:
            if job.running:
                job.cancel()
                return Running()
            self._job = None
            self._stager.discard()
        return Done()

    def _require_idle(self) -> None:
        if self._job is not None and self._job.running:
            raise RefitError(f"version {self._job.version} is still being worked on")


class _Job:
    """Work on its own thread; ``reply`` is set when it has ended."""

    def __init__(
        self,
        doing: str,
        version: int,
        rank: int,
        seconds: float,
        work: Callable[[Limit], RankReply],
    ) -> None:
        self.version = version
        self._doing = doing
        self.reply: RankReply | None = None
        self._rank = rank
        self._cancelled = threading.Event()
        self._limit = Limit(time.monotonic() + seconds, self._cancelled.is_set)
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=f"refit-{doing}-{version}", daemon=True
        )
        self._thread.start()

    @property
    def running(self) -> bool:
        return self.reply is None

    def so_far(self, handover: Handover | None) -> Running:
        progress = self._limit.progress
        reply = Running(nbytes=progress.nbytes, total_nbytes=progress.total_nbytes)
        if handover is None:
            return reply
        return msgspec.structs.replace(
            reply,
            conversions=handover.total,
            ready=handover.ready,
            converted=handover.done,
            convert_ms=handover.ms,
        )

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(self, work: Callable[[Limit], RankReply]) -> None:
        try:
            self.reply = work(self._limit)
        except Exception as error:
            logger.exception(
                "dynamo-refit: %s of version %d failed", self._doing, self.version
            )
            failure = failure_from(
                error, stage=self._doing, rank=self._rank, version=self.version
            )
            self.reply = Refused(failure=failure)


def _end_process() -> NoReturn:
    """vLLM ends the engine when a rank is gone, so nothing more is generated."""
    logger.critical("dynamo-refit: weights unknown, ending this process")
    os._exit(1)


def _failure_of(work: Callable[..., object], *arguments: object) -> Exception | None:
    try:
        work(*arguments)
    except Exception as error:
        logger.exception("dynamo-refit: an install between two steps failed")
        return error
    return None


class RefitWorkerExtension:
    """Mixed into vLLM's worker by ``--worker-extension-cls``."""

    #: What carries out the requests.
    refit_rank_class = RefitRank

    def refit_call(self, payload: bytes) -> bytes:
        """Answer an encoded :class:`RankCall` with an encoded :class:`RankAnswer`.

        Never raises and never takes long; see the module.
        """
        call, request = -1, None
        try:
            decoded = msgspec.msgpack.decode(payload, type=RankCall)
            call, request = decoded.call, decoded.request
            reply = self._refit_rank().answer(request)
        except Exception as error:
            logger.exception("dynamo-refit: %s failed", type(request).__name__)
            reply = Refused(failure=self._failure(request, error))
        return msgspec.msgpack.encode(RankAnswer(call, reply))

    def _refit_rank(self) -> RefitRank:
        if not hasattr(self, "_refit"):
            self._refit = self.refit_rank_class(self)
        return self._refit

    def _failure(self, request: RankRequest | None, error: Exception) -> Failure:
        return failure_from(
            error,
            stage=type(request).__name__.lower(),
            rank=get_tensor_model_parallel_rank(),
            version=getattr(request, "version", None),
        )
