"""What a plan is charged: Qua²SeDiMo's averages for PixArt-α from its card, and two sets of scales
for the long skips of a U-Net.
"""

from __future__ import annotations

import pytest
import torch

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.graphs.families import cards
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.models import tiny_unet, unet_inputs


@pytest.fixture(scope="module")
def pixart() -> OpGraph:
    """The graph of PixArt-α at its real size, on the meta device."""
    return extract(*cards.load("pixart-alpha"), name="pixart-alpha")


@pytest.mark.reference
@pytest.mark.parametrize(
    ("scheme", "published"),
    [
        ("uint4-c", 4.023),
        ("uint3-c", 3.023),
        ("km4-c", 4.181),
        ("km3-c", 3.091),
        ("km4-t", 4.000),
        ("km3-t", 3.000),
    ],
)
def test_a_uniform_plan_of_pixart_alpha_takes_the_bits_that_qua2sedimo_publishes(
    pixart: OpGraph, scheme: str, published: float
) -> None:
    assert pixart.weights == 610_228_224
    assert round(Plan.uniform(pixart, scheme).achieved.average_bits, 3) == published


def test_long_skips_are_charged_and_given_two_sets_of_scales() -> None:
    torch.manual_seed(0)
    model = tiny_unet().eval()
    graph = extract(model, unet_inputs())
    skips = [layer for layer in graph if layer.parts]
    assert skips
    name, parts = skips[0].name, skips[0].parts
    weight = model.get_submodule(name).weight.data
    weight[:, parts[0] :] *= 50  # the skip's channels

    with simulate(model, {name: Scheme.parse("uint4-c")}, graph, QuantizedWeights(model, graph)):
        inside = model.get_submodule(name).weight.detach().clone()

    quiet = float(
        (inside - weight)[:, : parts[0]].square().sum() / weight[:, : parts[0]].square().sum()
    )
    assert quiet < 0.03  # one range for both would round all of the first part to zero
    plan = Plan.uniform(graph, "uint4-c").achieved.bits
    one_range = sum(
        Scheme.parse("uint4-c" if n.quantizable else "keep").stored_bits(
            n.weight_shape, n.channel_axis
        )
        for n in graph
    )
    assert plan - one_range == sum(32 * n.weight_shape[0] * (len(n.parts) - 1) for n in skips)
