"""Banded and block-sparse attention with the log-sum-exp of each row, as one Triton kernel.

A program holds a tile of queries of a head and goes over the keys that it needs: text first, then a
band, or the blocks of a list; keys that no query of the tile attends to are never loaded. Softmax
runs block by block as in FlashAttention-2 (arXiv 2307.08691), in base 2. Tokens are addressed in
the band's order, so that a video's places over all frames need no copy in another order.

A head of 72 numbers is multiplied as 64 and 16, one of 96 as 64 and 32: Triton's blocks are powers
of two, and 128 would do 1.78 times the work of 72. Products of queries and keys may be int8,
rounded beforehand row by row, keys less their mean (SageAttention, arXiv 2410.02367).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_layout import Band, Blocks, Layout
from ..sparse_attention import Attended, quantize_rows
from .launching import Launch, interpreting

_NEVER = tl.constexpr(-1.0e30)  # a score that is masked: finite, so that a row of them is no NaN


@triton.jit
def _token(position, text, text_start, visual_start, frames, places, BY_PLACE: tl.constexpr):
    """Tokens of positions: text first, then visual tokens in the band's order."""
    visual = position - text
    if BY_PLACE:
        visual = visual % frames * places + visual // frames
    return tl.where(position < text, text_start + position, visual_start + visual)


