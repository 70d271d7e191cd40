# SPDX-FileCopyrightText: Copyright (c) 2026 dynamo-refit contributors
# SPDX-License-Identifier: Apache-2.0
"""Versions of layers that run on something else than what was loaded into them.

Here with a quantization method made up for the test, which does what vLLM's do: it
replaces weights, adds scales, keeps a workspace and a kernel of its own, and works in
place on what it is given. vLLM's models are in packed_layers.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynamo.refit.worker.torchvision_stub import stand_in_if_missing

stand_in_if_missing()

from vllm.model_executor.layers.quantization.base_config import (  # noqa: E402
    QuantizeMethodBase,
)
from vllm.model_executor.layers.quantization.kv_cache import (  # noqa: E402
    BaseKVCacheMethod,
)

from dynamo.refit.errors import PointerMoved, UnsupportedConfiguration  # noqa: E402
from dynamo.refit.rank import reserve  # noqa: E402
from dynamo.refit.rank.capture import describe_parameters  # noqa: E402
from dynamo.refit.rank.conversion import RuntimeForm  # noqa: E402
from dynamo.refit.rank.processing import LayerFailed  # noqa: E402
from tests.support.served import Served  # noqa: E402

pytestmark = [
    pytest.mark.integration,
    pytest.mark.pre_merge,
    pytest.mark.gpu_0,
    pytest.mark.vllm,
]

CONFIG = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))


@pytest.mark.timeout(280)
def test_vllm_s_models_in_the_packed_layout() -> None:
    cases = Path(__file__).with_name("packed_layers.py")
    options = ["-q", "-p", "no:cacheprovider", "--timeout=250"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(cases)],
        capture_output=True,
        text=True,
        timeout=270,
        cwd=cases.parents[2],
    )
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]


class Kernel:
    """Keeps a tensor that it computed from the layer's, as kernels for experts do."""

    def __init__(self, scale: torch.Tensor) -> None:
        self.gain = scale * 2
        self.max_tokens = id(self) % 97


# As if vLLM had defined it.
Kernel.__module__ = "vllm.model_executor.kernels.made_up"


class Eighths(QuantizeMethodBase):
    """Weights as eight-bit integers, transposed, with a scale for each row."""

    def __init__(self) -> None:
        self.kernel: Kernel | None = None

    def create_weights(self, layer: nn.Module, *sizes: int, **_: object) -> None:
        layer.weight = nn.Parameter(torch.empty(*sizes), requires_grad=False)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if hasattr(layer, "processed"):
            return
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        # In place: what was staged must not be what this works on.
        layer.weight.div_(scale).round_()
        weight = layer.weight.to(torch.int8).t()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.scale = nn.Parameter(scale, requires_grad=False)
        layer.workspace = torch.zeros(4)
        if self.kernel is None:
            self.kernel = Kernel(scale)
        layer.processed = True

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        layer.workspace += 1
        return x @ layer.weight.float() * layer.scale.t() * self.kernel.gain.t()


class Layer(nn.Module):
    def __init__(self, method: QuantizeMethodBase) -> None:
        super().__init__()
        self.quant_method = method
        method.create_weights(self, 6, 4)
        self.register_buffer("map", torch.arange(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class Model(nn.Module):
    def __init__(self, method: Callable[[], QuantizeMethodBase]) -> None:
        super().__init__()
        self.first = Layer(method())
        self.norm = nn.LayerNorm(6)
        self.second = Layer(method())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x))[:, :4])


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in {
            "first.weight": (6, 4),
            "norm.weight": (6,),
            "norm.bias": (6,),
            "second.weight": (6, 4),
        }.items()
    }


def _loaded(method: Callable[[], QuantizeMethodBase], seed: int) -> Model:
    """As vLLM loads a model: the weights, and then every layer's method."""
    model = Model(method)
    with torch.no_grad():
        model.load_state_dict(_weights(seed), strict=False)
        for layer in (model.first, model.second):
            layer.quant_method.process_weights_after_loading(layer)
    return model


