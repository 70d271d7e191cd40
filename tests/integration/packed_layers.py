# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's own models in the layout of vLLM's CPU build, which packs their weights.

Run by test_conversion.py in a process of its own, since other tests turn packing off
for good. Every version that is installed must be equal, bit for bit, to a model that
was freshly loaded from that version's checkpoint.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphs.local import CPU_ENVIRONMENT
from graphs.tiny_model import build_tokenizer, make_checkpoint

for variable, setting in CPU_ENVIRONMENT.items():
    os.environ.setdefault(variable, setting)

from dynamo.refit.worker.torchvision_stub import stand_in_if_missing  # noqa: E402

stand_in_if_missing()

from transformers import DeepseekV2Config, DeepseekV2ForCausalLM  # noqa: E402
from vllm import _custom_ops  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.model_executor.layers import utils as gemm  # noqa: E402
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (  # noqa: E402
    CPUUnquantizedExperts,
)
from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.model_loader import get_model  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import (  # noqa: E402
    CPUAttentionBackendImpl,
)

from dynamo.refit.errors import UnsupportedConfiguration  # noqa: E402
from dynamo.refit.rank.conversion import RuntimeForm  # noqa: E402
from dynamo.refit.rank.cpu_layout import (  # noqa: E402
    LAYOUT_VARIABLE,
    keep_plain_layout,
)
from dynamo.refit.rank.processing import LayerFailed  # noqa: E402
from dynamo.refit.rank.runtime_layout import MLA_DERIVED, find_layout  # noqa: E402
from dynamo.refit.rank.twin import build_twin  # noqa: E402
from tests.support.served import Served  # noqa: E402

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"
ARCHITECTURES = ("qwen3", "qwen3-tied", "qwen3moe", "mla")
TOKENS = torch.tensor([5, 77, 4000, 1, 2, 900, 31])


def _checkpoint(architecture: str, seed: int) -> Path:
    directory = CACHE / f"packed-{architecture}-{seed}"
    if architecture != "mla":
        return make_checkpoint(directory, seed=seed, architecture=architecture)
    if not (directory / "model.safetensors").exists():
        config = DeepseekV2Config(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            first_k_dense_replace=2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            vocab_size=4096,
            dtype="bfloat16",
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = DeepseekV2ForCausalLM(config).to(torch.bfloat16)
        build_tokenizer().save_pretrained(directory)
        model.save_pretrained(directory)
    return directory


def _config(model: Path) -> VllmConfig:
    return EngineArgs(
        model=str(model),
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=256,
        kv_cache_memory_bytes=1 << 20,
    ).create_engine_config()


def _load(config: VllmConfig) -> nn.Module:
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def _as_loaded(model: Path) -> dict[str, torch.Tensor]:
    """What ``load_weights`` makes of a checkpoint, before any processing."""
    config = _config(model)
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        built = initialize_model(config)
        built.load_weights(load_file(model / "model.safetensors").items())
    return {name: tensor.detach() for name, tensor in built.named_parameters()}


def _outputs(model: nn.Module, config: VllmConfig) -> dict[str, torch.Tensor]:
    """Logits, and of every layer with a packed weight what it makes of fixed inputs,
    and all that has a name."""
    with torch.no_grad(), set_current_vllm_config(config):
        with set_forward_context(None, config, num_tokens=len(TOKENS)):
            hidden = model(TOKENS, torch.arange(len(TOKENS)))
        outputs = {"logits": model.compute_logits(hidden), "hidden": hidden}
        for name, layer in model.named_modules():
            if hasattr(layer, "cpu_linear"):
                inputs = torch.linspace(-1, 1, 3 * _inputs(layer)).view(3, -1)
                outputs[f"{name}()"] = layer.quant_method.apply(
                    layer, inputs.bfloat16(), getattr(layer, "bias", None)
                )
    state = (*model.named_parameters(), *model.named_buffers())
    return outputs | {name: tensor.detach().clone() for name, tensor in state}


def _inputs(layer: nn.Module) -> int:
    for size in ("input_size_per_partition", "input_size", "embedding_dim"):
        if hasattr(layer, size):
            return getattr(layer, size)
    raise AttributeError(f"{type(layer).__name__} has no known size")


def _assert_equal(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not torch.equal(found[name], expected[name])]
    assert wrong == []


@dataclass
class Case:
    """A live model of checkpoint 1, and what it has to be for checkpoints 1 to 3."""

    config: VllmConfig
    model: nn.Module
    twin: nn.Module
    served: Served
    weights: dict[int, dict[str, torch.Tensor]]
    expected: dict[int, dict[str, torch.Tensor]]

    def outputs(self) -> dict[str, torch.Tensor]:
        return _outputs(self.model, self.config)


@functools.cache
def _expected(architecture: str, seed: int) -> dict[str, torch.Tensor]:
    config = _config(_checkpoint(architecture, seed))
    return _outputs(_load(config), config)


def _case(architecture: str) -> Case:
    config = _config(_checkpoint(architecture, 1))
    model = _load(config)
    twin = build_twin(config, model)
    weights = {seed: _as_loaded(_checkpoint(architecture, seed)) for seed in (1, 2, 3)}
    return Case(
        config=config,
        model=model,
        twin=twin,
        served=Served(model, twin, config),
        weights=weights,
        expected={seed: _expected(architecture, seed) for seed in (1, 2, 3)},
    )


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = tmp_path_factory.mktemp("rank") / "store"
    # Groups for experts are made for such a model only.
    with set_current_vllm_config(_config(_checkpoint("qwen3moe", 1))):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)


