"""Reconstruction block by block: never worse than nearest rounding, better where it learns, and
what is learnt is what `simulate` runs.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qsearch.choices.fake_quantization import fake_quantize_between, lsq_fake_quantize
from qsearch.choices.floats import FloatFormat
from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.measure.quantized_weights import QuantizedWeights
from qsearch.measure.reconstruction import Reconstruction, reconstruct
from qsearch.measure.simulation import simulate
from tests.models import PlainDenoiser, plain, plain_calls, tiny_unet, unet_inputs

Case = tuple[PlainDenoiser, OpGraph]


@pytest.fixture(scope="module")
def case() -> Case:
    return plain()


def uniform(graph: OpGraph, scheme: str) -> dict[str, Scheme]:
    return {layer.name: Scheme.parse(scheme) for layer in graph.quantizable}


def learnt(case: Case, scheme: str, order: str = "separate", steps: int = 60) -> Reconstruction:
    return reconstruct(*case, uniform(case[1], scheme), plain_calls(4), order=order, steps=steps)


@pytest.mark.parametrize("order", ["separate", "joint"])
@pytest.mark.parametrize(
    "scheme",
    [
        "uint3-c+a4t@adaround",
        "e2m1-g8+a6@adaround_scaled",
        "uint2-t+a8c~balance@adaround",
        "int3-g5+a4t",
    ],
)
def test_no_block_s_output_is_further_from_full_precision_than_with_nearest_rounding(
    case: Case, scheme: str, order: str
) -> None:
    made = learnt(case, scheme, order, steps=8)

    assert [b.block for b in made.blocks if not b.after <= b.before] == []
    assert all(b.before > 0 for b in made.blocks)


@pytest.mark.parametrize(
    ("scheme", "order"),
    [("uint3-c+a6t@adaround", "separate"), ("e2m1-g8+a6t@adaround_scaled", "joint")],
)
def test_learning_makes_the_whole_model_s_output_nearer(
    case: Case, scheme: str, order: str
) -> None:
    model, graph = case
    made = learnt(case, scheme, order, steps=100)
    plan, plain_ = uniform(graph, scheme), uniform(graph, scheme.partition("@")[0])
    nearest = QuantizedWeights(model, graph, made.weights.calibration)

    errors = []
    for layers, weights in ((plain_, nearest), (plan, made.weights)):
        with torch.no_grad():
            truth = [model(**c.kwargs) for c in plain_calls(4)]
            with simulate(model, layers, graph, weights):
                errors.append(
                    sum(
                        float((model(**c.kwargs) - y).square().sum())
                        for c, y in zip(plain_calls(4), truth, strict=True)
                    )
                )

    assert errors[1] < 0.8 * errors[0]


def test_learnt_weights_lie_on_the_grid_of_their_scheme(case: Case) -> None:
    model, graph = case
    made = learnt(case, "uint3-c@adaround")

    moved = 0
    for layer in graph.quantizable:
        grid = quantize(
            model.get_submodule(layer.name).weight.data,
            Scheme.parse("uint3-c"),
            axis=layer.channel_axis,
        )
        got = made.weights.get(layer.name, Scheme.parse("uint3-c@adaround"))
        levels = torch.stack(
            [
                type(grid.code)(
                    torch.full_like(grid.code.codes, c), grid.code.scale, grid.code.zero
                ).values()
                for c in range(8)
            ]
        )
        off = (got.flatten(1) - levels[:, :, 0]).abs().amin(0)
        assert float(off.max()) < 1e-6, layer.name
        moved += int((got != grid.dequantize()).sum())
    assert moved > 20


def test_what_is_learnt_can_be_stored(case: Case) -> None:
    model, _ = case
    scheme = Scheme.parse("uint3-c+a8t~balance@adaround")
    made = learnt(case, str(scheme), steps=20)

    (part,) = made.weights.codes("blocks.0.ff.0", scheme)
    input_quantizer = made.weights.input_quantizer("blocks.0.ff.0", scheme)

    assert input_quantizer is not None
    assert not torch.equal(
        part.code.codes[:, 0],
        quantize(
            input_quantizer.weight(model.blocks[0].ff[0].weight.data), scheme_without_method(scheme)
        ).code.codes[:, 0],
    )
    torch.testing.assert_close(
        made.weights.get("blocks.0.ff.0", scheme), input_quantizer.restore_weight(part.dequantize())
    )


def scheme_without_method(scheme: Scheme) -> Scheme:
    return Scheme.parse(str(scheme).partition("@")[0])


def test_inputs_of_a_block_are_those_that_the_rounded_blocks_before_it_give(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    own = simulate

    def watched(m: object, plan: dict[str, Scheme], *rest: object) -> object:
        seen.append(set(plan))
        return own(m, plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("qsearch.measure.reconstruction.simulate", watched)
    learnt(case, "uint3-c@adaround", steps=2)

    assert seen[0] == set()
    assert all(a < b for a, b in pairwise(seen))


def test_the_model_is_left_as_it_was(case: Case) -> None:
    model, _ = case
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    learnt(case, "uint3-c+a4t@adaround", steps=4)

    assert [
        n
        for n, p in model.named_parameters()
        if not torch.equal(p, before[n]) or p.grad is not None
    ] == []
    assert [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_the_same_seed_learns_the_same_bits(case: Case) -> None:
    one, two = (learnt(case, "uint3-c+a4t@adaround", "joint", steps=10) for _ in range(2))

    assert one.blocks == two.blocks


def test_learning_the_range_of_an_input_at_four_bits_clips_it(case: Case) -> None:
    _, graph = case
    made = learnt(case, "keep+a4t", steps=100)
    scheme = Scheme.parse("keep+a4t")

    narrowed = [
        n
        for n in uniform(graph, "keep")
        if made.weights.input_quantizer(n, scheme).inputs.high.max()
        < 0.99 * made.weights.calibration[n].high.max()
    ]  # type: ignore[union-attr]

    assert len(narrowed) >= 2


@pytest.mark.parametrize("form", ["8", "4", "e2m3", "e4m3"])
def test_rounding_with_gradients_rounds_as_rounding_does(form: str) -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 2
    low, high = torch.tensor(-2.5), torch.tensor(3.0)

    torch.testing.assert_close(
        lsq_fake_quantize(x, low, high, form),
        fake_quantize_between(x, low, high, form),
        rtol=1e-5,
        atol=1e-5,
    )


def test_the_gradient_of_a_range_is_lsq_s() -> None:
    x = torch.tensor([0.3, -0.21, 9.0, -9.0])
    stretch = torch.ones((), requires_grad=True)
    low, high = torch.tensor(-1.5), torch.tensor(1.5)

    (
        lsq_fake_quantize(x, low, high, "4", stretch) * torch.tensor([1.0, 10.0, 100.0, 1000.0])
    ).sum().backward()

    scale, zero = float(torch.tensor(0.2).half()), 8
    inside = [scale * (round(float(v) / scale + zero) - zero - float(v) / scale) for v in x[:2]]
    ends = [scale * (15 - zero), -scale * zero]
    expected = sum(w * g for w, g in zip((1, 10, 100, 1000), (*inside, *ends), strict=True))
    assert stretch.grad is not None
    assert float(stretch.grad) == pytest.approx(expected, rel=1e-3)


def test_floats_are_clipped_at_their_largest_level() -> None:
    x = torch.tensor([5.0], requires_grad=True)

    made = lsq_fake_quantize(x, torch.tensor(-1.0), torch.tensor(1.0), "e2m3")
    made.backward()

    assert float(made.detach()) == pytest.approx(
        float(torch.tensor(1 / FloatFormat.named("e2m3").own_top).half())
        * FloatFormat.named("e2m3").own_top,
        rel=1e-3,
    )
    assert x.grad is not None
    assert float(x.grad) == 0


def test_layers_outside_repeated_blocks_and_parts_of_a_long_skip_are_learnt_too() -> None:
    from qsearch.graphs.extraction import extract
    from qsearch.measure.pipelines import Call

    torch.manual_seed(4)
    model = tiny_unet().eval()
    graph = extract(model, unet_inputs())
    calls = [Call((), unet_inputs(), i) for i in range(2)]
    split = [layer.name for layer in graph if layer.parts]
    assert split

    made = reconstruct(model, graph, uniform(graph, "uint3-c@adaround"), calls, steps=4)

    assert {
        name
        for b in made.blocks
        for name in uniform(graph, "keep")
        if name == b.block or name.startswith(b.block + ".")
    } == set(uniform(graph, "keep"))
    with simulate(model, uniform(graph, "uint3-c@adaround"), graph, made.weights):
        assert torch.isfinite(model(**unet_inputs()).sample).all()


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("uint4-c@hqq", {}, "no layer of the plan has any of them"),
        (
            "uint4-c@adaround",
            {"order": "jointly"},
            "order: input should be 'none', 'separate' or 'joint'; given 'jointly'",
        ),
        (
            "uint4-c@adaround",
            {"steps": 0},
            "steps: input should be greater than or equal to 1; given 0",
        ),
        ("uint4-c@adaround", {"order": "none"}, "takes an order .separate or joint."),
    ],
)
def test_what_can_t_be_reconstructed_is_said(
    case: Case, scheme: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(QSearchError, match=message):
        reconstruct(*case, uniform(case[1], scheme), plain_calls(1), **settings)


def test_the_block_error_that_is_told_is_what_the_block_does(case: Case) -> None:
    """The slow twin: the first unit is a single layer on the model's own input, and its error can
    be computed by hand.
    """
    model, _ = case
    made = learnt(case, "uint3-c@adaround", steps=30)

    x: Tensor = torch.cat([c.kwargs["sample"] for c in plain_calls(4)])
    with torch.no_grad():
        truth = model.conv_in(x)
        errors = [
            float(
                (F.conv2d(x, w, model.conv_in.bias, padding=1) - truth).square().sum()
                / truth.square().sum()
            )
            for w in (
                quantize(model.conv_in.weight.data, Scheme.parse("uint3-c")).dequantize(),
                made.weights.get("conv_in", Scheme.parse("uint3-c@adaround")),
            )
        ]

    [block] = [b for b in made.blocks if b.block == "conv_in"]
    assert [block.before, block.after] == pytest.approx(errors, rel=1e-4)
