# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""The inside of a rank of :mod:`tests.support.rank_group`: a vLLM worker's distributed
environment, model loader and refit extension, without scheduler, KV cache or engine.

    python -m tests.support.rank_process PIPE RANK RANKS PORT

Loads one model after another, since importing vLLM takes longer than loading them.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

# As in a real worker: importing it, before the load, keeps the plain layout.
from dynamo.refit.rank.extension import RefitWorkerExtension
from tests.support.child import answer_requests


class RankWorker(RefitWorkerExtension):
    """What the extension is mixed into: it sees these attributes of a vLLM worker."""

    def __init__(self, vllm_config: VllmConfig, model: nn.Module) -> None:
        self.vllm_config = vllm_config
        self.model_runner = SimpleNamespace(get_model=lambda: model)


class RankProcess:
    """Carries out what the test asks for; each public method is a request."""

    def __init__(self, rank: int, ranks: int, port: int) -> None:
        self._rank = rank
        self._ranks = ranks
        self._port = port
        self._distributed = False
        self._worker: RankWorker | None = None

    def load(self, directory: Path, load_format: str = "auto") -> None:
        """Load a checkpoint as a worker does; the model before it is dropped."""
        self._worker = None
        gc.collect()
        config = self._make_config(directory, load_format)
        if not self._distributed:
            self._start_distributed(config)
        with set_current_vllm_config(config):
            self._worker = RankWorker(config, get_model(vllm_config=config))

    def refit_call(self, payload: bytes) -> bytes:
        return self._worker.refit_call(payload)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every live parameter, under every name it has."""
        return _digests(self._model)

    def scribble(self, value: float) -> None:
        """Overwrite every live parameter, so that nothing can be equal by chance."""
        _fill(self._model, value)

    def golden(self, directory: Path) -> dict[str, str]:
        """Digests of a new model of the same kind, after its own ``load_weights`` has
        been given the whole checkpoint: the slow path that a refit must equal."""
        model = self._build_model()
        _fill(model, -7.25)
        model.load_weights(load_file(directory / "model.safetensors").items())
        return _digests(model)

    def resources(self) -> tuple[int, int, int]:
        """Resident bytes, file descriptors and threads of this process."""
        gc.collect()
        status = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        resident = int(fields["VmRSS"].split()[0]) << 10
        return resident, len(os.listdir("/proc/self/fd")), int(fields["Threads"])

    @property
    def _model(self) -> nn.Module:
        return self._worker.model_runner.get_model()

    def _make_config(self, directory: Path, load_format: str) -> VllmConfig:
        config = EngineArgs(
            model=str(directory),
            load_format=load_format,
            tensor_parallel_size=self._ranks,
            distributed_executor_backend="mp",
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=512,
            kv_cache_memory_bytes=16 << 20,
        ).create_engine_config()
        config.parallel_config.rank = self._rank
        config.parallel_config.disable_custom_all_reduce = True
        return config

    def _start_distributed(self, config: VllmConfig) -> None:
        # vLLM's shared-memory collectives are named after it.
        os.environ["VLLM_DIST_IDENT"] = str(self._port)
        # Without a model in the config, the groups that only experts need are made,
        # too: they have to serve every model that is loaded later.
        modelless = VllmConfig(parallel_config=config.parallel_config)
        with set_current_vllm_config(modelless):
            init_worker_distributed_environment(
                modelless,
                self._rank,
                f"tcp://127.0.0.1:{self._port}",
                self._rank,
                "gloo",
            )
        self._distributed = True

    def _build_model(self) -> nn.Module:
        config = copy.copy(self._worker.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.static_forward_context = {}
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
        ):
            return initialize_model(config)


@torch.no_grad()
def _fill(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def _digests(model: nn.Module) -> dict[str, str]:
    return {
        name: hashlib.sha256(
            parameter.detach().contiguous().view(torch.uint8).numpy()
        ).hexdigest()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def main() -> None:
    descriptor, rank, ranks, port = map(int, sys.argv[1:])
    answer_requests(descriptor, RankProcess(rank, ranks, port))
    # A process group that is torn down would wait for its peers.
    os._exit(0)


if __name__ == "__main__":
    main()
