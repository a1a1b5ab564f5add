"""Trellis codes of a weight, feedback by blocks: error bounds, bits in memory, refusals."""

from __future__ import annotations

import pytest
import torch

from qsearch.choices.codes import qparams_from_range, quantize_to_grid
from qsearch.choices.feedback import upper_factor, with_feedback
from qsearch.choices.moments import output_error
from qsearch.choices.quantizers import gptq
from qsearch.choices.trellis import trellis_codes
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme

STATES = 8  # quick, and the laws are the same
SAME = 1e-4


def weight(rows: int = 64, columns: int = 64, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=dice) * torch.rand(rows, 1, generator=dice)


def moments(columns: int = 64, seed: int = 1) -> torch.Tensor:
    """Of inputs whose channels differ in size and go together."""
    dice = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=dice) * 0.3 + torch.eye(columns)
    x = torch.randn(4096, columns, generator=dice) @ mixed
    return x.T @ x / len(x)


def relative(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float((made - truth).square().sum() / truth.square().sum())


@pytest.mark.parametrize(("bits", "most"), [(2, 0.09), (3, 0.026), (4, 0.008)])
def test_the_squared_error_is_that_of_a_code_near_the_limit(bits: int, most: float) -> None:
    w = weight(96, 160)

    assert relative(trellis_codes(w, bits, STATES).values(), w) <= most


def test_more_states_and_more_bits_leave_less() -> None:
    w = weight(64, 80)

    found = [relative(trellis_codes(w, 2, states).values(), w) for states in (8, 10, 12)]
    by_bits = [relative(trellis_codes(w, bits, STATES).values(), w) for bits in (2, 3, 4)]

    assert found[0] > found[1] > found[2]
    assert by_bits[0] > 2 * by_bits[1] > 4 * by_bits[2]


@pytest.mark.parametrize(("rows", "columns"), [(32, 8), (33, 9), (70, 30), (16, 4)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_in_memory_are_counted_before_and_after_and_ragged_weights_come_back_whole(
    rows: int, columns: int, bits: int
) -> None:
    w = weight(rows, columns)

    codes = trellis_codes(w, bits, STATES)

    assert codes.values().shape == w.shape
    high = -(-rows // 8) * 8  # all in one tile
    expected = high * -(-columns // 4) * 4 * bits + 16 * rows
    scheme = Scheme.parse(f"tcq{bits}-c")
    assert codes.stored_bits == scheme.stored_bits((rows, columns)) == expected
    assert codes.packed.numel() * 8 + codes.scale.half().numel() * 16 == codes.stored_bits
    assert torch.equal(codes.scale.half().float(), codes.scale)


def test_feedback_leaves_less_output_error_than_rounding_for_itself() -> None:
    w, square = weight(), moments()

    alone = trellis_codes(w, 2, STATES).values()
    fed = trellis_codes(w, 2, STATES, square).values()

    assert float(output_error(fed - w, square).sum()) < 0.7 * float(
        output_error(alone - w, square).sum()
    )


def test_inputs_that_all_count_alike_need_no_feedback() -> None:
    w = weight()

    fed = trellis_codes(w, 3, STATES, torch.eye(64)).values()

    torch.testing.assert_close(fed, trellis_codes(w, 3, STATES).values(), atol=SAME, rtol=0)


def test_rows_with_heavy_tails_get_a_wider_scale() -> None:
    torch.manual_seed(0)
    w = torch.distributions.StudentT(3.0).sample((64, 160))

    plain = trellis_codes(w, 4, STATES)
    spread = w.square().mean(1).sqrt()

    gauss = trellis_codes(torch.randn(64, 160) * spread[:, None], 4, STATES)
    assert float((plain.scale / gauss.scale).mean()) > 1.1


def test_rows_of_zeros_and_of_one_constant_stay_finite() -> None:
    w = torch.zeros(32, 16)
    w[3] = 0.7

    made = trellis_codes(w, 3, STATES).values()

    assert bool(torch.isfinite(made).all())
    assert float(made[0].abs().max()) < 1e-5
    assert float((made[3] - 0.7).abs().max()) < 0.25


def test_twice_the_same_weight_is_twice_the_same_code() -> None:
    first, second = (trellis_codes(weight(), 2, STATES, moments()) for _ in range(2))

    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.scale, second.scale)


def test_feedback_by_single_columns_is_gptq() -> None:
    w, square, scheme = weight(), moments(), Scheme.parse("int4-c")
    scale, zero = qparams_from_range(w.amin(1, keepdim=True), w.amax(1, keepdim=True), scheme)

    def rounded(column: torch.Tensor, begin: int) -> torch.Tensor:
        return quantize_to_grid(column[:, None], scale[:, None], zero[:, None], scheme).values()[
            :, 0
        ]

    made = with_feedback(w, 1, square, rounded, "layer")

    theirs = gptq.quantize(w[:, None], scheme, square).values()[:, 0]
    assert float((made != theirs).float().mean()) < 0.01  # ties apart


def test_what_cannot_be_coded_is_said_with_the_layer_s_name() -> None:
    with pytest.raises(QSearchError, match=r"blocks\.0\.q is 15 x 160: .* choose a scalar format"):
        trellis_codes(weight(15, 160), 2, STATES, layer="blocks.0.q")
    with pytest.raises(QSearchError, match="at least 16 rows of 4 columns"):
        trellis_codes(weight(64, 3), 2, STATES)
    with pytest.raises(QSearchError, match=r"given 5 bits and 2\^8 states"):
        trellis_codes(weight(), 5, STATES)
    bad = weight()
    bad[2, 3] = torch.inf
    with pytest.raises(QSearchError, match="the weight holds 1 that are not"):
        trellis_codes(bad, 2, STATES)
    square = moments()
    square[0, 0] = torch.nan
    with pytest.raises(QSearchError, match="second moments must be finite; those of q hold 1"):
        trellis_codes(weight(), 2, STATES, square, "q")
    with pytest.raises(QSearchError, match="no negative eigenvalues"):
        upper_factor(-torch.eye(8))
    with pytest.raises(QSearchError, match="64 columns and moments of 32"):
        trellis_codes(weight(), 2, STATES, torch.eye(32))
    with pytest.raises(QSearchError, match=r"are \[columns, columns\]"):
        upper_factor(torch.ones(3))
