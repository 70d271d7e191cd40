# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Refits of one vLLM replica on one host's GPUs, as its clients see them.

    PYTHONPATH=SITE:components/src:. python3 -m tests.benchmarks.gpu

Needs a CUDA machine with vLLM, NIXL and ModelExpress; no Dynamo. A dense model of a
Qwen3's shape with random weights and CUDA graphs decodes for many streams while a
trainer in other processes offers two versions in turn. The stall is the longest gap
between two tokens of any stream that touches the commit. Beside it: the same cycle
with everything built anew, and the one that transfers inside the pause. With
``--from-disk`` the engine loads the first version from a checkpoint, and its answers
are what a refit back to it must give. Prints a table, then one line of JSON.

A trainer is a list of devices, one per rank, such as ``cuda:1,cuda:1`` or ``cpu``, and
``/in_place`` if its tensors are read where they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.protocol import InFlightPolicy
from dynamo.refit.worker.engine_process import mark_changes
from tests.benchmarks.gpu.measure import (
    built,
    check_tokens,
    golden,
    measure,
    memory,
    stage,
    worst,
)
from tests.benchmarks.gpu.model import CONFIGS
from tests.benchmarks.gpu.report import print_table
from tests.benchmarks.gpu.source import Publishers
from tests.benchmarks.gpu.streams import Streams, greedy
from tests.support.replica import Replica

#: Refits from a source that is slow.
FEW = 5


@dataclass(frozen=True)
class Trainer:
    """As on the command line."""

    devices: tuple[str, ...]
    mode: str

    @classmethod
    def parse(cls, text: str) -> Trainer:
        devices, _, mode = text.partition("/")
        return cls(tuple(devices.split(",")), mode or "snapshot")

    @property
    def name(self) -> str:
        suffix = "" if self.mode == "snapshot" else f" {self.mode}"
        return ",".join(self.devices) + suffix

    @property
    def slow(self) -> bool:
        return "cpu" in self.devices


