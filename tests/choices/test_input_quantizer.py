"""Inputs in simulate: rounded as the scheme says, moved and moved back, a first token left out;
refused where it can't be, undone whatever happens.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsearch.choices.fake_quantization import fake_quantize
from qsearch.choices.input_quantizer import needs_inputs
from qsearch.choices.quantization import quantize
from qsearch.choices.statistics import LayerInputs
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.measure.calibration import calibrate
from qsearch.measure.pipelines import Call
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.simulation import simulate
from tests.models import CONTEXT, PlainDenoiser, plain, plain_calls, plain_inputs

TEXT, IMAGE, CONV = "blocks.0.attn1.to_k", "blocks.0.ff.2", "conv_in"


@pytest.fixture(scope="module")
def case() -> tuple[PlainDenoiser, OpGraph, dict[str, LayerInputs]]:
    """A denoiser, its graph, and its layers' inputs on text whose first token is the same for
    all.
    """
    model, graph = plain()
    return model, graph, calibrate(model, graph, causal_calls())


def causal_calls() -> list[Call]:
    calls = plain_calls(3)
    for call in calls:
        call.kwargs["context"][:, 0] = 8 * torch.linspace(-1, 1, CONTEXT)
    return calls


def inside(
    model: nn.Module,
    graph: OpGraph,
    plan: dict[str, str],
    weights: QuantizedWeights,
    inputs: dict[str, Any] | None = None,
) -> Tensor:
    with simulate(model, {k: Scheme.parse(v) for k, v in plan.items()}, graph, weights):
        found: Tensor = model(**(inputs or causal_calls()[0].kwargs))
    return found


def layer_output(
    case: tuple[PlainDenoiser, OpGraph, dict[str, LayerInputs]], layer: str, scheme: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(a layer's input in full precision, its output then, its output where it alone has
    `scheme`).
    """
    model, graph, calibration = case
    heard: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _, args, y: heard.append((args[0].detach(), y.detach()))
    )
    model(**causal_calls()[0].kwargs)
    handle.remove()
    weights, module = QuantizedWeights(model, graph, calibration), model.get_submodule(layer)
    with simulate(model, {layer: Scheme.parse(scheme)}, graph, weights):
        return *heard[0], module(heard[0][0]).detach()


