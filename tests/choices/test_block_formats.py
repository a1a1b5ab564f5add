"""Block formats: OCP's and NVIDIA's arithmetic number by number, and the torch types that their
scales are stored in.
"""

from __future__ import annotations

import math

import pytest
import torch

from qsearch.choices.quantization import quantize
from qsearch.core.scheme import Scheme

MX = {
    "mxfp4": (2, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
    "mxfp6": (
        2,
        [i / 8 for i in range(8)]
        + [v * s for s in (1, 2, 4) for v in (1 + i / 8 for i in range(8))],
    ),
}


def weights(rows: int = 5, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return (
        torch.distributions.StudentT(4.0).sample((rows, columns)) * 0.05
        if seed == 0
        else torch.randn(rows, columns) * 10.0**seed
    )


def to_grid(value: float, grid: list[float]) -> float:
    """The nearest of `grid` with the sign of `value`; of two equally near ones the one at an even
    place, as IEEE ties go.
    """
    size = abs(value)
    least = min(abs(size - g) for g in grid)
    found = [i for i, g in enumerate(grid) if abs(size - g) == least]
    even = next((i for i in found if i % 2 == 0), found[0])
    return math.copysign(grid[even], value)


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("seed", [0, -3, 3])
def test_a_microscaled_block_is_what_ocp_writes(name: str, seed: int) -> None:
    highest, grid = MX[name]
    grid = sorted(set(grid))
    w = weights(seed=seed)

    made = quantize(w, Scheme.parse(name)).dequantize()

    for row in range(len(w)):
        for begin in range(0, w.shape[1], 32):
            block = [float(v) for v in w[row, begin : begin + 32]]
            scale = 2.0 ** (math.floor(math.log2(max(abs(v) for v in block))) - highest)
            expected = [scale * to_grid(v / scale, grid) for v in block]
            assert made[row, begin : begin + 32].tolist() == expected


def test_mxfp8_codes_are_torch_s_bytes_under_a_power_of_two() -> None:
    w = weights()

    made = quantize(w, Scheme.parse("mxfp8")).code

    theirs = (w.reshape(5, 3, 32) / made.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(made.values(), theirs.float() * made.scale)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8"])
def test_microscaled_scales_are_stored_exactly_by_e8m0(name: str) -> None:
    w = weights()
    w[0] = 0
    w[1] *= 1e-38
    w[2] *= 1e36

    made = quantize(w, Scheme.parse(name))

    assert torch.equal(made.code.scale.to(torch.float8_e8m0fnu).float(), made.code.scale)
    assert torch.isfinite(made.dequantize()).all()
    assert float(made.dequantize()[0].abs().max()) == 0.0


def test_nvfp4_is_what_nvidia_writes() -> None:
    w = weights()

    made = quantize(w, Scheme.parse("nvfp4"))

    unit = float(w.abs().max()) / (6 * 448)
    blocks = w.reshape(5, 6, 16)
    scale = (
        (blocks.abs().amax(-1, keepdim=True) / (6 * unit))
        .clamp(2.0**-9, 448)
        .to(torch.float8_e4m3fn)
        .float()
    )
    assert made.code.unit == pytest.approx(unit, rel=1e-6)
    assert torch.equal(made.code.scale, scale)
    assert (
        float(made.code.scale.max()) == 448
    )  # the largest block uses the whole range of its scale's type
    expected = [
        [to_grid(float(v), MX["mxfp4"][1]) for v in row]
        for row in (blocks / (scale * unit)).reshape(-1, 16)
    ]
    torch.testing.assert_close(
        made.code.values(),
        torch.tensor(expected).reshape(5, 6, 16) * (scale * unit),
        rtol=1e-5,
        atol=1e-8,
    )


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6", "mxfp8", "nvfp4"])
def test_rows_that_blocks_do_not_divide_are_filled_to_be_rounded_and_charged_as_they_are(
    name: str,
) -> None:
    w = weights(3, 37)
    scheme = Scheme.parse(name)

    made = quantize(w, scheme)

    assert made.dequantize().shape == w.shape
    block = {"nvfp4": 16}.get(name, 32)
    padded, scales = made.code.codes.numel(), made.code.scale.numel()
    assert padded == 3 * -(-37 // block) * block
    assert scheme.stored_bits(w.shape) == scheme.bits * w.numel() + 8 * scales + (
        32 if name == "nvfp4" else 0
    )