@pytest.fixture(scope="module", autouse=True)
def attention() -> Iterator[None]:
    """Attention without a KV cache, which leaves its output uninitialised: here it
    gives the queries back."""

    def forward(self: object, layer: object, query: torch.Tensor, *_: object, **named):
        return named["output"].copy_(query)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPUAttentionBackendImpl, "forward", forward)
        yield


@pytest.fixture(params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture
def dense() -> Case:
    return _case("qwen3")


def _addresses(model: nn.Module) -> dict[str, int]:
    """Of everything that is a tensor, under whatever kind of name."""
    return {
        f"{prefix}.{key}": value.data_ptr()
        for prefix, module in model.named_modules()
        for held in (module._parameters, module._buffers, module.__dict__)
        for key, value in held.items()
        if isinstance(value, torch.Tensor)
    }


def test_versions_follow_each_other(case: Case) -> None:
    """Three versions and the first one again, the last of them twice."""
    assert case.served.processed
    logits = [expected["logits"] for expected in case.expected.values()]
    assert not torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[1], logits[2])
    _assert_equal(case.outputs(), case.expected[1])
    addresses = _addresses(case.model)
    kept = {
        seed: {name: tensor.clone() for name, tensor in tensors.items()}
        for seed, tensors in case.weights.items()
    }
    live = 1
    for version in (2, 3, 1, 1):
        made = case.served.make(case.weights[version])
        _assert_equal(case.outputs(), case.expected[live])
        case.served.install(made)
        live = version
        _assert_equal(case.outputs(), case.expected[version])
        assert _addresses(case.model) == addresses
    for seed, tensors in case.weights.items():
        assert all(torch.equal(tensors[name], kept[seed][name]) for name in tensors)


def test_what_is_processed_and_what_is_not(dense: Case) -> None:
    layout = find_layout(dense.twin, dense.model)
    names = dense.served.form.parameters.keys()
    assert {name for name in names if "norm" in name} == layout.plain.keys()
    assert dense.served.processed == names - layout.plain.keys()


def test_what_was_live_can_be_put_back(case: Case) -> None:
    """Tensors are copied, and functions that hold packed weights take turns."""
    live = case.served.live
    backup = {name: torch.empty_like(t) for name, t in live.filled.items()}
    live.copy_to(backup)
    replaced = case.served.install(case.served.make(case.weights[2]))
    _assert_equal(case.outputs(), case.expected[2])
    live.copy_from(backup)
    for function in replaced:
        function.install()
    _assert_equal(case.outputs(), case.expected[1])


