"""Calibration where it is asked for: profiling, estimators and evaluation carry out schemes that
choose by inputs; what can't be is said by name.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qsearch.choices.fake_quantization import fake_quantize_between
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.graphs.extraction import extract
from qsearch.measure import quantized_weights
from qsearch.measure.calibration import has_rows, rows_of
from qsearch.measure.pipelines import Call
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights, calibrated_weights
from qsearch.measure.simulation import simulate
from tests.models import PlainDenoiser, plain, plain_calls

Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture(scope="module")
def case() -> Case:
    return plain()


@pytest.mark.parametrize("estimator", ["sweep", "probe", "fisher", "weight_error"])
def test_every_estimator_prices_schemes_that_choose_by_inputs(case: Case, estimator: str) -> None:
    table = profile(
        *case, ["uint3-c", "uint3-c@gptq"], plain_calls(2), estimator=estimator, probes=2
    )

    values = table.values(table.metrics[0])
    assert set(values) == {layer.name for layer in case[1].quantizable}
    assert all(row["uint3-c@gptq"] > 0 for row in values.values())
    assert sum(row["uint3-c@gptq"] != row["uint3-c"] for row in values.values()) > 5


def test_the_sweep_prices_static_inputs(case: Case) -> None:
    values = profile(*case, ["keep+a8t", "keep+a4t"], plain_calls(2)).values("noise")

    assert all(row["keep+a4t"] > row["keep+a8t"] > 0 for row in values.values())


def test_other_calls_may_choose_than_those_that_measure(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    own = quantized_weights.calibrate

    def watched(
        model: object, graph: object, calls: list[Call], *rest: object, **settings: object
    ) -> object:
        seen.append([c.step for c in calls])
        return own(model, graph, calls, *rest, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(quantized_weights, "calibrate", watched)
    chosen = [Call((), c.kwargs, 70 + c.step) for c in plain_calls(2)]
    profile(*case, ["keep+a8t"], plain_calls(1), calibration=chosen)
    profile(*case, ["keep+a8t"], plain_calls(1))
    profile(*case, ["uint8-c"], plain_calls(1), calibration=chosen)

    assert seen == [[70, 71], [0]]  # nothing is run where no scheme asks


def test_only_what_asks_is_calibrated_and_moments_only_where_rounding_goes_by_them(
    case: Case,
) -> None:
    wanted = {
        "conv_in": [Scheme.parse("keep+a8t")],
        "conv_out": [Scheme.parse("uint4-c+a8")],
        "blocks.0.ff.0": [Scheme.parse("uint4-c~balance")],
    }

    weights = calibrated_weights(*case, wanted, plain_calls(1))

    assert set(weights.calibration) == {"conv_in", "blocks.0.ff.0"}
    assert {inputs.moments for inputs in weights.calibration.values()} == {None}
    moments = (
        calibrated_weights(*case, {"conv_in": [Scheme.parse("uint4-c@gptq")]}, plain_calls(1))
        .calibration["conv_in"]
        .moments
    )
    assert moments is not None


def test_no_call_to_choose_by_is_an_error(case: Case) -> None:
    with pytest.raises(QSearchError, match="calibration needs at least one recorded call"):
        calibrated_weights(*case, {"conv_in": [Scheme.parse("keep+a8t")]}, [])


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Conv1d(4, 6, 3, 2, 1), (9,)),
        (nn.Conv2d(4, 6, 3, 2, 1, 2), (9, 8)),
        (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), (0, 1, 2), (1, 2, 1)), (5, 7, 9)),
    ],
)
def test_rows_times_the_weight_are_the_convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, sizes: tuple[int, ...]
) -> None:
    x = torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0))

    rows = rows_of(x, module)

    assert rows is not None
    assert module.bias is not None
    made = rows @ module.weight.flatten(1).T + module.bias
    torch.testing.assert_close(made, module(x).movedim(1, -1).flatten(0, -2))


def test_a_convolution_that_pads_by_itself_has_no_rows() -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    assert not has_rows(WanCausalConv3d(4, 4, 3, padding=1))


class Odd(nn.Module):
    """A grouped convolution, a transposed one, and a layer that runs only when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.up, self.spare = (
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ConvTranspose2d(4, 2, 2),
            nn.Conv2d(2, 2, 1),
        )

    def forward(self, sample: Tensor, more: bool = True) -> Tensor:
        made: Tensor = self.up(self.grouped(sample))
        return self.spare(made) if more else made


