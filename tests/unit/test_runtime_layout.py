# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Which layers count as laid out as they are loaded: only where that is certain."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

stand_in_if_missing()

from vllm.model_executor.layers.fused_moe.oracle.unquantized import (  # noqa: E402
    UnquantizedMoeBackend,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (  # noqa: E402
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    UnquantizedEmbeddingMethod,
)

from dynamo.refit.errors import PackedWeights, UnsupportedConfiguration  # noqa: E402
from dynamo.refit.rank import runtime_layout  # noqa: E402
from dynamo.refit.rank.runtime_layout import find_layout  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.pre_merge, pytest.mark.gpu_0]


class PaddedLinearMethod(UnquantizedLinearMethod):
    """Not vLLM's: nobody knows what it does after a load."""


@pytest.fixture(params=["cuda", "cpu", "another"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = request.param
    monkeypatch.setattr(
        runtime_layout,
        "current_platform",
        SimpleNamespace(is_cuda=lambda: name == "cuda", is_cpu=lambda: name == "cpu"),
    )
    return name


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(runtime_layout, "current_platform", platform)


def _method(kind: type, **attributes: object) -> object:
    """A quantization method that was not asked what the platform can do."""
    method = object.__new__(kind)
    if isinstance(method, nn.Module):
        nn.Module.__init__(method)
    method.__dict__.update(attributes)
    return method


def _layer(method: object, *, meta: bool, **attributes: object) -> nn.Module:
    model = nn.Module()
    with torch.device("meta" if meta else "cpu"):
        model.layer = nn.Linear(4, 4, bias=False)
    model.layer.quant_method = method
    model.layer.__dict__.update(attributes)
    return model


def _is_plain(method: object, **attributes: object) -> bool:
    """Of a layer that looks as it was loaded."""
    twin = _layer(method, meta=True)
    live = _layer(method, meta=False, **attributes)
    layout = find_layout(twin, live)
    processed = [layer.name for layer in layout.processed]
    assert (list(layout.plain), processed) in (
        (["layer.weight"], []),
        ([], ["layer"]),
    )
    return not processed


def test_a_layer_that_nothing_processes_is_plain(platform: str) -> None:
    assert _is_plain(None)


@pytest.mark.parametrize("kind", [UnquantizedLinearMethod, UnquantizedEmbeddingMethod])
def test_unquantized_layers_are_plain_on_cuda_only(platform: str, kind: type) -> None:
    assert _is_plain(_method(kind)) is (platform == "cuda")


def test_a_subclass_is_not_trusted(platform: str) -> None:
    assert not _is_plain(_method(PaddedLinearMethod))


def _pack() -> object:
    packed = torch.zeros(4)
    return lambda x, weight, bias: x + packed


@pytest.mark.parametrize(
    ("gemm", "plain"),
    [
        (nn.functional.linear, True),
        (lambda x, weight, bias: nn.functional.linear(x, weight, bias), True),
        (_pack(), False),
        (lambda x, weight, bias, packed=True: x, False),
    ],
)
def test_a_cpu_layer_is_plain_if_its_function_holds_nothing(
    gemm: object, plain: bool
) -> None:
    method = _method(UnquantizedLinearMethod)
    assert _is_plain(method, cpu_linear=gemm) is plain


@pytest.mark.parametrize("backend", UnquantizedMoeBackend)
def test_experts_in_the_same_shape_are_processed_unless_the_backend_is_known(
    cuda: None, backend: UnquantizedMoeBackend
) -> None:
    method = _method(UnquantizedFusedMoEMethod, unquantized_backend=backend)
    assert _is_plain(method) is (backend.name in ("TRITON", "BATCHED_TRITON"))


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        ("dynamo.refit.rank.cpu_layout", True),
        ("vllm.model_executor.layers.fused_moe.experts.cpu_moe", False),
    ],
)
def test_experts_on_a_cpu_are_plain_if_their_packing_was_replaced(
    module: str, plain: bool
) -> None:
    def process_weights_after_loading(self: object, layer: nn.Module) -> None: ...

    process_weights_after_loading.__module__ = module
    hook = {"process_weights_after_loading": process_weights_after_loading}
    experts = type("Experts", (), hook)()
    method = _method(
        UnquantizedFusedMoEMethod,
        unquantized_backend=UnquantizedMoeBackend.CPU,
        moe_kernel=SimpleNamespace(fused_experts=experts),
    )
    assert _is_plain(method) is plain


@pytest.mark.parametrize("form", ["strided", "transposed", "converted"])
def test_another_form_is_processed_whatever_the_method(cuda: None, form: str) -> None:
    method = _method(UnquantizedLinearMethod)
    twin, live = _layer(method, meta=True), _layer(method, meta=False)
    weight = {
        "strided": torch.zeros(4, 8)[:, ::2],
        "transposed": torch.zeros(4, 4).t(),
        "converted": torch.zeros(4, 4, dtype=torch.int8),
    }[form]
    live.layer.weight = nn.Parameter(weight, requires_grad=False)
    [layer] = find_layout(twin, live).processed
    assert layer.parameters == {"weight": "layer.weight"}
    live.layer.quant_method = twin.layer.quant_method = None
    with pytest.raises(PackedWeights) as refused:
        find_layout(twin, live)
    assert refused.value.tensor == "layer.weight"