@triton.jit
def _rows(x, tokens, mask, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows of `x`, zeros beyond SIZE columns."""
    at = FIRST + tl.arange(0, WIDTH)
    inside = mask[:, None]
    if FIRST + WIDTH > SIZE:
        inside = inside & (at < SIZE)[None, :]
    return tl.load(x + tokens.to(tl.int64)[:, None] * stride + at[None, :], mask=inside, other=0)


@triton.jit
def _product(a, b, acc, WIDE: tl.constexpr):
    """acc + a b. WIDE: fp32 operands, since Triton's interpreter has no bf16."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _keys(
    acc, more, top, total, q, q_more, q_factor, units, k, v, k_factor, position, end, begin, text,
    text_start, visual_start, frames, places, unit, reach, k_stride, v_stride,
    BN: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q2: tl.constexpr, SIZE: tl.constexpr,
    BANDED: tl.constexpr, BY_PLACE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of keys, positions from `position` on and before `end`, into the running softmax."""
    at = position + tl.arange(0, BN)
    there = at < end
    tokens = _token(at, text, text_start, visual_start, frames, places, BY_PLACE)
    keys = _rows(k, tokens, there, k_stride, 0, D1, SIZE)
    if q.dtype == tl.int8:
        scores = _product(q, keys.T, tl.zeros((q.shape[0], BN), tl.int32), WIDE)
    else:
        scores = _product(q, keys.T, tl.zeros((q.shape[0], BN), tl.float32), WIDE)
    if Q2 > 0:
        scores = _product(q_more, _rows(k, tokens, there, k_stride, D1, Q2, SIZE).T, scores, WIDE)
    factor = q_factor[:, None]
    if k_factor is not None:
        factor = factor * tl.load(k_factor + tokens, mask=there, other=0.0)[None, :]
    scores = scores.to(tl.float32) * factor
    seen = there[None, :]
    if BANDED:
        far = tl.abs(units[:, None] - ((at - text) // unit)[None, :]) > reach
        seen = seen & ((units < 0)[:, None] | (at < text)[None, :] | (far == 0))
    scores = tl.where(seen, scores, _NEVER)
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    less = tl.exp2(top - higher)
    total = total * less + tl.sum(weights, 1)
    weights = weights.to(v.dtype.element_ty)
    acc = _product(
        weights, _rows(v, tokens, there, v_stride, 0, D1, SIZE), acc * less[:, None], WIDE
    )
    if D2 > 0:
        rest = _rows(v, tokens, there, v_stride, D1, D2, SIZE)
        more = _product(weights, rest, more * less[:, None], WIDE)
    return acc, more, higher, total


@triton.jit
def _sparse_attention(
    q, k, v, out, lse, q_factor, k_factor, chosen, heads, total_tokens, text, visual, text_start,
    visual_start, frames, places, unit, reach, blocks, kept, scale,
    q_batch, q_head, q_stride, k_batch, k_head, k_stride, v_batch, v_head, v_stride,
    o_batch, o_head, o_stride,
    BM: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, Q2: tl.constexpr,
    SIZE: tl.constexpr, BANDED: tl.constexpr, LISTED: tl.constexpr, BY_PLACE: tl.constexpr,
    ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    tiles = tl.cdiv(visual, BM)
    is_text = tile >= tiles
    first = tl.where(is_text, (tile - tiles) * BM, text + tile * BM)
    end = tl.where(is_text, text, total_tokens)
    rows = first + tl.arange(0, BM)
    mine = rows < end
    tokens = _token(rows, text, text_start, visual_start, frames, places, BY_PLACE)
    # ALIGN: heads of 72 begin at multiples of 8, not 16, which is all that Triton sees of a stride
    q += (batch * q_batch + head * q_head) * ALIGN
    k += (batch * k_batch + head * k_head) * ALIGN
    v += (batch * v_batch + head * v_head) * ALIGN
    out += (batch * o_batch + head * o_head) * ALIGN
    queries = _rows(q, tokens, mine, q_stride, 0, D1, SIZE)
    q_more = _rows(q, tokens, mine, q_stride, D1, Q2, SIZE) if Q2 > 0 else queries
    factor = tl.zeros((BM,), tl.float32) + scale * 1.4426950408889634  # into base 2
    if q_factor is not None:
        factor *= tl.load(q_factor + row * total_tokens + tokens, mask=mine, other=0.0)
    if k_factor is not None:
        k_factor += row * total_tokens
    units = tl.where(rows < text, -1, (rows - text) // unit)  # text sees all: no unit
    acc = tl.zeros((BM, D1), tl.float32)
    more = tl.zeros((BM, D2 if D2 > 0 else 1), tl.float32)
    top = tl.zeros((BM,), tl.float32) + _NEVER
    total = tl.zeros((BM,), tl.float32)
    for position in range(0, text, BN):
        acc, more, top, total = _keys(
            acc, more, top, total, queries, q_more, factor, units, k, v, k_factor, position, text,
            first, text, text_start, visual_start, frames, places, unit, reach, k_stride, v_stride,
            BN, D1, D2, Q2, SIZE, False, BY_PLACE, WIDE,
        )  # fmt: skip
    if LISTED:
        chosen += (row * blocks + tl.where(is_text, 0, tile)) * kept
        for i in range(tl.where(is_text, blocks, kept)):
            block = tl.load(chosen + i, mask=is_text == 0, other=0)
            position = text + tl.where(is_text, i, block) * BN
            acc, more, top, total = _keys(
                acc, more, top, total, queries, q_more, factor, units, k, v, k_factor, position,
                total_tokens, first, text, text_start, visual_start, frames, places, unit, reach,
                k_stride, v_stride, BN, D1, D2, Q2, SIZE, False, BY_PLACE, WIDE,
            )  # fmt: skip
    else:
        start, stop = text, total_tokens
        if BANDED:
            lowest = tl.maximum((tile * BM) // unit - reach, 0) * unit
            highest = ((tile * BM + BM - 1) // unit + reach + 1) * unit
            start = text + tl.where(is_text, 0, lowest)
            stop = text + tl.where(is_text, visual, tl.minimum(highest, visual))
        for position in range(start, stop, BN):
            acc, more, top, total = _keys(
                acc, more, top, total, queries, q_more, factor, units, k, v, k_factor, position,
                stop, first, text, text_start, visual_start, frames, places, unit, reach,
                k_stride, v_stride, BN, D1, D2, Q2, SIZE, BANDED, BY_PLACE, WIDE,
            )  # fmt: skip
    tl.store(
        lse + row * total_tokens + tokens, (top + tl.log2(total)) * 0.6931471805599453, mask=mine
    )
    to = out + tokens.to(tl.int64)[:, None] * o_stride
    at = tl.arange(0, D1)[None, :]
    made = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(to + at, made, mask=mine[:, None] & (at < SIZE))
    if D2 > 0:
        after = D1 + tl.arange(0, D2)[None, :]
        rest = (more / total[:, None]).to(out.dtype.element_ty)
        tl.store(to + after, rest, mask=mine[:, None] & (after < SIZE))


def parts_of(size: int, least: int = 16) -> tuple[int, int]:
    """A head's numbers as two blocks, powers of two that tensor cores take: 72 is (64, 16).

    Args:
        size: numbers of a head.
        least: the smallest block: 16 for half precision, 32 for int8.

    Returns:
        The first block, and the second or 0.
    """
    first = max(1 << (size.bit_length() - 1), least)
    rest = size - first
    return first, 0 if rest <= 0 else max(1 << (rest - 1).bit_length(), least)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None = None,
    int8_qk: bool = False,
    tile: tuple[int, int] | None = None,
) -> tuple[tuple[Launch, ...], Attended]:
    """The launch (none where there is nothing to compute), and the result that it fills.

    Args:
        q, k, v: [batch, heads, T, head size], in any strides whose last is 1.
        layout: which pairs are kept.
        scale: 1 / sqrt(head size) where none is given.
        int8_qk: products of queries and keys in int8; what rounding them first takes comes on top,
            and the statistics lack what the keys' mean takes away (`attend` adds it).
        tile: queries and keys of a program's tile; `tile_of` where none is given. Blocks of a list
            have their own.

    Returns:
        Launches, and `sparse_attention.attention`'s result.

    Raises:
        ValueError: for values of another head size than the queries.
    """
    batch, heads, total, size = q.shape
    if v.shape[-1] != size:
        raise ValueError(f"values have the queries' head size, {size}; given {v.shape[-1]}")
    scale = 1 / math.sqrt(size) if scale is None else scale
    chosen = layout.chosen(q, k).int().contiguous() if isinstance(layout, Blocks) else None
    q_factor = k_factor = None
    if int8_qk:
        q, q_factor = quantize_rows(q.float())
        k, k_factor = quantize_rows(k.float() - k.float().mean(2, keepdim=True))
        q_factor, k_factor = (x.contiguous() for x in (q_factor, k_factor))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output = v.new_empty(batch, total, heads, size).transpose(1, 2)
    lse = torch.empty(batch, heads, total, dtype=torch.float32, device=q.device)
    if not output.numel():
        return (), Attended(output, lse)
    own = tile is None or isinstance(layout, Blocks)
    tokens, (bm, bn) = layout.tokens, tile_of(layout, _hopper(q)) if own or tile is None else tile
    first, rest = parts_of(size, 32 if int8_qk else 16)
    values_rest = 0 if first >= size else parts_of(size)[1]
    strides: dict[str, Any] = {}
    held = {"q": q, "k": k, "v": v, "o": output}
    align = math.gcd(8, *(n for x in held.values() for n in x.stride()[:2]))
    for name, x in held.items():
        strides[f"{name}_batch"], strides[f"{name}_head"] = (n // align for n in x.stride()[:2])
        strides[f"{name}_stride"] = x.stride(2)
    banded = isinstance(layout, Band)
    arguments = {
        "q": q, "k": k, "v": v, "out": output, "lse": lse, "q_factor": q_factor,
        "k_factor": k_factor, "chosen": chosen, "heads": heads, "total_tokens": total,
        "text": tokens.text, "visual": tokens.visual, "text_start": tokens.text_slice.start,
        "visual_start": tokens.visual_slice.start, "frames": tokens.frames,
        "places": tokens.places, "unit": layout.unit if isinstance(layout, Band) else 1,
        "reach": layout.reach if isinstance(layout, Band) else 0,
        "blocks": layout.count if isinstance(layout, Blocks) else 0,
        "kept": layout.kept if isinstance(layout, Blocks) else 0, "scale": float(scale),
        **strides,
        "BM": bm, "BN": bn, "D1": first, "D2": values_rest, "Q2": rest,
        "SIZE": size, "BANDED": banded, "LISTED": chosen is not None,
        "BY_PLACE": isinstance(layout, Band) and layout.order == "places",
        "ALIGN": align, "WIDE": interpreting(),
    }  # fmt: skip
    tiles = -(-tokens.visual // bm) + -(-tokens.text // bm)
    warps = 4 if bm <= 64 else 8
    return (Launch(_sparse_attention, (tiles, batch * heads), arguments, warps, 2),), Attended(
        output, lse
    )


def tile_of(layout: Layout, hopper: bool = True) -> tuple[int, int]:
    """Queries and keys of a tile: a list's blocks, 64 queries for a narrow band, else 128.

    Args:
        layout: which pairs are kept.
        hopper: whether a warp group multiplies from shared memory (compute capability 9.0);
            elsewhere operands and scores of 64 keys spill registers.

    Returns:
        Both numbers.
    """
    if isinstance(layout, Blocks):
        return layout.size, layout.size
    if not hopper:
        return 64, 32
    narrow = isinstance(layout, Band) and layout.reach * layout.unit < 256
    return (64, 64) if narrow else (128, 64)


def _hopper(x: Tensor) -> bool:
    """Whether a tensor's GPU is one; so is what a launch is compiled for where there is none."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None = None,
    int8_qk: bool = False,
) -> Attended:
    """`sparse_attention.attention` on a GPU, or in Triton's interpreter."""
    launches, made = sparse_attention(q, k, v, layout, scale, int8_qk)
    for launch in launches:
        launch.run()
    if not int8_qk:
        return made
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mean = k.float().mean(2, keepdim=True)
    shift = scale * (q.float() @ mean.transpose(-2, -1)).squeeze(-1)
    return Attended(made.output, made.lse + shift)
