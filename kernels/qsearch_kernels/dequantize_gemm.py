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
from .jit import compiled, in_parts, passes
from .weight import Weight

#: weights that are widened at a time, nearly: smaller pieces would fit a smaller cache, but each is
#: a call, and a GEMM that packs its rows
_WEIGHTS = 2**20
_THREAD = 2**16  # weights that are worth a thread of their own
#: of each thread: the last piece's memory, which takes longer to map anew than to fill
_SCRATCH = threading.local()


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
    given = (
        layout.by_phase(rows, weight.bits)
        if by_phase
        else F.pad(rows, (0, padded - weight.columns))
    )
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
    given = _compiled(weight)
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


class _Compiled(NamedTuple):
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
        rows = slice(begin, end)
        tables = self.tables if len(self.tables) == 1 else self.tables[rows]
        same = (self.signed, self.widths, self.columns, self.size, tables)
        return (self.codes[rows], *same, self.zero[rows], self.scale[rows])


def _compiled(weight: Weight) -> _Compiled:
    rows, phases, grouped = len(weight.codes), layout.phases(weight.bits), weight.group > 0
    size = weight.group // phases if grouped else -(-weight.columns // phases)
    zero = torch.full((1, 1), weight.offset) if weight.zero is None else weight.zero.float()
    scale = weight.scale.float() if grouped else torch.ones(1, 1)
    groups = weight.scale.shape[-1] if grouped else 1
    zeros, scales = (v.expand(rows, groups).contiguous().numpy() for v in (zero, scale))
    tables = torch.empty(1, 1, 0) if weight.levels is None else weight.levels.float()
    tables = tables.view(1, 1, -1) if tables.ndim == 1 else tables
    return _Compiled(
        weight.codes.view(torch.uint8).contiguous().numpy(),
        weight.codes.dtype == torch.int8,
        torch.tensor(layout.planes(weight.bits)).numpy(),
        weight.columns,
        size,
        tables.contiguous().numpy(),
        zeros,
        scales,
    )


def by_rows(rows: Tensor, weight: Weight) -> Tensor:
    """`product` for a few rows, where numba is installed: four rows of the weight at a time, in the
    first cache.
    """
    fast = compiled("widen_numba")
    assert fast is not None, "asked for where numba is not installed"
    given, made = _compiled(weight), torch.empty(len(rows), len(weight.codes))
    x = layout.by_phase(rows.float(), weight.bits).contiguous().numpy()
    out = made.numpy()
    in_parts(lambda a, b: fast.few(x, *given.part(a, b), out, a), len(weight.codes), _least(weight))
    return made if weight.group > 0 else made.mul_(weight.scale.float().flatten())


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
