# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Refits of one vLLM replica on one GPU, as its clients see them.

    PYTHONPATH=SITE:components/src:. python3 -m tests.benchmarks.gpu_refit

Needs a CUDA machine with vLLM, NIXL and ModelExpress; no Dynamo. A dense model of
Qwen3-4B's shape with random weights and CUDA graphs decodes for many streams while
a publisher in a second process offers two versions in turn, from the GPU's memory
or the host's. The stall is the longest gap between two tokens of any stream that
touches the commit. Beside it: the same cycle with everything built anew, and the one
that transfers inside the pause. With ``--from-disk`` the engine loads the first
version from a checkpoint, and its answers are what a refit back to it must give.
Prints a table, then one line of JSON.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import reduce_tensor
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.fingerprint import Batch, Part
from dynamo.refit.manifest import Manifest, Source
from dynamo.refit.protocol import InFlightPolicy, RankVote
from dynamo.refit.publish.torch_state import SnapshotBuffers, local_shards
from dynamo.refit.rank.cycle import STEPS
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
#: The checkpoint's one file, and the bytes of the plain copy between two processes.
FILE = "model.safetensors"
IPC_NBYTES = 2 << 30

#: Elements that weights are made of; odd, so that no two rows are alike.
FILL_BLOCK = (1 << 22) + 1

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
    # A block of them again and again: a host takes minutes for billions of normals.
    block = torch.empty(FILL_BLOCK, dtype=torch.bfloat16, device=device)
    block.normal_(0, 0.02, generator=generator)
    for tensor in tensors.values():
        if tensor.dim() == 1:
            tensor.uniform_(0.8, 1.2, generator=generator)
        else:
            for part in tensor.view(-1).split(FILL_BLOCK):
                part.copy_(block[: len(part)])