def naive(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Asymmetric integers between two ends, one number after the other."""
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = float(torch.tensor((high - low) / top).half())
    zero = min(max(round(-low / scale), 0), top)
    flat = [scale * (min(max(round(float(v) / scale + zero), 0), top) - zero) for v in x.flatten()]
    return torch.tensor(flat).reshape(x.shape)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_token_is_rounded_between_its_own_ends(case: Any, bits: int) -> None:
    x, _, found = layer_output(case, IMAGE, f"keep+a{bits}")
    module = case[0].get_submodule(IMAGE)

    rounded = torch.stack(
        [
            torch.stack([naive(t, float(t.min()), float(t.max()), bits) for t in picture])
            for picture in x
        ]
    )

    torch.testing.assert_close(found, module(rounded), rtol=1e-4, atol=1e-4)


def test_a_convolution_s_token_is_the_whole_picture(case: Any) -> None:
    x, _, found = layer_output(case, CONV, "keep+a4")

    rounded = torch.stack([naive(p, float(p.min()), float(p.max()), 4) for p in x])

    torch.testing.assert_close(found, case[0].get_submodule(CONV)(rounded), rtol=1e-4, atol=1e-4)


def test_static_ranges_are_those_of_calibration_and_clip_what_lies_beyond(case: Any) -> None:
    model, graph, calibration = case
    everything = torch.cat([c.kwargs["sample"] for c in causal_calls()])
    loud = causal_calls()[0].kwargs | {"sample": 3 * causal_calls()[0].kwargs["sample"]}
    heard: list[Tensor] = []

    with simulate(
        model, {CONV: Scheme.parse("keep+a8t")}, graph, QuantizedWeights(model, graph, calibration)
    ):
        handle = model.conv_in.register_forward_hook(lambda _, args, y: heard.append(args[0]))
        model(**loud)
        handle.remove()

    expected = naive(loud["sample"], float(everything.min()), float(everything.max()), 8)
    torch.testing.assert_close(heard[0], expected, rtol=1e-4, atol=1e-4)
    assert float(heard[0].abs().max()) < 0.6 * float(loud["sample"].abs().max())


def test_each_channel_has_its_own_range_where_the_scheme_says_channel(case: Any) -> None:
    x, _, found = layer_output(case, CONV, "keep+a4c")
    everything = torch.cat([c.kwargs["sample"] for c in causal_calls()])

    channels = [
        naive(x[:, c], float(everything[:, c].min()), float(everything[:, c].max()), 4)
        for c in range(x.shape[1])
    ]

    torch.testing.assert_close(
        found, case[0].get_submodule(CONV)(torch.stack(channels, 1)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("form", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_fp8_inputs_are_torch_s_under_a_scale_of_the_token(
    case: Any, form: str, dtype: torch.dtype
) -> None:
    x, _, found = layer_output(case, IMAGE, f"keep+a{form}")
    top = torch.finfo(dtype).max

    unit = 2.0 ** math.floor(math.log2(top))
    scale = (x.abs().amax(-1, keepdim=True) / (top / unit)).half().float() / unit
    expected = case[0].get_submodule(IMAGE)((x / scale).clamp(-top, top).to(dtype).float() * scale)

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "scheme",
    [
        "keep+a8",
        "keep+a8t",
        "keep+a8c",
        "keep+ae4m3",
        "keep+ae3m4",
        "keep+a8t~balance",
        "keep+a8~balance15",
        "uint8-c+a8t~shift~migrate",
        "uint8-c+a8t~bos",
    ],
)
def test_eight_bits_change_little_and_something(case: Any, scheme: str) -> None:
    _, truth, found = layer_output(case, TEXT, scheme)

    error = float((found - truth).square().sum() / truth.square().sum())

    assert 0 < error < 2e-3


@pytest.mark.parametrize("grain", ["", "t", "c"])
def test_more_bits_of_the_input_mean_less_error(case: Any, grain: str) -> None:
    errors = []
    for bits in (4, 6, 8):
        _, truth, found = layer_output(case, IMAGE, f"keep+a{bits}{grain}")
        errors.append(float((found - truth).square().sum()))

    assert errors[0] > 4 * errors[1] > 16 * errors[2]


def test_the_first_token_is_as_it_was_and_the_others_have_a_range_without_it(case: Any) -> None:
    _, truth, plain_ = layer_output(case, TEXT, "uint4-c+a8t")
    _, _, found = layer_output(case, TEXT, "uint4-c+a8t~bos")

    torch.testing.assert_close(
        found[:, 0], truth[:, 0], rtol=2**-11, atol=1e-5
    )  # it is stored in half precision
    assert not torch.allclose(plain_[:, 0], truth[:, 0], rtol=1e-3)
    coarse, fine = (
        float((y - truth)[:, 1:].square().sum())
        for y in layer_outputs(case, TEXT, "keep+a4t", "keep+a4t~bos")
    )
    assert fine < 0.2 * coarse  # the first token, eight times louder, had set the range


def layer_outputs(case: Any, layer: str, *schemes: str) -> list[Tensor]:
    return [layer_output(case, layer, scheme)[2] for scheme in schemes]


def test_a_text_encoder_that_looks_both_ways_is_refused(case: Any) -> None:
    model, graph, _ = case
    both_ways = calibrate(
        model, graph, plain_calls(3)
    )  # the first token is another for each prompt

    with pytest.raises(
        QSearchError,
        match=r"blocks\.0\.attn1\.to_k can't have uint8-c\+a8t~bos: ~bos needs a causal text",
    ):
        simulate(
            model,
            {TEXT: Scheme.parse("uint8-c+a8t~bos")},
            graph,
            QuantizedWeights(model, graph, both_ways),
        ).__enter__()


def test_one_prompt_is_not_enough_to_call_an_encoder_causal(case: Any) -> None:
    model, graph, _ = case
    call = causal_calls()[0]
    call.kwargs["context"][:] = call.kwargs["context"][:1]

    assert calibrate(model, graph, [call], [TEXT])[TEXT].first is None


@pytest.mark.parametrize(
    ("layer", "scheme", "message"),
    [
        (IMAGE, "uint8-c+a8~bos", r"~bos is for layers that see text alone"),
        (CONV, "uint8-c+a8t~shift", r"~shift is for linear layers; conv_in is Conv2d"),
        (
            TEXT,
            "uint8-c+a8t~shift~bos",
            r"write ~bos~shift",
        ),
    ],
)
def test_a_transform_where_it_does_not_belong_is_refused_by_name(
    case: Any, layer: str, scheme: str, message: str
) -> None:
    model, graph, calibration = case

    with pytest.raises(QSearchError, match=message):
        simulate(
            model, {layer: Scheme.parse(scheme)}, graph, QuantizedWeights(model, graph, calibration)
        ).__enter__()


@pytest.mark.parametrize("scheme", ["keep+a8t", "keep+a8c", "uint4-c~balance", "keep+a8~shift"])
def test_what_needs_calibration_says_how_to_get_it(case: Any, scheme: str) -> None:
    model, graph, _ = case

    with pytest.raises(
        QSearchError,
        match=(
            r"needs to know the inputs of blocks\.0\.ff\.2; give QuantizedWeights\(model, graph, "
            r"calibrate"
        ),
    ):
        simulate(model, {IMAGE: Scheme.parse(scheme)}, graph).__enter__()


@torch.no_grad()
def balanced(case: Any, alpha: float) -> Tensor:
    """SmoothQuant by hand: rounded W s times rounded x / s."""
    x, _, _ = layer_output(case, IMAGE, "keep")
    module, inputs = case[0].get_submodule(IMAGE), case[2][IMAGE]
    s = inputs.low.abs().maximum(inputs.high.abs()) ** alpha / module.weight.abs().amax(0) ** (
        1 - alpha
    )
    s = s.half().float()
    weight = quantize(module.weight * s, Scheme.parse("uint4-c")).dequantize()
    moved = x / s
    rounded = torch.stack(
        [
            torch.stack([naive(t, float(t.min()), float(t.max()), 8) for t in picture])
            for picture in moved
        ]
    )
    return F.linear(rounded, weight, module.bias)


@pytest.mark.parametrize(
    ("scheme", "alpha"), [("uint4-c+a8~balance", 0.5), ("uint4-c+a8~balance15", 0.15)]
)
def test_balancing_is_smoothquant_s(case: Any, scheme: str, alpha: float) -> None:
    torch.testing.assert_close(
        layer_output(case, IMAGE, scheme)[2], balanced(case, alpha), rtol=1e-3, atol=1e-3
    )


def test_the_shift_goes_into_the_bias_in_full_precision(case: Any) -> None:
    x, _, found = layer_output(case, IMAGE, "uint3-c+a8t~shift")
    module, inputs = case[0].get_submodule(IMAGE), case[2][IMAGE]
    z = inputs.middle.half().float()
    weight = quantize(module.weight, Scheme.parse("uint3-c")).dequantize()

    rounded = naive(x - z, float((inputs.low - z).min()), float((inputs.high - z).max()), 8)

    torch.testing.assert_close(
        found, F.linear(rounded, weight, module.bias + module.weight @ z), rtol=1e-4, atol=1e-4
    )


def post_gelu() -> tuple[nn.Linear, OpGraph, list[Call]]:
    """A linear layer on GELU's outputs, whose channels differ in size: what TaQ-DiT is about."""
    from qsearch.graphs.extraction import extract

    dice = torch.Generator().manual_seed(3)
    size = torch.exp(0.8 * torch.randn(32, generator=dice))
    module = nn.Sequential(nn.Linear(32, 16))
    nn.init.normal_(module[0].weight, std=0.2, generator=dice)
    calls = [
        Call((F.gelu(1.5 * torch.randn(4, 20, 32, generator=dice)) * size,), {}, i)
        for i in range(3)
    ]
    return module, extract(module, {"input": calls[0].args[0]}), calls


def test_migration_lowers_the_error_of_four_bit_post_gelu_inputs() -> None:
    module, graph, calls = post_gelu()
    weights = QuantizedWeights(module, graph, calibrate(module, graph, calls))
    x = calls[0].args[0]
    truth = module(x)

    def error(scheme: str) -> float:
        with torch.no_grad(), simulate(module, {"0": Scheme.parse(scheme)}, graph, weights):
            return float((module(x) - truth).square().sum())

    assert error("uint8-c+a4t~migrate") < 0.6 * error("uint8-c+a4t")


@pytest.mark.parametrize(
    "scheme",
    ["uint4-c+a8", "uint4-c+a8t~balance", "uint4-c+a8t~shift~migrate", "keep+a8", "uint4-c@gptq"],
)
def test_afterwards_the_model_computes_the_same_bits(case: Any, scheme: str) -> None:
    model, graph, calibration = case
    before = model(**plain_inputs())
    weights = QuantizedWeights(model, graph, calibration)

    assert not torch.equal(inside(model, graph, {IMAGE: scheme}, weights, plain_inputs()), before)
    assert torch.equal(model(**plain_inputs()), before)


def test_an_exception_inside_removes_every_hook(case: Any) -> None:
    model, graph, calibration = case

    with (
        pytest.raises(ZeroDivisionError),
        simulate(
            model,
            {IMAGE: Scheme.parse("keep+a8"), CONV: Scheme.parse("uint4-c+a8t")},
            graph,
            QuantizedWeights(model, graph, calibration),
        ),
    ):
        raise ZeroDivisionError

    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_an_exception_while_entering_removes_every_hook(case: Any) -> None:
    model, graph, _ = case

    with (
        pytest.raises(QSearchError),
        simulate(model, {IMAGE: Scheme.parse("keep+a8"), CONV: Scheme.parse("keep+a8t")}, graph),
    ):
        raise AssertionError("the block must not begin")

    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_calibration_leaves_the_model_as_it_was_also_after_an_error(case: Any) -> None:
    model, graph, _ = case
    bad = Call((), plain_inputs() | {"sample": torch.full((3, 2, 4, 4), torch.nan)}, 0)

    with pytest.raises(
        QSearchError, match="calibration needs finite inputs; those of conv_in are not"
    ):
        calibrate(model, graph, [bad])

    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_calibration_without_a_call_is_refused(case: Any) -> None:
    with pytest.raises(QSearchError, match="calibration needs at least one recorded call"):
        calibrate(case[0], case[1], [])


def test_moments_are_the_mean_of_the_rows_that_a_weight_meets(case: Any) -> None:
    model, _, calibration = case
    x = torch.cat([c.kwargs["sample"] for c in causal_calls()])
    error = torch.randn(model.conv_in.weight.shape)

    by_moments = torch.einsum(
        "rc,cd,rd->r", error.flatten(1), calibration[CONV].moments, error.flatten(1)
    )

    by_running = F.conv2d(x, error, padding=1).square().mean((0, 2, 3))
    torch.testing.assert_close(by_moments, by_running, rtol=1e-4, atol=1e-5)


def test_records_move_with_a_shift_and_a_scale(case: Any) -> None:
    inputs = case[2][IMAGE]
    shift, scale = torch.randn(len(inputs.low)), torch.rand(len(inputs.low)) + 0.5

    moved = inputs.moved(shift, scale)

    n = 10_000
    root = torch.linalg.cholesky(
        inputs.moments.double()
        - torch.outer(inputs.mean, inputs.mean)
        + 1e-6 * torch.eye(len(shift))
    )
    x = torch.randn(n, len(shift), dtype=torch.double)
    x = (x - x.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(x.T, correction=0))
    ).T @ root.T + inputs.mean
    y = (x - shift) / scale
    torch.testing.assert_close((y.T @ y / n).float(), moved.moments, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(y.mean(0).float(), moved.mean, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "needs"),
    [
        ("keep", False),
        ("keep+a8", False),
        ("uint4-c@hqq", False),
        ("km3-c+a8", False),
        ("keep+a8t", True),
        ("int4-c+a8c", True),
        ("int4-c@gptq", True),
        ("int4-c~balance", True),
    ],
)
def test_a_scheme_says_whether_it_takes_calibration(scheme: str, needs: bool) -> None:
    assert needs_inputs(Scheme.parse(scheme)) is needs


