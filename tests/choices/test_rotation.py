"""`~rotate`: groups that divide the channels or a refusal, and layers that round better for it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.choices.hadamard import group_of, rotated
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import calibrated_weights
from tests.choices.layers import CALLS, Layers
from tests.layer_outputs import compare_layers


@pytest.fixture
def case() -> tuple[nn.Module, OpGraph]:
    torch.manual_seed(1)
    model = Layers().eval()
    return model, extract(model, CALLS[0].kwargs)


@pytest.mark.parametrize(("channels", "group"), [(1152, 64), (640, 64), (1280, 256), (48, 16)])
def test_the_largest_group_that_divides_is_taken(channels: int, group: int) -> None:
    assert group_of(channels) == group


def test_channels_that_no_group_divides_are_refused_and_so_is_a_group_that_does_not() -> None:
    with pytest.raises(QSearchError, match="none divides 40: leave ~rotate out"):
        group_of(40)
    with pytest.raises(QSearchError, match="of 64 channels must divide 48; 16 does"):
        group_of(48, 64)


@pytest.mark.parametrize("axis", [-1, 1])
def test_twice_turned_is_as_before(axis: int) -> None:
    x = torch.randn(3, 32, 32)

    torch.testing.assert_close(rotated(rotated(x, 16, axis), 16, axis), x, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::qsearch.execute.runtime.DequantizeFallbackWarning")
@pytest.mark.parametrize(
    "scheme", ["int4-c+a4~rotate", "int4-g16+a8t~rotate16", "int3-c~rotate@gptq"]
)
def test_packed_layers_compute_what_simulate_computes(
    case: tuple[nn.Module, OpGraph], scheme: str, tmp_path: Path
) -> None:
    model, graph = case
    plan = Plan.uniform(graph, scheme)
    wanted = {layer.name: [Scheme.parse(scheme)] for layer in graph.quantizable}
    chosen = {name: scheme for name, (scheme,) in wanted.items()}
    source = copy.deepcopy(model)
    apply(model, plan, graph, calibrated_weights(model, graph, wanted, CALLS))
    save(model, tmp_path / "model.safetensors", graph, plan)
    torch.manual_seed(1)
    again = load(tmp_path / "model.safetensors", Layers().eval(), graph)

    weights = calibrated_weights(source, graph, wanted, CALLS)
    for packed in (model, again):
        compare_layers(source, packed, chosen, graph, weights, CALLS[0])


def test_a_rotation_stores_nothing(case: tuple[nn.Module, OpGraph]) -> None:
    _, graph = case

    plain, turned = (Plan.uniform(graph, f"int4-c+a4{end}").achieved for end in ("", "~rotate"))

    assert turned.bits == plain.bits


def test_outliers_cost_less_when_they_are_spread(case: tuple[nn.Module, OpGraph]) -> None:
    model, graph = case

    table = profile(model, graph, ["keep+a4", "keep+a4~rotate"], CALLS, estimator="sweep")

    found = table.values()["second"]
    assert found["keep+a4~rotate"] < 0.6 * found["keep+a4"]


def test_probes_price_a_rotation_as_the_sweep_does(case: tuple[nn.Module, OpGraph]) -> None:
    model, graph = case
    schemes = ["uint4-c~rotate", "int6-c+a6~rotate"]

    swept = profile(model, graph, schemes, CALLS, estimator="sweep").values()
    probed = profile(model, graph, schemes, CALLS, estimator="probe", probes=200).values()

    for layer in graph.quantizable:
        for scheme in schemes:
            assert 0.6 < probed[layer.name][scheme] / swept[layer.name][scheme] < 1.6
