"""GEMM on a CPU with any weight: tiles are dequantized to floating point, one at a time, in the
cache.

For groups, tables and integers whose product of bytes is slower here than a dense product. Against
widening the whole weight (`Weight.dequantize`) it saves writing and reading it at four bytes a
weight, and shuffling: codes come out of their bytes in an order of their own (`layout.py`), and the
smaller operand, rows or weight, is brought into the order of the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .jit import compiled, has_avx2, has_avx512, in_parts, passes
from .weight import Weight

#: weights that are widened at a time, nearly: smaller pieces would fit a smaller cache, but each is
#: a call, and a GEMM that packs its rows
_WEIGHTS = 2**20
_SHORT = 2**22  # the same of bf16
_THREAD = 2**16  # weights that are worth a thread of their own
_ROWS = 256  # rows that are
_FEW = 48  # rows up to which codes become numbers in registers with AVX2, not in memory
#: columns whose products of 12 and 8 bits add up in 32
MOST_DIGITS = 2**13 - 2
#: weights that are, times one row: a tenth of a millisecond's work
_ONE_ROW = 2**21
#: of each thread: the last piece's memory, which takes longer to map anew than to fill
_SCRATCH = threading.local()
_NOTHING = torch.empty(0).numpy()
_ONE, _NONE = torch.ones(1, 1), torch.empty(1, 1, 0)


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight: a group begins with a byte."""
    return weight.columns > 0 and (
        weight.group <= 0 or weight.group % layout.phases(weight.bits) == 0
    )


