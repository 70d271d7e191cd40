# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Workers that a refit would get wrong are refused by their arguments, by name."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

stand_in_if_missing()

from dynamo.vllm import main as dynamo_vllm  # noqa: E402
from dynamo.vllm import worker_factory  # noqa: E402
from dynamo.vllm.args import parse_args  # noqa: E402
from dynamo.vllm.worker_factory import WorkerFactory  # noqa: E402

from dynamo.refit.errors import UnsupportedConfiguration  # noqa: E402
from dynamo.refit.rank.supported import (  # noqa: E402
    check_settings,
    settings_of_config,
    unknown_connectors,
)
from dynamo.refit.worker import hook  # noqa: E402
from dynamo.refit.worker.supported import check_arguments  # noqa: E402
from graphs.tiny_model import make_checkpoint  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]

MULTIMODAL = ["--enable-multimodal"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_checkpoint(tmp_path_factory.mktemp("model"), seed=1))


def kv_transfer(name: str, module: str | None = None, **extra: Any) -> dict:
    config = {"kv_connector": name, "kv_role": "kv_both"}
    if module is not None:
        config["kv_connector_module_path"] = module
    if extra:
        config["kv_connector_extra_config"] = extra
    return config


def flag(name: str, value: dict) -> list[str]:
    return [name, json.dumps(value)]


NIXL = kv_transfer("NixlConnector")
LMCACHE = kv_transfer("LMCacheConnectorV1")

