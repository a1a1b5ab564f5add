"""Activations as they are in products of bytes: each row a scale times digits of 8 bits (W8A16).

A row in half precision is a scale times whole numbers of 16 bits, one in fp32 of 24: two or three
bytes, each with an exact int8 GEMM of its own, which are added up with their powers of 256. Where
a core multiplies bytes (VNNI, AMX), two of these GEMMs take as long as one in bf16, and read a
weight of a byte. A row that holds something not finite becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout, small_m
from .cpu_rounded import factor_of, spreader, uneven, zero_of
from .dequantize_gemm import as_compiled, each_of
from .jit import compiled, has_vnni, in_parts
from .weight import Weight

_BYTES = 2**20  # of weights, spread at a time
_ROWS = 512  # of activations at a time
_PART, _OUTPUTS = 256, 64  # rows, and outputs of fewer rows, that are worth a thread of their own


def digits_of(rows: Tensor, count: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """fp32 rows as `count` bytes each, the highest first: scale * (256 * (256 * d0 + d1) + d2); and
    the sums of each digit's rows.
    """
    top = 127.0 * sum(256**i for i in range(count))
    scale = (
        rows.abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.new_zeros(len(rows), 1)
    ).clamp(min=1e-30) / top
    left, digits, sums = (rows / scale).round_().clamp_(-top, top), [], []
    for place in range(count - 1, -1, -1):
        unit = 256**place
        half = 128 * sum(
            256**i for i in range(place)
        )  # what the lower digits can make up for, downwards
        digit = ((left + half) / unit).floor_() if place else left
        digits.append(digit.to(torch.int8))
        sums.append(digit.sum(-1))
        if place:
            left.sub_(digit, alpha=unit)
    return digits, scale + torch.stack(sums).sum(0)[:, None] * 0, sums


def product(
    digits: list[Tensor],
    scale: Tensor,
    sums: list[Tensor],
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N]: the sum over `digits` [M, K] of 256**place times their product with the weights,
    scaled.

    `scale`: fp32 [M, 1]; `sums`: [M] of each digit's rows.
    """
    count, columns = digits[0].shape
    out = torch.empty(count, len(weight.codes), dtype=dtype)
    if not out.numel() or not columns:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    spread, order = spreader(weight)
    digits, factor = [order(d) for d in digits], factor_of(weight)
    whole = (
        weight.codes.dtype == torch.int8 and count <= small_m.MOST
    )  # nothing to spread, and little to keep in the cache
    step = len(weight.codes) if whole else max(64, _BYTES // max(1, digits[0].shape[1]))
    for begin in range(0, len(weight.codes), step):
        part = weight.part(begin, begin + step)
        places = slice(begin, begin + len(part.codes))
        matrix = spread(part.codes).t()
        u = zero_of(part) if uneven(part) else None
        row_scale = part.scale.float().flatten() * factor
        for first in range(0, count, _ROWS):
            some = slice(first, first + _ROWS)
            y = _integers([d[some] for d in digits], [s[some] for s in sums], matrix, u).mul_(
                row_scale
            )
            if bias is None:
                torch.mul(y, scale[some], out=out[some, places])
            else:
                torch.addcmul(bias[places].float(), y, scale[some], out=out[some, places])
    return out


def _integers(
    digits: list[Tensor], sums: list[Tensor], matrix: Tensor, zero: Tensor | None
) -> Tensor:
    """fp32 [m, n]: products with `matrix` less `zero` times the sums, digit by digit; each is exact
    before it is rounded to fp32.
    """
    y: Tensor | None = None
    for digit, total in zip(digits, sums, strict=True):
        product = torch._int_mm(digit.contiguous(), matrix).float()
        if zero is not None:
            product.addcmul_(total[:, None], zero.expand(matrix.shape[1])[None], value=-1)
        y = product if y is None else y.mul_(256).add_(product)
    assert y is not None
    return y


def in_tiles(weight: Weight) -> bool:
    """Whether `product_in_tiles` is for this weight, on this machine."""
    return in_panels(weight) and has_vnni()


def in_panels(weight: Weight) -> bool:
    """Whether `vnni_numba.py` makes panels of this weight's codes: whole ones, and groups begin
    with a word.
    """
    whole = weight.bits < 8 or weight.codes.dtype == torch.int8
    even = weight.group <= 0 or weight.group % (4 * layout.phases(weight.bits)) == 0
    known = weight.levels is None and 0 < weight.columns <= small_m.LONGEST
    return known and whole and even


def product_in_tiles(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """[M, N] in the type of `rows` [M, K]: the same with digits, sums of groups and what becomes of
    them in one compiled call (`vnni_numba.py`).
    """
    fast = compiled("vnni_numba")
    assert fast is not None, "asked for where numba is not installed"
    short, grouped = rows.dtype == torch.bfloat16, weight.group > 0
    x = (rows if short else rows.float()).contiguous()
    count = 3 if rows.dtype == torch.float32 else 2
    given, outputs = as_compiled(weight), len(weight.codes)
    size = weight.group if grouped else weight.columns
    units, added = (each_of(v, outputs) for v in (None if grouped else weight.scale, bias))
    out = torch.empty(len(rows), outputs, dtype=x.dtype)
    source, target = (v.view(torch.int16).numpy() for v in (x, out))

    def part(m: slice, n: slice) -> None:
        codes, _, widths, columns, _, _, zero, scale = given.part(n.start, n.stop)
        fast.digits_product(
            source[m], short, count, codes, widths, columns, size, zero, scale, units[n], added[n],
            target[m], n.start,
        )  # fmt: skip

    if len(rows) >= _PART * torch.get_num_threads():
        in_parts(lambda a, b: part(slice(a, b), slice(0, outputs)), len(rows), _PART)
    else:
        in_parts(lambda a, b: part(slice(None), slice(a, b)), outputs, _OUTPUTS)
    return out.to(rows.dtype)
