"""Triton kernels of trellis codes against their twins: the interpreter here, or a GPU."""

from __future__ import annotations

import pytest
import torch

from qsearch_kernels import reference_a8, trellis, trellis_encode, trellis_products
from qsearch_kernels.gpu import trellis_encode as gpu_encode
from qsearch_kernels.gpu.linear_trellis import decode, linear_trellis, linear_trellis_a8
from tests.kernels.grid import DEVICES, DTYPES, TINY, assert_near, run


def example(rows: int, columns: int, bits: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tiles and scales."""
    shape = trellis.packed_shape(rows, columns, bits)
    packed = torch.randint(0, 256, shape, dtype=torch.uint8)
    return packed.to(device), (torch.rand(rows) * 0.01 + 0.01).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", trellis.BITS)
@pytest.mark.parametrize("states", [8, 14])
@pytest.mark.parametrize(("rows", "columns"), [(37, 50), (160, 136), (3, 5)])
def test_levels_come_out_as_the_twin_says(
    device: str, bits: int, states: int, rows: int, columns: int
) -> None:
    packed, scale = example(rows, columns, bits, device)

    launches, made = decode(packed, None, bits, states, rows, columns)
    run(*launches)
    assert torch.equal(made.cpu(), trellis.decode(packed.cpu(), bits, states, rows, columns))

    launches, wide = decode(packed, scale, bits, states, rows, columns, torch.float16)
    run(*launches)
    assert_near(
        wide, trellis.dequantize(packed, scale[:, None], bits, states, columns, torch.float16)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "bits", "columns", "outputs"), [(1, 2, 40, 33), (19, 3, 70, 37), (5, 4, 8, 64)]
)
def test_activations_of_16_bits_are_multiplied_with_decoded_levels(
    device: str, dtype: torch.dtype, rows: int, bits: int, columns: int, outputs: int
) -> None:
    packed, scale = example(outputs, columns, bits, device)
    x, bias = torch.randn(rows, columns).to(device, dtype), torch.randn(outputs).to(device, dtype)

    launches, made = linear_trellis(x, packed, scale, bits, 12, bias, TINY)
    run(*launches)

    assert_near(made, trellis_products.linear_trellis(x, packed, scale, bits, 12, bias), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "bits", "columns", "outputs"), [(2, 2, 40, 33), (20, 3, 70, 37), (6, 4, 136, 64)]
)
def test_rounded_rows_are_multiplied_with_decoded_levels_and_the_epilogue_follows(
    device: str, rows: int, bits: int, columns: int, outputs: int
) -> None:
    packed, scale = example(outputs, columns, bits, device)
    weight = trellis.dequantize(packed, scale[:, None], bits, 12, columns)
    given = reference_a8.quantize_rows(torch.randn(rows, columns, device=device), "8")
    bias, gate = torch.randn(outputs, device=device), torch.randn(2, outputs, device=device)
    residual = torch.randn(rows, outputs, device=device)
    arguments = (given.codes, given.scale, given.zero, packed, scale, weight.sum(1), bits, 12)

    launches, made = linear_trellis_a8(
        *arguments, bias, gate, residual, torch.float32, TINY
    )  # fmt: skip
    run(*launches)

    expected = trellis_products.linear_trellis_a8(*arguments, bias, gate, residual, torch.float32)
    assert_near(made, expected, 2)


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_launches_nothing_and_wrong_tiles_are_refused(device: str) -> None:
    packed, scale = example(40, 24, 2, device)
    x = torch.randn(3, 24, device=device)

    assert linear_trellis(x[:0], packed, scale, 2, 12)[0] == ()
    with pytest.raises(ValueError, match=r"at 3 bits is uint8 \(1, 6, 60\)"):
        linear_trellis(x, packed, scale, 3, 12)
    with pytest.raises(ValueError, match="given 2 bits and 2\\*\\*9 states"):
        linear_trellis(x, packed, scale, 2, 9)
    with pytest.raises(ValueError, match="rounded rows are int8"):
        linear_trellis_a8(x, scale[:3], None, packed, scale, None, 2, 12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", trellis.BITS)
def test_viterbi_finds_the_very_codes_that_plain_torch_finds(
    device: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_encode, "processors", lambda x: 1)
    monkeypatch.setattr(gpu_encode, "_RESIDENT", 2)  # a program takes several tiles
    tiled = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * trellis.DEVIATION
    tiled = tiled[:, :160]
    rounded = trellis_encode._rounded(tiled, bits, 8).to(device)
    levels = trellis_encode._values(8).to(device)

    launches, states = gpu_encode.encode(rounded, levels, bits, 8, trellis_encode.SEAM)
    run(*launches)

    made = trellis.pack(states.cpu(), bits)
    assert torch.equal(made, trellis_encode.encode_slow(tiled, bits, 8))
    assert gpu_encode.encode(rounded[:0], levels, bits, 8, 8)[0] == ()