def test_a_layer_that_fails_leaves_all_as_it_was_and_can_be_tried_again(
    dense: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = UnquantizedLinearMethod.process_weights_after_loading
    calls: list[nn.Module] = []

    def fail_at_the_third(self: UnquantizedLinearMethod, layer: nn.Module) -> None:
        calls.append(layer)
        process(self, layer)
        if len(calls) == 3:
            raise ValueError("no memory for a packed copy")

    monkeypatch.setattr(
        UnquantizedLinearMethod, "process_weights_after_loading", fail_at_the_third
    )
    with pytest.raises(LayerFailed, match="no memory for a packed copy") as caught:
        dense.served.refit(dense.weights[2])
    assert caught.value.tensor == "model.layers.0.mlp.gate_up_proj"
    _assert_equal(dense.outputs(), dense.expected[1])

    dense.served.refit(dense.weights[2])
    _assert_equal(dense.outputs(), dense.expected[2])


def test_a_layer_that_would_be_laid_out_otherwise_is_not_written(
    dense: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN does not take a weight, vLLM keeps it plain, with a warning."""

    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(_custom_ops, "create_onednn_mm", refuse)
    with pytest.raises(LayerFailed, match=r"weight is \(0,\) torch.bfloat16 on cpu"):
        dense.served.refit(dense.weights[2])
    monkeypatch.undo()
    _assert_equal(dense.outputs(), dense.expected[1])
    dense.served.refit(dense.weights[2])
    _assert_equal(dense.outputs(), dense.expected[2])


def test_what_cannot_be_processed_again_is_refused_before_the_first_version(
    dense: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("only at a load")

    monkeypatch.setattr(
        UnquantizedLinearMethod, "process_weights_after_loading", refuse
    )
    with pytest.raises(
        UnsupportedConfiguration,
        match=r"layers\.0\.self_attn\.qkv_proj.*only at a load",
    ):
        RuntimeForm(dense.model, dense.twin, dense.config)


def test_packed_weights_under_compiled_code_are_refused(
    dense: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch._dynamo.config.patch(disable=False):
        RuntimeForm(dense.model, dense.twin, dense.config)
        monkeypatch.setattr(dense.model.model, "do_not_compile", False)
        with pytest.raises(UnsupportedConfiguration, match="--enforce-eager"):
            RuntimeForm(dense.model, dense.twin, dense.config)


def test_an_output_layer_that_was_tied_after_the_load_is_refused(dense: Case) -> None:
    """vLLM does so when a checkpoint holds both, and they are equal."""
    dense.model.lm_head.weight = dense.model.model.embed_tokens.weight
    with pytest.raises(UnsupportedConfiguration, match=r"lm_head.weight were equal"):
        find_layout(dense.twin, dense.model)


def test_experts_that_are_packed_in_the_same_shape_are_processed() -> None:
    case = _case("qwen3moe")
    loaded = case.weights[1]
    experts = [name for name in loaded if "w13_weight" in name or "w2_weight" in name]
    assert len(experts) == 8
    for name in experts:
        live = case.model.get_parameter(name)
        assert (live.shape, live.dtype) == (loaded[name].shape, loaded[name].dtype)
        assert live.is_contiguous()
        assert not torch.equal(live, loaded[name])
        assert name in case.served.processed


class Convolution(nn.Module):
    """As in linear attention: a linear layer that holds a convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = ColumnParallelLinear(4, 64, bias=False, prefix="conv1d")
        self.conv1d.weight.data = self.conv1d.weight.data.unsqueeze(1)


def test_convolutions_are_packed_again(dense: Case, plain_layout: None) -> None:
    """Whatever the layout of linear layers is."""

    def build(device: str) -> Convolution:
        with (
            set_current_vllm_config(dense.config),
            set_default_torch_dtype(torch.bfloat16),
            torch.device(device),
        ):
            return Convolution()

    def loaded(weight: torch.Tensor) -> Convolution:
        model = build("cpu")
        model.conv1d.weight.data.copy_(weight)
        model.conv1d.quant_method.process_weights_after_loading(model.conv1d)
        return model

    first, second = torch.randn(2, 64, 1, 4).bfloat16()
    model, twin, expected = loaded(first), build("meta"), loaded(second)
    served = Served(model, twin, dense.config)
    assert served.processed == {"conv1d.weight"}
    addresses = _addresses(model)
    served.refit({"conv1d.weight": second})
    assert _addresses(model) == addresses
    assert torch.equal(model.conv1d.weight, expected.conv1d.weight)
    kept = "_cpu_unpacked_conv_weight"
    if hasattr(expected.conv1d, kept):
        assert torch.equal(getattr(model.conv1d, kept), second.squeeze(1))


def test_copies_that_mla_made_are_made_again_where_they_are() -> None:
    """Also where they are no views of ``kv_b_proj``, as after a conversion."""
    case = _case("mla")
    layers = [m for m in case.model.modules() if hasattr(m, MLA_DERIVED[0])]
    assert len(layers) == 2
    for layer in layers:
        for name in MLA_DERIVED:
            copied = getattr(layer, name).detach().clone()
            setattr(layer, name, nn.Parameter(copied, requires_grad=False))
    Served(case.model, case.twin, case.config).refit(case.weights[2])
    _assert_equal(case.outputs(), case.expected[2])


@pytest.fixture
def plain_layout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packing turned off, and on again afterwards."""
    monkeypatch.setattr(gemm, *_as_it_is(gemm, "dispatch_cpu_unquantized_gemm"))
    for name in ("process_weights_after_loading", "apply"):
        monkeypatch.setattr(
            CPUUnquantizedExperts, *_as_it_is(CPUUnquantizedExperts, name)
        )
    keep_plain_layout()
    yield


def _as_it_is(holder: object, name: str) -> tuple[str, object]:
    return name, getattr(holder, name)


def test_packing_stays_on_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LAYOUT_VARIABLE, "packed")
    keep_plain_layout()
    assert _case("qwen3").served.processed
    monkeypatch.setenv(LAYOUT_VARIABLE, "tiled")
    with pytest.raises(UnsupportedConfiguration, match="'tiled', and has to be plain"):
        keep_plain_layout()


def test_with_packing_off_all_but_mla_s_source_is_plain(
    plain_layout: None, case: Case
) -> None:
    assert {name for name in case.served.processed if "kv_b_proj" not in name} == set()
    for version in (2, 1):
        case.served.refit(case.weights[version])
        found = dict(case.model.named_parameters())
        for name in case.served.form.parameters:
            assert torch.equal(found[name], case.weights[version][name]), name
        # The same kernels' sums in another order: not bit by bit.
        torch.testing.assert_close(
            case.outputs()["logits"],
            case.expected[version]["logits"],
            rtol=0.1,
            atol=0.1,
        )
