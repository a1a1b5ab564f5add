"""Operations that `torch.compile` and CUDA graphs see whole: on a GPU the Triton kernels, on a CPU
their twins, and shapes alone for tracing.

Each is `torch.ops.qsearch_kernels.gpu_NAME` and is called here by NAME, with the arguments of its
twin in `reference_a8.py`. What no kernel does is refused by name; nothing is computed in full
precision without being asked for. `linear_rounded`, `conv2d_rounded` and `linear` put them together
as a layer needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference_a8
from .prepared import Prepared
from .reference import convolved, grid
from .reference_levels import dequantize_levels, linear_levels, takes

#: Rows of activations from which whole rows of weights are unpacked once, for a dense product: 1.5
#: bytes a weight at 4.3 TB/s against 2 * rows operations a weight at 1160 TOPS (published rates of
#: an H200) are 202 / rows, under 5 % from here on.
UNPACK_ROWS = 4096
_ROWS = "(Tensor codes, Tensor scale, Tensor zero, Tensor sums)"


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """What carries out the launches that `gpu/MODULE.py` makes of an operation's arguments."""

    def call(*arguments: Any) -> Any:
        launches, out = getattr(importlib.import_module(f".gpu.{module}", __package__), name)(
            *arguments
        )
        for launch in launches:
            launch.run()
        return tuple(out) if isinstance(out, reference_a8.Rows) else out

    return call


def _operation(
    name: str,
    twin: Callable[..., Any],
    fake: Callable[..., Any],
    module: str,
    schema: str | None = None,
) -> Any:
    made = custom_op(
        f"qsearch_kernels::gpu_{name}", twin, mutates_args=(), device_types="cpu", schema=schema
    )
    made.register_kernel("cuda")(_kernel(module, name))
    made.register_fake(fake)
    return made


