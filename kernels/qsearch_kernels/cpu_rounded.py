"""Products of rounded activations on a CPU: a row becomes bytes, bytes are multiplied as bytes, and
scale, zeros and bias come after in few passes.

With x = s (a - z) and w = t (b - u), a and b bytes: y = s t (sum a b - z sum b + (K z - sum a) u) +
bias. The first sum is exact in 32 bits; what is added to it is a product of rank 1 or 2, in a
single pass. torch's own operations go over memory once each, and around a product of bytes that is
most of the time: so there are as few of them as the numbers allow. A row that holds something not
finite becomes NaN. `traced_rows` and `traced_product` are the same in operations that a compiler
takes apart, and fuses with what comes before and after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import dequantize_gemm, integer_sums, layout, products, saturation, small_m
from .cpu_rows import Bytes
from .jit import compiled, in_parts, passes
from .reference import grid
from .weight import Weight

_WIDE = (
    2**20
)  # weights at a time that are widened to fp32 or split, where that is how integers are multiplied
_SPREAD = 2**23  # bytes of weights, spread at a time
_FINISHED = (torch.float32, torch.bfloat16)  # types that `rows_numba.finish` writes
#: of a product's results at a time: what is computed between them stays in the last cache
_NUMBERS = 2**20
# codes -> (version of the tensor, sums of its rows): four bytes a row, and not a pass over the
# weights each call
_TOTALS = WeakTensorKeyDictionary()


def whole_levels(levels: Tensor) -> tuple[Tensor, float] | None:
    """A table of levels as int8 and the power of two that makes it so (e2m1 times 2: 0 to 12); None
    where there is none.
    """
    if levels.ndim != 1 or not bool(torch.isfinite(levels).all()):
        return None
    for power in range(8):
        scaled = levels.float() * 2**power
        if torch.equal(scaled, scaled.round()):
            return (
                (scaled.to(torch.int8), 2.0**-power) if float(scaled.abs().max()) <= 127 else None
            )
    return None


def in_bytes(weight: Weight) -> bool:
    """Whether a weight can be multiplied as bytes: one scale a row, and codes or levels that are
    whole numbers of 8 bits.
    """
    if weight.group > 0 or weight.columns > small_m.LONGEST:
        return False
    return (
        whole_levels(weight.levels) is not None
        if weight.levels is not None
        else weight.bits < 8 or weight.codes.dtype == torch.int8
    )


def uneven(weight: Weight) -> bool:
    """Whether the weights' zero is anything but the byte 0, so that the sums of rows are needed."""
    return weight.zero is not None or (weight.levels is None and weight.offset != base_of(weight))


def factor_of(weight: Weight) -> float:
    """What one step of whole levels stands for."""
    if weight.levels is None:
        return 1.0
    found = whole_levels(weight.levels)
    assert found is not None, "asked for bytes of levels that are not whole"
    return found[1]


def zero_of(weight: Weight) -> Tensor:
    """u, fp32 [1 or N]: the byte that stands for the weight 0."""
    return (
        torch.full((1,), weight.offset) if weight.zero is None else weight.zero.float().flatten()
    ) - base_of(weight)


