# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""One running engine, refitted by the agent and then by the stock way: what
``dynamo.vllm`` does for ``pause_generation``, ``update_weights_from_disk`` and
``resume_generation``. Both as the engine's stall and as its clients see it.

    python -m tests.benchmarks.engine PIPE

A ``__main__`` of its own, since vLLM spawns its processes, and spawned processes import
every other kind of main module with all that it imports.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.worker.engine_process import mark_changes
from tests.benchmarks.gpu.streams import Streams, spread
from tests.benchmarks.shapes import tensors, write_config
from tests.benchmarks.sources import Held, Sources, fill
from tests.support.child import answer_requests
from tests.support.replica import Replica

#: Before and after an update, so that its longest gap is its own.
QUIET_SECONDS = 0.5

#: For the first tokens of all streams.
START_SECONDS = 60.0

#: Of a stream's request; another one follows it.
MAX_TOKENS = 1000


class SmallStreams(Streams):
    """Requests without end, with a prompt that fits a small vocabulary."""

    async def start(self) -> None:
        async with asyncio.timeout(START_SECONDS):
            await super().start()

    async def _run(self, times: list[float]) -> None:
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False
        )
        while not self._stopping:
            prompt = {"prompt_token_ids": [5, 6, 7, len(times) % 100 + 10]}
            request = f"s{id(times)}-{time.time()}"
            async for _ in self._llm.generate(prompt, params, request):
                times.append(time.time())
                if self._stopping:
                    break


class EngineProcess:
    """The inside of the engine's process."""

    def measure(self, config: dict, updates: int, streams: int) -> dict:
        """``updates`` of either kind; milliseconds.

        ``gap`` is the longest between two tokens of any of ``streams`` requests over an
        update, for the agent from the beginning of its stage.
        """
        with tempfile.TemporaryDirectory(prefix="refit-bench-") as directory:
            model = write_config(config, Path(directory, "model"))
            write_checkpoint(config, model)
            with Sources(1, Path(directory)) as sources:
                held = sources.hold(tensors(config))
                return asyncio.run(measure(model, held, updates, streams))


def write_checkpoint(config: dict, model: Path) -> None:
    weights = {}
    for name, shape in tensors(config):
        weights[name] = torch.empty(shape, dtype=torch.bfloat16)
        fill(weights[name].view(-1).view(torch.uint8))
    save_file(weights, model / "model.safetensors")
    index = {name: "model.safetensors" for name in weights}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )


async def measure(model: Path, held: Held, updates: int, streams: int) -> dict:
    mark_changes()
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="bfloat16",
            block_size=32,
            max_model_len=2048,
            # One more, for the probe.
            max_num_seqs=streams + 1,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=256 << 20,
            worker_extension_cls="dynamo.refit.rank.extension.RefitWorkerExtension",
        )
    )
    try:
        replica = Replica(llm)
        await replica.agent.start()
        await replica.refit(held.manifest, 0, held.fingerprints)
        running = SmallStreams(llm, streams)
        await running.start()
        began = time.time()
        await asyncio.sleep(4 * QUIET_SECONDS)
        quiet = {
            "gap_ms": running.median_gap_ms(began, time.time()),
            "longest_gap_ms": running.longest_gap_ms(began, time.time()),
        }
        rows: dict[str, list[float]] = {}

        def note(name: str, milliseconds: float) -> None:
            rows.setdefault(name, []).append(milliseconds)

        for _ in range(updates):
            began = time.time()
            await replica.stage(held.manifest, 0, held.fingerprints)
            staged = time.time()
            committed = await replica.commit()
            await asyncio.sleep(QUIET_SECONDS)
            until = time.time()
            note("refit_stall_ms", committed.timings.stall_ms)
            note("refit_install_ms", committed.timings.install_ms)
            note("refit_commit_gap_ms", running.longest_gap_ms(staged, until))
            note("refit_gap_ms", running.longest_gap_ms(began, until))
        # Not in turns: the stock reload moves tensors, after which a refit is refused.
        # The first one also brings the pages of the checkpoint into memory.
        for number in range(updates + 1):
            began = time.time()
            stall = await update_from_disk(llm, model)
            await asyncio.sleep(QUIET_SECONDS)
            if number > 0:
                note("stock_stall_ms", stall)
                note("stock_gap_ms", running.longest_gap_ms(began, time.time()))
        await running.stop()
        assert not replica.fenced
        return {
            "nbytes": held.manifest.nbytes,
            "streams": streams,
            "updates": updates,
            "quiet": quiet,
            **{name: spread(values) for name, values in rows.items()},
        }
    finally:
        llm.shutdown()


async def update_from_disk(llm: AsyncLLM, model: Path) -> float:
    """Milliseconds from the pause to the end of the resume."""
    began = time.perf_counter()
    await llm.pause_generation(mode="keep", clear_cache=False)
    await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
    await llm.reset_prefix_cache()
    await llm.resume_generation()
    return (time.perf_counter() - began) * 1e3


if __name__ == "__main__":
    answer_requests(int(sys.argv[1]), EngineProcess())
