"""Products on a CPU: int8 GEMMs where they are fast and exact, else widened weights.

Which product serves which weight, inputs and number of rows is asked of this core's table
(`products`): int8 GEMMs where the core has units for them and they are exact, with inputs that the
plan rounds (`cpu_rounded`) or cut into digits (`digits`, `few`); elsewhere a dense GEMM with the
weight widened a piece at a time (`widened`), in the type that the core multiplies fastest. For
rounded inputs, weights of fewer bits are spread to bytes in the order in which they come out of
their bytes (`layout.unpack_by_phase`), and convolutions lay their windows out as rows.
A row that holds something not finite becomes NaN.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    bf16_tiles,
    dequantize_gemm,
    digits,
    integer_sums,
    layout,
    products,
    reference,
    small_m,
)
from .activation_cache import shared
from .cpu_rounded import (
    as_they_lie,
    base_of,
    factor_of,
    few_rows,
    in_bytes,
    largest_weight,
    product,
    row_sums,
    uneven,
    whole_levels,
)
from .cpu_rows import Bytes, rows_of
from .jit import compiled
from .reference import convolved
from .weight import Weight

FEW = small_m.MOST  # so that fp32 activations too are worth their digits
_BYTES = 2**20  # of weights, widened at a time
#: inputs and outputs of torch 2.13's `_weight_int8pack_mm` are multiples of this
_WHOLE = 32


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`reference.linear_wna16`: as digits, or with the weight widened, whichever is faster here
    (`products`).
    """
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if products.reference_forced():
        made = reference.linear_wna16(rows, **_twin(weight), bias=bias)
    elif x.dtype == torch.float64 or not rows.numel() or not len(weight.codes):
        made = F.linear(
            rows, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype)
        )
    else:
        made = linear_by(weight_way(weight, len(rows), x.dtype), rows, weight, bias)
    return made.view(*x.shape[:-1], made.shape[-1])


def weight_way(weight: Weight, rows: int, dtype: torch.dtype) -> str:
    """How a weight is multiplied with so many rows of `dtype` as they are: one of `weight_ways`."""
    inputs = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    return products.way(
        f"{products.kind_of(weight, None)} {inputs}",
        rows,
        weight_ways(weight, rows, dtype),
        len(weight.codes) * weight.columns,
    )


def weight_ways(weight: Weight, rows: int, dtype: torch.dtype) -> tuple[str, ...]:
    """The ways of `linear_by` that there are for a weight and so many rows of `dtype`."""
    short = dtype == torch.bfloat16
    found = ["fp32"]
    if digits.in_tiles(weight):
        found.append("vnni")
    if dequantize_gemm.takes(weight) and compiled("widen_numba") is not None:
        found.append("fp32 rows")
    if in_bytes(weight) and small_m.exact():
        found.append("digits")
    if short and bf16_tiles.takes(weight):
        found.append("bf16 tiles")
    if short and rows > FEW:
        found.append("bf16")
    even = weight.codes.dtype == torch.int8 and weight.group <= 0 and not uneven(weight)
    if (
        short
        and rows <= FEW
        and even
        and len(weight.codes) % _WHOLE == 0
        and weight.columns % _WHOLE == 0
    ):
        found.append("int8pack")
    return tuple(found)


