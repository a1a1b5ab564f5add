"""simulate: inside, the weights are what the plan stores; outside, the model is what it was, to the
bit, whatever happened.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsearch.choices.quantization import quantize, quantize_parts
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.execute.runtime import apply
from qsearch.graphs.extraction import extract
from qsearch.measure.pipelines import Call
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.models import PlainDenoiser, dit_inputs, plain, plain_inputs, tiny_dit

Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture
def case() -> Case:
    """A denoiser and its graph."""
    return plain()


def weights(model: nn.Module, graph: OpGraph) -> dict[str, Tensor]:
    """Copies of all weights, by layer."""
    return {layer.name: model.get_submodule(layer.name).weight.detach().clone() for layer in graph}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_inside_every_layer_holds_what_its_scheme_stores(case: Case) -> None:
    model, graph = case
    own = weights(model, graph)

    with simulate(model, Plan.uniform(graph, "uint3-c"), graph):
        inside = weights(model, graph)

    expected = {n: quantize(w, Scheme.parse("uint3-c")).dequantize() for n, w in own.items()}
    assert changed(expected, inside) == set()
    assert changed(own, inside) == set(own)


def test_after_the_block_every_weight_is_the_same_tensor_with_the_same_bits(case: Case) -> None:
    model, graph = case
    own, places = weights(model, graph), {n: p.data_ptr() for n, p in model.named_parameters()}

    with simulate(model, Plan.uniform(graph, "uint2-c"), graph):
        pass

    assert changed(own, weights(model, graph)) == set()
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places


def test_an_exception_in_the_block_leaves_the_model_as_it_was(case: Case) -> None:
    model, graph = case
    own = weights(model, graph)

    with (
        pytest.raises(ZeroDivisionError),
        simulate(model, Plan.uniform(graph, "uint2-c"), graph),
    ):
        raise ZeroDivisionError

    assert changed(own, weights(model, graph)) == set()
    assert torch.is_grad_enabled()


def test_an_exception_while_entering_leaves_the_model_as_it_was(case: Case) -> None:
    model, graph = case
    own = weights(model, graph)

    with (
        pytest.raises(QSearchError, match="minmax can't make km2"),
        simulate(
            model,
            {"conv_in": Scheme.parse("uint2-c"), "conv_out": Scheme.parse("km2@minmax")},
            graph,
        ),
    ):
        raise AssertionError("the block must not begin")

    assert changed(own, weights(model, graph)) == set()


def test_blocks_may_be_nested(case: Case) -> None:
    model, graph = case
    own = weights(model, graph)

    with simulate(model, {"conv_in": Scheme.parse("uint2-c")}, graph):
        with simulate(model, {"conv_out": Scheme.parse("uint2-c")}, graph):
            assert changed(own, weights(model, graph)) == {"conv_in", "conv_out"}
        assert changed(own, weights(model, graph)) == {"conv_in"}
    assert changed(own, weights(model, graph)) == set()


def test_layers_that_a_sparse_plan_does_not_name_are_kept(case: Case) -> None:
    model, graph = case
    own = weights(model, graph)

    with simulate(model, {"blocks.0.ff.0": Scheme.parse("uint2-c"), "conv_in": KEEP}, graph):
        assert changed(own, weights(model, graph)) == {"blocks.0.ff.0"}


def test_keeping_everything_computes_the_same_bits(case: Case) -> None:
    model, graph = case
    inputs = plain_inputs()

    with simulate(model, Plan.uniform(graph, KEEP), graph):
        inside = model(**inputs)

    assert torch.equal(inside, model(**inputs))


def test_the_output_is_that_of_a_model_with_the_stored_weights(case: Case) -> None:
    model, graph = case
    twin = PlainDenoiser()
    twin.load_state_dict(model.state_dict())
    for layer in graph:
        weight = twin.get_submodule(layer.name).weight
        weight.data.copy_(quantize(weight.data, Scheme.parse("uint4-g8")).dequantize())

    with simulate(model, Plan.uniform(graph, "uint4-g8"), graph):
        inside = model(**plain_inputs())

    assert torch.equal(inside, twin(**plain_inputs()))


def test_transposed_convolutions_get_a_scale_for_each_output_channel() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2))
    graph = extract(model, {"input": torch.randn(1, 3, 4, 4)})
    own = model[0].weight.detach().clone()

    with simulate(model, Plan.uniform(graph, "uint4-c"), graph):
        inside = model[0].weight.detach().clone()

    channels = [
        quantize(own[:, i].flatten()[None], Scheme.parse("uint4-c")).dequantize().view(3, 2, 2)
        for i in range(5)
    ]
    assert torch.equal(inside, torch.stack(channels, 1))


def test_half_precision_weights_stay_in_half_precision(case: Case) -> None:
    model, graph = case
    model.half()

    with simulate(model, Plan.uniform(graph, "uint4-c"), graph):
        assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_a_plan_of_another_graph_is_refused_with_both_graphs(case: Case) -> None:
    model, graph = case
    other = extract(PlainDenoiser(blocks=2), plain_inputs())

    with pytest.raises(
        QSearchError,
        match=f"the plan was made for graph {other.id}, PlainDenoiser is graph {graph.id}",
    ):
        simulate(model, Plan.uniform(other, "uint4-c"), graph).__enter__()


@pytest.mark.parametrize("scheme", ["uint4-c", "keep"])
def test_an_unknown_layer_is_refused_even_where_it_would_be_kept(case: Case, scheme: str) -> None:
    model, graph = case

    with (
        pytest.raises(QSearchError, match=r"blocks\.0\.attn9\.to_q"),
        simulate(model, {"blocks.0.attn9.to_q": Scheme.parse(scheme)}, graph),
    ):
        raise AssertionError("the block must not begin")


def test_a_model_that_lost_a_layer_of_its_graph_is_refused(case: Case) -> None:
    model, graph = case
    model.conv_out = nn.Identity()

    with pytest.raises(
        QSearchError,
        match="PlainDenoiser has no layer 'conv_out' with a weight; extract its graph again",
    ):
        simulate(model, Plan.uniform(graph, "uint4-c"), graph).__enter__()


def test_shared_weights_are_quantized_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = case
    made: list[str] = []
    monkeypatch.setattr(
        "qsearch.measure.quantized_weights.quantize_parts",
        lambda *a, **k: (made.append(k["layer"]), quantize_parts(*a, **k))[1],
    )
    store = QuantizedWeights(model, graph)

    for _ in range(3):
        with simulate(model, {"conv_in": Scheme.parse("uint4-c")}, graph, store):
            pass

    assert made == ["conv_in"]


@pytest.mark.parametrize("way", ["offloaded", "cast"])
def test_weights_that_are_not_there_between_calls_are_refused_in_words(way: str) -> None:
    from accelerate import cpu_offload

    model = tiny_dit().eval()
    graph = extract(model, dit_inputs())
    if way == "offloaded":
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    else:
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )
    plan, call = Plan.uniform(graph, "int4-c"), Call((), dit_inputs(), 0)
    words = "remove_hook_from_submodules" if way == "offloaded" else "enable_layerwise_casting"

    with pytest.raises(QSearchError, match=words), simulate(model, plan, graph):
        pass
    with pytest.raises(QSearchError, match=words):
        apply(model, plan, graph)
    with pytest.raises(QSearchError, match=words):
        profile(model, graph, ["int4-c"], [call], estimator="probe", probes=2)
    with pytest.raises(QSearchError, match=words):
        profile(model, graph, ["int4-c"], [call], estimator="sweep")