def serve_weights(
    config: dict, device: str, name: str, directory: Path | None, pipe: Connection
) -> None:
    """The publisher process: two versions in two slots, until told to end."""
    tensors = {
        tensor: torch.empty(shape, dtype=torch.bfloat16, device=device)
        for tensor, shape in shapes(config).items()
    }
    buffers = SnapshotBuffers(local_shards(tensors), slots=2)
    fingerprints, fold_s = [], 0.0
    for slot in range(2):
        fill(tensors, seed=slot)
        if directory is not None and slot == 0:
            save_file({n: t.cpu() for n, t in tensors.items()}, directory / FILE)
        buffers.write(slot)
        batch = Batch(
            [
                Part(view, tuple((0, size) for size in view.shape), view.shape)
                for view in buffers.views(slot)
            ]
        )
        fingerprints.append(batch.fold().tobytes())
        began = time.perf_counter()
        batch.fold()
        fold_s = time.perf_counter() - began
    tensors.clear()
    if device == "cuda":
        torch.cuda.empty_cache()
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
    shared = None
    if device == "cuda":
        lent = torch.zeros(IPC_NBYTES, dtype=torch.uint8, device="cuda")
        shared = reduce_tensor(lent)
    pipe.send(
        {
            "manifest": msgspec.msgpack.encode(manifest),
            "fingerprints": fingerprints,
            "register_ms": took * 1e3,
            "fold_gb_per_s": manifest.nbytes / fold_s / 1e9,
            "shared": shared,
        }
    )
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
            # Deltas: whole answers would cost this process more at every token.
            params = SamplingParams(
                max_tokens=1000,
                temperature=1.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
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


@dataclass(frozen=True)
class Published:
    """What the publisher process offers: a manifest, two slots, their fingerprints."""

    manifest: Manifest
    fingerprints: list[np.ndarray]

    async def stage(self, replica: Replica, slot: int) -> RankVote:
        (vote,) = await replica.stage(self.manifest, slot, self.fingerprints[slot])
        return vote

    async def refit(self, replica: Replica, slot: int) -> RankVote:
        vote = await self.stage(replica, slot)
        await replica.commit()
        return vote


async def measure(
    replica: Replica,
    published: Published,
    streams: Streams,
    refits: int,
    policy: InFlightPolicy,
    *,
    forget: bool = False,
) -> dict:
    """``refits`` cycles under load; milliseconds, GB/s, tokens per second.

    With ``forget`` the rank drops its session and its buffers before each.
    """
    await published.refit(replica, 1)
    quiet_from = time.time()
    await asyncio.sleep(2.0)
    quiet_until = time.time()
    undisturbed = streams.tokens(quiet_from, quiet_until) / (quiet_until - quiet_from)
    stalls, votes, commits = [], [], []
    staging_tokens = staging_seconds = 0.0
    for cycle in range(refits):
        if forget:
            await replica.llm.collective_rpc("refit_forget")
        began = time.time()
        vote = await published.stage(replica, cycle % 2)
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
        "verify_ms": spread([c.timings.verify_ms for c in commits]),
        **{
            f"{step}_ms": spread([getattr(v.timings, f"{step}_ms") for v in votes])
            for step in STEPS
        },
        "wire_gb_per_s": votes[-1].nbytes
        / statistics.median(v.timings.wire_ms for v in votes)
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


async def check_tokens(
    replica: Replica, published: Published, fresh: list[int] | None
) -> dict:
    """A, B, A, B: the same weights give the same tokens, and no old block is hit.

    Compared with a cold prefix cache only: kernels differ in the last bits between a
    whole prefill and one that goes on from cached blocks.
    """
    answers, cached = [], []
    for slot in (0, 1, 0, 1):
        await published.refit(replica, slot)
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


def plain_ipc_copy(shared: tuple) -> float:
    """GB/s of a tensor copy from the publisher's process, over CUDA IPC."""
    rebuild, arguments = shared
    theirs = rebuild(*arguments)
    mine = torch.empty_like(theirs)
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        mine.copy_(theirs)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return theirs.numel() / min(times) / 1e9


async def run(options: argparse.Namespace) -> dict:
    config = {**QWEN3_4B, "num_hidden_layers": options.layers}
    results: dict = {"device": torch.cuda.get_device_name(0), "runs": []}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(config))
        source = start_source(config, options.sources[0], options, directory)
        llm = start_engine(directory, options, results)
        try:
            fresh = None
            if options.from_disk:
                fresh, _ = await greedy(llm)
            replica = Replica(llm, staging=options.staging)
            await replica.agent.start()
            for number, device in enumerate(options.sources):
                if number:
                    source = start_source(config, device, options, None)
                await measure_source(replica, source, device, fresh, options, results)
                source.process.kill()
        finally:
            llm.shutdown()
    results.update(plain_copies(4 << 30))
    return results


def start_engine(directory: Path, options: argparse.Namespace, results: dict):
    began = time.perf_counter()
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(directory),
            skip_tokenizer_init=True,
            load_format="auto" if options.from_disk else "dummy",
            quantization=options.quantization,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=64,
            gpu_memory_utilization=options.memory,
            worker_extension_cls="tests.benchmarks.forgetful.Extension",
        )
    )
    results["engine_start_s"] = time.perf_counter() - began
    return llm


@dataclass
class SourceProcess:
    process: multiprocessing.process.BaseProcess
    offer: dict