@pytest.mark.parametrize(
    "scheme",
    ["keep+a8", "uint4-c+a8t~bos", "int4-c@gptq", "uint3-c@adaround", "km3-g8", "nvfp4+ae4m3"],
)
def test_layers_named_one_by_one_give_what_they_give_in_a_whole_plan(
    case: Any, scheme: str
) -> None:
    model, graph, calibration = case
    names = [TEXT, "blocks.0.attn1.to_v"]

    together = inside(
        model, graph, dict.fromkeys(names, scheme), QuantizedWeights(model, graph, calibration)
    )

    store = QuantizedWeights(model, graph, calibration)
    with (
        simulate(model, {names[1]: Scheme.parse(scheme)}, graph, store),
        simulate(model, {names[0]: Scheme.parse(scheme)}, graph, store),
    ):
        nested = model(**causal_calls()[0].kwargs)
    assert torch.equal(together, nested)


@pytest.mark.parametrize(("form", "bits"), [("4", 4), ("int4", 4), ("8", 8)])
def test_groups_of_channels_have_scales_of_their_own(form: str, bits: int) -> None:
    scheme = Scheme.parse(f"keep+a{form}g8")
    x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
    x[..., 8:16] *= 100  # a group of outliers, which the others do not hear of

    made = fake_quantize(x, scheme, None, -1)

    for place in (slice(0, 8), slice(8, 16), slice(16, 20)):
        alone = fake_quantize(x[..., place], Scheme.parse(f"keep+a{form}"), None, -1)
        torch.testing.assert_close(made[..., place], alone)
    grid = (2 * x.abs().amax() / (2**bits - 1)).item()
    assert (made[..., :8] - x[..., :8]).abs().max() < grid / 20


