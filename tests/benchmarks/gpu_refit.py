# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Refits of one vLLM replica on one GPU, as its clients see them.

    PYTHONPATH=SITE:components/src:. python3 -m tests.benchmarks.gpu_refit

Needs a CUDA machine with vLLM, NIXL and ModelExpress; no Dynamo. A dense model of
Qwen3-4B's shape with random weights and CUDA graphs decodes for many streams while
a publisher in a second process offers two versions in turn, from the GPU's memory
or the host's. The stall is the longest gap between two tokens of any stream that
touches the commit. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import torch
from vllm import AsyncEngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.protocol import InFlightPolicy, RankVote
from dynamo.refit.publish.torch_state import SnapshotBuffers, local_shards
from dynamo.refit.transport.nixl import NixlAgent
from tests.support.replica import Replica

QWEN3_4B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}
#: What layers.N and the top level of a Qwen3 checkpoint hold.
LAYER = {
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
    "self_attn.q_proj.weight": ("q", "hidden_size"),
    "self_attn.k_proj.weight": ("kv", "hidden_size"),
    "self_attn.v_proj.weight": ("kv", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "q"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}
PROMPT = [785, 3974, 13876, 38835]


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Checkpoint name to shape."""
    head = config["head_dim"]
    sizes = {
        **config,
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
    }
    found = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.norm.weight": (config["hidden_size"],),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, dims in LAYER.items():
            found[f"model.layers.{layer}.{name}"] = tuple(sizes[d] for d in dims)
    return found


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Random weights of a scale with which the model neither dies nor explodes."""
    device = next(iter(tensors.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    for _name, tensor in tensors.items():
        if tensor.dim() == 1:
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            tensor.normal_(0, 0.02, generator=generator)


def serve_weights(config: dict, device: str, name: str, pipe: Connection) -> None:
    """The publisher process: two versions in two slots, until told to end."""
    tensors = {
        tensor: torch.empty(shape, dtype=torch.bfloat16, device=device)
        for tensor, shape in shapes(config).items()
    }
    buffers = SnapshotBuffers(local_shards(tensors), slots=2)
    for slot in range(2):
        fill(tensors, seed=slot)
        buffers.write(slot)
    tensors.clear()
    agent = NixlAgent(name)
    memory = "VRAM" if device == "cuda" else "DRAM"
    regions = [(r.address, r.nbytes) for slot in buffers.regions for r in slot]
    began = time.perf_counter()
    agent.register(regions, memory, 0)
    took = time.perf_counter() - began
    source = Source(
        agent=name,
        metadata=agent.metadata(),
        memory=memory,
        device=0,
        slots=buffers.regions,
    )
    manifest = Manifest(
        model="model", tensors=tuple(buffers.entries), sources=(source,)
    )
    pipe.send((msgspec.msgpack.encode(manifest), took))
    while not pipe.poll(0.002):
        agent.progress()


class Streams:
    """Requests that decode without end; token times by stream, Unix seconds."""

    def __init__(self, llm: AsyncLLM, count: int) -> None:
        self._llm = llm
        self.times: list[list[float]] = [[] for _ in range(count)]
        self._tasks: list[asyncio.Task] = []
        self._stopping = False

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(t)) for t in self.times]
        while not all(len(times) > 20 for times in self.times):
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    def tokens(self, since: float, until: float) -> int:
        return sum(since < t < until for times in self.times for t in times)

    def longest_gap_ms(self, since: float, until: float) -> float:
        gaps = [
            later - earlier
            for times in self.times
            for earlier, later in itertools.pairwise(times)
            if later >= since and earlier <= until
        ]
        return max(gaps, default=0.0) * 1e3

    def median_gap_ms(self, since: float, until: float) -> float:
        gaps = [
            later - earlier
            for times in self.times
            for earlier, later in itertools.pairwise(times)
            if since < earlier and later < until
        ]
        return statistics.median(gaps) * 1e3

    async def _run(self, times: list[float]) -> None:
        number = 0
        while not self._stopping:
            params = SamplingParams(
                max_tokens=1000, temperature=1.0, ignore_eos=True, detokenize=False
            )
            request = f"s{id(times)}-{number}-{time.time()}"
            number += 1
            prompt = {"prompt_token_ids": [*PROMPT, len(times) % 1000 + 10]}
            async for _ in self._llm.generate(prompt, params, request):
                times.append(time.time())
                if self._stopping:
                    break


async def greedy(llm: AsyncLLM, tokens: int = 32) -> tuple[list[int], int]:
    """Greedy tokens of a prompt longer than a block, and how many were cached."""
    params = SamplingParams(
        max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
    prompt = {"prompt_token_ids": PROMPT * 20}
    async for output in llm.generate(prompt, params, f"greedy-{time.time()}"):
        last = output
    return list(last.outputs[0].token_ids), last.num_cached_tokens or 0


async def measure(
    replica: Replica,
    manifest: Manifest,
    streams: Streams,
    refits: int,
    policy: InFlightPolicy,
) -> dict:
    """``refits`` warm cycles under load; milliseconds, GB/s, tokens per second."""
    await replica.refit(manifest, 1)
    quiet_from = time.time()
    await asyncio.sleep(2.0)
    quiet_until = time.time()
    undisturbed = streams.tokens(quiet_from, quiet_until) / (quiet_until - quiet_from)
    stalls, votes, commits = [], [], []
    staging_tokens = staging_seconds = 0.0
    for cycle in range(refits):
        began = time.time()
        (vote,) = await replica.stage(manifest, cycle % 2)
        staged = time.time()
        staging_seconds += staged - began
        commit = await replica.commit(policy)
        done = time.time()
        await asyncio.sleep(0.3)
        stalls.append(streams.longest_gap_ms(staged, done))
        staging_tokens += streams.tokens(began, staged)
        votes.append(vote)
        commits.append(commit)
    return {
        "streams": len(streams.times),
        "policy": policy,
        "median_gap_ms": streams.median_gap_ms(quiet_from, quiet_until),
        "quiet_gap_ms_max": streams.longest_gap_ms(quiet_from, quiet_until),
        "stall_ms": spread(stalls),
        "engine_stall_ms": spread([c.timings.stall_ms for c in commits]),
        "pause_ms": spread([c.timings.pause_ms for c in commits]),
        "resume_ms": spread([c.timings.resume_ms for c in commits]),
        "install_ms": spread([c.timings.install_ms for c in commits]),
        "pull_ms": spread([v.timings.pull_ms for v in votes]),
        "backup_ms": spread([v.timings.backup_ms for v in votes]),
        "pull_gb_per_s": votes[-1].nbytes
        / statistics.median(v.timings.pull_ms for v in votes)
        / 1e6,
        "tokens_per_s": undisturbed,
        "tokens_per_s_staging": staging_tokens / staging_seconds,
        "built": built(votes),
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }


def built(votes: list[RankVote]) -> list[int]:
    """Allocations, registrations and descriptor lists over all ``votes``."""
    counters = [vote.counters for vote in votes]
    names = ("allocations", "registrations", "descriptor_builds")
    return [sum(getattr(c, name) for c in counters) for name in names]


async def check_tokens(replica: Replica, manifest: Manifest) -> dict:
    """A, B, A, B: the same weights give the same tokens, and no old block is hit.

    Compared with a cold prefix cache only: kernels differ in the last bits between a
    whole prefill and one that goes on from cached blocks.
    """
    answers, cached = [], []
    for slot in (0, 1, 0, 1):
        await replica.refit(manifest, slot)
        tokens, first = await greedy(replica.llm)
        _, hot = await greedy(replica.llm)
        answers.append(tokens)
        cached.append((first, hot))
    return {
        "same_weights_same_tokens": answers[0] == answers[2]
        and answers[1] == answers[3],
        "other_weights_other_tokens": answers[0] != answers[1],
        "cached_hot": min(hot for _, hot in cached),
        "cached_after_refit": max(first for first, _ in cached),
    }


def plain_copies(nbytes: int) -> dict[str, float]:
    """What this device does at best, GB/s of payload: one large copy."""
    a = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return {"device_copy_gb_per_s": a.numel() / min(times) / 1e9}


async def run(options: argparse.Namespace) -> dict:
    config = {**QWEN3_4B, "num_hidden_layers": options.layers}
    context = multiprocessing.get_context("spawn")
    results: dict = {"device": torch.cuda.get_device_name(0), "runs": []}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config))
        began = time.perf_counter()
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=directory,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype="bfloat16",
                max_model_len=4096,
                max_num_seqs=64,
                gpu_memory_utilization=options.memory,
                worker_extension_cls=(
                    "dynamo.refit.rank.extension.RefitWorkerExtension"
                ),
            )
        )
        results["engine_start_s"] = time.perf_counter() - began
        replica = Replica(llm)
        await replica.agent.start()
        try:
            for device in options.sources:
                here, there = context.Pipe()
                source = context.Process(
                    target=serve_weights,
                    args=(config, device, f"trainer-{device}", there),
                    daemon=True,
                )
                source.start()
                payload, register_s = await asyncio.to_thread(here.recv)
                manifest = msgspec.msgpack.decode(payload, type=Manifest)
                (cold,) = await replica.refit(manifest, 0)
                print(device, "registered in", register_s, "cold", cold, flush=True)
                results["nbytes"] = manifest.nbytes
                results[f"cold_{device}"] = msgspec.to_builtins(cold)
                results[f"tokens_{device}"] = await check_tokens(replica, manifest)
                for count in options.streams:
                    streams = Streams(llm, count)
                    await streams.start()
                    for policy in options.policies:
                        run = await measure(
                            replica, manifest, streams, options.refits, policy
                        )
                        results["runs"].append({"source": device, **run})
                        print(json.dumps(results["runs"][-1]), flush=True)
                    await streams.stop()
                here.send("end")
                source.join(20)
                source.kill()
        finally:
            llm.shutdown()
    results.update(plain_copies(4 << 30))
    return results


