"""apply: packed layers compute what simulate shows, take the bytes of the plan, live as torch's
modules do, and never fall back in silence.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsearch import zoo
from qsearch.choices.statistics import LayerInputs
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import Scheme
from qsearch.execute.runtime import (
    DequantizeFallbackWarning,
    QuantLinear,
    apply,
    packed_layers,
)
from qsearch.graphs.extraction import extract
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import (
    Call,
    Sampling,
    denoiser_of,
    example_inputs,
    load_pipeline,
    record,
    run,
    scene_prompts,
)
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.layer_outputs import LAYER, compare_layers
from tests.models import PlainDenoiser, plain, plain_calls, plain_inputs

FORMATS = [
    *(f"{kind}{bits}-c" for kind in ("int", "uint") for bits in range(2, 9)),
    "int4-t",
    "uint3-g4",
    "int8-g5",
    "uint4-c@hqq",
    "int4-c@search",
    *(f"{form}-c" for form in ("e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")),
    "e2m1-g4",
    *(f"km{bits}-c" for bits in (2, 3, 4)),
    "km2-g4",
    "km2-t",
    *("mxfp4", "mxfp6", "mxfp8", "nvfp4"),
]
INPUTS = [
    "int8-c+a8",
    "uint4-c+a8",
    "uint3-c+a6",
    "int4-c+a4t",
    "uint8-c+a8c",
    "int4-g4+a8",
    "e2m1-c+a8",
    "uint4-c+ae4m3",
    "int8-c+ae2m1t",
    "keep+a8",
    "km2-c+a8",
    "nvfp4+a8",
]
TRANSFORMS = ["int4-c~balance30", "uint4-c+a8~balance", "int8-c+a8t~balance~balance20"]
LINEAR_ONLY = ["int4-c+a8t~shift", "keep+a8t~shift~balance", "uint4-c+a8~balance~shift"]
Calibration = dict[str, LayerInputs]
Case = tuple[PlainDenoiser, OpGraph, Calibration]


@pytest.fixture(scope="module")
def source() -> Case:
    """A denoiser, its graph, and what goes into its layers."""
    torch.manual_seed(0)
    model, graph = plain()
    return model, graph, calibrate(model, graph, plain_calls())


@pytest.fixture
def case(source: Case) -> Case:
    """A copy, to be packed."""
    return copy.deepcopy(source[0]), source[1], source[2]


def pack(
    model: nn.Module, plan: Any, graph: OpGraph, calibration: Calibration | None = None
) -> nn.Module:
    """`apply`, where a widened layer is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DequantizeFallbackWarning)
        return apply(model, plan, graph, QuantizedWeights(model, graph, calibration))


def compare(
    model: nn.Module,
    packed: nn.Module,
    plan: dict[str, Scheme],
    graph: OpGraph,
    calibration: Calibration,
    call: Call,
) -> None:
    """`compare_layers` of layers that `calibration` was made for."""
    weights = QuantizedWeights(model, graph, calibration)
    compare_layers(model, packed, plan, graph, weights, call)


@pytest.mark.parametrize("scheme", [*FORMATS, *INPUTS, *TRANSFORMS])
def test_every_layer_gives_what_it_gives_simulated(case: Case, source: Case, scheme: str) -> None:
    model, graph, calibration = case
    plan = {layer.name: Scheme.parse(scheme) for layer in graph.quantizable}

    packed = pack(model, plan, graph, calibration)

    assert set(packed_layers(packed)) == set(plan)
    compare(copy.deepcopy(source[0]), packed, plan, graph, calibration, plain_calls(1)[0])


@pytest.mark.parametrize("scheme", LINEAR_ONLY)
def test_shifts_move_into_the_bias_and_products_of_scales_stay_exact(
    case: Case, source: Case, scheme: str
) -> None:
    model, graph, calibration = case
    plan = {
        layer.name: Scheme.parse(scheme) for layer in graph.quantizable if layer.kind == "linear"
    }

    packed = pack(model, plan, graph, calibration)

    compare(copy.deepcopy(source[0]), packed, plan, graph, calibration, plain_calls(1)[0])