def _rows_fake(
    x: Tensor, columns: int, form: str, group: int, grids: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    codes = x.new_empty(
        *x.shape[:-1],
        columns,
        dtype=torch.int8 if reference_a8.form_of(form)[0] else torch.float8_e4m3fn,
    )
    scale, zero = (
        x.new_empty(rows if grids is None else grids, dtype=torch.float32) for _ in range(2)
    )
    return (
        codes,
        scale,
        zero,
        x.new_empty(rows, -(-columns // group) if group else 1, dtype=torch.int32),
    )


def _quantize_rows_fake(
    x: Tensor,
    form: str = "8",
    activation: str = "",
    shift: Any = None,
    divisor: Any = None,
    scale: Tensor | None = None,
    zero: Any = None,
    group: int = 0,
) -> Any:
    return _rows_fake(
        x,
        x.shape[-1] // (2 if activation == "geglu" else 1),
        form,
        group,
        None if scale is None else scale.shape[0],
    )


def _norm_quantize_fake(x: Tensor, form: str = "8", *rest: Any) -> Any:
    return _rows_fake(x, x.shape[-1], form, int(rest[8]) if len(rest) > 8 else 0, None)


def _conv2d_a8_fake(
    codes: Tensor, a_scale: Tensor, a_zero: Tensor, weight: Tensor, *rest: Any
) -> Tensor:
    given: tuple[Any, ...] = (*rest[2:], *(1, 0, 1, None, None, torch.bfloat16)[len(rest) - 2 :])
    stride, padding, dilation, _, _, dtype = given
    size = [
        (n + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for n, taps in zip(codes.shape[1:3], weight.shape[1:3], strict=True)
    ]
    return codes.new_empty(codes.shape[0], *size, weight.shape[0], dtype=dtype)


def _product_fake(place: int) -> Callable[..., Tensor]:
    """The fake of a product whose type is the argument at `place`, bf16 where it is left out."""

    def fake(
        codes: Tensor, a_scale: Tensor, a_zero: Any, sums: Any, weight: Tensor, *rest: Any
    ) -> Tensor:
        return codes.new_empty(
            *codes.shape[:-1],
            weight.shape[0],
            dtype=rest[place - 5] if len(rest) > place - 5 else torch.bfloat16,
        )

    return fake


quantize_rows = _operation(
    "quantize_rows", reference_a8.quantize_rows, _quantize_rows_fake, "quantize",
    (
        "(Tensor x, str form='8', str activation='', Tensor? shift=None, Tensor? "
        "divisor=None, Tensor? scale=None, Tensor? zero=None, SymInt group=0) -> "
    ) + _ROWS,
)  # fmt: skip
norm_quantize = _operation(
    "norm_quantize", reference_a8.norm_quantize, _norm_quantize_fake, "norm_quantize",
    "(Tensor x, str form='8', bool rms=False, float eps=1e-6, Tensor? weight=None, "
        "Tensor? bias=None, Tensor? modulation_scale=None, "
    "Tensor? modulation_shift=None, Tensor? shift=None, Tensor? divisor=None, SymInt "
        "group=0) -> " + _ROWS,
)  # fmt: skip
linear_a8 = _operation("linear_a8", reference_a8.linear_a8, _product_fake(11), "linear_a8")
linear_packed_a8 = _operation(
    "linear_packed_a8", reference_a8.linear_packed_a8, _product_fake(14), "linear_packed_a8"
)
conv2d_a8 = _operation("conv2d_a8", reference_a8.conv2d_a8, _conv2d_a8_fake, "conv2d_a8")
dequantize = _operation(
    "dequantize",
    dequantize_levels,
    lambda codes, *rest: codes.new_empty(codes.shape[0], rest[5], dtype=rest[7]),
    "dequantize",
)
linear_wna16 = _operation(
    "linear_wna16",
    linear_levels,
    lambda x, codes, *rest: x.new_empty(*x.shape[:-1], codes.shape[0]),
    "linear_wna16",
)


def linear_rounded(
    rows: reference_a8.Rows | tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Prepared,
    *after: Any,
    dtype: torch.dtype,
) -> Tensor:
    """A layer's product from rounded rows and a prepared weight; `after`: bias, gate and residual
    as in `reference_a8.linear_a8`, where given.

    Codes of 8 bits with a scale for each row of weights, or many rows of activations, are a dense
    int8 product; the rest is unpacked on the way. Rows that are rounded once serve several layers
    (Q, K and V); with groups of columns and zeros, `sums` must have been taken by the same groups.
    """
    codes, a_scale, zeros, sums = rows
    a_zero = zeros if codes.dtype == torch.int8 else None
    given = (*after, *(None,) * (3 - len(after)))
    bits = weight.bits
    dense = None if weight.codes.dtype == torch.uint8 else weight.codes
    if weight.group == 0 and dense is None and codes.shape[:-1].numel() >= UNPACK_ROWS:
        dense = _dense(weight, codes.shape[-1])
    if weight.group == 0 and dense is not None:
        zero = None if weight.zero is None else weight.zero[:, 0]
        found: Tensor = linear_a8(
            codes,
            a_scale,
            a_zero,
            sums,
            dense,
            weight.scale[:, 0],
            zero,
            weight.total,
            *given,
            dtype,
        )
        return found
    packed = (
        weight.codes,
        weight.scale,
        weight.zero,
        weight.total,
        weight.table,
        bits,
        weight.group,
    )
    product: Tensor = linear_packed_a8(codes, a_scale, a_zero, sums, *packed, *given, dtype)
    return product


def conv2d_rounded(
    x: Tensor,
    weight: Prepared,
    bias: Tensor | None,
    activation: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> Tensor:
    """`reference.conv2d_wnaxi` [batch, N, h, w], channels last in memory: each picture on a grid of
    its own, or on the one between `low` and `high`.

    Codes of fewer bits are unpacked, and all of them brought from [N, C, R, S] into the kernel's
    order [N, R, S, C], once a call: two bytes moved a weight (none for taps of 1 x 1), where the
    product multiplies it with every place of every picture. A copy that is kept would double the
    memory of 8 bits and undo that of fewer. Raises `ValueError` for what the kernel doesn't do. A
    picture that holds something not finite becomes NaN, on a static grid too.
    """
    refused = [
        f"{name} {tuple(given)}"
        for name, given in (("stride", stride), ("padding", padding), ("dilation", dilation))
        if len(set(given)) != 1
    ]
    refused += (
        [f"groups of {weight.group}"]
        if weight.group
        else ["zeros"]
        if weight.zero is not None
        else []
    )
    if refused:
        raise ValueError(
            "int8 convolutions take one stride, padding and dilation for both axes and "
            "weights with one scale a row and no zeros; "
            f"given {', '.join(refused)}: dequantize this weight instead"
        )
    batch, channels = x.shape[:2]
    size = convolved(x.shape[2:], kernel, stride, padding, dilation)
    if not x.numel():
        return x.new_empty(batch, *size, len(weight.codes)).permute(0, 3, 1, 2)
    places = x.permute(0, 2, 3, 1).contiguous()
    first, last = (end.float() for end in torch.aminmax(places.view(batch, -1), dim=1))
    finite = (first.clamp(max=0) + last.clamp(min=0)).isfinite()
    first, last = (end.where(finite, 0) for end in (first, last))
    scale, zero = grid(
        x,
        activation,
        first if low is None else low.reshape(-1),
        last if high is None else high.reshape(-1),
    )
    scale = scale.expand(batch).contiguous()
    zero = (zero - 2 ** (activation - 1)).expand(batch).contiguous()
    codes = quantize_rows(places, form=str(activation), scale=scale, zero=zero)[0]
    dense = (
        weight.codes
        if weight.codes.dtype == torch.int8
        else _dense(weight, channels * kernel[0] * kernel[1])
    )
    taps = dense.view(-1, channels, *kernel).permute(0, 2, 3, 1).contiguous()
    after = (stride[0], padding[0], dilation[0], bias, None, x.dtype)
    made: Tensor = conv2d_a8(
        codes, scale.where(finite, torch.nan), zero, taps, weight.scale[:, 0], weight.total, *after
    )
    return made.permute(0, 3, 1, 2)


def _dense(weight: Prepared, columns: int) -> Tensor:
    """The signed codes int8 [N, columns] of a weight of fewer bits: its levels, as whole
    numbers.
    """
    middle = 0.0 if weight.table is not None else 2.0 ** (weight.bits - 1)
    found: Tensor = dequantize(
        weight.codes, None, None, middle, weight.table, weight.bits, columns, 0, torch.int8
    )
    return found


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offset: float,
    levels: Tensor | None,
    bits: int,
    columns: int,
    group: int,
    bias: Tensor | None,
) -> Tensor:
    """`reference_levels.linear_levels` for activations as they are: up to 16 rows with packed
    weights, more by a dense product with the weight unpacked once.

    A weight as `Weight` holds it: `offset` is the zero of all where `zero` is None, and means
    nothing beside one.
    """
    offset = offset if zero is None else 0.0
    if takes(x.shape[:-1].numel(), group, levels):
        product: Tensor = linear_wna16(
            x, codes, scale, zero, offset, levels, bits, columns, group, bias
        )
        return product
    return torch.nn.functional.linear(
        x, dequantize(codes, scale, zero, offset, levels, bits, columns, group, x.dtype), bias
    )