REFUSED = {
    "embedding": (["--embedding-worker"], "--embedding-worker"),
    "classify": (["--classify-worker"], "--classify-worker"),
    "realtime": (["--realtime"], "--realtime"),
    "encode": (
        [*MULTIMODAL, "--disaggregation-mode", "encode"],
        "--disaggregation-mode encode",
    ),
    "route to encoder": ([*MULTIMODAL, "--route-to-encoder"], "--route-to-encoder"),
    "embedding cache": (
        ["--multimodal-embedding-cache-capacity-gb", "0.5"],
        "--multimodal-embedding-cache-capacity-gb",
    ),
    "custom encoder": (
        [*MULTIMODAL, "--custom-encoder-class", "my.Encoder"],
        "--custom-encoder-class",
    ),
    "embedding connector": (
        flag(
            "--ec-transfer-config",
            {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"},
        ),
        "--ec-transfer-config, connector ECExampleConnector",
    ),
    "expert parallel": (["--enable-expert-parallel"], "--enable-expert-parallel"),
    "expert balancing": (
        ["--enable-eplb", "--enable-expert-parallel"],
        "--enable-eplb",
    ),
    "pipeline": (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size"),
    "data": (["--data-parallel-size", "2"], "--data-parallel-size"),
    "lora": (["--enable-lora"], "--enable-lora"),
    "shared weights": (["--load-format", "gms"], "--load-format gms"),
    "draft model": (
        flag("--speculative-config", {"model": "small", "num_speculative_tokens": 2}),
        "--speculative-config with small",
    ),
    "eagle": (
        flag("--speculative-config", {"method": "eagle3", "model": "head"}),
        r"--speculative-config with eagle3 \(head\)",
    ),
    "mtp": (
        flag("--speculative-config", {"method": "mtp"}),
        "--speculative-config with mtp",
    ),
    "spec flags": (
        ["--spec-method", "medusa", "--spec-model", "heads"],
        r"--speculative-config with medusa \(heads\)",
    ),
    "connector": (
        flag("--kv-transfer-config", LMCACHE),
        "--kv-transfer-config .* connector LMCacheConnectorV1",
    ),
    "a member": (
        flag(
            "--kv-transfer-config",
            kv_transfer("MultiConnector", connectors=[NIXL, LMCACHE]),
        ),
        "connector LMCacheConnectorV1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_arguments(case: str, model: str) -> None:
    arguments, named = REFUSED[case]
    config = parse_args(["--model", model, *arguments])
    with pytest.raises(UnsupportedConfiguration, match=named) as refused:
        check_arguments(config)
    assert "python -m dynamo.vllm" in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--tensor-parallel-size", "8"],
        ["--enable-sleep-mode"],
        ["--load-format", "dummy"],
        ["--multimodal-embedding-cache-capacity-gb", "0"],
        flag(
            "--speculative-config",
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4},
        ),
        flag("--speculative-config", {"model": "ngram", "num_speculative_tokens": 2}),
        flag("--kv-transfer-config", NIXL),
        flag(
            "--kv-transfer-config", kv_transfer("NixlConnector", "graphs.kv_transfer")
        ),
        flag("--kv-transfer-config", kv_transfer("MultiConnector", connectors=[NIXL])),
    ],
    ids=" ".join,
)
def test_accepted_by_the_arguments(
    arguments: list[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "127.0.0.1")
    check_arguments(parse_args(["--model", model, *arguments]))


def test_weights_of_the_memory_service_are_refused_also_by_its_variable(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYN_GMS_USE_V1", "true")
    with pytest.raises(UnsupportedConfiguration, match="DYN_GMS_USE_V1"):
        check_arguments(parse_args(["--model", model]))


@pytest.mark.parametrize(
    ("transfer", "unknown"),
    [
        (None, []),
        (kv_transfer("PdConnector", "kvbm.connector", connectors=[NIXL]), ["PdConn"]),
        # A class of somebody else's with a known name.
        (kv_transfer("NixlConnector", f"{__name__}"), ["NixlConn"]),
        (
            kv_transfer(
                "MultiConnector",
                connectors=[kv_transfer("MultiConnector", connectors=[LMCACHE, NIXL])],
            ),
            ["LMCacheConn"],
        ),
    ],
)
def test_connectors_that_are_not_known(transfer: dict | None, unknown: list) -> None:
    found = unknown_connectors(transfer)
    assert len(found) == len(unknown)
    assert all(name in told for name, told in zip(unknown, found, strict=True))


class NixlConnector:
    """Keeps KV by tokens, whatever its name."""


def final_config(**changed: Any) -> SimpleNamespace:
    """As vLLM makes it of arguments that say nothing of what it holds."""
    config = VllmConfig()
    return SimpleNamespace(
        parallel_config=config.parallel_config,
        load_config=config.load_config,
        compilation_config=config.compilation_config,
        **{
            "lora_config": None,
            "kv_transfer_config": None,
            "ec_transfer_config": None,
            "speculative_config": None,
            **changed,
        },
    )


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        # Found by vLLM in the model's own configuration.
        ({"speculative_config": SimpleNamespace(method="mtp", model="m")}, "mtp"),
        # Of --kv-offloading-size.
        (
            {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")},
            "--kv-offloading-size, connector OffloadingConnector",
        ),
        (
            {"ec_transfer_config": SimpleNamespace(ec_connector="DynamoCache")},
            "connector DynamoCache",
        ),
    ],
)
def test_what_only_the_final_configuration_tells(changed: dict, named: str) -> None:
    with pytest.raises(UnsupportedConfiguration, match=named):
        check_settings(settings_of_config(final_config(**changed)))


@pytest.mark.parametrize(
    "changed",
    [{}, {"speculative_config": SimpleNamespace(method="ngram", model="ngram")}],
)
def test_a_final_configuration_that_is_accepted(changed: dict) -> None:
    check_settings(settings_of_config(final_config(**changed)))


# --- where it is checked ------------------------------------------------------


def test_an_engine_that_is_refused_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(
        AsyncLLM,
        "from_vllm_config",
        staticmethod(lambda vllm_config, **kwargs: loaded.append(vllm_config)),
    )

    def check(config: Any) -> None:
        if config == "bad":
            raise UnsupportedConfiguration("bad")

    hook.on_engine_config(check)
    AsyncLLM.from_vllm_config(vllm_config="good", stat_loggers=[])
    with pytest.raises(UnsupportedConfiguration):
        AsyncLLM.from_vllm_config(vllm_config="bad", stat_loggers=[])
    assert loaded == ["good"]


@pytest.mark.parametrize("module", [dynamo_vllm, worker_factory])
async def test_no_model_is_registered_without_an_agent(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever kind of worker it is: its model is what routers find it by."""
    registered: list[str] = []

    async def register_model(name: str) -> None:
        registered.append(name)

    for one in (dynamo_vllm, worker_factory):
        monkeypatch.setattr(one, "register_model", register_model)
    monkeypatch.setattr(
        WorkerFactory, "register_engine_routes", lambda *args, **kwargs: None
    )
    hook.on_worker_ready(lambda *args: None)
    with pytest.raises(UnsupportedConfiguration, match="has no refit agent"):
        await module.register_model("model")
    factory = SimpleNamespace(register_vllm_model=register_model)
    WorkerFactory.register_engine_routes(factory, None, None, None)
    await module.register_model("model")
    assert registered == ["model"]