def product(
    rounded: Bytes,
    weight: Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    totals: Tensor | None = None,
    *,
    origin: tuple[Tensor, int] | None = None,
    largest: int | None = None,
    way: str | None = None,
) -> Tensor:
    """[M, N] in `dtype`: rounded rows times weights, plus `bias`.

    Args:
        totals: `row_sums` of the weight, where they are known.
        origin: the stored codes that the weight's were made of, and in which order of columns.
        largest: the magnitude that no byte of the weight exceeds, where it is less than its type
            says.
        way: a key of `products.Table.seconds`; None = the fastest one here.
    """
    count, columns = rounded.codes.shape
    out = torch.empty(
        count, len(weight.codes), dtype=dtype if dtype in _FINISHED else torch.float32
    )
    if not out.numel() or not columns:
        return (out.zero_() if bias is None else out.copy_(bias.expand_as(out))).to(dtype)
    factor, left = factor_of(weight), _left(rounded)
    totals = row_sums(weight) if totals is None else totals
    largest = largest_weight(weight) if largest is None else largest
    narrow = integer_sums.fits_pairs(rounded.largest, largest)
    name, _, rest = (
        way or products.way("narrow" if narrow else "wide", count, weights=out.shape[1] * columns)
    ).partition(" + ")
    if name == "madd" and count == 1 and as_they_lie(weight):
        found = dequantize_gemm.one_row_of_integers(rounded.codes, weight).float()
        scale, own = weight.scale.float().flatten(), None if bias is None else bias.float()
        _finish(found, left, _right(weight, totals), scale, rounded.scale, own, out, 0)
        return out.to(dtype)
    spread, order = spreader(weight)
    if name == "vnni" and as_they_lie(weight):
        spread, order = (lambda codes: codes), (lambda x: x)
    codes = order(rounded.codes)
    if name != "fp32" and products.table().exact[name] == "pairs":
        codes, spread = integer_sums.aligned(codes), _aligned(spread)
    excess = None
    if rest:
        excess = saturation.rest_of(*(origin or (weight.codes, 0)), lambda: spread(weight.codes))
        name = name if excess is not None else "fp32"
    step = (
        len(weight.codes)
        if weight.codes.dtype == torch.int8 or name == "vnni"
        else max(64, _SPREAD // max(1, codes.shape[1]))
    )
    if (
        name == "fp32" or excess is not None
    ):  # the rest brings the rows into another order for each piece
        step = min(
            step,
            max(
                64,
                (_WIDE if name == "fp32" or count <= small_m.MOST else _SPREAD) // codes.shape[1],
            ),
        )
    for begin in range(0, len(weight.codes), step):
        part, places = weight.part(begin, begin + step), slice(begin, begin + step)
        matrix, scale = spread(part.codes), part.scale.float().flatten() * factor
        own = None if bias is None else bias[places].float()
        if name in ("madd", "vnni"):
            ends = _ends(left, _right(part, totals[places]), scale, rounded.scale, own)
            bits = weight.bits if matrix.dtype == torch.uint8 else 8
            integer_sums.tiles_finished(name, codes, matrix, bits, *ends, out, begin)
            continue
        more = None if excess is None else excess.part(begin, begin + step, codes.shape[1])
        if name == "fp32":
            sums = integer_sums.in_fp32(
                matrix,
                rounded.largest * largest,
                dequantize_gemm.scratch(len(matrix), matrix.shape[1], torch.float32),
            )
        else:
            if more is not None:
                matrix = saturation.without(
                    matrix, more, dequantize_gemm.scratch(len(matrix), matrix.shape[1], torch.int8)
                )
            sums = integer_sums.PRODUCTS[name](matrix, 0)
        right = _right(part, totals[places])
        rows = max(256, _NUMBERS // len(matrix))
        for first in range(0, count, rows):
            some = slice(first, first + rows)
            y = sums(codes[some])
            if more is not None:
                y = saturation.add_rest(_fp32(y), codes[some], more)
            _finish(y, left[some], right, scale, rounded.scale[some], own, out[some], begin)
    return out.to(dtype)


def few_rows(
    rows: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: int,
    low: Tensor | None,
    high: Tensor | None,
    way: str = "vnni",
) -> Tensor:
    """`product` of `rows` [M, K] rounded by `rows_of`, in the type of `rows`: in one compiled call,
    by "vnni" for a weight that lies as `as_they_lie` says, or "madd" for bytes with a sign.
    """
    fast, outputs = compiled(f"{way}_numba"), len(weight.codes)
    assert fast is not None, "asked for where numba is not installed"
    short = rows.dtype == torch.bfloat16
    x = (rows if short else rows.float()).contiguous()
    out = torch.empty(len(x), outputs, dtype=x.dtype)
    each = dequantize_gemm.each_of
    ends = [each(end, 1 if end is None else end.numel()) for end in (low, high)]
    zero = each(zero_of(weight) if uneven(weight) else None, outputs)
    total, scale, added = (each(v, outputs) for v in (row_sums(weight), weight.scale, bias))
    codes = weight.codes.contiguous().numpy().view("int8" if way == "madd" else "uint8")
    source, target = (v.view(torch.int16).numpy() for v in (x, out))
    packed = () if way == "madd" else (layout.WIDTHS[weight.bits], weight.columns)
    form = 1 if short else 2  # of a number, in int16

    def part(begin: int, end: int) -> None:
        n = slice(begin, end)
        fast.rounded_product(
            source, short, *ends, 2**activation - 1, codes[n], *packed, total[n], zero[n],
            scale[n], added[n], target[:, form * begin : form * end],
        )  # fmt: skip

    in_parts(part, outputs, integer_sums.OUTPUTS)
    return out.to(rows.dtype)


def as_they_lie(weight: Weight) -> bool:
    """Whether a weight's codes, packed or not, are the bytes that a product of bytes takes."""
    return weight.codes.dtype == torch.int8 or (weight.levels is None and not base_of(weight))


def _finish(
    sums: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    a_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    begin: int,
) -> None:
    """`(sums + left @ right) * scale * a_scale + bias` into the columns of `out` from `begin` on.

    `sums` int32 or fp32 [m, n], which may be written over; `left` [m, 2], `right` [1 or 2, n].
    """
    fast, outputs = passes("rows_numba"), sums.shape[1]
    if fast is None:
        y = _fp32(sums)
        y.addmm_(left[:, : len(right)], right).mul_(scale)
        places = slice(begin, begin + outputs)
        if bias is None:
            torch.mul(y, a_scale, out=out[:, places])
        else:
            torch.addcmul(bias, y, a_scale, out=out[:, places])
        return
    (first, second, unit), each = _ends(left, right, scale, a_scale, bias)
    total, zero, units, added = (v.numpy() for v in each)
    short, target = out.dtype == torch.bfloat16, out.view(torch.int16).numpy()
    fast.finish(
        sums.numpy(), first.numpy(), total, second.numpy(), zero, units, unit.numpy(), added,
        short, target, begin,
    )  # fmt: skip


def _ends(
    left: Tensor, right: Tensor, scale: Tensor, a_scale: Tensor, bias: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The arguments of `_finish` as `rows_numba.finish` takes them: those of each row, of each
    output."""
    none, sides = torch.empty(0), left.t().contiguous()
    second, zero = (sides[1], right[1]) if len(right) > 1 else (none, none)
    w_scale, added = scale.expand(right.shape[1]), none if bias is None else bias
    outputs = (right[0], zero.contiguous(), w_scale.contiguous(), added.contiguous())
    return (sides[0], second, a_scale.flatten()), outputs


def _fp32(sums: Tensor) -> Tensor:
    """fp32 of sums that may be int32, in the same memory: to map new memory takes longer than to
    convert.
    """
    return sums if sums.dtype == torch.float32 else sums.view(torch.float32).copy_(sums)


def traced_rows(x: Tensor, activation: int, low: Tensor | None, high: Tensor | None) -> Bytes:
    """`rows_of` any `x` [..., K] in torch's own operations alone, each written once for a compiler;
    sums always, which it drops where nobody reads them.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    least, most = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    ends = (
        least if low is None else low.reshape(-1, 1),
        most if high is None else high.reshape(-1, 1),
    )
    scale, zero = grid(rows, activation, *ends)
    finite = (least.abs() + most.abs()).isfinite()  # not `least * 0`, which a compiler folds to 0
    place = (rows / scale + zero).round().clamp(0, 2**activation - 1) - 128
    return Bytes(
        place.to(torch.int8),
        torch.where(finite, scale, torch.nan),
        (zero - 128).expand_as(finite),
        place.sum(-1, keepdim=True),
    )


def traced_product(
    rounded: Bytes,
    weight: Weight,
    each: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`product` in torch's own operations alone, for weights that lie as bytes; `each`: fp32 [N] of
    `row_sums`, zeros and scales.
    """
    totals, zero, scale = each
    y = torch._int_mm(rounded.codes, weight.codes.t()).float() - rounded.zero * totals
    if uneven(weight) and rounded.sums is not None:
        y = y + (weight.columns * rounded.zero - rounded.sums) * zero
    y = y * scale * rounded.scale
    return (y if bias is None else y + bias.float()).to(dtype)


def row_sums(weight: Weight) -> Tensor:
    """fp32 [N]: the sum of each row's bytes, worked out once for as long as the codes stay the same
    tensor with the same content.
    """
    version = 0 if weight.codes.is_inference() else weight.codes._version
    found = _TOTALS.get(weight.codes)
    if found is None or found[0] != version:
        sums, (spread, _), base = (
            [],
            spreader(weight),
            0 if weight.codes.dtype == torch.int8 else base_of(weight),
        )
        for codes in weight.codes.split(max(64, _SPREAD // max(1, weight.columns))):
            matrix = spread(codes)
            sums.append(
                matrix.sum(-1, dtype=torch.int32).add_(base * (matrix.shape[1] - weight.columns))
            )  # columns that pad hold the code 0
        found = _TOTALS[weight.codes] = (version, torch.cat(sums).float())
    totals: Tensor = found[1]
    return totals


def spreader(weight: Weight) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How packed rows become int8 [n, K'], and how activations [M, K] come into the same order."""
    bits = weight.bits
    table = None if weight.levels is None else whole_levels(weight.levels)
    if (
        weight.codes.dtype == torch.int8 and weight.columns == 1
    ):  # torch 2.13's _int_mm reads beyond a matrix of one column
        return (lambda codes: F.pad(codes, (0, 1))), (lambda x: F.pad(x, (0, 1)))
    if weight.codes.dtype == torch.int8:
        return (lambda codes: codes), (lambda x: x)
    padded = -(-weight.columns // layout.phases(bits)) * layout.phases(bits)

    def spread(codes: Tensor) -> Tensor:
        out = torch.empty(len(codes), padded, dtype=torch.uint8)
        layout.unpack_by_phase(codes, bits, weight.columns, out)
        if table is None:
            return (
                out.sub_(out.new_tensor(base_of(weight))).view(torch.int8)
                if base_of(weight)
                else out.view(torch.int8)
            )
        return table[0][out.int()]

    return spread, lambda x: layout.by_phase(x, bits)


def largest_weight(weight: Weight) -> int:
    """The magnitude that no byte of a weight exceeds."""
    if weight.levels is not None:
        found = whole_levels(weight.levels)
        assert found is not None, "asked for bytes of levels that are not whole"
        return int(found[0].short().abs().max())
    return 128 if weight.bits == 8 else 64 if weight.bits == 7 else int(2**weight.bits - 1)


def _aligned(spread: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda codes: integer_sums.aligned(spread(codes))


def base_of(weight: Weight) -> int:
    """What a byte is less than the code that it stands for; 7 bits lie about zero, so that the
    products of two neighbours fit 16 bits.
    """
    if weight.levels is not None:
        return 0
    return 128 if weight.codes.dtype == torch.int8 else 64 if weight.bits == 7 else 0


def _left(rounded: Bytes) -> Tensor:
    """fp32 [M, 1 or 2]: -z and, where sums are there, K z - sum a."""
    if rounded.sums is None:
        return -rounded.zero
    return torch.cat([-rounded.zero, rounded.codes.shape[1] * rounded.zero - rounded.sums], 1)


def _right(weight: Weight, totals: Tensor) -> Tensor:
    """fp32 [1 or 2, N], to be multiplied with `_left`: sum b and, where the weights' zero is not
    the byte 0, u.
    """
    return (
        torch.stack([totals, zero_of(weight).expand_as(totals)]) if uneven(weight) else totals[None]
    )
