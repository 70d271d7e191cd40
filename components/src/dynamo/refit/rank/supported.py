# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which engines can be refitted, decided by their settings alone.

The same rules are applied to an engine's arguments, before anything is downloaded, to
its final configuration, before it loads, and by every rank.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from dynamo.refit.errors import UnsupportedConfiguration

#: It moves the KV of one request, by its blocks, and keeps none for others.
NIXL_CONNECTOR = "NixlConnector"
NIXL_PACKAGE = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
#: As good as its members.
MULTI_CONNECTOR = "MultiConnector"

#: Speculative methods that draft without weights of their own.
WEIGHTLESS_DRAFTS = frozenset({"ngram", "[ngram]", "ngram_gpu", "suffix"})

#: In the module of each worker class of Dynamo's GPU memory service.
SHARED_WEIGHTS = "gpu_memory_service"


@dataclass(frozen=True)
class EngineSettings:
    """What decides whether an engine can be refitted.

    ``kv_transfer`` and ``ec_transfer`` are vLLM's own configurations; ``draft`` names
    the model or method that drafts with weights of its own.
    """

    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    enable_lora: bool = False
    load_format: str = "auto"
    worker_class: str = "auto"
    kv_transfer: Any = None
    ec_transfer: Any = None
    draft: str | None = None
    #: vLLM's CPU runner then lets inductor freeze weights into compiled code.
    max_autotune_on_cpu: bool = False


def settings_of_arguments(arguments: AsyncEngineArgs) -> EngineSettings:
    """As far as an engine's arguments tell."""
    speculative = {
        key.replace("-", "_"): value
        for key, value in (arguments.speculative_config or {}).items()
    }
    return EngineSettings(
        pipeline_parallel_size=arguments.pipeline_parallel_size,
        data_parallel_size=arguments.data_parallel_size,
        enable_expert_parallel=arguments.enable_expert_parallel,
        enable_eplb=arguments.enable_eplb,
        enable_lora=arguments.enable_lora,
        load_format=str(arguments.load_format),
        worker_class=str(arguments.worker_cls),
        kv_transfer=arguments.kv_transfer_config,
        ec_transfer=arguments.ec_transfer_config,
        draft=_draft(
            arguments.spec_method or speculative.get("method"),
            arguments.spec_model or speculative.get("model"),
        ),
    )


def settings_of_config(config: VllmConfig) -> EngineSettings:
    """Of an engine's final configuration."""
    parallel, speculative = config.parallel_config, config.speculative_config
    inductor = config.compilation_config.inductor_compile_config
    return EngineSettings(
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        enable_expert_parallel=parallel.enable_expert_parallel,
        enable_eplb=parallel.enable_eplb,
        enable_lora=config.lora_config is not None,
        load_format=str(config.load_config.load_format),
        worker_class=str(parallel.worker_cls),
        kv_transfer=config.kv_transfer_config,
        ec_transfer=config.ec_transfer_config,
        draft=speculative and _draft(speculative.method, speculative.model),
        max_autotune_on_cpu=current_platform.is_cpu()
        and bool(inductor.get("max_autotune")),
    )


def check_settings(settings: EngineSettings) -> None:
    """Refuse what a refit would get wrong.

    Raises:
        UnsupportedConfiguration: names the setting, and the way out.
    """
    for setting, why in _refused(settings):
        refuse_setting(setting, why)


def refuse_setting(setting: str, why: str) -> None:
    """
    Raises:
        UnsupportedConfiguration: always.
    """
    raise UnsupportedConfiguration(
        f"this release does not refit workers that use {setting}: {why}. Start the "
        "worker without it, or with python -m dynamo.vllm"
    )


def _refused(settings: EngineSettings) -> Iterator[tuple[str, str]]:
    """Each setting that is refused, with its reason."""
    if settings.pipeline_parallel_size > 1:
        yield _flag("pipeline_parallel_size"), "ranks hold different layers"
    if settings.data_parallel_size > 1:
        yield _flag("data_parallel_size"), "a worker has several engines"
    # Before the expert parallelism that it needs.
    if settings.enable_eplb:
        yield _flag("enable_eplb"), "experts move between ranks while they serve"
    if settings.enable_expert_parallel:
        yield _flag("enable_expert_parallel"), "ranks hold different experts"
    if settings.enable_lora:
        yield (
            _flag("enable_lora"),
            "adapters wrap the layers, and are computed against the base weights",
        )
    if settings.load_format == "gms" or SHARED_WEIGHTS in settings.worker_class:
        yield (
            "weights of the GPU memory service (--load-format gms, DYN_GMS_USE_V1)",
            "other engines use the same memory",
        )
    if settings.draft is not None:
        yield (
            f"--speculative-config with {settings.draft}",
            "the drafter keeps the weights that it started with; ngram has none",
        )
    if settings.ec_transfer is not None:
        yield (
            "--ec-transfer-config, connector "
            f"{getattr(settings.ec_transfer, 'ec_connector', None)}",
            "it keeps embeddings of older weights, by the media's hash alone",
        )
    for connector in unknown_connectors(settings.kv_transfer):
        yield (
            f"--kv-transfer-config or --kv-offloading-size, connector {connector}",
            "it is not known to tell the KV of older weights from that of the served "
            f"ones; {NIXL_CONNECTOR} does",
        )
    if settings.max_autotune_on_cpu:
        yield "max_autotune on a CPU", "compiled code holds weights"


def unknown_connectors(kv_transfer: Any) -> list[str]:
    """The names of the connectors, members of others too, that are not known to keep
    the KV of different weights apart."""
    if kv_transfer is None:
        return []
    # Members of a MultiConnector are dictionaries.
    take = kv_transfer.get if isinstance(kv_transfer, dict) else None
    name, module, extra = (
        take(key) if take else getattr(kv_transfer, key, None)
        for key in (
            "kv_connector",
            "kv_connector_module_path",
            "kv_connector_extra_config",
        )
    )
    if name is None:
        return []
    if name == MULTI_CONNECTOR and not module:
        members = (extra or {}).get("connectors", [])
        return [unknown for member in members for unknown in unknown_connectors(member)]
    if name == NIXL_CONNECTOR and (not module or _is_nixl(module, name)):
        return []
    return [f"{module}.{name}" if module else name]


def _is_nixl(module: str, name: str) -> bool:
    """Whether a class that somebody else wrote is vLLM's connector, in other words."""
    connector = getattr(importlib.import_module(module), name)
    return any(base.__module__.startswith(NIXL_PACKAGE) for base in connector.__mro__)


def _draft(method: str | None, model: str | None) -> str | None:
    """Who drafts with weights of its own; None also where that is not told yet."""
    drafter = method or model
    if drafter is None or drafter in WEIGHTLESS_DRAFTS:
        return None
    return f"{method} ({model})" if method and model else drafter


def _flag(setting: str) -> str:
    return f"{setting} (--{setting.replace('_', '-')})"
