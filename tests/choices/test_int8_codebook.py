"""`cb4`: 16 fixed levels on int8's grid."""

from __future__ import annotations

import pytest
import torch

from qsearch.choices import block_scales, int8_codebook
from qsearch.choices.fake_quantization import fake_quantize_between
from qsearch.choices.floats import FloatFormat
from qsearch.choices.packed_weight import packed_weight
from qsearch.choices.quantization import quantize
from qsearch.core.scheme import Scheme

FP8 = FloatFormat.named("e4m3")
CB4 = Scheme.parse("cb4")


def groups(rows: int = 64, columns: int = 256) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns // 16, 16, generator=dice) * 0.05


def off(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float((made - truth).square().sum())


def test_what_codes_stand_for_are_int8_with_one_scale_a_row() -> None:
    made = int8_codebook.level_codes(groups())

    whole = made.whole()
    assert torch.equal(whole, whole.round())
    assert float(whole.abs().max()) <= 127
    assert torch.equal(made.row.half().float(), made.row)
    scale = made.block * int8_codebook.UNIT
    assert torch.equal(FP8.values()[FP8.encode(scale).int()], scale)
    torch.testing.assert_close(made.values(), whole * made.row)


def test_it_comes_nearer_to_gaussian_weights_than_nvfp4_at_the_bits_of_nvfp4() -> None:
    nvfp4, w = Scheme.parse("nvfp4"), groups()

    ours, theirs = int8_codebook.level_codes(w), block_scales.chosen(w, nvfp4)

    assert off(theirs.values(), w) / off(ours.values(), w) > 1.3
    more = CB4.stored_bits((64, 256)) - nvfp4.stored_bits((64, 256))
    assert more == 16 * 64 - 32  # a scale for each row, and none for the tensor


def test_the_levels_are_those_that_gaussian_blocks_ask_for() -> None:
    trained = int8_codebook.train_levels(blocks=20000, rounds=25)

    known = torch.tensor(int8_codebook.LEVELS, dtype=torch.float32)
    torch.testing.assert_close(trained, known, atol=2.0, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.7, -0.3, 1e-9, 3e4])
def test_degenerate_blocks_stay_finite_and_zeros_stay_zeros(value: float) -> None:
    w = torch.full((2, 3, 16), value)

    made = int8_codebook.level_codes(w).values()

    assert bool(torch.isfinite(made).all())
    assert float((made - w).abs().max()) <= (max(0.13 * abs(value), 2e-6) if value else 0.0)


def test_products_with_rounded_inputs_are_those_of_int8() -> None:
    """Rows that no block of 16 divides: 24 channels, 3.5 blocks."""
    dice = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 56, generator=dice), torch.randn(5, 56, generator=dice)
    made = quantize(weight, CB4)
    packed = packed_weight(made)

    got = packed.linear_rounded(x, None, 8, None, None)

    assert "cpu" in packed.devices
    rounded = fake_quantize_between(x, x.amin(1, keepdim=True), x.amax(1, keepdim=True), "8")
    torch.testing.assert_close(got, rounded @ made.dequantize().T, rtol=1e-4, atol=1e-4)


def test_a_scale_that_its_type_lacks_is_refused() -> None:
    made = quantize(torch.randn(4, 32), CB4)
    packed = packed_weight(made)
    made.code.row.mul_(1.0001)  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="do not fit"):
        packed.fill(made)
