"""Methods that choose scales and rounding: each against a slow twin or the bound it promises, on
inputs whose channels hang together.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qsearch.choices.moments import columns_of, from_columns, output_error
from qsearch.choices.quantization import quantize, quantize_parts, to_groups
from qsearch.choices.quantizers import adaround, gptq, hqq, search
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme


def weight(rows: int = 8, columns: int = 24, seed: int = 0) -> torch.Tensor:
    dice = np.random.default_rng(seed)
    return torch.from_numpy(dice.standard_t(5, (rows, columns))).float()


def moments(columns: int = 24) -> torch.Tensor:
    dice = torch.Generator().manual_seed(1)
    x = torch.randn(500, columns, generator=dice) @ (
        torch.eye(columns) + 2 * torch.randn(columns, columns, generator=dice) / columns**0.5
    )
    return x.T @ x / len(x)


def output(scheme: str, w: torch.Tensor, square: torch.Tensor) -> float:
    return float(
        output_error(
            quantize(w, Scheme.parse(scheme), moments=square).dequantize() - w, square
        ).sum()
    )


def naive_search(group: torch.Tensor, top: int) -> float:
    """Least sum of |error|^2.4 over the shrunken ranges of one group of asymmetric codes, one
    weight after the other.
    """
    best = math.inf
    for shrink in search.SHRINK:
        low, high = min(float(group.min()) * shrink, 0.0), max(float(group.max()) * shrink, 0.0)
        scale = float(torch.tensor((high - low) / top).half())
        zero = min(max(round(-low / scale), 0), top)
        best = min(
            best,
            sum(
                abs(scale * (min(max(round(float(w) / scale + zero), 0), top) - zero) - float(w))
                ** 2.4
                for w in group
            ),
        )
    return best


def test_search_finds_the_best_of_its_ranges() -> None:
    w = weight()
    made = quantize(w, Scheme.parse("uint3-g8@search"))

    losses = (made.code.values() - to_groups(w, made.scheme)).abs().pow(2.4).sum(-1)

    expected = [[naive_search(group, 7) for group in row.split(8)] for row in w]
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", ["uint2-c", "int3-c", "e2m1-g8"])
def test_search_loses_nothing_and_gains_on_heavy_tails(scheme: str) -> None:
    w = weight()

    def loss(text: str) -> torch.Tensor:
        return (quantize(w, Scheme.parse(text)).dequantize() - w).abs().pow(2.4).sum(1)

    assert (loss(f"{scheme}@search") <= loss(scheme) * (1 + 1e-5)).all()
    assert float(loss(f"{scheme}@search").sum()) < 0.98 * float(loss(scheme).sum())


def naive_hqq(
    rows: list[list[float]], scales: list[float], zeros: list[float], top: int
) -> list[float]:
    """The least sum of |error / scale|^0.7 that HQQ's iteration meets in each row, in plain
    numbers.
    """
    best, beta, before = [math.inf] * len(rows), hqq.BETA, math.inf
    for _ in range(hqq.ROUNDS + 1):
        for r, (row, scale, zero) in enumerate(zip(rows, scales, zeros, strict=True)):
            codes = [min(max(round(w / scale + zero), 0), top) for w in row]
            errors = [w - scale * (c - zero) for w, c in zip(row, codes, strict=True)]
            best[r] = min(best[r], sum(abs(e / scale) ** 0.7 for e in errors))
            kept = [
                math.copysign(max(abs(e) - abs(e) ** -0.3 / beta, 0.0), e) if e else 0.0
                for e in errors
            ]
            zeros[r] = float(
                np.float16(
                    np.mean([c - (w - k) / scale for w, c, k in zip(row, codes, kept, strict=True)])
                )
            )
        if sum(best) > before * (1 - hqq.ENOUGH):
            break
        before, beta = sum(best), beta * hqq.KAPPA
    return best


@pytest.mark.parametrize(
    "size", [1.0, 0.01]
)  # errors large enough to be set aside, and none of them
def test_hqq_is_its_iteration_in_plain_numbers(size: float) -> None:
    w = weight() * size
    made = quantize(w, Scheme.parse("uint3-c@hqq")).code
    plain = quantize(w, Scheme.parse("uint3-c")).code
    scale = plain.scale[:, 0]

    losses = ((made.values()[:, 0] - w) / scale).abs().pow(0.7).sum(1)

    expected = naive_hqq(w.tolist(), scale[:, 0].tolist(), plain.zero[:, 0, 0].tolist(), 7)
    torch.testing.assert_close(losses, torch.tensor(expected), rtol=2e-3, atol=1e-3)
    assert float(losses.sum()) < float(((plain.values()[:, 0] - w) / scale).abs().pow(0.7).sum())


def naive_gptq(
    w: np.ndarray, square: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int
) -> np.ndarray:
    """GPTQ without its Cholesky factor: before each column, the inverse of what is left of H
    (optimal brain surgeon).
    """
    left, out = w.copy(), np.empty_like(w)
    damped = square + np.eye(len(square)) * gptq.DAMPING * square.diagonal().mean()
    for j in range(w.shape[1]):
        inverse = np.linalg.inv(damped[j:, j:])
        out[:, j] = scale * (np.clip(np.round(left[:, j] / scale + zero), 0, top) - zero)
        left[:, j:] -= np.outer((left[:, j] - out[:, j]) / inverse[0, 0], inverse[0])
    return out


@pytest.mark.parametrize("lazy", [7, gptq.LAZY])
def test_gptq_is_optimal_brain_surgery_column_by_column(
    lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "LAZY", lazy)  # several batches of columns, and one
    w, square = weight(), moments()
    made = quantize(w, Scheme.parse("uint4-c@gptq"), moments=square)

    expected = naive_gptq(
        w.double().numpy(),
        square.double().numpy(),
        made.code.scale[:, 0, 0].double().numpy(),
        made.code.zero[:, 0, 0].double().numpy(),
        15,
    )

    torch.testing.assert_close(
        made.dequantize(), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4
    )


def test_without_correlation_gptq_is_rounding_to_nearest() -> None:
    w = weight()

    made = quantize(w, Scheme.parse("int4-g8@gptq"), moments=torch.eye(24))

    assert torch.equal(made.dequantize(), quantize(w, Scheme.parse("int4-g8")).dequantize())


@pytest.mark.parametrize("scheme", ["uint4-c", "int4-g10", "uint3-t", "e2m1-g8"])
@pytest.mark.parametrize("method", ["gptq", "adaround", "adaround_scaled"])
def test_methods_that_look_at_inputs_lower_the_output_s_error_by_a_decibel(
    scheme: str, method: str
) -> None:
    w, square = weight(), moments()

    gain = 10 * math.log10(output(scheme, w, square) / output(f"{scheme}@{method}", w, square))

    assert gain > 1.0


@pytest.mark.parametrize("scheme", ["uint4-c", "int4-g10", "e2m1-c", "e3m0-c"])
def test_adaround_chooses_between_the_two_neighbours(scheme: str) -> None:
    w, square = weight(), moments()
    made = quantize(w, Scheme.parse(f"{scheme}@adaround"), moments=square).dequantize()
    plain = quantize(w, Scheme.parse(scheme))
    groups = to_groups(w, plain.scheme)
    form = plain.code
    every = torch.stack(
        [
            type(form)(torch.full_like(form.codes, c), form.scale, form.zero, form.levels).values()
            for c in range(2**plain.scheme.bits)
        ]
    )
    below = torch.where(every <= groups, every, -torch.inf).amax(0)
    above = torch.where(every >= groups, every, torch.inf).amin(0)

    inside = torch.isfinite(below) & torch.isfinite(
        above
    )  # a weight may lie beyond the end of a grid with a rounded scale

    found = to_groups(made, plain.scheme)
    near = torch.minimum((found - below).abs(), (found - above).abs())
    assert float(near[inside].max()) < 1e-5
    assert not torch.equal(made, plain.dequantize())


def test_adaround_finds_the_best_rounding_of_a_few_weights() -> None:
    w, square = weight(6, 8, seed=4), moments(8)
    scheme = Scheme.parse("uint3-c")
    scale, zero = (t[:, 0] for t in (quantize(w, scheme).code.scale, quantize(w, scheme).code.zero))
    low = scale * ((w / scale + zero).floor().clamp(0, 6) - zero)
    up = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)  # all 256 roundings
    best = torch.stack([output_error(low + u * scale - w, square) for u in up]).amin(0)

    found = output_error(
        quantize(w, Scheme.parse("uint3-c@adaround"), moments=square).dequantize() - w, square
    )

    plain = output_error(quantize(w, scheme).dequantize() - w, square)
    assert (found >= best * (1 - 1e-4)).all()
    assert float((found - best).sum()) < 0.25 * float((plain - best).sum())


@pytest.mark.parametrize("scheme", ["int4-t", "int4-c", "int4-g7", "int4-g100"])
def test_columns_and_groups_are_each_other_s_inverse(scheme: str) -> None:
    w, chosen = weight(), Scheme.parse(scheme)
    groups = to_groups(w, chosen)

    columns = columns_of(groups, chosen, torch.eye(24))

    assert torch.equal(columns, w)
    assert torch.equal(from_columns(columns, groups, chosen), groups)


@pytest.mark.parametrize("method", ["gptq", "adaround", "adaround_scaled"])
def test_inputs_of_zeros_leave_finite_weights(method: str) -> None:
    made = quantize(
        weight(), Scheme.parse(f"uint4-c@{method}"), moments=torch.zeros(24, 24)
    ).dequantize()

    assert torch.equal(made, quantize(weight(), Scheme.parse("uint4-c")).dequantize())


def test_a_method_that_lacks_its_inputs_says_where_they_come_from() -> None:
    with pytest.raises(
        QSearchError,
        match=(
            r"gptq looks at what goes into blocks\.0\.ff; give QuantizedWeights\(model, graph, "
            r"calibrate"
        ),
    ):
        quantize(weight(), Scheme.parse("int4-c@gptq"), layer="blocks.0.ff")


def test_learning_longer_is_asked_for_by_argument() -> None:
    w, square, scheme = weight(), moments(), Scheme.parse("uint4-c@adaround")

    short = adaround.quantize(to_groups(w, scheme), scheme, square, steps=1)

    assert torch.equal(
        short.values(), quantize(w, Scheme.parse("uint4-c")).code.values()
    )  # gates start where the weights lie


@pytest.mark.parametrize(
    ("scheme", "axis"),
    [("uint4-c", 0), ("uint4-t", 0), ("km2-c", 0), ("uint4-g4@gptq", 0), ("mxfp4", 1)],
)
def test_the_parts_of_a_concatenated_input_have_scales_of_their_own(scheme: str, axis: int) -> None:
    w = weight(8, 24)
    w[:, 10:] *= 20  # the skip is louder than the rest
    given, splits, chosen = (w.T.contiguous() if axis else w), (10, 14), Scheme.parse(scheme)

    made = quantize_parts(given, chosen, axis=axis, splits=splits, moments=moments())

    one, two = (part.dequantize() for part in made)
    expected = [
        quantize(p, chosen, axis=axis, moments=moments()[s, s]).dequantize()
        for p, s in zip(given.split(splits, 1 - axis), (slice(10), slice(10, 24)), strict=True)
    ]
    assert torch.equal(one, expected[0])
    assert torch.equal(two, expected[1])
    charged = sum(part.code.scale.numel() for part in made)
    assert chosen.groups(given.shape, axis, splits) == charged
