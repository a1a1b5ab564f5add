"""Low-rank branches: the best of their rank for the inputs, alternating with what is quantized."""

from __future__ import annotations

import pytest
import torch

from qsearch.choices.lowrank import LowRank, branch, refined
from qsearch.choices.moments import output_error
from qsearch.choices.quantization import quantize
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme

HALF = 2e-3  # what rounding factors to fp16 may add, of the weight


def weight(rows: int = 96, columns: int = 64) -> torch.Tensor:
    """A few directions that stand out of noise, as smoothed weights have."""
    dice = torch.Generator().manual_seed(0)
    strong = torch.randn(rows, 8, generator=dice) @ torch.randn(8, columns, generator=dice)
    return strong + torch.randn(rows, columns, generator=dice)


def moments(columns: int = 64) -> torch.Tensor:
    dice = torch.Generator().manual_seed(1)
    x = torch.randn(2048, columns, generator=dice) * torch.logspace(-1, 1, columns)
    return x.T @ x / len(x)


def rounded(rest: torch.Tensor) -> torch.Tensor:
    return quantize(rest, Scheme.parse("int3-g32")).dequantize()


def test_without_moments_the_branch_is_the_truncated_singular_value_decomposition() -> None:
    w = weight()
    left, size, right = torch.linalg.svd(w, full_matrices=False)

    made = branch(w, 16).values()

    best = (left[:, :16] * size[:16]) @ right[:16]
    assert float((made - best).norm() / w.norm()) < HALF


def test_with_moments_it_leaves_less_output_error_than_without() -> None:
    w, square = weight(), moments()

    plain, weighted = (w - branch(w, 16, given).values() for given in (None, square))

    assert float(output_error(weighted, square).sum()) < 0.6 * float(
        output_error(plain, square).sum()
    )


@pytest.mark.parametrize("given", [None, moments()], ids=["all inputs alike", "moments"])
def test_alternating_beats_one_round_and_one_round_beats_no_branch(
    given: torch.Tensor | None,
) -> None:
    w = weight()

    def error(off: torch.Tensor) -> float:
        return float(output_error(off, torch.eye(64) if given is None else given).sum())

    none = error(w - rounded(w))
    once_low, once = refined(w, 16, rounded, given, rounds=1)
    low, rest = refined(w, 16, rounded, given)

    assert error(w - once_low.values() - once) < none
    assert error(w - low.values() - rest) <= error(w - once_low.values() - once)


def test_the_error_falls_with_the_rank_and_bytes_rise_with_it() -> None:
    w, found, bits = weight(), [], []
    for rank in (16, 32, 48):
        low, rest = refined(w, rank, rounded, moments())
        found.append(float(output_error(w - low.values() - rest, moments()).sum()))
        bits.append(low.stored_bits)

    assert found[0] > found[1] > found[2]
    assert bits == [16 * rank * (96 + 64) for rank in (16, 32, 48)]


def test_q_k_and_v_share_one_projection_down() -> None:
    stacked = torch.cat([weight(48), weight(32), weight(16)])

    low, rest = refined(stacked, 16, rounded, moments())
    parts = low.split((48, 32, 16))

    assert all(part.down is low.down for part in parts)
    assert torch.equal(
        torch.cat([part.values() for part in parts]), torch.cat([p.up for p in parts]) @ low.down
    )
    assert rest.shape == stacked.shape


def test_factors_are_numbers_that_fp16_holds_and_of_one_size() -> None:
    low = branch(weight(), 16, moments())

    for factor in (low.down, low.up):
        assert torch.equal(factor.half().float(), factor)
    torch.testing.assert_close(low.down.norm(dim=1), low.up.norm(dim=0), rtol=0.01, atol=0)


def test_ranks_that_no_branch_has_are_refused_with_the_nearest() -> None:
    with pytest.raises(QSearchError, match="q is 96 x 64, given 80; the nearest is 64"):
        branch(weight(), 80, layer="q")
    with pytest.raises(QSearchError, match="given 24; the nearest is 16"):
        branch(weight(), 24)
    with pytest.raises(QSearchError, match="second moments must be finite; those of q are not"):
        branch(weight(), 16, moments() * torch.nan, "q")
    with pytest.raises(QSearchError, match="must be finite; q is not"):
        refined(weight(), 16, lambda rest: rest * torch.nan, None, "q")


def test_a_branch_is_its_factors_product() -> None:
    low = LowRank(torch.ones(16, 5), torch.ones(3, 16))

    assert torch.equal(low.values(), torch.full((3, 5), 16.0))