def _twin(method: Callable[[], QuantizeMethodBase]) -> Model:
    with torch.device("meta"):
        return Model(method)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_is(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def _graph_addresses(model: Model) -> list[int]:
    """What a CUDA graph of this model would read."""
    return [
        tensor.data_ptr()
        for layer in (model.first, model.second)
        for tensor in (
            layer.weight,
            layer.scale,
            layer.workspace,
            layer.map,
            layer.quant_method.kernel.gain,
        )
    ]


@torch.no_grad()
def test_versions_follow_each_other_where_they_are() -> None:
    model, twin = _loaded(Eighths, 1), _twin(Eighths)
    served = Served(model, twin, CONFIG)
    assert served.processed == {"first.weight", "second.weight"}
    x, addresses = torch.randn(3, 4), _graph_addresses(model)
    layers = (model.first, model.second)
    kernels = [layer.quant_method.kernel for layer in layers]
    for version in (2, 3, 1, 1):
        weights, before = _weights(version), _state(model)
        made = served.make(weights)
        _assert_is(model, before)
        for name, loaded in _weights(version).items():
            assert torch.equal(weights[name], loaded), name
        served.install(made)
        fresh = _loaded(Eighths, version)
        assert torch.equal(model(x), fresh(x))
        assert torch.equal(model.first.weight, fresh.first.weight)
        assert _graph_addresses(model) == addresses
    assert kernels == [
        model.first.quant_method.kernel,
        model.second.quant_method.kernel,
    ]
    assert torch.equal(model.first.map, torch.arange(6))
    # The twin can be used again, for captures as well.
    assert twin.first.quant_method.kernel is None
    assert twin.first.weight.is_meta
    assert twin.first.weight.shape == (6, 4)


def test_a_workspace_that_moved_is_named() -> None:
    model = _loaded(Eighths, 1)
    served = Served(model, _twin(Eighths), CONFIG)
    model.second.workspace = torch.zeros(4)
    with pytest.raises(PointerMoved) as caught:
        served.refit(_weights(2))
    assert caught.value.tensor == "second.workspace"


class Baked(Eighths):
    """Hands a number of its weights to the kernel, where a graph has captured it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.peak = layer.weight.max().item()
        super().process_weights_after_loading(layer)


def test_a_number_that_depends_on_the_weights_is_refused() -> None:
    model = _loaded(Baked, 1)
    with pytest.raises(UnsupportedConfiguration, match=r"first.*peak is .*would be 1"):
        RuntimeForm(model, _twin(Baked), CONFIG)


class Sparse(Eighths):
    """Its runtime form has as many rows as there are without a zero."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        rows = (layer.weight != 0).all(1)
        super().process_weights_after_loading(layer)
        layer.weight = nn.Parameter(layer.weight[:, rows], requires_grad=False)


def test_another_shape_leaves_the_model_as_it_was() -> None:
    model = _loaded(Sparse, 1)
    served = Served(model, _twin(Sparse), CONFIG)
    weights = _weights(2)
    weights["second.weight"][0, 0] = 0
    before = _state(model)
    with pytest.raises(LayerFailed, match=r"weight is \(4, 6\) torch.int8") as caught:
        served.refit(weights)
    assert caught.value.tensor == "second.weight"
    _assert_is(model, before)
    served.refit(_weights(2))
    assert torch.equal(model.second.weight, _loaded(Sparse, 2).second.weight)


@torch.no_grad()
def test_what_was_live_can_be_put_back() -> None:
    model = _loaded(Eighths, 1)
    served = Served(model, _twin(Eighths), CONFIG)
    x = torch.randn(3, 4)
    answer = model(x)
    backup = {name: torch.empty_like(t) for name, t in served.live.filled.items()}
    served.live.copy_to(backup)
    served.refit(_weights(2))
    assert not torch.equal(model(x), answer)
    served.live.copy_from(backup)
    assert torch.equal(model(x), answer)


def test_a_weight_that_is_held_transposed_is_copied_in_the_order_of_memory() -> None:
    """A copy of contiguous memory is the quickest."""
    model = _loaded(Eighths, 1)
    assert not model.first.weight.is_contiguous()
    served = Served(model, _twin(Eighths), CONFIG)
    filled = served.live.filled["first.weight"]
    assert (filled.is_contiguous(), filled.shape) == (True, (6, 4))
    assert filled.data_ptr() == model.first.weight.data_ptr()
    made = served.make(_weights(2)).tensors["first.weight"]
    assert torch.equal(made, _loaded(Eighths, 2).first.weight.t())


class Kept(Eighths):
    """Leaves what was loaded as it is, and computes with a copy of it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        kept = layer.weight.detach().clone()
        layer.weight = nn.Parameter(kept, requires_grad=False)
        super().process_weights_after_loading(layer)


def _with_views(model: Model) -> Model:
    """As Mamba-2 does for its kernels, when it is built."""
    for layer in (model.first, model.second):
        rows = layer.weight.data[1:4, 1:]
        model.register_buffer(f"rows_{len(model._buffers)}", rows, persistent=False)
    return model


def test_views_of_what_was_loaded_follow_it_where_they_are() -> None:
    model = _with_views(Model(Kept))
    with torch.no_grad():
        model.load_state_dict(_weights(1), strict=False)
        for layer in (model.first, model.second):
            layer.quant_method.process_weights_after_loading(layer)
    served = Served(model, _with_views(_twin(Kept)), CONFIG)
    views = {"rows_0": "first.weight", "rows_1": "second.weight"}
    addresses = [getattr(model, view).data_ptr() for view in views]
    for version in (2, 3, 1):
        before = {view: getattr(model, view).clone() for view in views}
        made = served.make(_weights(version))
        for view in views:
            assert torch.equal(getattr(model, view), before[view]), view
        served.install(made)
        for view, name in views.items():
            expected = _weights(version)[name][1:4, 1:]
            assert torch.equal(getattr(model, view), expected), view
        fresh = _loaded(Kept, version)
        assert torch.equal(model.first.weight, fresh.first.weight)
        assert [getattr(model, view).data_ptr() for view in views] == addresses


class Sorted(Eighths):
    """Writes an order of the rows, which depends on the weights, into a buffer."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.map.copy_(layer.weight.amax(1).argsort())
        super().process_weights_after_loading(layer)


def test_a_buffer_that_processing_writes_into_waits_for_the_install() -> None:
    model, twin = _loaded(Sorted, 1), _twin(Sorted)
    served = Served(model, twin, CONFIG)
    address = model.first.map.data_ptr()
    # The first processing of all, with made-up weights, has not written it either.
    live = _loaded(Sorted, 1).first.map
    for version in (2, 3, 1):
        assert torch.equal(model.first.map, live)
        made = served.make(_weights(version))
        assert torch.equal(model.first.map, live)
        served.install(made)
        fresh = _loaded(Sorted, version).first.map
        assert not torch.equal(fresh, live)
        live = fresh
        assert torch.equal(model.first.map, live)
    assert model.first.map.data_ptr() == address


class Tuner:
    """A kernel that is there before the load, and is set up by the first layer."""

    def __init__(self) -> None:
        self.sizes: tuple[int, ...] | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        assert self.sizes is None
        self.sizes = tuple(layer.weight.shape)


class Tuned(Eighths):
    def __init__(self) -> None:
        super().__init__()
        self.tuner = Tuner()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.tuner.process_weights_after_loading(layer)
        super().process_weights_after_loading(layer)


def test_kernels_of_the_twin_and_of_the_model_are_not_set_up_again() -> None:
    model, twin = _loaded(Tuned, 1), _twin(Tuned)
    served = Served(model, twin, CONFIG)
    tuners = [layer.quant_method.tuner for layer in (model.first, model.second)]
    for version in (2, 3):
        served.refit(_weights(version))
        fresh = _loaded(Tuned, version)
        assert torch.equal(model.first.weight, fresh.first.weight)
        assert twin.first.quant_method.tuner.sizes is None
    assert [tuner.sizes for tuner in tuners] == [(6, 4), (6, 4)]
    assert tuners == [layer.quant_method.tuner for layer in (model.first, model.second)]


class Gauge:
    """A kernel that is there before the load, and keeps a tensor of the weights."""

    def __init__(self) -> None:
        self.gain: torch.Tensor | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.gain = layer.weight.amax(1, keepdim=True)


Gauge.__module__ = "vllm.model_executor.kernels.made_up"


class Gauged(Eighths):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = Gauge()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.kernel.process_weights_after_loading(layer)
        super().process_weights_after_loading(layer)


@torch.no_grad()
def test_what_a_kernel_of_the_twin_makes_of_the_weights_is_the_live_one_s() -> None:
    model, twin = _loaded(Gauged, 1), _twin(Gauged)
    served = Served(model, twin, CONFIG)
    gauge, addresses = model.first.quant_method.kernel, _graph_addresses(model)
    x = torch.randn(3, 4)
    for version in (2, 3, 1):
        served.refit(_weights(version))
        fresh = _loaded(Gauged, version)
        assert torch.equal(gauge.gain, fresh.first.quant_method.kernel.gain)
        assert torch.equal(model(x), fresh(x))
    assert model.first.quant_method.kernel is gauge
    assert _graph_addresses(model) == addresses
    assert twin.first.quant_method.kernel.gain is None


class Bare(Eighths):
    """Without a kernel: modules hold all of it."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.kernel = None


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What :mod:`reserve` sees of a worker of vLLM; ``twins`` counts what was built."""
    model = _loaded(Bare, 1)
    model.cache = torch.empty(0)
    worker = SimpleNamespace(
        rank=0,
        twins=0,
        vllm_config=CONFIG,
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None),
        model_runner=SimpleNamespace(get_model=lambda: model),
    )

    def build(config: object, live: nn.Module) -> nn.Module:
        assert (config, live) == (CONFIG, model)
        worker.twins += 1
        return _twin(Bare)

    monkeypatch.setattr(reserve, "build_twin", build)
    monkeypatch.setattr(reserve, "_determine_available_memory", lambda _: 4 << 30)
    monkeypatch.setenv("DYN_REFIT_STAGING", "device")
    return worker


