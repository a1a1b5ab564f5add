"""Trellis codes in a plan: what layers can have them, prices, simulation, packed layers, files,
exports.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qsearch.choices.trellis_weight import TrellisWeight
from qsearch.core.cost import Budget, can_have
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.decide.allocation import allocate, random_plan
from qsearch.decide.draws import draw
from qsearch.execute.packed_file import load, save
from qsearch.execute.runtime import apply, packed_layers
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Call, run
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import weights_for
from qsearch.measure.simulation import simulate

WORDS = ("tcq2-c", "tcq3-c~rotate@ldlq", "tcq4-c+a8~rotate")


class Small(nn.Module):
    """Layers of many kinds: a product, one that nothing rotates, one that is too small for a path,
    a convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.mid = nn.Linear(32, 48)
        self.odd = nn.Linear(48, 20)
        self.back = nn.Linear(20, 32)
        self.small = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.conv(x).flatten(2).transpose(1, 2)
        rows = self.back(torch.relu(self.odd(torch.relu(self.mid(rows)))))
        return self.small(rows)


def calls(count: int = 2) -> list[Call]:
    dice = torch.Generator().manual_seed(0)
    return [Call((), {"x": torch.randn(4, 16, 8, 8, generator=dice)}, i) for i in range(count)]


@pytest.fixture
def case() -> tuple[nn.Module, OpGraph]:
    torch.manual_seed(0)
    model = Small().eval()
    return model, extract(model, calls(1)[0].kwargs)


def test_a_layer_that_is_too_small_or_that_nothing_rotates_is_said_before_anything_is_made(
    case: tuple[nn.Module, OpGraph],
) -> None:
    _, graph = case
    layers = {x.name: Scheme.parse("keep") for x in graph}

    with pytest.raises(QSearchError, match=r"tcq2 can't store a weight of 4 x 32: .*16 rows of 4"):
        Plan.make(graph, layers | {"small": "tcq2-c"})
    with pytest.raises(QSearchError, match="none divides 20: leave ~rotate out"):
        Plan.make(graph, layers | {"back": "tcq2-c~rotate"})
    with pytest.raises(QSearchError, match="rank is at most 20"):
        Plan.make(graph, layers | {"back": "int4-c~lowrank32"})
    with pytest.raises(QSearchError, match="tcq3 takes -c; given 'tcq3-g64'"):
        Scheme.parse("tcq3-g64")
    uniform = Plan.uniform(graph, "tcq3-c~rotate")
    kept = [name for name, held in uniform.choices.items() if str(held[0]) == "keep"]
    assert kept == ["back", "small"]
    assert not can_have(graph.layer("conv"), Scheme.parse("int4-c~lowrank16"))


def test_profile_allocate_and_random_plans_offer_a_layer_what_it_can_have(
    case: tuple[nn.Module, OpGraph],
) -> None:
    model, graph = case
    schemes = ("tcq2-c~rotate@ldlq", "tcq2-c", "uint8-c")
    table = profile(model, graph, schemes, calls(), probes=4)

    found = table.frame.groupby("site")["scheme"].agg(set).to_dict()
    assert found["mid"] == set(schemes)
    assert found["back"] == {"tcq2-c", "uint8-c"}
    assert found["small"] == {"uint8-c"}
    plan = allocate(graph, table, Budget(average_bits=6.5))
    assert {s.format for held in plan.choices.values() for s in held} >= {"tcq2"}
    assert random_plan(graph, schemes, Budget(average_bits=6.5), 0).achieved.average_bits <= 6.5
    assert all(len(p.choices) == 5 for p in draw(graph, schemes, 3).values())


@pytest.mark.filterwarnings(
    "ignore::qsearch.execute.runtime.DequantizeFallbackWarning"
)  # the convolution
@pytest.mark.parametrize("text", WORDS)
def test_a_packed_model_is_the_simulated_one_at_the_plan_s_bytes(
    case: tuple[nn.Module, OpGraph], text: str, tmp_path: Path
) -> None:
    model, graph = case
    plan = Plan.uniform(graph, text)
    weights = weights_for(model, graph, [plan], calls())
    call = calls(1)[0]
    with simulate(model, plan, graph, weights):
        wanted = run(model, call)

    apply(model, plan, graph, weights)
    made = run(model, call)

    packed = packed_layers(model)
    assert all(isinstance(p, TrellisWeight) for layer in packed.values() for p in layer.parts)
    stored = 8 * sum(p.stored_bytes for layer in packed.values() for p in layer.parts)
    kept = sum(16 * x.weights for x in graph if x.name not in packed)
    assert stored + kept == plan.achieved.bits
    loose = 2e-2 if "+a" in text else 1e-4  # a rounded input may fall to the other side
    assert float((made - wanted).abs().max()) < loose * float(wanted.abs().max())
    save(model, tmp_path / "model.safetensors", graph, plan)
    torch.manual_seed(1)
    other = load(tmp_path / "model.safetensors", Small().eval(), graph)
    torch.testing.assert_close(run(other, call), made, atol=0, rtol=0)


def test_feedback_and_rotation_leave_less_of_the_output_s_error(
    case: tuple[nn.Module, OpGraph],
) -> None:
    model, graph = case
    dice = torch.Generator().manual_seed(1)
    with torch.no_grad():  # channels that go together, and some loud ones
        model.get_parameter("mid.weight")[:, ::7] *= 6.0
    given = torch.randn(8, 16, 8, 8, generator=dice).cumsum(1)
    call = Call((), {"x": given}, 0)
    reference = run(model, call)

    def noise(text: str) -> float:
        layers = {x.name: Scheme.parse(text if x.name == "mid" else "keep") for x in graph}
        weights = weights_for(model, graph, [Plan.make(graph, layers)], [call])
        with simulate(model, layers, graph, weights):
            return float((run(model, call) - reference).square().sum())

    assert noise("tcq2-c@ldlq") < 0.8 * noise("tcq2-c")
    assert noise("tcq2-c~rotate@ldlq") < 0.8 * noise("uint2-c~rotate@gptq")
