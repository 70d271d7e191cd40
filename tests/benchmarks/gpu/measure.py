# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One measurement each: cycles under load, the tokens that weights give, the live
parameters beside the golden path, and memory."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import psutil
import torch

from dynamo.refit.protocol import InFlightPolicy, RankVote
from dynamo.refit.rank.cycle import STEPS
from tests.benchmarks.gpu.source import Publishers
from tests.benchmarks.gpu.streams import Span, Streams, greedy, spread, summary
from tests.support.replica import Replica

#: Of a commit, in its timings.
PHASES = "pause_ms install_ms copy_ms resume_ms probe_ms verify_ms".split()

#: After a commit, for what it leaves to do, and then until the next cycle begins.
SETTLE_SECONDS = 0.3
QUIET_SECONDS = 0.3


async def stage(
    replica: Replica, published: Publishers, slot: int
) -> tuple[RankVote, ...]:
    fingerprints = published.fingerprints[slot % published.manifest.slots]
    return await replica.stage(
        published.manifest, slot % published.manifest.slots, fingerprints
    )


async def measure(
    replica: Replica,
    published: Publishers,
    streams: Streams,
    refits: int,
    policy: InFlightPolicy,
    *,
    forget: bool = False,
) -> dict:
    """``refits`` cycles under load; milliseconds, GB/s, tokens per second.

    Each is compared with the quiet time right before it: see :func:`summary`.
    With ``forget`` the ranks drop their sessions and buffers before each.
    """
    await stage(replica, published, 1)
    await replica.commit()
    await streams.go_on(time.time())
    spans, votes, commits = [], [], []
    for cycle in range(refits):
        if forget:
            await replica.llm.collective_rpc("refit_forget")
        await asyncio.sleep(SETTLE_SECONDS)
        quiet = time.time()
        await asyncio.sleep(QUIET_SECONDS)
        began = time.time()
        vote = await stage(replica, published, cycle)
        staged = time.time()
        commit = await replica.commit(policy)
        done = time.time()
        # Streams that are recomputed stand still for longer than the commit takes.
        await streams.go_on(done)
        spans.append(Span(quiet, began, staged, done))
        votes.append(vote)
        commits.append(commit.timings)
    wire = [max(v.timings.wire_ms for v in vote) for vote in votes]
    nbytes = sum(v.nbytes for v in votes[-1])
    return {
        "streams": len(streams.times),
        "policy": policy,
        **summary([streams.see(span) for span in spans]),
        **{
            name: spread([getattr(timings, name) for timings in commits])
            for name in PHASES
        },
        "engine_stall_ms": spread([timings.stall_ms for timings in commits]),
        **{
            f"{step}_ms": spread(
                [max(getattr(v.timings, f"{step}_ms") for v in vote) for vote in votes]
            )
            for step in STEPS
        },
        "skew_ms": spread(
            [
                max(v.timings.pull_ms for v in vote)
                - min(v.timings.pull_ms for v in vote)
                for vote in votes
            ]
        ),
        "wire_nbytes": nbytes,
        "wire_gb_per_s": nbytes / spread(wire)["p50"] / 1e6,
        "built": built([v for vote in votes for v in vote]),
    }


def worst(votes: tuple[RankVote, ...]) -> dict[str, float]:
    """Milliseconds of each step, of the slowest rank."""
    return {
        step: max(getattr(vote.timings, f"{step}_ms") for vote in votes)
        for step in STEPS
    }


def built(votes: list[RankVote] | tuple[RankVote, ...]) -> list[int]:
    """Allocations, registrations and descriptor lists over all ``votes``."""
    counters = [vote.counters for vote in votes]
    names = ("allocations", "registrations", "descriptor_builds")
    return [sum(getattr(c, name) for c in counters) for name in names]


def memory() -> dict[str, list[int]]:
    """Bytes in use: of every GPU by anyone, and resident of this and its children."""
    used = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        used.append(total - free)
    me = psutil.Process()
    resident = [p.memory_info().rss for p in [me, *me.children(recursive=True)]]
    return {"gpu": used, "resident": [sum(resident)]}


async def check_tokens(
    replica: Replica, published: Publishers, fresh: list[int] | None
) -> dict:
    """A, B, A, B: the same weights give the same tokens, and no old block is hit.

    Compared with a cold prefix cache only: kernels differ in the last bits between a
    whole prefill and one that goes on from cached blocks.
    """
    answers, cached = [], []
    for slot in (0, 1, 0, 1):
        await stage(replica, published, slot)
        await replica.commit()
        tokens, first = await greedy(replica.llm)
        _, hot = await greedy(replica.llm)
        answers.append(tokens)
        cached.append((first, hot))
    return {
        "same_weights_same_tokens": answers[0] == answers[2]
        and answers[1] == answers[3],
        "other_weights_other_tokens": answers[0] != answers[1],
        "equal_to_a_fresh_engine": None if fresh is None else answers[2] == fresh,
        "cached_hot": min(hot for _, hot in cached),
        "cached_after_refit": max(first for first, _ in cached),
        "answers": np.concatenate(answers[:2]).tolist(),
    }


async def golden(
    replica: Replica, published: Publishers, config: dict, slot: int
) -> dict:
    """One more refit; then every live parameter of every rank beside what the
    engine's own loader makes of the whole checkpoint."""
    await stage(replica, published, slot)
    await replica.commit()
    compared = await replica.llm.collective_rpc("golden_compare", args=(config, slot))
    return {
        "slot": slot,
        "parameters": [count for count, _ in compared],
        "different": [name for _, names in compared for name in names],
    }
