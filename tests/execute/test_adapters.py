"""Adapters and packed layers: on top through peft and diffusers, fused by rounding again, and
nothing that is written into a packed weight is lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from qsearch import apply, extract, simulate
from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme
from qsearch.execute.layers import QuantLayer
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import packed_layers
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import Call, Prompts, Sampling, record, run
from qsearch.measure.quantized_weights import QuantizedWeights
from tests import tiny_pipelines
from tests.models import tiny_unet, unet_inputs


def tiny_dit() -> nn.Module:
    found: nn.Module = tiny_pipelines.build("stable_diffusion_3").transformer
    return found


def dit_inputs() -> dict[str, Any]:
    pipe = tiny_pipelines.build("stable_diffusion_3")
    (call,) = record(pipe, Prompts(("a red ring",)), Sampling(1, resolution=32), 1)
    return dict(call.kwargs)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "unet": (tiny_unet, unet_inputs),
    "dit": (tiny_dit, dit_inputs),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
pytestmark = pytest.mark.filterwarnings("ignore:products of low-bit inputs")
EACH = pytest.mark.parametrize("name", MODELS)


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(of: nn.Module, targets: Any = TARGETS) -> nn.Module:
    torch.manual_seed(7)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    of.add_adapter(config)  # type: ignore[operator]
    return of.eval()


def plan_of(graph: Any, scheme: str = "int4-c") -> dict[str, Scheme]:
    return {x.name: Scheme.parse(scheme) for x in graph.quantizable if x.kind == "linear"}


def far(a: Tensor, b: Tensor) -> float:
    return float(((a - b).square().sum() / b.square().sum()).detach())


def packed_and_simulated(name: str) -> tuple[nn.Module, Tensor, Call]:
    """A packed model with an adapter on top, and what the simulated one gives with the same."""
    given = MODELS[name][1]()
    call = Call((), given, 0)
    plain = model(name)
    graph = extract(plain, given)
    plan = plan_of(graph)
    packed = adapted(apply(model(name), plan, graph))
    other = adapted(model(name))
    wide = extract(other, given)
    held = {x.name for x in wide}
    named = {n if n in held else f"{n}.base_layer": s for n, s in plan.items()}
    with simulate(other, named, wide):
        said = run(other, call)
    return packed, said, call


@EACH
def test_an_adapter_on_packed_layers_gives_what_it_gives_on_simulated_ones(name: str) -> None:
    packed, said, call = packed_and_simulated(name)

    assert far(run(packed, call), said) < 1e-5
    packed.disable_adapters()  # type: ignore[operator]
    assert far(run(packed, call), said) > 1e-3


@EACH
def test_fusing_stores_the_sum_in_the_layers_own_formats(name: str) -> None:
    packed, said, call = packed_and_simulated(name)
    before = {n: (str(x.scheme), x.dequantize()) for n, x in packed_layers(packed).items()}
    deltas = {
        n: m.get_delta_weight("default")
        for n, m in packed.named_modules()
        if hasattr(m, "get_delta_weight")
    }

    packed.fuse_lora()  # type: ignore[operator]

    assert far(run(packed, call), said) < 1e-2  # rounded again
    layers = packed_layers(packed)
    assert deltas
    for place, delta in deltas.items():
        layer = layers[f"{place}.base_layer"]
        scheme, weight = before[f"{place}.base_layer"]
        assert str(layer.scheme) == scheme
        wanted = quantize(weight + delta, Scheme.parse("int4-c")).dequantize()
        torch.testing.assert_close(layer.dequantize(), wanted)


def test_a_lora_of_diffusers_is_loaded_onto_a_packed_model_as_onto_any() -> None:
    trained = adapted(model("dit"))
    state = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(trained).items()}
    given = dit_inputs()
    call = Call((), given, 0)
    graph = extract(model("dit"), given)
    packed = apply(model("dit"), plan_of(graph, "int8-c"), graph)
    without = run(packed, call)

    plain = model("dit")

    for one in (packed, plain):
        one.load_lora_adapter(state, prefix="transformer")  # type: ignore[operator]

    assert far(run(packed, call), without) > 2e-4
    assert far(run(packed, call), run(plain, call)) < 5e-5


@EACH
def test_a_lora_of_other_layers_is_one_line_and_changes_nothing(name: str) -> None:
    call = Call((), MODELS[name][1](), 0)
    graph = extract(model(name), MODELS[name][1]())
    packed = apply(model(name), plan_of(graph, "int8-c"), graph)
    without = run(packed, call)
    state = {f"transformer.other.to_q.lora_{part}.weight": torch.zeros(4, 4) for part in "AB"}

    with pytest.raises(ValueError, match=r"^Target modules \{'other.to_q'\} not found[^\n]*$"):
        packed.load_lora_adapter(state, prefix="transformer")  # type: ignore[operator]

    assert run(packed, call).equal(without)


@pytest.mark.parametrize(
    "scheme",
    [
        "int4-g32",
        "uint3-c",
        "int8-c+a8",
        "int4-c~balance",
        "int4-c+a8~rotate",
        "int4-c~lowrank16",
        "keep+a8",
    ],
)
def test_a_written_weight_is_kept_as_well_as_its_format_can(scheme: str) -> None:
    layer, source, inputs = _layer(scheme)
    torch.manual_seed(5)
    other = source.weight.data + 0.02 * torch.randn_like(source.weight)

    layer.weight.data = other

    first = _error(layer, source.weight.data)
    assert _error(layer, other) < min(0.05, first + 1e-9)
    expected = nn.functional.linear(inputs, layer.dequantize(), layer.bias)
    assert far(layer(inputs), expected) < 1e-2


@pytest.mark.parametrize("scheme", ["int4-c+a8~shift", "uint4-c+a8~shift~rotate"])
def test_a_layer_that_holds_more_of_its_weight_refuses_another(scheme: str) -> None:
    layer, source, _ = _layer(scheme)

    with pytest.raises(QSearchError, match="another weight would change"):
        layer.weight.data = source.weight.data


def test_writing_into_the_copy_is_refused() -> None:
    layer, source, _ = _layer("int4-c")

    with pytest.raises(QSearchError, match=r"assign `weight\.data = values`"):
        layer.weight.add_(1.0)
    with pytest.raises(QSearchError, match=r"assign `weight\.data = values`"):
        layer.weight[0] = 0.0
    with pytest.raises(QSearchError, match="takes no weight of 3 x 3"):
        layer.weight.data = torch.zeros(3, 3)
    with pytest.raises(QSearchError, match="must be finite"):
        layer.weight.data = torch.full_like(source.weight, torch.nan)
    assert type(layer.weight + 1) is Tensor


def test_a_fused_model_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    packed, _, call = packed_and_simulated("dit")
    packed.fuse_lora()  # type: ignore[operator]
    packed.unload_lora()  # type: ignore[operator]
    wanted = run(packed, call)
    graph = extract(model("dit"), dit_inputs())

    save(packed, tmp_path / "model.safetensors", graph)
    loaded = load(tmp_path / "model.safetensors", model("dit"), graph)

    torch.testing.assert_close(run(loaded, call), wanted)


def _layer(scheme: str) -> tuple[QuantLayer, nn.Linear, Tensor]:
    """A packed layer, what it stands for, and inputs."""
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    source = whole[1]
    assert isinstance(source, nn.Linear)
    kept = nn.Linear(64, 64)
    kept.load_state_dict(source.state_dict())
    x = torch.randn(32, 64)
    graph = extract(_Denoiser(whole), {"hidden_states": x[None], "timestep": torch.ones(1)})
    layers = {x.name: x for x in graph.quantizable}
    (name,) = [n for n in layers if n.endswith("1")]
    whole = _Denoiser(whole)
    weights = QuantizedWeights(
        whole,
        graph,
        calibrate(
            whole, graph, [Call((), {"hidden_states": x[None], "timestep": torch.ones(1)}, 0)]
        ),
    )
    packed = apply(whole, {name: Scheme.parse(scheme)}, graph, weights)
    (layer,) = packed_layers(packed).values()
    return layer, kept, whole.net[0](x).detach()


class _Denoiser(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.net(hidden_states) * timestep


def _error(layer: QuantLayer, weight: Tensor) -> float:
    return far(layer.dequantize(), weight)
