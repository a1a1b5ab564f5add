"""The operations as torch sees them, on a CPU: schemas, fakes, whole graphs; and a layer put
together from rounding, a prepared weight and a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qsearch_kernels import gpu_ops, layout, reference_levels
from qsearch_kernels.prepared import prepare, prepare_fp8

ROWS = lambda: gpu_ops.quantize_rows(torch.randn(3, 4, 40))  # noqa: E731
INT8 = torch.randint(-128, 128, (6, 40), dtype=torch.int8)
PACKED = layout.pack(torch.randint(0, 8, (6, 40), dtype=torch.uint8), 3)
ONES = torch.ones(6)
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "quantize_rows": lambda: (torch.randn(3, 80), "8", "geglu", None, None, None, None, 16),
    "norm_quantize": lambda: (
        torch.randn(2, 3, 40, dtype=torch.bfloat16),
        "4",
        False,
        1e-5,
        None,
        None,
        torch.randn(2, 40),
        torch.randn(2, 40),
    ),
    "linear_a8": lambda: (
        *ROWS(),
        INT8,
        ONES,
        ONES,
        ONES,
        ONES,
        torch.randn(3, 6),
        torch.randn(3, 4, 6),
        torch.float16,
    ),
    "linear_packed_a8": lambda: (
        *ROWS(),
        PACKED,
        ONES[:, None],
        None,
        ONES,
        None,
        3,
        0,
        ONES,
        None,
        None,
        torch.float32,
    ),
    "conv2d_a8": lambda: (
        INT8.view(2, 3, 5, 8),
        ONES[:2],
        ONES[:2],
        INT8.view(-1)[:108].view(2, 2, 3, 9)[..., :8],
        ONES[:2],
        ONES[:2],
        2,
        1,
        1,
        ONES[:2],
    ),
    "dequantize": lambda: (PACKED, torch.ones(6, 3), None, 4.0, None, 3, 40, 16, torch.float16),
    "linear_wna16": lambda: (
        torch.randn(2, 1, 40),
        PACKED,
        ONES[:, None],
        None,
        4.0,
        torch.randn(8),
        3,
        40,
        0,
        ONES,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operation_is_what_its_schema_and_its_fake_say(name: str) -> None:
    torch.library.opcheck(
        getattr(torch.ops.qsearch_kernels, f"gpu_{name}").default,
        CALLS[name](),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_every_operation_is_checked() -> None:
    assert {f"gpu_{name}" for name in CALLS} == {
        name.partition("::")[2]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qsearch_kernels::gpu_")
    }


def stored(bits: int, group: int, kind: str) -> tuple[Any, ...]:
    """A weight 24 x 64 as it is stored: codes, scale, zero, offset, levels, bits, columns,
    group.
    """
    groups = 64 // group if group > 0 else 1
    scale = torch.rand(1 if group == -1 else 24, groups) + 0.1
    zero = torch.rand_like(scale) * 2**bits if kind == "uint" else None
    levels = {
        "e2m1": torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 4,
        "km": torch.randn(24, 1, 2**bits),
    }.get(kind)
    levels = torch.cat([levels, -levels]) if kind == "e2m1" and levels is not None else levels
    codes = torch.randint(0, 2**bits, (24, 64), dtype=torch.uint8)
    packed = (codes ^ 128).view(torch.int8) if bits == 8 else layout.pack(codes, bits)
    return packed, scale, zero, 2.0 ** (bits - 1) if kind == "int" else 0.0, levels, bits, 64, group


@pytest.mark.parametrize(
    ("bits", "group", "kind"),
    [
        (8, 0, "int"),
        (8, 32, "uint"),
        (4, -1, "int"),
        (4, 32, "uint"),
        (3, 0, "uint"),
        (4, 32, "e2m1"),
        (2, 64, "int"),
    ],
)
def test_a_layer_with_a_prepared_weight_computes_what_the_stored_weight_says(
    bits: int, group: int, kind: str
) -> None:
    weight, x, bias = stored(bits, group, kind), torch.randn(2, 5, 64), torch.randn(24)
    ready = prepare(*weight)

    rows = gpu_ops.quantize_rows(x, group=ready.group)
    made = gpu_ops.linear_rounded(rows, ready, bias, dtype=torch.float32)

    codes, scale, zero, _ = rows
    rounded = (codes.float() - zero.view(2, 5, 1)) * scale.view(2, 5, 1)
    torch.testing.assert_close(
        made, reference_levels.linear_levels(rounded, *weight, bias), rtol=1e-4, atol=1e-4
    )


def test_a_codebook_is_rounded_to_8_bits_only_where_that_is_asked_for() -> None:
    weight, x = stored(3, 0, "km"), torch.randn(5, 64)
    with pytest.raises(ValueError, match="dequantize this weight instead"):
        prepare(*weight)

    rows = gpu_ops.quantize_rows(x)
    made = gpu_ops.linear_rounded(rows, prepare(*weight, round_codebooks=True), dtype=torch.float32)

    rounded = (rows[0].float() - rows[2][:, None]) * rows[1][:, None]
    exact = reference_levels.linear_levels(rounded, *weight)
    assert (
        float((made - exact).norm() / exact.norm()) < 0.01
    )  # half of 1/127 of the largest entry, spread evenly


def test_an_e4m3_weight_is_multiplied_as_the_floats_that_its_codes_are() -> None:
    codes = (
        torch.randint(0, 126, (24, 64), dtype=torch.uint8)
        | torch.randint(0, 2, (24, 64), dtype=torch.uint8) << 7
    )
    levels = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float() / 256
    scale, x = torch.rand(24, 1), torch.randn(5, 64)
    rows = gpu_ops.quantize_rows(x, form="e4m3")

    made = gpu_ops.linear_rounded(rows, prepare_fp8(codes, scale, levels), dtype=torch.float32)

    weight = scale * levels[codes.int()]
    torch.testing.assert_close(
        made, (rows[0].float() * rows[1][:, None]) @ weight.T, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="take e4m3 codes"):
        prepare_fp8(codes, scale, levels.square())


def test_groups_that_tensor_cores_cannot_close_are_refused_when_a_weight_is_prepared() -> None:
    with pytest.raises(ValueError, match="given groups of 16: dequantize this weight instead"):
        prepare(*stored(4, 16, "int"))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(
    ("bits", "group", "kind"), [(8, 0, "int"), (4, 16, "uint"), (3, 0, "km"), (4, -1, "int")]
)
def test_a_weight_only_layer_computes_what_the_stored_weight_says_with_few_rows_and_with_many(
    rows: int, bits: int, group: int, kind: str
) -> None:
    weight, x, bias = stored(bits, group, kind), torch.randn(rows, 64), torch.randn(24)

    made = gpu_ops.linear(x, *weight, bias)

    torch.testing.assert_close(
        made, reference_levels.linear_levels(x, *weight, bias), rtol=1e-4, atol=1e-4
    )


def test_a_block_of_layers_is_one_graph_for_the_compiler() -> None:
    ready = prepare(*stored(4, 32, "uint"))

    def block(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows = gpu_ops.norm_quantize(x, modulation_scale=scale, group=32)
        return gpu_ops.linear_rounded(rows, ready, dtype=torch.float32) * 2

    x, scale = torch.randn(2, 3, 64), torch.randn(2, 64)
    torch.testing.assert_close(
        torch.compile(block, backend="aot_eager", fullgraph=True)(x, scale), block(x, scale)
    )