def start_source(
    config: dict, device: str, options: argparse.Namespace, directory: Path | None
) -> SourceProcess:
    """Start the publisher, and wait for what it offers."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=serve_weights,
        args=(
            config,
            device,
            f"trainer-{device}",
            directory if options.from_disk else None,
            there,
        ),
        daemon=True,
    )
    process.start()
    offer = here.recv()
    # Kept open: the publisher serves until it is killed.
    offer["pipe"] = here
    return SourceProcess(process, offer)


async def measure_source(
    replica: Replica,
    source: SourceProcess,
    device: str,
    fresh: list[int] | None,
    options: argparse.Namespace,
    results: dict,
) -> None:
    offer = source.offer
    published = Published(
        msgspec.msgpack.decode(offer["manifest"], type=Manifest),
        [np.frombuffer(values, dtype="<u8") for values in offer["fingerprints"]],
    )
    results["nbytes"] = published.manifest.nbytes
    about = {name: offer[name] for name in ("register_ms", "fold_gb_per_s")}
    if offer["shared"] is not None:
        about["plain_ipc_gb_per_s"] = plain_ipc_copy(offer["shared"])
    about["cold"] = msgspec.to_builtins(await published.refit(replica, 0))
    about["tokens"] = await check_tokens(replica, published, fresh)
    results[f"source_{device}"] = about
    print(device, json.dumps(about), flush=True)
    # The host's link is slow: fewer refits show it.
    on_device = device == "cuda"
    refits = options.refits if on_device else 5
    for count in options.streams if on_device else options.streams[:1]:
        streams = Streams(replica.llm, count)
        await streams.start()
        for policy in options.policies:
            runs = {policy: (refits, False)}
            if options.uncached and policy == "continue":
                runs[f"{policy}, uncached"] = (3, True)
            for name, (cycles, forget) in runs.items():
                run = await measure(
                    replica, published, streams, cycles, policy, forget=forget
                )
                run |= {"source": device, "cycle": name}
                results["runs"].append(run)
                print(json.dumps(run), flush=True)
        if options.direct:
            direct = Replica(replica.llm, staging="direct")
            direct.version = 10_000 * (1 + len(results["runs"]))
            await direct.agent.start()
            run = await measure(direct, published, streams, 5, "continue")
            run |= {"source": device, "cycle": "pull in the pause"}
            results["runs"].append(run)
            print(json.dumps(run), flush=True)
        await streams.stop()


def print_table(results: dict) -> None:
    print(f"\n{results['device']}, {results['nbytes'] / 1e9:.2f} GB per version; ms")
    print(
        f"{'source':6} {'streams':>7} {'cycle':20} {'m':>5} {'stall p50/p95/max':>22} "
        f"{'pause':>6} {'install':>7} {'verify':>6} {'wire':>6} {'GB/s':>5} "
        f"{'fold':>5} {'backup':>6} {'alloc':>6} {'tok/s staging':>13} built"
    )
    for run in results["runs"]:
        stall = run["stall_ms"]
        share = run["tokens_per_s_staging"] / run["tokens_per_s"]
        half = {name: value["p50"] for name, value in run.items() if "_ms" in name
                and isinstance(value, dict)}  # fmt: skip
        print(
            f"{run['source']:6} {run['streams']:7} {run['cycle']:20} "
            f"{run['median_gap_ms']:5.1f} "
            f"{stall['p50']:7.1f}{stall['p95']:7.1f}{stall['max']:8.1f} "
            f"{half['pause_ms']:6.1f} {half['install_ms']:7.1f} "
            f"{half['verify_ms']:6.1f} {half['wire_ms']:6.1f} "
            f"{run['wire_gb_per_s']:5.0f} {half['fingerprint_ms']:5.1f} "
            f"{half['backup_ms']:6.1f} {half['allocate_ms']:6.0f} {share:13.0%} "
            f"{run['built']}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--sources", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--policies", nargs="+", default=["continue", "recompute"])
    parser.add_argument("--refits", type=int, default=20)
    parser.add_argument("--memory", type=float, default=0.5)
    parser.add_argument("--staging", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--from-disk", action="store_true")
    parser.add_argument("--uncached", action="store_true")
    parser.add_argument("--direct", action="store_true")
    options = parser.parse_args()
    # UCX reads its environment when an agent is made, and falls back to TCP between
    # two processes of one GPU without this.
    os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "y")
    results = asyncio.run(run(options))
    print_table(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