def test_the_form_that_made_room_for_staging_is_the_one_that_stages(
    worker: SimpleNamespace,
) -> None:
    assert 0 < reserve.determine_with_staging(worker) < 4 << 30
    model = worker.model_runner.get_model()
    # As vLLM's start goes on: the KV cache comes after its size.
    model.cache = torch.empty(64)
    form = reserve.runtime_form(worker)
    assert reserve.runtime_form(worker) is form
    assert worker.twins == 1
    assert form.held["cache"] is model.cache
    assert form.live()["first.weight"].data_ptr() == model.first.weight.data_ptr()


@pytest.mark.parametrize("name", ["norm.weight", "second.scale"])
def test_a_form_whose_tensors_have_moved_since_is_built_again(
    worker: SimpleNamespace, name: str
) -> None:
    reserve.determine_with_staging(worker)
    module, _, leaf = name.rpartition(".")
    layer = worker.model_runner.get_model().get_submodule(module)
    moved = nn.Parameter(getattr(layer, leaf).detach().clone(), requires_grad=False)
    setattr(layer, leaf, moved)
    form = reserve.runtime_form(worker)
    assert worker.twins == 2
    assert form.live()[name].data_ptr() == moved.data_ptr()


def test_a_form_of_what_only_a_kernel_holds_is_built_again(
    worker: SimpleNamespace,
) -> None:
    """Nobody sees there whether vLLM has replaced it since."""
    reserve.determine_with_staging(worker)
    before = vars(worker)[reserve._FORM]
    before.made["second.kernel.weight"] = torch.zeros(4)
    assert reserve.runtime_form(worker) is not before
    assert worker.twins == 2


class Scales(BaseKVCacheMethod):
    def __init__(self) -> None:
        super().__init__(quant_config=None)

    def create_weights(self, layer: nn.Module, *_: int) -> None:
        super().create_weights(layer)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        del layer.q_scale, layer.k_scale, layer.v_scale, layer.prob_scale


def test_scales_of_the_kv_cache_exist_during_a_load_only() -> None:
    model, twin = nn.Module(), nn.Module()
    model.attention, twin.attention = Layer(Scales()), Layer(Scales())
    assert len(list(twin.parameters())) == 4
    model.attention.quant_method.process_weights_after_loading(model.attention)
    assert describe_parameters(twin, model) == []
