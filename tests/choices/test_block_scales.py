"""Block scales by choice."""

from __future__ import annotations

import pytest
import torch

from qsearch.choices import block_scales
from qsearch.choices.floats import FloatFormat
from qsearch.choices.formats import nvfp4
from qsearch.choices.quantizers import minmax
from qsearch.core.errors import QSearchError
from qsearch.core.scheme import Scheme

FP8 = FloatFormat.named("e4m3")


def groups(scheme: Scheme, rows: int = 12, columns: int = 256, seed: int = 0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // scheme.group, scheme.group, generator=dice) * 0.05


def off(made: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (made - truth).square().sum(-1)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_a_chosen_scale_errs_less_than_the_standard_s_and_is_one_that_is_stored(name: str) -> None:
    scheme = Scheme.parse(name)
    w = groups(scheme, 64)

    made, plain = block_scales.chosen(w, scheme), minmax.quantize(w, scheme)

    gain = float(off(plain.values(), w).sum() / off(made.values(), w).sum())
    assert gain > (1.15 if name == "nvfp4" else 1.04)
    if name == "nvfp4":
        assert torch.equal(FP8.values()[FP8.encode(made.scale).int()], made.scale)
    else:
        assert torch.equal(made.scale.log2().round().exp2(), made.scale)
        assert bool((off(made.values(), w) <= off(plain.values(), w) * (1 + 1e-5)).all())
    assert int(made.codes.max()) < 16


def test_blocks_on_four_and_blocks_on_six_both_occur_and_each_errs_least() -> None:
    scheme = Scheme.parse("nvfp4")
    w = groups(scheme, 64)

    made = block_scales.chosen(w, scheme)

    top = made.values().abs().amax(-1) / (made.scale[..., 0] * made.unit)
    assert float((top == 4).float().mean()) > 0.2
    assert float((top == 6).float().mean()) > 0.2
    for size in (4.0, 6.0):
        scale = w.abs().amax(-1, keepdim=True) / (size * made.unit)
        scale = FP8.values()[FP8.encode(scale).clamp(min=1).int()]
        other = nvfp4.quantize_to_grid(w, scale, torch.zeros_like(scale), "nvfp4", made.unit)
        assert bool((off(made.values(), w) <= off(other.values(), w) * (1 + 1e-5)).all())


def test_the_block_of_section_two_is_exact_on_four_only() -> None:
    """Weights 10, 20, 30, 40 are 1, 2, 3, 4 of a step, and on six 1.5, 3, 4.5 (which is not), 6."""
    scheme = Scheme.parse("nvfp4")
    w = torch.zeros(1, 1, 16)
    w[0, 0, :4] = torch.tensor([10.0, 20.0, 30.0, 40.0])

    made, plain = block_scales.chosen(w, scheme).values(), minmax.quantize(w, scheme).values()

    torch.testing.assert_close(made, w)
    assert float((plain - w).abs().max()) > 2


@pytest.mark.parametrize("value", [0.0, 0.7, -0.3, 1e-9, 3e4])
def test_degenerate_blocks_stay_finite_and_zeros_stay_nearly_zero(value: float) -> None:
    w = torch.full((2, 3, 16), value)

    made = block_scales.chosen(w, Scheme.parse("nvfp4")).values()

    assert bool(torch.isfinite(made).all())
    assert float((made - w).abs().max()) <= max(0.13 * abs(value), 2e-6)


def test_other_formats_have_no_block_scales_to_choose() -> None:
    with pytest.raises(QSearchError, match="chosen for nvfp4 and mxfp4; given int4"):
        block_scales.chosen(torch.zeros(1, 1, 16), Scheme.parse("int4-g16"))