def product(rows: Tensor, weight: Weight) -> Tensor:
    """Rows [M, K] in fp32 or bf16 times the weight, which is widened to their type: fp32 [M, N]."""
    count, outputs = layout.phases(weight.bits), len(weight.codes)
    padded = -(-weight.columns // count) * count
    by_phase = len(rows) <= outputs or count == 1
    given = rows
    if by_phase:
        given = layout.by_phase(rows, weight.bits)
    elif padded > weight.columns:  # `pad` copies where there is nothing to add, too
        given = F.pad(rows, (0, padded - weight.columns))
    scaled = (
        weight.group <= 0 and len(rows) > weight.columns
    )  # scaling the weight is less work than scaling what comes out
    out = torch.empty(len(rows), outputs)
    pieces = max(1, round(outputs * padded / _WEIGHTS))
    step = max(64, -(-outputs // pieces))
    shape = (min(step, outputs), padded)
    levels, widened = scratch(*shape, torch.float32), _widener(weight, shape)
    for begin in range(0, outputs, step):
        size = min(step, outputs - begin)
        piece = levels[:size]
        view = (
            piece.unflatten(-1, (count, -1))
            if by_phase
            else piece.unflatten(-1, (-1, count)).transpose(1, 2)
        )
        widened(begin, view)
        if scaled:
            piece.mul_(weight.part(begin, begin + size).scale.float().view(-1, 1))
        if rows.dtype == torch.float32:
            torch.mm(given, piece.t(), out=out[:, begin : begin + size])
        else:
            out[:, begin : begin + size] = given @ piece.to(rows.dtype).t()
    return out if weight.group > 0 or scaled else out.mul_(weight.scale.float().flatten())


def bf16_product(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """bf16 rows [M, K] times the weight, which numba widens to bf16 in one pass: bf16 [M, N]."""
    fast = compiled("widen_numba")
    assert fast is not None, "asked for where numba is not installed"
    outputs, given = len(weight.codes), as_compiled(weight)
    x = layout.by_phase(rows, weight.bits)
    units = _ONE.flatten() if weight.group > 0 else weight.scale.float().flatten()
    out = torch.empty(len(rows), outputs, dtype=torch.bfloat16)
    step = max(64, -(-outputs // max(1, round(outputs * x.shape[1] / _SHORT))))
    piece = scratch(min(step, outputs), x.shape[1], torch.bfloat16)
    for begin in range(0, outputs, step):
        n = slice(begin, min(begin + step, outputs))
        wide, some = piece[: n.stop - begin], units if len(units) == 1 else units[n]
        part = (*given.part(n.start, n.stop), some.numpy())
        fast.widen_to_bf16(*part, wide.view(torch.int16).numpy())
        out[:, n] = F.linear(x, wide, None if bias is None else bias[n].bfloat16())
    return out


def scratch(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory [rows, columns] with anything in it, which the next call for this type gives again."""
    size = rows * columns
    kept: Tensor | None = getattr(_SCRATCH, str(dtype), None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=dtype)
        setattr(_SCRATCH, str(dtype), kept)
    return kept[:size].view(rows, columns)


def _widener(weight: Weight, shape: tuple[int, int]) -> Callable[[int, Tensor], object]:
    """What widens the rows of a weight from one on, as many as `out` [n, phases, columns a phase]
    has; `shape`: the largest that `out` gets."""
    fast = passes("widen_numba")
    if fast is None:
        bytes_ = scratch(*shape, torch.uint8)
        return lambda begin, out: _widen(
            weight.part(begin, begin + len(out)), bytes_[: len(out)], out
        )
    given = as_compiled(weight)
    return lambda begin, out: fast.widen(*given.part(begin, begin + len(out)), out.numpy())


def _widen(weight: Weight, bytes_: Tensor, out: Tensor) -> None:
    """Writes levels less zeros, and times scales if these belong to groups, to `out`
    [n, phases, columns a phase]; `bytes_` is scratch of the same size."""
    codes = (
        weight.codes
        if weight.bits == 8
        else layout.unpack_by_phase(weight.codes, weight.bits, weight.columns, bytes_)
    )
    base = 128 if codes.dtype == torch.int8 else 0
    if weight.levels is not None:
        places = codes.int().view(out.shape)
        if weight.levels.ndim == 3:
            tables = torch.arange(
                0, weight.levels.numel(), weight.levels.shape[2], dtype=torch.int32
            ).view(weight.levels.shape[:2])
            for place, table in _by_group(places, tables, weight.group):
                place.add_(table)
        found = torch.index_select(weight.levels.float().flatten(), 0, places.flatten())
        out.copy_(found.view(out.shape))
    elif (
        weight.zero is None
        and weight.offset == weight.offset // 1
        and codes.dtype == torch.uint8
        and weight.bits < 8
    ):
        out.copy_(
            bytes_.sub_(bytes_.new_tensor(int(weight.offset))).view(torch.int8).view(out.shape)
        )  # whole and below 128: as bytes
        base, weight = 0, weight._replace(offset=0.0)
    else:
        out.copy_(codes.view(out.shape))
    if weight.zero is not None:
        for place, zero in _by_group(out, weight.zero.float().sub_(base), weight.group):
            place.sub_(zero)
    elif weight.offset != base:
        out.sub_(weight.offset - base)
    if weight.group > 0:
        for place, scale in _by_group(out, weight.scale.float(), weight.group):
            place.mul_(scale)


class Compiled(NamedTuple):
    """A weight as the arguments of `widen_numba.py`."""

    codes: Any
    signed: bool
    widths: Any
    columns: int
    size: int
    tables: Any
    zero: Any
    scale: Any

    def part(self, begin: int, end: int) -> tuple[Any, ...]:
        """The arguments for the rows from `begin` to `end`."""
        tables, zero, scale = (
            v if len(v) == 1 else v[begin:end] for v in (self.tables, self.zero, self.scale)
        )
        same = (self.signed, self.widths, self.columns, self.size, tables)
        return (self.codes[begin:end], *same, zero, scale)


def as_compiled(weight: Weight) -> Compiled:
    """A weight as compiled functions take it."""
    phases, grouped = layout.phases(weight.bits), weight.group > 0
    size = weight.group // phases if grouped else -(-weight.columns // phases)
    zero = torch.full((1, 1), weight.offset) if weight.zero is None else weight.zero.float()
    scale = weight.scale.float() if grouped else _ONE
    zero = zero.expand(len(zero), scale.shape[1] if grouped else 1).contiguous()
    tables = _NONE if weight.levels is None else weight.levels.float()
    tables = tables.view(1, 1, -1) if tables.ndim == 1 else tables
    return Compiled(
        weight.codes.view(torch.uint8).contiguous().numpy(),
        weight.codes.dtype == torch.int8,
        layout.WIDTHS[weight.bits],
        weight.columns,
        size,
        tables.contiguous().numpy(),
        zero.numpy(),
        scale.contiguous().numpy(),
    )


def compiled_product(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`product` and `bias`, in the type of `rows`, where numba is installed: some rows of the
    weight at a time in the second cache, or in registers for few rows.
    """
    if lanes := _lanes(weight, len(rows)):
        return product_in_registers(rows, weight, bias, lanes)
    if len(rows) == 1 and weight.levels is None:
        made = one_row(rows, weight).float()
        if weight.group <= 0:
            made.mul_(weight.scale.float().flatten())
        return (made if bias is None else made.add_(bias)).to(rows.dtype)
    fast = compiled("widen_numba")
    assert fast is not None, "asked for where numba is not installed"
    short, given = rows.dtype == torch.bfloat16, as_compiled(weight)
    x = (rows if short else rows.float()).contiguous()
    out = torch.empty(len(rows), len(weight.codes), dtype=x.dtype)
    scale = None if weight.group > 0 else weight.scale
    row_scale, added = (each_of(v, len(weight.codes)) for v in (scale, bias))
    source, target = (v.view(torch.int16).numpy() for v in (x, out))

    def part(begin: int, end: int) -> None:
        ends = (row_scale[begin:end], added[begin:end])
        fast.product(source, short, *given.part(begin, end), *ends, target, begin)

    def some(begin: int, end: int) -> None:
        ends = (row_scale, added)
        fast.product(source[begin:end], short, *given, *ends, target[begin:end], 0)

    if len(rows) >= _ROWS * torch.get_num_threads():
        in_parts(some, len(rows), _ROWS)
    else:
        in_parts(part, len(weight.codes), _least(weight))
    return out.to(rows.dtype)


def _lanes(weight: Weight, rows: int) -> int:
    """The numbers of a vector with which `product_in_registers` is the fastest for so many rows; 0
    where another product is.
    """
    if has_avx512() and in_vectors(weight, 16):
        return 16
    single = weight.group > 0 or weight.columns > MOST_DIGITS  # else digits of 12 bits are as fast
    few = 1 < rows <= _FEW or (rows == 1 and single)
    return 8 if few and has_avx2() and in_vectors(weight, 8) else 0


def in_vectors(weight: Weight, lanes: int) -> bool:
    """Whether `product_in_registers` is for this weight: groups are whole vectors."""
    phases = layout.phases(weight.bits)
    return (
        weight.levels is None
        and weight.codes.dtype == (torch.int8 if weight.bits == 8 else torch.uint8)
        and weight.columns > phases * (lanes - 1)
        and (not 0 < weight.group < weight.columns or weight.group % (phases * lanes) == 0)
    )


def product_in_registers(rows: Tensor, weight: Weight, bias: Tensor | None, lanes: int) -> Tensor:
    """`compiled_product` with codes that become numbers in registers (see `codes_numba.py`), in
    vectors of `lanes` numbers.
    """
    fast = compiled("codes_numba")
    assert fast is not None, "asked for where numba is not installed"
    short, given, outputs = rows.dtype == torch.bfloat16, as_compiled(weight), len(weight.codes)
    given = given._replace(zero=given.zero - 128) if given.signed else given
    x = (rows if short else rows.float()).contiguous()
    out = torch.empty(len(rows), outputs, dtype=x.dtype)
    units, added = (each_of(v, outputs) for v in (None if weight.group > 0 else weight.scale, bias))
    source, target = (v.view(torch.int16).numpy() for v in (x, out))
    compiled_for = fast.product(weight.bits, lanes, weight.group > 0)

    def part(begin: int, end: int) -> None:
        codes, _, _, columns, size, _, zero, scale = given.part(begin, end)
        compiled_for(
            source, short, codes, columns, size, zero, scale, units[begin:end], added[begin:end],
            target, begin,
        )  # fmt: skip

    least = _least(weight) if len(rows) > 1 else _ONE_ROW // weight.columns
    in_parts(part, outputs, max(1, least))
    return out.to(rows.dtype)


def each_of(values: Tensor | None, count: int) -> Any:
    """fp32 [count] of one number or as many; empty for None."""
    if values is None:
        return _NOTHING
    given = values.float().flatten().numpy()
    return given if len(given) == count else given.repeat(count)


def one_row(row: Tensor, weight: Weight) -> Tensor:
    """fp64 [1, N]: a row [1, K] times a weight that has no table of levels, as numba compiles it;
    scales of groups included, of rows not.
    """
    fast = compiled("row_numba")
    assert fast is not None, "asked for where numba is not installed"
    if weight.bits == 8 and weight.codes.dtype == torch.uint8:
        weight = weight._replace(codes=layout.signed(weight.codes))
    given, x, grouped = as_compiled(weight), row.float(), weight.group > 0
    given = given._replace(zero=given.zero - 128) if given.signed else given
    if not grouped and weight.columns <= MOST_DIGITS and has_avx2():
        less = x.double().sum(1, keepdim=True) * torch.from_numpy(given.zero).t()
        return one_row_of_integers(x, weight).sub_(less)
    piece, groups = -(-weight.columns // 8) * 8, given.scale.shape[1]
    group = weight.group if grouped else piece
    piece = group if given.signed else piece
    sums = x.double() if grouped else x.double().sum(1, keepdim=True)
    if grouped:
        sums = F.pad(sums, (0, groups * group - weight.columns)).view(groups, group).sum(1)
    ordered = torch.cat([layout.by_phase(x, width) for width in layout.planes(weight.bits)], 1)
    numbers, total = ordered.flatten().numpy(), sums.flatten().numpy()
    out = torch.empty(len(weight.codes), dtype=torch.float64)
    made = out.numpy()

    def part(begin: int, end: int) -> None:
        codes, signed, widths, columns, _, _, zero, scale = given.part(begin, end)
        fast.product(
            numbers, total, codes, signed, widths, columns, piece, group, zero, scale,
            made[begin:end],
        )  # fmt: skip

    in_parts(part, len(made), max(1, _ONE_ROW // max(1, weight.columns)))
    return out[None]


def one_row_of_integers(row: Tensor, weight: Weight) -> Tensor:
    """fp64 [1, N]: one row [1, K] times the bytes, or the codes of fewer bits, of a weight, in
    products of 16 bits that numba compiles for x86 cores with AVX2 (at most `MOST_DIGITS` columns).

    A row of bytes is multiplied exactly; one of fp32 is cut into two digits of 12 bits.
    """
    fast = compiled("row_numba")
    assert fast is not None, "asked for where numba is not installed"
    x = torch.cat([layout.by_phase(row, width) for width in layout.planes(weight.bits)], 1)
    if row.dtype == torch.float32:
        numbers = torch.empty(2, x.shape[1], dtype=torch.int16).numpy()
        unit = fast.split(x.flatten().numpy(), numbers)
    else:
        numbers, unit = x.short().numpy(), 1.0
    given = weight.codes.contiguous().numpy().view("uint8")
    out = torch.empty(1, len(weight.codes), dtype=torch.float64)
    made = out[0].numpy()

    def part(begin: int, end: int) -> None:
        widths = layout.WIDTHS[weight.bits]
        fast.integer_product(
            numbers, float(unit), given[begin:end], widths, weight.columns, made[begin:end]
        )

    in_parts(part, len(made), max(1, _ONE_ROW // max(1, weight.columns)))
    return out


def _least(weight: Weight) -> int:
    """Rows of a weight that are worth a thread of their own."""
    return max(1, _THREAD // weight.columns)


def _by_group(values: Tensor, each: Tensor, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of values [n, phases, columns a phase] and what `each` [n or 1, groups] has for them:
    the whole groups, then the incomplete last one."""
    if group <= 0:
        yield values, each[:, :, None]
        return
    size = group // values.shape[1]
    count = values.shape[2] // size
    if count:
        yield values[..., : count * size].unflatten(-1, (count, size)), each[:, None, :count, None]
    if values.shape[2] % size:
        yield values[..., count * size :], each[:, None, count:]
