"""Trellis codes and rotations as torch operations, for a CPU and for CUDA.

`torch.ops.qsearch_kernels.*`, each with a fake, so that a compiler knows shapes without computing.
On CUDA few rows of activations are multiplied with packed weights, decoded between load and tensor
core; from `DECODE_ROWS` on the weight is decoded once a call, for a dense product. Products pass no
gradient on: a layer that is trained through works with the dequantized weight. A rotation does.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakTensorKeyDictionary

from . import hadamard, reference_a8, trellis, trellis_cpu
from .ops import _rows

#: of activations, from which on a weight is decoded once: 3 bytes moved a weight at 4.3 TB/s
#: against 2 * rows operations at 1160 TOPS (an H200's) are 5 % of the product's time here
DECODE_ROWS = 8192
_TOTALS = WeakTensorKeyDictionary()  # packed tiles -> (version, sum of each row of levels)


def _gpu(module: str, name: str, *arguments: Any) -> Any:
    launches, out = getattr(importlib.import_module(f".gpu.{module}", __package__), name)(
        *arguments
    )
    for launch in launches:
        launch.run()
    return out


@custom_op("qsearch_kernels::decode_trellis", mutates_args=(), device_types="cpu")
def decode_trellis(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    """`trellis.decode`: levels int8 [rows, columns]."""
    trellis.check_packed(packed, bits, states, rows, columns)
    out = torch.empty(rows, columns, dtype=torch.int8)
    return trellis_cpu.decode_into(packed, bits, states, out)


@decode_trellis.register_kernel("cuda")
def _(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    made: Tensor = _gpu("linear_trellis", "decode", packed, None, bits, states, rows, columns)
    return made


@decode_trellis.register_fake
def _(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    return packed.new_empty(rows, columns, dtype=torch.int8)


@custom_op("qsearch_kernels::linear_trellis", mutates_args=(), device_types="cpu")
def linear_trellis(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, states: int, bias: Tensor | None = None
) -> Tensor:
    """`trellis_products.linear_trellis`: activations [..., columns] as they are; `scale`: [N]."""
    return trellis_cpu.linear(x, packed, scale, bits, states, bias)


@linear_trellis.register_kernel("cuda")
def _(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, states: int, bias: Tensor | None = None
) -> Tensor:
    if x.shape[:-1].numel() < DECODE_ROWS:
        made: Tensor = _gpu(
            "linear_trellis", "linear_trellis", x, packed, scale, bits, states, bias
        )
        return made
    shape = (scale.numel(), x.shape[-1])
    weight = _gpu("linear_trellis", "decode", packed, scale, bits, states, *shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@linear_trellis.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, states: int, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.numel())


@custom_op("qsearch_kernels::linear_trellis_rounded", mutates_args=(), device_types="cpu")
def linear_trellis_rounded(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    states: int,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """The same with activations rounded to `activation` bits, as `reference.linear_wnaxi` does."""
    return trellis_cpu.linear_rounded(x, packed, scale, bits, states, bias, activation, low, high)


@linear_trellis_rounded.register_kernel("cuda")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    states: int,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    from . import gpu_ops

    codes, a_scale, zero, sums = _rows(gpu_ops.quantize_rows, x, activation, 0, low, high)
    own = scale.reshape(-1).float()
    total = own * _totals(packed, bits, states, len(own), x.shape[-1])
    if codes.shape[:-1].numel() < DECODE_ROWS:
        given = (codes, a_scale, zero, packed, own, total, bits, states, bias, None, None, x.dtype)
        made: Tensor = _gpu("linear_trellis", "linear_trellis_a8", *given)
        return made
    level = decode_trellis(packed, bits, states, len(own), x.shape[-1])
    dense: Tensor = gpu_ops.linear_a8(
        codes, a_scale, zero, sums, level, own, None, total, bias, None, None, x.dtype
    )
    return dense


@linear_trellis_rounded.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bits: int,
    states: int,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scale.numel())


def _totals(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    """fp32 [rows]: the sum of each row's levels, worked out once for as long as tiles stay so."""
    found = _TOTALS.get(packed)
    if found is None or found[0] != packed._version:
        level = decode_trellis(packed, bits, states, rows, columns)
        found = _TOTALS[packed] = (packed._version, level.sum(1, dtype=torch.int32).float())
    total: Tensor = found[1]
    return total


@custom_op("qsearch_kernels::rotate", mutates_args=(), device_types="cpu")
def rotate(x: Tensor, group: int) -> Tensor:
    """`hadamard.rotate`: every `group` of neighbours of `x` [..., channels] rotated."""
    return hadamard.rotate(x.detach(), group)


@rotate.register_kernel("cuda")
def _(x: Tensor, group: int) -> Tensor:
    made: Tensor = _gpu("rotate", "rotate", x, group)
    return made


@rotate.register_fake
def _(x: Tensor, group: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _turn_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return rotate(gradient, ctx.group), None  # the matrix is its own transpose


def _remember(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.group = inputs[1]


rotate.register_autograd(_turn_back, setup_context=_remember)


@custom_op("qsearch_kernels::rotate_quantize_rows", mutates_args=(), device_types="cpu")
def rotate_quantize_rows(
    x: Tensor,
    rotated: int,
    form: str = "8",
    activation: str = "",
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hadamard.rotate_quantize_rows`: codes, scale, zero and sums of rotated, rounded rows."""
    made = hadamard.rotate_quantize_rows(x, rotated, form, activation, divisor, scale, zero, group)
    return made.codes, made.scale, made.zero, made.sums


@rotate_quantize_rows.register_kernel("cuda")
def _(
    x: Tensor,
    rotated: int,
    form: str = "8",
    activation: str = "",
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (x, rotated, form, activation, divisor, scale, zero, group)
    made = _gpu("rotate", "rotate_quantize_rows", *given)
    return made.codes, made.scale, made.zero, made.sums


@rotate_quantize_rows.register_fake
def _(
    x: Tensor,
    rotated: int,
    form: str = "8",
    activation: str = "",
    divisor: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns, rows = x.shape[-1] // (2 if activation == "geglu" else 1), x.shape[:-1].numel()
    integer = reference_a8.form_of(form)[0]
    codes = x.new_empty(
        *x.shape[:-1], columns, dtype=torch.int8 if integer else torch.float8_e4m3fn
    )
    grids = rows if scale is None else scale.shape[0]
    own, other = (x.new_empty(grids, dtype=torch.float32) for _ in range(2))
    groups = -(-columns // group) if group else 1
    return codes, own, other, x.new_empty(rows, groups, dtype=torch.int32)