@pytest.mark.parametrize("scheme", ["uint4-c", "e2m1-g4", "km3-c", "mxfp4"])
def test_a_model_whose_weights_alone_are_packed_gives_what_it_gives_simulated(
    case: Case, scheme: str
) -> None:
    model, graph, _ = case
    plan = Plan.uniform(graph, scheme)
    with simulate(model, plan, graph):
        expected = run(model, plain_calls(1)[0])

    torch.testing.assert_close(
        run(apply(model, plan, graph), plain_calls(1)[0]),
        expected,
        rtol=0,
        atol=1e-5 * float(expected.abs().max()),
    )


@pytest.fixture(scope="module", params=zoo.NAMES)
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, OpGraph, Calibration, Any]:
    """A denoiser of the zoo, its graph, calibration, and a call."""
    pipe = load_pipeline(zoo.folder(request.param))
    model = denoiser_of(pipe)
    [call] = record(pipe, scene_prompts(2, seed=0), Sampling(steps=2), bins=1)
    graph = extract(model, example_inputs(call, model))
    return model, graph, calibrate(model, graph, [call]), call


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*FORMATS, *INPUTS, *TRANSFORMS])
def test_every_layer_of_the_zoo_gives_what_it_gives_simulated(
    trained: tuple[nn.Module, OpGraph, Calibration, Any], scheme: str
) -> None:
    model, graph, calibration, call = trained
    plan = {layer.name: Scheme.parse(scheme) for layer in graph.quantizable}

    packed = pack(copy.deepcopy(model), plan, graph, calibration)

    compare(model, packed, plan, graph, calibration, call)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", ["int8-c+a8t~bos", "int4-c+a8t~bos~migrate", "int4-c+a8t~shift~migrate"]
)
def test_the_zoo_with_what_is_made_for_some_layers_alone(
    trained: tuple[nn.Module, OpGraph, Calibration, Any], scheme: str
) -> None:
    model, graph, calibration, call = trained
    chosen = (
        {
            layer.name
            for layer in graph.quantizable
            if layer.sees == "text-only"
            and (found := calibration.get(layer.name))
            and found.first is not None
        }
        if "bos" in scheme
        else {"transformer_blocks.0.ff.net.2"}
    )
    plan = {layer.name: Scheme.parse(scheme) for layer in graph.quantizable if layer.name in chosen}
    if not plan:
        pytest.skip("this model has no layer of the kind")

    packed = pack(copy.deepcopy(model), plan, graph, calibration)

    compare(model, packed, plan, graph, calibration, call)