def test_a_method_that_was_replaced_after_the_load_is_refused(platform: str) -> None:
    twin = _layer(_method(PaddedLinearMethod), meta=True)
    live = _layer(_method(UnquantizedFusedMoEMethod, moe_kernel=None), meta=False)
    live.layer.quant_method.unquantized_backend = UnquantizedMoeBackend.CPU
    with pytest.raises(UnsupportedConfiguration, match="PaddedLinearMethod"):
        find_layout(twin, live)


def test_tied_parameters_are_one_and_parameters_tied_later_are_refused() -> None:
    twin = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False).to("meta")})
    live = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    for model in (twin, live):
        model["b"] = nn.Linear(2, 2, bias=False)
        model["b"].weight = model["a"].weight
    assert list(find_layout(twin, live).plain) == ["a.weight"]

    twin["b"].weight = nn.Parameter(torch.empty(2, 2, device="meta"))
    with pytest.raises(UnsupportedConfiguration, match=r"a\.weight and b\.weight"):
        find_layout(twin, live)


# Tensors that are derived from weights outside of quantization methods.


def _attention(module: str, **attributes: object) -> nn.Module:
    """A model with an attention layer whose hook is defined in ``module``."""

    def process_weights_after_loading(self: object, dtype: torch.dtype) -> None: ...

    process_weights_after_loading.__module__ = module
    hook = {"process_weights_after_loading": process_weights_after_loading}
    layer = type("Layer", (nn.Module,), hook)()
    layer.__dict__.update(attributes)
    model = nn.Module()
    model.attention = layer
    return model


def _impl(module: str, **attributes: object) -> object:
    def process_weights_after_loading(self: object, dtype: torch.dtype) -> None: ...

    process_weights_after_loading.__module__ = module
    hook = {"process_weights_after_loading": process_weights_after_loading}
    return type("Backend", (), {**hook, **attributes})()


LAYERS = "vllm.model_executor.layers.attention."
BACKENDS = "vllm.v1.attention."


def _with_projection(module: str, *, meta: bool) -> nn.Module:
    """A model with an attention layer that has a linear layer of its own."""
    model = _attention(module, impl=_impl(f"{BACKENDS}backend"))
    method = _method(UnquantizedLinearMethod)
    model.attention.kv_b_proj = _layer(method, meta=meta).layer
    return model


@pytest.mark.parametrize(
    ("layer", "copied"),
    [("attention", False), ("mm_encoder_attention", False), ("mla_attention", True)],
)
def test_attention_that_vllm_processes_in_known_ways(
    cuda: None, layer: str, copied: bool
) -> None:
    """MLA keeps copies of a layer that is plain otherwise."""
    live = _with_projection(LAYERS + layer, meta=False)
    twin = _with_projection(LAYERS + layer, meta=True)
    layout = find_layout(twin, live)
    name = "attention.kv_b_proj.weight"
    assert list(layout.plain) == ([] if copied else [name])
    assert [p.parameters for p in layout.processed] == [{"weight": name}] * copied
    assert [p.attention for p in layout.processed] == (
        [("attention", live.attention)] * copied
    )


def test_views_of_what_is_processed_are_known(platform: str) -> None:
    """Mamba-2's kernels read ``conv_weights``: what they are a view of at the load."""

    def build(meta: bool) -> nn.Module:
        model = _layer(_method(PaddedLinearMethod), meta=meta)
        weight = model.layer.weight.data
        model.register_buffer("rows", weight[1:3, 1:], persistent=False)
        model.register_buffer("other", torch.zeros(2))
        return model

    live = build(meta=False)
    live.layer.weight.data = torch.ones(16)
    (layer,) = find_layout(build(meta=True), live).processed
    assert layer.views == (("rows", "weight", ((2, 3), (4, 1), 5)),)


@pytest.mark.parametrize(
    "attributes",
    [
        {"impl": _impl(f"{BACKENDS}backends.flashinfer", sinks=torch.zeros(2))},
        {"impl": _impl(f"{BACKENDS}backends.mla.amx_mla")},
        {"is_amx_bmm_enabled": True},
        {"is_aiter_triton_fp8_bmm_enabled": True},
    ],
)
def test_backends_with_copies_of_their_own_are_refused(
    attributes: dict[str, object],
) -> None:
    live = _attention(f"{LAYERS}mla_attention", **attributes)
    with pytest.raises(UnsupportedConfiguration, match=r"^attention \("):
        find_layout(nn.Module(), live)


def test_flashinfer_without_sinks_keeps_no_copies() -> None:
    impl = _impl(f"{BACKENDS}backends.flashinfer", sinks=None)
    live = _attention(f"{LAYERS}attention", impl=impl)
    assert find_layout(nn.Module(), live).processed == ()


def test_a_model_with_a_hook_of_its_own_is_refused() -> None:
    live = _attention("a.plugin").attention
    with pytest.raises(UnsupportedConfiguration, match="derives tensors"):
        find_layout(nn.Module(), live)