@pytest.fixture(scope="module")
def odd() -> tuple[Odd, OpGraph, list[Call]]:
    torch.manual_seed(5)
    model = Odd().eval()
    sample = torch.randn(2, 4, 6, 6)
    return (
        model,
        extract(model, {"sample": sample}),
        [Call((), {"sample": sample, "more": False}, 0)],
    )


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (
            "grouped",
            "uint4-c@gptq",
            (
                r"@gptq is for linear layers and convolutions in one group, padded with zeros; "
                r"grouped is Conv2d"
            ),
        ),
        (
            "up",
            "uint4-c@adaround",
            (
                r"@adaround is for linear layers and convolutions in one group, padded with "
                r"zeros; up is ConvTranspose2d"
            ),
        ),
        (
            "grouped",
            "uint4-c+a8~balance",
            r"~balance is for linear layers and convolutions in one group; grouped is Conv2d",
        ),
        ("up", "uint4-c+a8t~shift", r"~shift is for linear layers; up is ConvTranspose2d"),
        (
            "spare",
            "uint4-c+a8t",
            r"calls for calibration run 1 of 2 layers, not spare: record calls that run them",
        ),
    ],
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_layer_that_can_t_have_a_scheme_is_named_with_the_reason(
    odd: tuple[Odd, OpGraph, list[Call]], layer: str, scheme: str, message: str, calibrated: bool
) -> None:
    model, graph, calls = odd
    choice = Scheme.parse(scheme)
    other = Scheme.parse("keep+a8t")
    wanted = {layer: [choice], "up": [other, choice] if layer == "up" else [other]}
    if layer == "spare" and not calibrated:
        message = "needs to know the inputs of spare; give QuantizedWeights"

    with pytest.raises(QSearchError, match=message):
        weights = (
            calibrated_weights(model, graph, wanted, calls)
            if calibrated
            else QuantizedWeights(model, graph)
        )
        simulate(model, {layer: choice}, graph, weights).__enter__()


@pytest.mark.parametrize("layer", ["grouped", "up"])
def test_odd_layers_may_have_what_does_not_multiply_rows(
    odd: tuple[Odd, OpGraph, list[Call]], layer: str
) -> None:
    model, graph, calls = odd
    choice = Scheme.parse("uint4-c+a8t")
    own = model(**calls[0].kwargs).detach()

    with (
        torch.no_grad(),
        simulate(
            model,
            {layer: choice},
            graph,
            calibrated_weights(model, graph, {layer: [choice]}, calls),
        ),
    ):
        made = model(**calls[0].kwargs)

    assert 0 < float((made - own).abs().max()) < float(own.abs().max())


def test_weights_that_are_not_finite_name_their_layer_and_leave_the_model_as_it_was(
    odd: tuple[Odd, OpGraph, list[Call]],
) -> None:
    model, graph, _ = odd
    model.spare.weight.data[0, 0] = torch.nan
    try:
        with pytest.raises(
            QSearchError, match="weights must be finite to be quantized; spare holds 1 that are not"
        ):
            simulate(
                model, {"up": Scheme.parse("int4-c"), "spare": Scheme.parse("int4-c")}, graph
            ).__enter__()
        assert torch.isfinite(model.up.weight).all()
    finally:
        model.spare.weight.data[0, 0] = 0.5


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("int9-c", "did you mean 'int"),
        ("e5m9-c", "with format 'e5m9'"),
        ("int4-g0", "a scheme is FORMAT"),
        ("int4-c+a5", "with activation '5'"),
        ("int4-c@nothing", "nothing"),
    ],
)
def test_schemes_that_nobody_can_carry_out_are_refused_before_anything_changes(
    case: Case, scheme: str, message: str
) -> None:
    with pytest.raises(QSearchError, match=message):
        simulate(
            case[0], {"conv_in": Scheme.parse("uint4-c"), "conv_out": Scheme.parse(scheme)}, case[1]
        ).__enter__()

    assert [n for n, m in case[0].named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_a_group_that_does_not_divide_the_row_costs_its_scale_and_no_codes_but_its_own(
    case: Case,
) -> None:
    model, graph = case
    layer = graph.layer("conv_in")  # rows of 18
    scheme = Scheme.parse("int4-g8")

    with simulate(model, {"conv_in": scheme}, graph) as inside:
        assert inside.get_submodule("conv_in").weight.shape == layer.weight_shape
    assert scheme.stored_bits(layer.weight_shape) == 8 * (4 * 18 + 3 * 16)


def test_the_parts_of_a_concatenated_input_have_ranges_of_their_own(case: Case) -> None:
    model, graph = case
    layers = tuple(
        replace(x, splits=(1, 1), sees="image") if x.name == "conv_in" else x for x in graph.layers
    )
    skip = OpGraph(graph.model, layers)
    call = plain_calls(1)[0]
    call.kwargs["sample"][:, 1] *= 50
    choice, own = {"conv_in": Scheme.parse("keep+a4t")}, call.kwargs["sample"]
    heard: list[Tensor] = []

    with (
        torch.no_grad(),
        simulate(
            model,
            choice,
            skip,
            calibrated_weights(model, skip, {"conv_in": list(choice.values())}, [call]),
        ),
    ):
        handle = model.conv_in.register_forward_hook(lambda _, args, y: heard.append(args[0]))
        model(**call.kwargs)
        handle.remove()

    for part in range(2):
        expected = fake_quantize_between(own[:, part], own[:, part].min(), own[:, part].max(), "4")
        torch.testing.assert_close(heard[0][:, part], expected, rtol=1e-5, atol=1e-5)
