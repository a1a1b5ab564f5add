"""Exact integer GEMM on a CPU: the int8 products that torch has, and what each is exact for.

`torch._int_mm` is oneDNN's int8 GEMM where torch finds AVX512-VNNI, and a scalar loop elsewhere.
`onednn.qlinear_pointwise` is the same GEMM on every x86 core, for a weight that is repacked first.
A core without VNNI multiplies bytes with `vpmaddubsw`, which adds two neighbouring products in 16
bits and saturates: 255 * 127 + 255 * 127 does not fit. Such a core is exact only where all pairs
fit (weights of 7 bits or fewer, or activations of 7 bits), and `saturation.py` splits other weights
so that they do; `madd` multiplies in 16 bits and adds in 32 (`madd_numba.py`), where all bytes are
exact, at up to twice the rate of fp32; `vnni` is a GEMM of our own with `vpdpbusd`
(`vnni_numba.py`), for few rows and for codes of any width. fp32 multiplies integers exactly as long
as sums stay below 2**24, so that a product over pieces of the columns is exact on every core.

`exactness` tries a product at the ends of the range and on ragged shapes. Nothing is believed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layout
from .jit import compiled, has_avx2, has_vnni, in_parts

Exact = Literal["all", "pairs", ""]
#: int8 or uint8 [M, K] -> int32 or fp32 [M, N], the product with a weight
Sums = Callable[[Tensor], Tensor]
#: magnitudes whose pairs of products `vpmaddubsw` adds without saturating
PAIR = 2**15 - 1
_ROWS, OUTPUTS = 256, 64  # of a product that are worth a thread of their own
_WHOLE = 2**24  # fp32 holds every integer up to here
#: columns that pairs want a multiple of: oneDNN cuts longer rows in the middle of a pair otherwise
ALIGNED = 4
#: rows, columns, outputs
_PROBES = (
    (1, 2, 1), (1, 64, 33), (2, 33, 5), (5, 66, 32), (17, 131, 48), (64, 261, 31), (33, 4, 64),
    (8, 390, 16), (3, 1033, 9),
)  # fmt: skip


def fits_pairs(activation: int, weight: int) -> bool:
    """Whether any two products of entries up to these magnitudes add up in 16 bits."""
    return 2 * activation * weight <= PAIR


def aligned(codes: Tensor) -> Tensor:
    """`codes` [rows, columns] with columns of zeros, up to a multiple of `ALIGNED`."""
    short = -codes.shape[1] % ALIGNED
    return F.pad(codes, (0, short)) if short else codes


def int_mm(matrix: Tensor, largest: int) -> Sums:
    """`torch._int_mm` with `matrix` int8 [N, K], which is used as it lies."""
    return lambda codes: torch._int_mm(codes, matrix.t())


def onednn(matrix: Tensor, largest: int) -> Sums:
    """oneDNN's int8 linear layer with unit scales; `matrix` int8 [N, K] is repacked once."""
    packed = torch.ops.onednn.qlinear_prepack(matrix.contiguous(), None)
    ones = torch.ones(len(matrix))
    zeros = torch.zeros(len(matrix), dtype=torch.int64)

    def sums(codes: Tensor) -> Tensor:
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return made

    return sums


def madd(matrix: Tensor, largest: int) -> Sums:
    """16-bit products added in 32 bits (`madd_numba.py`), with `matrix` int8 [N, K] as it lies.

    Raises:
        NotImplementedError: Without numba, or on a core that has no AVX2.
    """
    if not has_avx2():
        raise NotImplementedError("16-bit products take numba and a core with AVX2")
    return partial(_alone, "madd", matrix)


def vnni(matrix: Tensor, largest: int) -> Sums:
    """`vpdpbusd` (`vnni_numba.py`), with `matrix` int8 [N, K] as it lies.

    Raises:
        NotImplementedError: Without numba, on a core that has no AVX512-VNNI, for int8 activations.
    """
    if not has_vnni():
        raise NotImplementedError("`vpdpbusd` takes numba and a core with AVX512-VNNI")
    return partial(_alone, "vnni", matrix)


def _alone(name: str, matrix: Tensor, codes: Tensor) -> Tensor:
    """The sums of `tiles_finished`, as they are."""
    (count, outputs), none = (len(codes), len(matrix)), torch.empty(0)
    made, zeros, ones = torch.empty(count, outputs), torch.zeros(outputs), torch.ones(outputs)
    rows = (torch.zeros(count), none, torch.ones(count))
    tiles_finished(name, codes, matrix, 8, rows, (zeros, none, ones, none), made, 0)
    return made