def print_table(results: dict) -> None:
    print(f"\n{results['device']}, {results['nbytes'] / 1e9:.2f} GB per version")
    heads = ("source", "streams", "policy", "m", "stall p50/p95/max", "install", "pull")
    print("{:7} {:>7} {:10} {:>6} {:>22} {:>8} {:>8} {:>7} {:>13}".format(
        *heads, "GB/s", "tok/s staging"
    ))  # fmt: skip
    for run in results["runs"]:
        stall = run["stall_ms"]
        share = run["tokens_per_s_staging"] / run["tokens_per_s"]
        print(
            f"{run['source']:7} {run['streams']:7} {run['policy']:10} "
            f"{run['median_gap_ms']:6.1f} "
            f"{stall['p50']:7.1f}{stall['p95']:7.1f}{stall['max']:8.1f} "
            f"{run['install_ms']['p50']:8.1f} {run['pull_ms']['p50']:8.1f} "
            f"{run['pull_gb_per_s']:7.0f} {share:12.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--sources", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--policies", nargs="+", default=["continue", "recompute"])
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--memory", type=float, default=0.6)
    options = parser.parse_args()
    # UCX reads its environment when an agent is made, and falls back to TCP between
    # two processes of one GPU without this.
    os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "y")
    results = asyncio.run(run(options))
    print_table(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
