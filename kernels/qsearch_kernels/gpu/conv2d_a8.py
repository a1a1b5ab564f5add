"""int8 convolution as an implicit product, channels last: rows are places of the output, columns
its channels, and the sum runs over taps and channels.

No picture is unfolded in memory: each step of the sum loads one tap's channels for a tile of
places. Around the picture the kernel reads the zero of the picture's own grid, so that padding
stands for 0 and the correction for zeros is the same everywhere. Pointers, not descriptors: a tile
of places is no box of the picture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Launch, processors
from .linear_a8 import epilogue_arguments
from .parts import finish, place
from .tiles import UNPACKING_TILES, Tile, choose


@triton.jit
def _conv2d_a8(
    a, w, out, a_scale, a_zero, sums, w_scale, w_zero, w_total, bias, gate, residual, M, N, H, W, C,
    P, Q, per_scale, per_gate,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), BAND)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    picture, p, q = rows // (P * Q), rows // Q % P, rows % Q
    outside = tl.load(a_zero + picture, mask=rows < M, other=0.0).to(tl.int8)
    acc = tl.zeros((BM, BN), tl.int32)
    steps = tl.cdiv(C, BK)
    for step in range(R * S * steps):
        tap = step // steps
        channel = step % steps * BK + tl.arange(0, BK)
        h = p * STRIDE - PADDING + tap // S * DILATION
        v = q * STRIDE - PADDING + tap % S * DILATION
        inside = (rows < M) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        begin = ((picture * H + h) * W + v).to(tl.int64) * C
        x = tl.load(
            a + begin[:, None] + channel[None, :],
            mask=inside[:, None] & (channel < C)[None, :],
            other=0,
        )
        x = tl.where(inside[:, None], x, outside[:, None])
        y = tl.load(
            w + (columns * (R * S) + tap)[:, None].to(tl.int64) * C + channel[None, :],
            mask=(columns < N)[:, None] & (channel < C)[None, :],
            other=0,
        )
        acc = tl.dot(x, y.T, acc, out_dtype=tl.int32)
    finish(
        acc,
        out,
        rows,
        column_tile * BN,
        M,
        N,
        a_scale,
        a_zero,
        sums,
        w_scale,
        w_zero,
        w_total,
        bias,
        gate,
        residual,
        per_scale,
        per_gate,
        BM,
        BN,
    )


def conv2d_a8(
    codes: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    w_total: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> tuple[tuple[Launch, ...], Tensor]:
    """The launches (none where there is nothing to compute) and the output that they fill:
    `reference_a8.conv2d_a8`. Raises `ValueError` for shapes that don't fit.
    """
    if (
        codes.ndim != 4
        or weight.ndim != 4
        or weight.shape[3] != codes.shape[3]
        or codes.dtype != torch.int8
        or weight.dtype != torch.int8
    ):
        raise ValueError(
            "int8 pictures [batch, H, W, C] need int8 weights [N, R, S, C], in one group; "
            f"given {codes.dtype} {tuple(codes.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    batch, H, W, C = codes.shape
    N, R, S, _ = weight.shape
    P, Q = (
        (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for size, taps in ((H, R), (W, S))
    )
    if P < 1 or Q < 1:
        raise ValueError(
            f"a picture must be as large as the kernel's window; given {H} x {W} with "
            f"padding {padding}, and {R} x {S} taps {dilation} apart"
        )
    if len(a_scale) != batch or len(a_zero) != batch:
        raise ValueError(
            f"a convolution mixes places, so that each of {batch} pictures has one grid; "
            f"given {len(a_scale)}"
        )
    out = torch.empty(batch, P, Q, N, device=codes.device, dtype=dtype)
    if not out.numel():
        return (), out
    rows = batch * P * Q
    tile = tile or choose("conv2d_a8", rows, N, R * S * C, processors(codes), UNPACKING_TILES)
    arguments = {
        "a": codes.contiguous(), "w": weight.contiguous(), "out": out,
        **epilogue_arguments(
            rows, N, 1, a_scale, a_zero, None, w_scale, None, w_total, bias, None, residual
        ),
        "M": rows, "N": N, "H": H, "W": W, "C": C, "P": P, "Q": Q, "R": R, "S": S, "STRIDE": stride,
        "PADDING": padding, "DILATION": dilation,
        "BM": tile.m, "BN": tile.n, "BK": min(tile.k, 64), "BAND": 8,
    }  # fmt: skip
    return (
        Launch(
            _conv2d_a8, (-(-rows // tile.m) * -(-N // tile.n),), arguments, tile.warps, tile.stages
        ),
    ), out