class Bench:
    """An engine, the refits of it, and what was measured.

    Args:
        options: see :func:`main`.
        directory: has the model's config, and perhaps its weights.
    """

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options = options
        self._directory = directory
        self.config = {**CONFIGS[options.model], "num_hidden_layers": options.layers}
        (directory / "config.json").write_text(json.dumps(self.config))
        self.results: dict[str, Any] = {
            "device": torch.cuda.get_device_name(0),
            "gpus": torch.cuda.device_count(),
            "model": options.model,
            "tensor_parallel": options.tensor_parallel,
            "trainers": {},
            "runs": [],
        }

    async def run(self) -> None:
        trainers = [Trainer.parse(text) for text in self._options.trainers]
        # Closed early if all goes well, for its memory: see _measure_trainers.
        with contextlib.closing(self._publish(trainers[0], first=True)) as first:
            if self._options.reader and first.offers[0].handle is not None:
                self.results["figures"] = figures(first, self._options.reader)
                print(json.dumps(self.results["figures"]), flush=True)
            await self._measure_trainers(trainers, first)

    async def _measure_trainers(
        self, trainers: list[Trainer], first: Publishers
    ) -> None:
        """One after the other, since there is no room for two; closes ``first``."""
        llm = self._start_engine()
        try:
            fresh = (await greedy(llm))[0] if self._options.from_disk else None
            replica = Replica(llm, staging=self._options.staging)
            await replica.agent.start()
            await llm.collective_rpc("watch_gc")
            for number, trainer in enumerate(trainers):
                published = self._publish(trainer) if number else first
                with contextlib.closing(published):
                    await self._measure_trainer(replica, trainer, published, fresh)
        finally:
            llm.shutdown()

    def _publish(self, trainer: Trainer, *, first: bool = False) -> Publishers:
        return Publishers(
            self.config,
            trainer.devices,
            mode=trainer.mode,
            directory=self._directory if first and self._options.from_disk else None,
            lend=first,
        )

    def _start_engine(self) -> AsyncLLM:
        options = self._options
        began = time.perf_counter()
        mark_changes()
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(self._directory),
                skip_tokenizer_init=True,
                load_format="auto" if options.from_disk else "dummy",
                quantization=options.quantization,
                dtype="bfloat16",
                max_model_len=8192,
                # One more than streams, for the probe.
                max_num_seqs=max(options.streams) + 1,
                tensor_parallel_size=options.tensor_parallel,
                gpu_memory_utilization=options.memory,
                worker_extension_cls="tests.benchmarks.gpu.extension.Extension",
            )
        )
        self.results["engine_start_s"] = time.perf_counter() - began
        # As vLLM's own server does: what is there by now is not looked through again.
        gc.collect()
        gc.freeze()
        return llm

    async def _measure_trainer(
        self,
        replica: Replica,
        trainer: Trainer,
        published: Publishers,
        fresh: list[int] | None,
    ) -> None:
        options = self._options
        self.results["nbytes"] = published.manifest.nbytes
        votes = await stage(replica, published, 0)
        await replica.commit()
        before = await check_tokens(replica, published, fresh)
        about: dict[str, Any] = {
            "register_ms": [offer.register_ms for offer in published.offers],
            "fold_gb_per_s": [offer.fold_gb_per_s for offer in published.offers],
            "cold": worst(votes),
            "cold_built": built(votes),
            "memory_before": memory(),
            "tokens": before,
        }
        # The first trainer with all, the others with what is different with them.
        full = not self.results["trainers"] and not trainer.slow
        for number, count in enumerate(
            options.streams if full else options.streams[:1]
        ):
            # Recomputing the context of all streams takes seconds when they are many.
            policies = options.policies if full and not number else ["continue"]
            await self._measure_streams(replica, trainer, published, count, policies)
        about["memory_after"] = memory()
        about["gc_pauses"] = await replica.llm.collective_rpc("gc_pauses")
        after = await check_tokens(replica, published, fresh)
        about["tokens_after"] = after | {"same_as_before": after == before}
        if options.golden and not trainer.slow:
            about["golden"] = [
                await golden(replica, published, self.config, slot)
                for slot in range(published.manifest.slots)
            ]
        self.results["trainers"][trainer.name] = about
        print(trainer.name, json.dumps(about), flush=True)

    async def _measure_streams(
        self,
        replica: Replica,
        trainer: Trainer,
        published: Publishers,
        count: int,
        policies: list[InFlightPolicy],
    ) -> None:
        options = self._options
        full = policies == options.policies
        refits = FEW if trainer.slow else options.refits
        for policy in policies:
            await self._note(policy, replica, published, trainer, count, refits, policy)
        if options.uncached and full:
            name = "continue, uncached"
            await self._note(name, replica, published, trainer, count, 3, forget=True)

    async def _note(
        self,
        cycle: str,
        replica: Replica,
        published: Publishers,
        trainer: Trainer,
        count: int,
        refits: int,
        policy: InFlightPolicy = "continue",
        *,
        forget: bool = False,
    ) -> None:
        """Measure with streams of its own, which all have about as much context."""
        streams = Streams(replica.llm, count)
        await streams.start()
        run = await measure(replica, published, streams, refits, policy, forget=forget)
        await streams.stop()
        run |= {"trainer": trainer.name, "cycle": cycle}
        self.results["runs"].append(run)
        print(json.dumps(run), flush=True)


def figures(published: Publishers, reader: str) -> dict:
    """:mod:`tests.benchmarks.gpu.figures`, and what UCX says it reads with."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.gpu.figures", reader],
        input=pickle.dumps(published.offers[0]),
        stdout=subprocess.PIPE,
        env={**os.environ, "UCX_PROTO_INFO": "y"},
        check=True,
        timeout=300,
    )
    lines = done.stdout.decode(errors="replace").splitlines()
    reads = [line.strip() for line in lines if "cuda_ipc" in line or "get" in line]
    # UCX writes on the same output, to the end.
    (found,) = [line for line in lines if line.startswith("{")]
    return {**json.loads(found), "ucx": sorted(set(reads))[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(CONFIGS), default="4b")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--trainers", nargs="+", default=["cuda:0", "cpu"])
    parser.add_argument(
        "--reader", default="cuda:0", help="for the figures; '' is none"
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--policies", nargs="+", default=["continue", "recompute"])
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--memory", type=float, default=0.55)
    parser.add_argument("--staging", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--uncached", action="store_true")
    parser.add_argument("--golden", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name))
        asyncio.run(bench.run())
    print_table(bench.results)
    print(json.dumps(bench.results))


if __name__ == "__main__":
    main()