class Skip(nn.Module):
    """Two feature maps of different range, concatenated before a linear layer and before a
    convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.join = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(10, 5, 3, padding=1),
        )

    def forward(self, sample: Tensor) -> Tensor:
        return self.join(torch.cat([self.a(sample), 9 * self.b(sample)], 1))


@pytest.mark.parametrize(
    "scheme", ["uint4-c", "int8-c+a8", "uint3-g4+a8t", "km2-c", "int4-c+a8~balance"]
)
def test_a_layer_behind_a_skip_has_scales_for_each_part_of_its_input(scheme: str) -> None:
    model, call = Skip().eval(), Call((torch.randn(2, 3, 6, 6),), {}, 0)
    found = extract(model, {"sample": call.args[0]})
    graph = OpGraph(
        found.model,
        tuple(replace(x, splits=(4, 6), sees="image") if x.name == "join" else x for x in found),
        found.ops,
        found.edges,
        found.blocks,
    )
    calibration = calibrate(model, graph, [call])

    packed = pack(copy.deepcopy(model), {"join": Scheme.parse(scheme)}, graph, calibration)

    assert len(packed_layers(packed)["join"].parts) == 2
    compare(model, packed, {"join": Scheme.parse(scheme)}, graph, calibration, call)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose2d(3, 4, 2, 2),
        lambda: nn.Conv1d(3, 4, 3),
        lambda: nn.Conv2d(4, 4, 3, groups=2, padding="same"),
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    ],
)
@pytest.mark.parametrize("scheme", ["uint4-c", "int8-c+a8"])
def test_other_convolutions_are_packed_too(make: Any, scheme: str) -> None:
    model = nn.Sequential(make()).eval()
    x = torch.randn(2, model[0].in_channels, *(7,) * (model[0].weight.ndim - 2))
    graph = extract(model, {"input": x})
    with simulate(model, Plan.uniform(graph, scheme), graph):
        expected = model(x)

    with torch.no_grad():
        torch.testing.assert_close(
            pack(model, Plan.uniform(graph, scheme), graph)(x),
            expected.detach(),
            rtol=0,
            atol=LAYER * float(expected.detach().abs().max()),
        )


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("scheme", ["uint4-c", "int3-c", "uint8-t", "e2m1-c", "km2-c"])
def test_the_bytes_are_those_of_the_plan(case: Case, scheme: str) -> None:
    model, graph, _ = case
    plan = Plan.uniform(graph, scheme)

    apply(model, plan, graph)

    for name, layer in packed_layers(model).items():
        bits = plan.layers[name].stored_bits(graph.layer(name).weight_shape)
        spare = 2 * layer.shape[0]  # a row begins at a byte, a plane of it too
        assert (
            bits / 8 - 1 <= sum(part.stored_bytes for part in layer.weights) <= bits / 8 + spare
        ), name


def test_casting_a_model_casts_what_computes_and_leaves_what_is_stored(case: Case) -> None:
    model, graph, calibration = case
    apply(
        model,
        Plan.uniform(graph, "uint4-c+a8"),
        graph,
        QuantizedWeights(model, graph, calibration),
    )
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    model.to(torch.bfloat16)

    assert {n: (b.dtype, torch.equal(b, before[n])) for n, b in model.named_buffers()} == {
        n: (b.dtype, True) for n, b in before.items()
    }
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = {name: value.bfloat16() for name, value in plain_inputs().items()}
    with torch.no_grad():
        assert model(**inputs).dtype == torch.bfloat16


# ------------------------------------------------------------------------------- as torch's modules


def test_a_copy_computes_the_same_bits_and_shares_nothing(case: Case) -> None:
    model, graph, calibration = case
    apply(
        model,
        Plan.uniform(graph, "uint4-c+a8"),
        graph,
        QuantizedWeights(model, graph, calibration),
    )

    twin = copy.deepcopy(model)

    assert torch.equal(run(twin, plain_calls(1)[0]), run(model, plain_calls(1)[0]))
    assert not {b.data_ptr() for b in model.buffers()} & {b.data_ptr() for b in twin.buffers()}


@pytest.mark.parametrize(
    "scheme", ["uint4-c", "int8-c+a8", "uint3-g4+a8", "nvfp4", "km2-c", "uint4-c+ae4m3"]
)
def test_a_state_dict_comes_back(case: Case, source: Case, scheme: str) -> None:
    model, graph, calibration = case
    pack(model, Plan.uniform(graph, scheme), graph, calibration)
    torch.manual_seed(9)
    other = pack(PlainDenoiser().eval(), Plan.uniform(graph, scheme), graph, calibration)

    other.load_state_dict(model.state_dict())

    assert torch.equal(run(other, plain_calls(1)[0]), run(model, plain_calls(1)[0]))


@pytest.mark.parametrize(
    "scheme", ["uint4-c", "int8-c+a8", "uint3-g4+a8t", "mxfp4", "int8-c+ae4m3"]
)
def test_a_graph_without_breaks_is_traced_and_computes_the_same(scheme: str) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(2), nn.Linear(16, 5)).eval(),
        torch.randn(3, 2, 6, 6),
    )
    graph = extract(model, {"input": x})
    pack(model, Plan.uniform(graph, scheme), graph, calibrate(model, graph, [Call((x,), {}, 0)]))

    with torch.no_grad():
        made = torch.compile(model, backend="eager", fullgraph=True)(x)

        torch.testing.assert_close(made, model(x), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_inductor_compiles_a_packed_model(case: Case) -> None:
    model, graph, calibration = case
    apply(model, Plan.uniform(graph, "uint4-c"), graph, QuantizedWeights(model, graph, calibration))

    with torch.no_grad():
        made = torch.compile(model, fullgraph=True)(**plain_inputs())

        torch.testing.assert_close(made, model(**plain_inputs()), rtol=1e-4, atol=1e-5)


def test_offloaded_layers_come_when_they_are_called(case: Case) -> None:
    from accelerate import cpu_offload

    model, graph, calibration = case
    apply(
        model,
        Plan.uniform(graph, "uint4-c+a8"),
        graph,
        QuantizedWeights(model, graph, calibration),
    )
    expected = run(model, plain_calls(1)[0])

    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)

    assert next(iter(packed_layers(model).values())).parts[0].codes.is_meta
    assert torch.equal(run(model, plain_calls(1)[0]), expected)


def test_an_adapter_stands_on_top_of_a_packed_layer_and_learns(case: Case) -> None:
    model, graph, _ = case
    apply(model, Plan.uniform(graph, "int4-c"), graph)

    class Adapter(nn.Module):
        def __init__(self, base: QuantLinear) -> None:
            super().__init__()
            self.base, self.down, self.up = (
                base,
                nn.Linear(base.in_features, 2, bias=False),
                nn.Linear(2, base.out_features, bias=False),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    layer = packed_layers(model)["blocks.0.ff.2"]
    assert isinstance(layer, QuantLinear)
    before, adapter = run(model, plain_calls(1)[0]), Adapter(layer)
    nn.init.zeros_(adapter.up.weight)
    model.blocks[0].ff[2] = adapter

    assert torch.equal(run(model, plain_calls(1)[0]), before)
    model(**plain_inputs()).square().sum().backward()
    assert adapter.up.weight.grad is not None
    assert adapter.up.weight.grad.abs().sum() > 0


def test_gradients_pass_through_packed_layers_as_through_the_widened_weight(case: Case) -> None:
    model, graph, _ = case
    apply(model, Plan.uniform(graph, "int4-c"), graph)
    layer, x = packed_layers(model)["blocks.0.ff.0"], torch.randn(3, 8, requires_grad=True)

    layer(x).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))


# ---------------------------------------------------------------------------------- what is refused


def test_a_layer_without_a_kernel_is_said_with_its_cost_or_refused(case: Case) -> None:
    model, graph, _ = case
    plan = {"blocks.0.ff.0": Scheme.parse("int4-g4+a8"), "blocks.0.ff.2": Scheme.parse("int4-c+a8")}

    with pytest.raises(
        QSearchError,
        match=r"cpu has no kernel for int4-g4\+a8 \(1\), first at blocks\.0\.ff\.0: use int",
    ):
        apply(model, plan, graph, kernels="required")
    assert packed_layers(model) == {}
    with pytest.warns(DequantizeFallbackWarning, match="no faster than full precision"):
        apply(model, plan, graph)


def test_a_plan_that_has_its_kernels_is_applied_without_a_word(case: Case) -> None:
    model, graph, _ = case

    apply(model, Plan.uniform(graph, "uint4-c+a8"), graph, kernels="required")

    assert all("cpu" in layer.devices for layer in packed_layers(model).values())


def test_a_plan_of_another_graph_and_a_layer_that_is_none_are_refused(case: Case) -> None:
    model, graph, _ = case
    other = extract(PlainDenoiser(blocks=2), plain_inputs())

    with pytest.raises(
        QSearchError,
        match=f"the plan was made for graph {other.id}, PlainDenoiser is graph {graph.id}",
    ):
        apply(model, Plan.uniform(other, "uint4-c"), graph)
    with pytest.raises(QSearchError, match=r"no layer 'blocks\.0\.ff\.1'"):
        apply(model, {"blocks.0.ff.1": Scheme.parse("uint4-c")}, graph)


def test_a_class_with_a_forward_of_its_own_is_refused_by_name(case: Case) -> None:
    class Loud(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, graph, _ = case
    model.time_embed = Loud(1, 8)

    with pytest.raises(QSearchError, match="time_embed is Loud: keep it"):
        apply(model, Plan.uniform(graph, "uint4-c"), graph)


def test_an_empty_batch_and_strides_and_half_precision_go_through(case: Case) -> None:
    model, graph, calibration = case
    apply(
        model,
        Plan.uniform(graph, "uint4-c+a8"),
        graph,
        QuantizedWeights(model, graph, calibration),
    )
    layer, conv = packed_layers(model)["blocks.0.ff.0"], packed_layers(model)["conv_in"]
    x = torch.randn(5, 8)

    with torch.no_grad():
        assert layer(torch.empty(0, 8)).shape == (0, 16)
        assert conv(torch.empty(0, 2, 4, 4)).shape == (0, 8, 4, 4)
        assert torch.equal(layer(x.T.contiguous().T), layer(x))
        for dtype in (torch.float16, torch.bfloat16):
            made = layer(x.to(dtype))
            assert made.dtype == dtype
            torch.testing.assert_close(made.float(), layer(x), rtol=0, atol=0.05)
