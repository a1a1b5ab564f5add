"""`~lowrank`: packed as simulated, paid for, refused above a layer's rank, and better at few
bits.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.calls import run
from qsearch.measure.quantized_weights import calibrated_weights
from qsearch.measure.simulation import simulate
from tests.choices.layers import CALLS, Layers
from tests.layer_outputs import compare_layers


@pytest.fixture
def case() -> tuple[nn.Module, OpGraph]:
    torch.manual_seed(1)
    model = Layers().eval()
    return model, extract(model, CALLS[0].kwargs)


@pytest.mark.filterwarnings("ignore::qsearch.execute.runtime.DequantizeFallbackWarning")
@pytest.mark.parametrize(
    "scheme",
    ["int4-c+a4~lowrank16", "int3-c~rotate~lowrank16@gptq", "int4-g16+a8~balance~lowrank16"],
)
def test_packed_layers_compute_what_simulate_computes(
    case: tuple[nn.Module, OpGraph], scheme: str, tmp_path: Path
) -> None:
    model, graph = case
    plan = Plan.make(graph, {x.name: scheme if x.name == "first" else "keep" for x in graph})
    wanted = {"first": [Scheme.parse(scheme)]}
    chosen = {name: scheme for name, (scheme,) in wanted.items()}
    source = copy.deepcopy(model)
    apply(model, plan, graph, calibrated_weights(model, graph, wanted, CALLS))
    save(model, tmp_path / "model.safetensors", graph, plan)
    torch.manual_seed(1)
    again = load(tmp_path / "model.safetensors", Layers().eval(), graph)

    weights = calibrated_weights(source, graph, wanted, CALLS)
    for packed in (model, again):
        compare_layers(source, packed, chosen, graph, weights, CALLS[0])


def test_a_branch_is_paid_for(case: tuple[nn.Module, OpGraph]) -> None:
    _, graph = case
    held = {x.name: "int4-c" if x.kind == "linear" else "keep" for x in graph}

    plain = Plan.make(graph, held).achieved.bits
    made = Plan.make(graph, held | {"first": "int4-c~lowrank16"}).achieved.bits

    assert made - plain == 16 * 16 * (48 + 64)


def test_a_rank_above_the_layer_s_is_refused(case: tuple[nn.Module, OpGraph]) -> None:
    model, graph = case

    with (
        pytest.raises(QSearchError, match=r"second can't have .* rank of 16, 32"),
        simulate(model, {"second": Scheme.parse("int4-c~lowrank16")}, graph),
    ):
        pass
    with pytest.raises(QSearchError, match="its rank from 16 to 512, a multiple of 16"):
        Scheme.parse("int4-c~lowrank20")


def test_a_branch_lowers_the_error_of_few_bits(case: tuple[nn.Module, OpGraph]) -> None:
    model, graph = case
    full = run(model, CALLS[0])

    def error(scheme: str) -> float:
        with simulate(model, {"first": Scheme.parse(scheme)}, graph):
            return float((run(model, CALLS[0]) - full).square().sum())

    assert error("int3-c~lowrank16") < 0.7 * error("int3-c")
    assert error("int3-c+a4~lowrank32") < error("int3-c+a4~lowrank16") < error("int3-c+a4")