def test_groups_of_a_convolution_are_of_its_picture() -> None:
    x = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))

    made = fake_quantize(x, Scheme.parse("keep+aint4g8"), None, 1)

    for i, first in itertools.product(range(3), (0, 8)):
        part = x[i, first : first + 8]
        scale = (part.abs().max() / 7).half().float()
        expected = scale * (part / scale).round().clamp(-8, 7)
        torch.testing.assert_close(made[i, first : first + 8], expected)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("int4-c+a4g", "from 8 to 1024, a multiple of 8; given 'g'"),
        ("int4-c+a4g12", "given 'g12'"),
        ("int4-c+a4g08", "given 'g08'"),
        ("int4-c+a4g2048", "given 'g2048'"),
        ("int4-c+a4t8", "activation '4t8'"),
    ],
)
def test_a_group_of_channels_that_cannot_be_is_one_line(text: str, rule: str) -> None:
    with pytest.raises(QSearchError, match=rule):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["int4-g64+aint4g64", "uint4-c+a8g16~balance30", "keep+ae4m3g32"])
def test_groups_are_spelt_one_way(text: str) -> None:
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4", "mxfp6", "mxfp8"])
def test_inputs_in_a_block_format_are_its_blocks(form: str) -> None:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0.0
    weight = Scheme.parse(form)

    made = fake_quantize(x, Scheme.parse(f"keep+a{form}"), None, -1)

    for token, own in zip(x.flatten(0, 1), made.flatten(0, 1), strict=True):
        expected = quantize(token[None], weight).code.values().reshape(-1)
        if form == "nvfp4":  # its weight has a scale a tensor besides: other block scales, as good
            assert (own - token).norm() <= 1.1 * (expected - token).norm()
        else:
            torch.testing.assert_close(own, expected)
    assert torch.equal(made[0, 0], torch.zeros(64))


def test_a_token_in_blocks_does_not_depend_on_the_others() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("nvfp4+anvfp4")

    alone = fake_quantize(x[:1], scheme, None, -1)
    beside = fake_quantize(torch.cat([x[:1], 1e3 * x[1:]]), scheme, None, -1)

    assert torch.equal(alone[0], beside[0])
    assert str(scheme) == "nvfp4+anvfp4"
    assert (scheme.grain, scheme.activation_bits) == ("group16", 4)


def test_a_block_format_has_no_other_grain() -> None:
    for text in ("nvfp4+anvfp4t", "nvfp4+anvfp4g64", "keep+amxfp8c"):
        with pytest.raises(QSearchError, match="built in"):
            Scheme.parse(text)
