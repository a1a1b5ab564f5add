"""Products of 8-bit activations, packed weights and convolutions against their twins: the
interpreter here, a GPU where there is one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qsearch_kernels import layout, reference_a8
from qsearch_kernels.gpu.conv2d_a8 import conv2d_a8
from qsearch_kernels.gpu.linear_a8 import linear_a8
from qsearch_kernels.gpu.linear_packed_a8 import linear_packed_a8
from tests.kernels.grid import DEVICES, DTYPES, TINY, assert_near, run

SHAPES = [
    (1, 16, 1),
    (5, 40, 33),
    (37, 64, 48),
    (19, 129, 70),
]  # rows, inputs, outputs; inputs of 16 and 64 go through descriptors


def int8(*shape: int, device: str, bits: int = 8) -> torch.Tensor:
    return torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=device
    )


def activations(
    rows: int, columns: int, device: str, group: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, whole zeros and sums, as `quantize_rows` makes them."""
    made = reference_a8.quantize_rows(torch.randn(rows, columns) + 0.3, group=group)
    return tuple(part.to(device) for part in made)  # type: ignore[return-value]


def weights(
    rows: int,
    columns: int,
    bits: int,
    group: int,
    device: str,
    zeros: bool,
    table: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Packed weights with scales, fractional zeros, and the sums of their rows."""
    numbers = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    groups = -(-columns // group) if group else 1
    scale = torch.rand(rows, groups) + 0.5
    zero = torch.randn(rows, groups) if zeros else None
    level = (
        numbers.double() - 2 ** (bits - 1)
        if table is None
        else table.expand(rows, -1).gather(1, numbers.long()).double()
    )
    spread = lambda v: v.double().repeat_interleave(group or columns, 1)[:, :columns]  # noqa: E731
    total = (spread(scale) * (level - (0 if zero is None else spread(zero)))).sum(1).float()
    found = {
        "packed": layout.pack(numbers, bits),
        "w_scale": scale,
        "w_zero": zero,
        "w_total": total,
        "table": table,
    }
    return {name: value if value is None else value.to(device) for name, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "outputs"), SHAPES)
def test_an_int8_product_is_its_twin(device: str, rows: int, columns: int, outputs: int) -> None:
    given = activations(rows, columns, device)
    w = int8(outputs, columns, device=device)
    side = {
        "w_scale": torch.rand(outputs, device=device),
        "w_zero": torch.randn(outputs, device=device),
        "w_total": torch.randn(outputs, device=device),
    }
    side["w_total"] = (side["w_scale"][:, None] * (w - side["w_zero"][:, None])).sum(1)

    launches, made = linear_a8(*given, w, **side, dtype=torch.float32, tile=TINY)
    run(*launches)

    assert len(launches) == 1
    assert launches[0].arguments["DESCRIBED"] == (columns % 16 == 0)
    assert_near(made, reference_a8.linear_a8(*given, w, **side, dtype=torch.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [32, 41])
def test_bias_gate_and_residual_are_added_in_the_epilogue(
    device: str, dtype: torch.dtype, columns: int
) -> None:
    codes, scale, zero, sums = activations(12, columns, device)
    w, w_scale = int8(21, columns, device=device), torch.rand(21, device=device) * 0.01
    after = {"bias": torch.randn(21), "gate": torch.randn(3, 21), "residual": torch.randn(3, 4, 21)}
    epilogue: dict[str, Any] = {name: value.to(device, dtype) for name, value in after.items()}
    total = w_scale * w.float().sum(1)

    launches, made = linear_a8(
        codes.view(3, 4, -1),
        scale,
        zero,
        sums,
        w,
        w_scale,
        None,
        total,
        **epilogue,
        dtype=dtype,
        tile=TINY,
    )
    run(*launches)

    assert made.shape == (3, 4, 21)
    assert_near(
        made,
        reference_a8.linear_a8(
            codes.view(3, 4, -1),
            scale,
            zero,
            sums,
            w,
            w_scale,
            None,
            total,
            **epilogue,
            dtype=dtype,
        ),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("columns", [32, 44])
def test_an_fp8_product_is_its_twin(device: str, columns: int) -> None:
    codes, scale = (
        torch.randn(9, columns, device=device).to(torch.float8_e4m3fn),
        torch.rand(9, device=device),
    )
    w, w_scale = (
        torch.randn(20, columns, device=device).to(torch.float8_e4m3fn),
        torch.rand(20, device=device),
    )

    launches, made = linear_a8(codes, scale, None, None, w, w_scale, dtype=torch.float32, tile=TINY)
    run(*launches)

    assert_near(
        made, reference_a8.linear_a8(codes, scale, None, None, w, w_scale, dtype=torch.float32)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_one_static_grid_serves_all_rows_and_stacked_weights_are_q_k_and_v(device: str) -> None:
    codes, scale, zero = (
        int8(7, 32, device=device),
        torch.tensor([0.3], device=device),
        torch.tensor([5.0], device=device),
    )
    parts = [(int8(n, 32, device=device), torch.rand(n, device=device)) for n in (24, 8, 16)]
    w, w_scale = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    launches, made = linear_a8(
        codes,
        scale,
        zero,
        None,
        w,
        w_scale,
        None,
        w_scale * w.float().sum(1),
        dtype=torch.float32,
        tile=TINY,
    )
    run(*launches)

    for (part, part_scale), found in zip(parts, made.split([24, 8, 16], -1), strict=True):
        assert_near(
            found,
            reference_a8.linear_a8(codes, scale, zero, None, part, part_scale, dtype=torch.float32),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("columns", "group"), [(75, 0), (100, 32), (130, 64)])
def test_weights_of_every_width_are_unpacked_into_the_product(
    device: str, bits: int, columns: int, group: int
) -> None:
    given = activations(6, columns, device, group)
    w = weights(35, columns, bits, group, device, zeros=bits % 2 == 0)

    launches, made = linear_packed_a8(
        *given, **w, bits=bits, group=group, dtype=torch.float32, tile=TINY
    )
    run(*launches)

    assert_near(
        made,
        reference_a8.linear_packed_a8(*given, **w, bits=bits, group=group, dtype=torch.float32),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_integers_of_8_bits_that_lie_as_signed_bytes_are_taken_as_they_are(device: str) -> None:
    given = activations(6, 75, device, 32)
    w = weights(35, 75, 8, 32, device, zeros=True)

    launches, made = linear_packed_a8(
        *given,
        **{**w, "packed": (w["packed"] ^ 128).view(torch.int8)},
        bits=8,
        group=32,
        dtype=torch.float32,
        tile=TINY,
    )
    run(*launches)

    assert_near(
        made, reference_a8.linear_packed_a8(*given, **w, bits=8, group=32, dtype=torch.float32)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("group", [0, 32])
def test_codebooks_are_looked_up_in_the_product(device: str, shared: bool, group: int) -> None:
    table = int8(1 if shared else 18, 8, device="cpu")
    given = activations(5, 50, device, group)
    w = weights(18, 50, 3, group, device, zeros=False, table=table)

    launches, made = linear_packed_a8(
        *given, **w, bits=3, group=group, dtype=torch.float32, tile=TINY
    )
    run(*launches)

    assert_near(
        made, reference_a8.linear_packed_a8(*given, **w, bits=3, group=group, dtype=torch.float32)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("taps", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2)],
)
@pytest.mark.parametrize("channels", [7, 16])
def test_a_convolution_is_its_twin_and_pads_with_the_zero_of_each_picture(
    device: str, taps: int, stride: int, padding: int, dilation: int, channels: int
) -> None:
    codes, scale = int8(2, 6, 5, channels, device=device), torch.rand(2, device=device)
    zero = torch.tensor([3.0, -100.0], device=device)
    w, w_scale = int8(9, taps, taps, channels, device=device), torch.rand(9, device=device)
    side: dict[str, Any] = {
        "w_total": w_scale * w.float().sum((1, 2, 3)),
        "bias": torch.randn(9, device=device),
    }
    window = {"stride": stride, "padding": padding, "dilation": dilation}

    launches, made = conv2d_a8(
        codes, scale, zero, w, w_scale, **side, **window, dtype=torch.float32, tile=TINY
    )
    run(*launches)

    assert_near(
        made,
        reference_a8.conv2d_a8(
            codes, scale, zero, w, w_scale, **side, **window, dtype=torch.float32
        ),
    )


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_batch_and_no_outputs_launch_nothing(device: str) -> None:
    w, scale, none = (
        int8(6, 16, device=device),
        torch.ones(6, device=device),
        torch.ones(0, device=device),
    )

    assert linear_a8(int8(0, 16, device=device), none, None, None, w, scale)[0] == ()
    assert linear_a8(
        int8(3, 16, device=device), torch.ones(3, device=device), None, None, w[:0], none
    )[1].shape == (3, 0)
    packed = layout.pack(torch.zeros(6, 16, dtype=torch.uint8), 3).to(device)
    assert linear_packed_a8(int8(0, 16, device=device), none, None, None, packed, scale, bits=3)[
        1
    ].shape == (0, 6)
    assert conv2d_a8(
        int8(0, 4, 4, 8, device=device), none, none, int8(6, 3, 3, 8, device=device), scale, scale
    )[1].shape == (0, 2, 2, 6)


@pytest.mark.parametrize("device", DEVICES)
def test_operands_may_lie_anyhow_in_memory(device: str) -> None:
    codes, w = int8(32, 9, device=device).t(), int8(32, 20, device=device).t()
    scale, w_scale = torch.rand(9, device=device), torch.rand(40, device=device)[::2]

    launches, made = linear_a8(codes, scale, None, None, w, w_scale, dtype=torch.float32, tile=TINY)
    run(*launches)

    assert_near(
        made, reference_a8.linear_a8(codes, scale, None, None, w, w_scale, dtype=torch.float32)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_that_do_not_fit_are_refused_with_the_right_one(device: str) -> None:
    codes, scale, w, w_scale = (
        int8(4, 16, device=device),
        torch.ones(4, device=device),
        int8(6, 16, device=device),
        torch.ones(6, device=device),
    )
    packed = layout.pack(torch.zeros(6, 16, dtype=torch.uint8), 3).to(device)

    with pytest.raises(ValueError, match=r"need weights \[N, 16\] of their type"):
        linear_a8(codes, scale, None, None, w[:, :15], w_scale)
    with pytest.raises(ValueError, match="need w_total"):
        linear_a8(codes, scale, scale, None, w, w_scale)
    with pytest.raises(ValueError, match="need sums"):
        linear_a8(codes, scale, None, None, w, w_scale, w_scale)
    with pytest.raises(ValueError, match=r"4 x 6 outputs need bias of shape \(6,\)"):
        linear_a8(codes, scale, None, None, w, w_scale, bias=scale)
    with pytest.raises(ValueError, match="rows are shared out in equal runs"):
        linear_a8(codes, scale[:3], None, None, w, w_scale)
    with pytest.raises(ValueError, match="given groups of 24: dequantize"):
        linear_packed_a8(codes, scale, None, None, packed, w_scale, bits=3, group=24)
    with pytest.raises(ValueError, match=r"uint8 \[N, 8\]"):
        linear_packed_a8(codes, scale, None, None, packed, w_scale, bits=4)
    with pytest.raises(ValueError, match="as large as the kernel's window"):
        conv2d_a8(
            codes.view(1, 2, 2, 16),
            scale[:1],
            scale[:1],
            int8(6, 3, 3, 16, device=device),
            w_scale,
            w_scale,
        )
    with pytest.raises(ValueError, match="each of 1 pictures has one grid; given 4"):
        conv2d_a8(
            codes.view(1, 2, 2, 16),
            scale,
            scale,
            int8(6, 1, 1, 16, device=device),
            w_scale,
            w_scale,
        )
