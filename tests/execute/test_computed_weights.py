"""Weights that torch computes for each call, and layers of no size: counted as they run, kept as
they are, beside layers that a plan quantizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from qsearch.core.plan import Plan
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.noise import relative_noise
from qsearch.measure.pipelines import Call, run
from qsearch.measure.profiling import profile
from qsearch.measure.simulation import simulate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
]
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "older weight norm": utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "older spectral norm": utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
#: fp32 rounding of a noise power
ROUNDING = 1e-10


class Mixed(nn.Module):
    """Layers whose weights are computed between plain ones."""

    def __init__(self, way: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.into = nn.Linear(6, 18)
        self.turned = way(nn.Linear(18, 18, bias=False))
        self.seen = way(nn.Conv2d(2, 4, 3, padding=1))
        self.out = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.turned(self.into(x).tanh()).unflatten(1, (2, 3, 3))
        made: Tensor = self.out(self.seen(hidden).tanh().flatten(1))
        return made


def mixed(way: str) -> Mixed:
    torch.manual_seed(2)
    model = Mixed(WAYS[way]).eval()
    model(torch.randn(3, 6))  # the older norms make their weight in a call
    return model


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_computed_weights_are_counted_as_they_run_and_kept(way: str) -> None:
    model, x = mixed(way), torch.randn(7, 6)

    graph = extract(model, {"x": x})

    assert [layer.name for layer in graph] == ["into", "turned", "seen", "out"]
    assert [layer.quantizable for layer in graph] == [True, False, False, True]
    assert [layer.kind for layer in graph] == ["linear", "linear", "conv2d", "linear"]
    plain = Mixed(lambda layer: layer).eval()
    with FlopCounterMode(display=False) as counter:
        plain(x)
    assert 2 * sum(layer.macs for layer in graph) == counter.get_total_flops()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["int4-c", "int8-c+a8"])
def test_a_plan_beside_computed_weights_is_carried_out(
    way: str, scheme: str, tmp_path: Path
) -> None:
    model, call = mixed(way), Call((torch.randn(7, 6),), {}, 0)
    graph = extract(model, {"x": call.args[0]})
    plan = Plan.uniform(graph, scheme)
    table = profile(model, graph, [scheme], [call], probes=4).frame
    assert set(table["site"]) == {"into", "out"}
    with simulate(model, plan, graph):
        wanted = run(model, call)

    packed = mixed(way)
    apply(packed, plan, graph)
    save(packed, tmp_path / "packed.safetensors", graph, plan)
    again = mixed(way)
    load(tmp_path / "packed.safetensors", again, graph)

    assert relative_noise(run(model, call), wanted)[0] > 1e-7
    for made in (packed, again):
        assert relative_noise(run(made, call), wanted)[0] < ROUNDING


class Empty(nn.Module):
    """With layers of no inputs and of no outputs, as ablated and generated models have."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 9)
        self.nothing = nn.Linear(9, 0)
        self.bias = nn.Linear(0, 4)
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.into(x).tanh()
        made: Tensor = self.out(hidden) + self.bias(self.nothing(hidden))
        return made


def test_layers_of_no_size_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, call = Empty().eval(), Call((torch.randn(7, 6),), {}, 0)
    graph = extract(model, {"x": call.args[0]})
    plan = Plan.uniform(graph, "int4-c")

    kept = {layer.name for layer in graph if not layer.quantizable}
    assert kept == {"nothing", "bias"}
    assert set(profile(model, graph, ["int4-c"], [call], probes=4).frame["site"]) == {"into", "out"}
    with simulate(model, plan, graph):
        wanted = run(model, call)
    packed = copy.deepcopy(model)
    apply(packed, plan, graph)
    save(packed, tmp_path / "packed.safetensors", graph, plan)

    assert relative_noise(run(packed, call), wanted)[0] < ROUNDING
