"""bf16 rows times a packed weight on a CPU with bf16 units, in tiles that numba compiles
(`bf16_numba.py`): about as fast as oneDNN's product with a weight that is bf16 already.

oneDNN's needs a whole bf16 weight in memory, which is written and read for each product. Here 32
rows of the weight at a time are widened in the second cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dequantize_gemm import as_compiled, each_of
from .digits import in_panels
from .jit import compiled, has_bf16, in_parts
from .weight import Weight

_ROWS = 256  # that are worth a thread of their own
_PANEL, _PANELS = 32, 2  # outputs of a panel; panels, for fewer rows, that are worth a thread


def takes(weight: Weight) -> bool:
    """Whether `product` is for this weight, on this machine."""
    return has_bf16() and in_panels(weight)


def product(rows: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """The product of bf16 rows with a weight that `takes` is true of.

    Sums are fp32. Codes of a weight without groups are exact; numbers of one with groups are
    rounded to bf16.

    Args:
        rows: bf16 [M, K].
        weight: [N, K].
        bias: [N], or none.

    Returns:
        bf16 [M, N].
    """
    fast = compiled("bf16_numba")
    assert fast is not None, "asked for where numba is not installed"
    given, outputs, grouped = as_compiled(weight), len(weight.codes), weight.group > 0
    size = weight.group if grouped else weight.columns
    units, added = (each_of(v, outputs) for v in (None if grouped else weight.scale, bias))
    out = torch.empty(len(rows), outputs, dtype=torch.bfloat16)
    source, target = (v.view(torch.int16).numpy() for v in (rows.contiguous(), out))

    def part(m: slice, n: slice) -> None:
        codes, signed, widths, columns, _, _, zero, scale = given.part(n.start, n.stop)
        fast.product(
            source[m], codes, signed, widths, columns, size, zero, scale, units[n], added[n],
            target[m], n.start,
        )  # fmt: skip

    def some_outputs(begin: int, end: int) -> None:
        part(slice(None), slice(begin * _PANEL, min(end * _PANEL, outputs)))

    if len(rows) >= _ROWS * torch.get_num_threads():
        in_parts(lambda a, b: part(slice(a, b), slice(0, outputs)), len(rows), _ROWS)
    else:
        in_parts(some_outputs, -(-outputs // _PANEL), _PANELS)
    return out