def tiles_finished(
    name: str,
    codes: Tensor,
    matrix: Tensor,
    bits: int,
    each_row: tuple[Tensor, Tensor, Tensor],
    each_output: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    begin: int,
) -> None:
    """An integer GEMM that numba compiled, and what `rows_numba.finish` makes of its sums while
    they are in the cache.

    Args:
        name: "madd" or "vnni".
        codes: uint8 [M, K]; int8 for `madd` alone.
        matrix: int8 [N, K]; for `vnni` also uint8 [N, row bytes], codes of `bits` (`layout.py`).
        bits: of the matrix.
        each_row: `finish`'s `first`, `second`, `a_scale`.
        each_output: its `total`, `zero`, `w_scale`, `bias`.
        out: fp32 or bf16, written from column `begin` on.
        begin: that column.

    Raises:
        NotImplementedError: `vnni` for int8 activations.
    """
    fast = compiled(f"{name}_numba")
    assert fast is not None, "asked for where numba is not installed"
    if name == "vnni" and codes.dtype != torch.uint8:
        raise NotImplementedError("`vpdpbusd` takes uint8 activations")
    given, weight = codes.contiguous().numpy(), matrix.contiguous().numpy()
    packed = () if name == "madd" else (layout.WIDTHS[bits], given.shape[1])
    weight = weight if name == "madd" else weight.view("uint8")
    first, second, a_scale = (v.contiguous().numpy() for v in each_row)
    total, zero, w_scale, bias = (v.contiguous().numpy() for v in each_output)
    short, target = out.dtype == torch.bfloat16, out.view(torch.int16).numpy()

    def part(m: slice, n: slice) -> None:
        fast.product(
            given[m], weight[n], *packed, first[m], total[n], second[m], zero[n], w_scale[n],
            a_scale[m], bias[n], short, target[m], begin + (n.start or 0),
        )  # fmt: skip

    whole = slice(None)
    if len(given) >= _ROWS * torch.get_num_threads():
        in_parts(lambda a, b: part(slice(a, b), whole), len(given), _ROWS)
    else:
        in_parts(lambda a, b: part(whole, slice(a, b)), len(weight), OUTPUTS)


def in_fp32(matrix: Tensor, largest: int, wide: Tensor | None = None) -> Sums:
    """fp32 GEMM over as many columns at a time as keep every sum below 2**24.

    Of one or two pieces, and of more that are added in fp64, the sum is rounded to fp32 once, as
    the int32 sums of the other products are.

    Args:
        matrix: int8 [N, K].
        largest: bound of |activation * weight|; 128 * 128 gives 1,024 columns a piece.
        wide: fp32 [N, K] to widen the matrix into, which must stay so while sums are taken.
    """
    step = max(1, _WHOLE // max(1, largest))
    wide = matrix.float() if wide is None else wide.copy_(matrix)

    def sums(codes: Tensor) -> Tensor:
        rows, columns = codes.float(), codes.shape[1]
        made = rows[:, :step] @ wide[:, :step].t()
        if columns > 2 * step:
            made = made.double()
        for begin in range(step, columns, step):
            made.add_(rows[:, begin : begin + step] @ wide[:, begin : begin + step].t())
        return made.float()

    return sums


#: name -> what makes the product of a weight; the last one is exact everywhere
PRODUCTS: dict[str, Callable[[Tensor, int], Sums]] = {
    "int_mm": int_mm,
    "onednn": onednn,
    "madd": madd,
    "vnni": vnni,
    "fp32": in_fp32,
}


def exactness(name: str, dtype: torch.dtype) -> Exact:
    """What the product `name` is exact for, with activations of `dtype` (uint8 or int8).

    Returns:
        "all" of 8 bits; "pairs" where two neighbouring products have to fit 16 bits; "" for
        a product that is wrong even there, or that this torch does not have.
    """
    try:
        if _agrees(name, dtype, pairs=False):
            return "all"
        return "pairs" if _agrees(name, dtype, pairs=True) else ""
    except (RuntimeError, AttributeError, NotImplementedError):
        return ""


def _agrees(name: str, dtype: torch.dtype, *, pairs: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    least, most = (0, 255) if dtype == torch.uint8 else (-128, 127)
    for rows, columns, outputs in _PROBES:
        drawn = torch.randint(least, most + 1, (rows, columns), generator=generator)
        ends = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, least, most)
        for codes in (drawn, ends, torch.full_like(ends, most), torch.full_like(ends, least)):
            for matrix in _weights(outputs, columns, generator, pairs=pairs):
                right = (codes.double() @ matrix.double().t()).float()
                given, activations = matrix.to(torch.int8), codes.to(dtype)
                if pairs:
                    given, activations = aligned(given), aligned(activations)
                made = PRODUCTS[name](given, 255 * 128)(activations).float()
                if made.shape != right.shape or not torch.equal(made, right):
                    return False
    return True


def _weights(n: int, k: int, generator: torch.Generator, *, pairs: bool) -> list[Tensor]:
    """Weights at the ends of the range: of 8 bits, or of pairs that add up to 128 at most."""
    coin = torch.rand(n, k, generator=generator) < 0.5
    if not pairs:
        drawn = torch.randint(-128, 128, (n, k), generator=generator)
        ends = torch.where(coin, -128, 127)
        return [drawn, ends, torch.full_like(ends, 127), torch.full_like(ends, -128)]
    first = torch.randint(0, 129, (n, -(-k // 2)), generator=generator)
    couples = torch.stack([first, 128 - first], -1).flatten(1)[:, :k]  # 128 in 255 * 128 twice
    half = torch.full((n, k), 64)
    opposite = torch.stack([torch.full_like(first, 127), torch.full_like(first, -128)], -1)
    return [couples.clamp(max=127), -couples, half, -half, opposite.flatten(1)[:, :k]]