def linear_by(way: str, rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product [M, N] of `rows` [M, K] in their type, in one of `weight_ways`.

    "digits": rows as two or three bytes each, in products of bytes; "vnni": the same as numba
    compiles it, scales of groups included; "bf16 tiles": bf16 rows with the weight widened to bf16
    a panel at a time, as numba compiles it; "int8pack": torch's own product of bf16 rows with bytes
    about zero; "fp32", "bf16": the weight widened to that type; "fp32 rows": the same in fp32 as
    numba compiles it, sixteen rows of the weight at a time, or with codes that become numbers in
    registers.
    """
    short = rows.dtype in (torch.bfloat16, torch.float16)
    if way == "digits":
        count = 2 if short else 3
        if len(rows) <= FEW and small_m.takes(weight):
            return _with_bias(small_m.product(rows.float(), weight, count), bias, rows.dtype)
        return digits.product(*digits.digits_of(rows.float(), count), weight, bias, rows.dtype)
    if way == "vnni":
        return digits.product_in_tiles(rows, weight, bias)
    if way == "bf16 tiles":
        return bf16_tiles.product(rows, weight, bias)
    if way == "fp32 rows":
        return dequantize_gemm.compiled_product(rows, weight, bias)
    if way == "int8pack":
        sums = torch._weight_int8pack_mm(
            rows.contiguous(), weight.codes, torch.ones(len(weight.codes), dtype=rows.dtype)
        )
        return _with_bias(sums.float().mul_(weight.scale.float().flatten()), bias, rows.dtype)
    wide = torch.bfloat16 if way == "bf16" else torch.float32
    if way == "bf16" and dequantize_gemm.takes(weight) and compiled("widen_numba") is not None:
        return dequantize_gemm.bf16_product(rows.bfloat16(), weight, bias).to(rows.dtype)
    if dequantize_gemm.takes(weight):
        return _with_bias(dequantize_gemm.product(rows.to(wide), weight), bias, rows.dtype)
    return F.linear(
        rows.to(wide), weight.dequantize(wide), None if bias is None else bias.to(wide)
    ).to(rows.dtype)


def _twin(weight: Weight) -> dict[str, Any]:
    """A weight as the arguments of the plain twins in `reference.py`."""
    zero = weight.offset if weight.zero is None else weight.zero
    numbers = {
        "bits": weight.bits,
        "columns": weight.columns,
        "group": weight.group,
        "levels": weight.levels,
    }
    return {"packed": weight.codes, "scale": weight.scale, "zero": zero, **numbers}


def _with_bias(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y.add_(bias)).to(dtype)


def linear_rounded(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """`reference.linear_wnaxi`. Raises `ValueError` for a weight that can't be multiplied as
    bytes.
    """
    _check(weight)
    if products.reference_forced():
        return reference.linear_wnaxi(
            x, **_twin(weight), activation=activation, low=low, high=high, bias=bias
        )
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    plain = (
        low is None
        and high is None
        and weight.codes.dtype == torch.int8
        and not uneven(weight)
        and weight.columns > 1
    )
    if len(rows) == 1 and plain and (way := products.way("wide", 1)) in ("int_mm", "fp32"):
        return _one_row(rows, weight, bias, activation, way).view(*x.shape[:-1], -1)
    sums = uneven(weight)
    few = rounded_way(weight, len(rows), activation) if len(rows) <= FEW else ""
    if in_one_call(few, weight, len(rows)):
        y = few_rows(rows, weight, bias, activation, low, high, few)
        return y.view(*x.shape[:-1], y.shape[-1])
    rounded = shared(
        x,
        (activation, int(sums)),
        (low, high),
        id(weight.codes),
        lambda: rows_of(rows, activation, low, high, sums=sums),
    )
    y = product(rounded, weight, bias, x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def in_one_call(way: str, weight: Weight, rows: int) -> bool:
    """Whether `few_rows` rounds and multiplies so many rows, by the product `way` of a weight that
    lies as `as_they_lie` says.
    """
    if way == "madd":
        whole = weight.codes.dtype == torch.int8 and products.table().unsigned
        return whole and 1 < rows <= FEW
    return way == "vnni" and 0 < rows <= FEW


def rounded_way(weight: Weight, rows: int, activation: int) -> str:
    """The integer product of rounded rows that is fastest here; none for a weight whose codes are
    spread to bytes first.
    """
    if not as_they_lie(weight):
        return ""
    top = 2**activation - 1 if products.table().unsigned else 128
    narrow = integer_sums.fits_pairs(top, largest_weight(weight))
    return products.way(
        "narrow" if narrow else "wide", rows, weights=len(weight.codes) * weight.columns
    )


def _one_row(x: Tensor, weight: Weight, bias: Tensor | None, activation: int, way: str) -> Tensor:
    """The same for one row [1, K] and bytes about zero, where as little as possible is done beside
    reading the weight: ends, scale and zero are plain numbers.
    """
    row = x.float()
    ends = torch.aminmax(row)
    low, high, top = min(float(ends.min), 0.0), max(float(ends.max), 0.0), 2**activation - 1
    if not math.isfinite(high - low):
        return x.new_full((1, len(weight.codes)), math.nan)
    # `reference.grid`, whose ten operations on single numbers take as long as a megabyte of weights
    scale = _rounded(
        "e", min(max(_rounded("f", _rounded("f", high - low) / top), 2.0**-24), 65504.0)
    )
    zero = min(max(round(_rounded("f", -low / scale)), 0), top)
    less, form = (
        (0, torch.uint8) if way == "int_mm" and products.table().unsigned else (128, torch.int8)
    )
    codes = row.div(scale).add_(zero).round_().clamp_(0, top).sub_(less).to(form)
    if way == "int_mm":
        y = torch._int_mm(codes, weight.codes.t()).float()
    else:
        parts = weight.codes.split(max(64, _BYTES // weight.columns))
        y = torch.cat(
            [
                integer_sums.in_fp32(
                    part,
                    128 * 128,
                    dequantize_gemm.scratch(len(part), weight.columns, torch.float32),
                )(codes)
                for part in parts
            ],
            1,
        )
    y.sub_(row_sums(weight), alpha=zero - less).mul_(weight.scale.float().flatten()).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _rounded(form: str, value: float) -> float:
    """The number as a type of `struct` holds it: "f" is fp32, "e" fp16."""
    found: float = struct.unpack(form, struct.pack(form, value))[0]
    return found


def conv2d_rounded(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """`reference.conv2d_wnaxi`: windows of bytes laid out as rows, one product. Raises `ValueError`
    for a weight that can't be multiplied as bytes.

    Windows are copied channels last, a run of channels at a time: byte by byte that took up to
    twice as long as the product.
    """
    _check(weight)
    if products.reference_forced():
        places: dict[str, Any] = {
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
        }
        return reference.conv2d_wnaxi(
            x, **_twin(weight), **places, activation=activation, low=low, high=high, bias=bias
        )
    batch, channels, height, width = x.shape
    size = convolved((height, width), kernel, stride, padding, dilation)
    if not x.numel():
        return x.new_empty(batch, len(weight.codes), *size)
    last = x.permute(0, 2, 3, 1)
    given = (
        x if x.is_contiguous() else last
    )  # a picture has one grid, in whatever order its numbers come
    rounded = rows_of(given.reshape(batch, -1), activation, low, high, sums=False)
    codes = rounded.codes.view(given.shape)
    pictures = codes.new_empty(batch, height + 2 * padding[0], width + 2 * padding[1], channels)
    if any(padding):  # zeros of the picture are the zero's code
        pictures.copy_(rounded.zero.to(codes.dtype).view(-1, 1, 1, 1).expand_as(pictures))
    pictures[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = (
        codes.permute(0, 2, 3, 1) if given is x else codes
    )
    b, h, w, c = pictures.stride()
    windows = pictures.as_strided(
        (batch, *size, *kernel, channels),
        (b, h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c),
    )
    rows = windows.reshape(batch * size[0] * size[1], weight.columns)
    scale, zero = (
        each.repeat_interleave(size[0] * size[1], 0) for each in (rounded.scale, rounded.zero)
    )
    moved = _taps_first(weight, channels)
    sums = _window_sums(pictures, size, kernel, stride, dilation) if uneven(moved) else None
    given_rows = Bytes(rows, scale, zero, sums, rounded.largest)
    origin, largest = (weight.codes, channels), largest_weight(weight)
    y = product(given_rows, moved, bias, x.dtype, row_sums(weight), origin=origin, largest=largest)
    return y.view(batch, *size, -1).permute(0, 3, 1, 2)


def _window_sums(
    pictures: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The sum of each window of bytes [B, H, W, C], fp32 [B * windows, 1]: channels are added once,
    and not for each window that a pixel is in.
    """
    pixels = pictures.sum(-1, dtype=torch.int32)
    total = pixels.new_zeros(len(pictures), *size)
    for tap in itertools.product(*map(range, kernel)):
        begin = [place * far for place, far in zip(tap, dilation, strict=True)]
        down, across = (
            slice(b, b + (n - 1) * step + 1, step)
            for b, n, step in zip(begin, size, stride, strict=True)
        )
        total += pixels[:, down, across]
    return total.view(-1, 1).float()


def _taps_first(weight: Weight, channels: int) -> Weight:
    """A convolution's weight as bytes whose columns are ordered by taps, then channels: a copy that
    takes a hundredth of the product's time.
    """
    codes, offset, zero, factor = weight.codes, weight.offset, weight.zero, factor_of(weight)
    if codes.dtype != torch.int8:
        numbers = layout.unpack(codes, weight.bits, weight.columns)
        table = None if weight.levels is None else whole_levels(weight.levels)
        less = base_of(weight)
        codes = numbers.sub_(less).view(torch.int8) if table is None else table[0][numbers.int()]
        more = 128 - less  # a byte is 128 less than a code of 8 bits
        offset, zero = offset + more, None if zero is None else zero.float() / factor + more
    moved = codes.view(len(codes), channels, -1).transpose(1, 2).reshape(len(codes), -1)
    return Weight(
        moved, weight.scale.float() * factor, zero, offset, None, 8, weight.columns, weight.group
    )


def _check(weight: Weight) -> None:
    if not in_bytes(weight):
        raise ValueError(
            "products of bytes need one scale a row and whole levels of 8 bits; given "
            f"{weight.bits} bits in groups of {weight.group}"
        )
