"""Sparse attention with row statistics: banded and block-sparse softmax(QK')V and its log-sum-exp.

On a CPU blocks of keys that no query attends to are not multiplied. Queries are cut into tiles,
each with the span of keys that it needs: a band's tiles are overlapping views of the same memory,
blocks of keys are gathered. All tiles are one call of torch's flash attention, which returns the
log-sum-exp of each row besides; a tile of 32 queries and a span of 160 keys does 1.24 times the
needed work of a band of 129. Batched products and a softmax, a head at a time, took 1.1 to 1.5
times as long; masked attention over all keys takes nine times as long. On a GPU it is one Triton
kernel (`gpu/sparse_attention.py`).

The log-sum-exp is what makes Re-ttention's rho free: rho = exp(lse of the window - lse of all), and
what lets two parts of a row's keys be computed apart and merged.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_layout import Band, Blocks, Dense, Layout

#: rows of queries of a band's tile, and how much of its reach a tile is at least
TILE_ROWS = 32
_GATHERED_BYTES = 2**22  # of keys that are gathered at a time


@dataclass(frozen=True)
class Attended:
    """An attention's output [batch, heads, T, head size] and its scores' log-sum-exp [..., T]."""

    output: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    int8_qk: bool = False,
) -> Attended:
    """softmax(scale * QK') V over the pairs that `layout` keeps, and the log-sum-exp of each row.

    Args:
        q, k, v: [batch, heads, T, head size]; where none requires a gradient, and on a CPU, nothing
            else is copied than what a layout gathers or reorders.
        layout: which pairs are kept; of T tokens.
        scale: 1 / sqrt(head size) where none is given.
        int8_qk: products of queries and keys in int8, each row about its own scale, the keys less
            their mean (SageAttention, arXiv 2410.02367, section 4.2). Here rounded, then multiplied
            as they are: the values of a kernel that multiplies bytes.

    Returns:
        Output and log-sum-exp, in fp32 but for fp64 inputs.

    Raises:
        ValueError: where q, k and v are not all of the layout's tokens, heads and batch.
    """
    check(q, k, v, layout)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if _on_gpu(q, k, v):
        from .gpu.sparse_attention import attend

        return attend(q, k, v, layout, scale, int8_qk)
    chosen = layout.chosen(q, k) if isinstance(layout, Blocks) else None
    if not int8_qk:
        return _attention(q, k, v, layout, chosen, scale)
    rounded = round_qk(q, k)
    found = _attention(rounded.q, rounded.k, v, layout, chosen, scale)
    return Attended(found.output, found.lse + scale * rounded.shift)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, chosen: Tensor | None, scale: float
) -> Attended:
    """`attention` with the blocks of keys chosen, which products in int8 do not change."""
    if isinstance(layout, Dense):
        return _tiles(q, k, v, scale)
    tokens = layout.tokens
    q_seen, k_seen, v_seen = (x[:, :, tokens.visual_slice] for x in (q, k, v))
    if isinstance(layout, Band):
        found = _band(q_seen, k_seen, v_seen, layout, scale)
    else:
        assert chosen is not None
        found = _blocks(q_seen, k_seen, v_seen, layout, chosen, scale)
    if not tokens.text:
        return found
    k_text, v_text = (x[:, :, tokens.text_slice] for x in (k, v))
    seen = merged(found, _tiles(q_seen, k_text, v_text, scale))
    text = _tiles(q[:, :, tokens.text_slice], k, v, scale)
    order = (text, seen) if tokens.text_first else (seen, text)
    return Attended(
        torch.cat([x.output.transpose(1, 2) for x in order], 1).transpose(1, 2),
        torch.cat([x.lse for x in order], 2),
    )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    scale: float | None = None,
    int8_qk: bool = False,
) -> Attended:
    """The slow twin of `attention`: a dense softmax in fp64 with the kept pairs as a mask."""
    check(q, k, v, layout)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = layout.mask(q, k)
    shift: Tensor | float = 0.0
    if int8_qk:
        mean = k.double().mean(2, keepdim=True)
        shift = scale * (q.double() * mean).sum(-1)
        q, k = (_round_rows(x.double()) for x in (q, k.double() - mean))
    scores = (q.double() @ k.double().transpose(-2, -1) * scale).masked_fill(~mask, -math.inf)
    output = scores.softmax(-1) @ v.double()
    return Attended(output.to(v.dtype), (scores.logsumexp(-1) + shift).to(_statistics_of(v)))


def check(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    """Refuse queries, keys and values that are not those of the layout's tokens."""
    total = layout.tokens.total
    if q.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3] or q.shape[2] != total:
        raise ValueError(
            f"sparse attention takes q, k, v [batch, heads, {total}, head size] of the same tokens "
            f"and heads; given {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def merged(one: Attended, other: Attended) -> Attended:
    """Attention over two parts of the keys, from the attention over each: weighted by its share."""
    lse = torch.logaddexp(one.lse, other.lse)
    parts = [x.output * (x.lse - lse).exp()[..., None].to(x.output.dtype) for x in (one, other)]
    return Attended(parts[0].add_(parts[1]) if _free(*parts) else parts[0] + parts[1], lse)


@dataclass(frozen=True)
class RoundedQK:
    """Queries and keys as int8 products see them, and what of each score / scale the mean took."""

    q: Tensor
    k: Tensor
    shift: Tensor


def round_qk(q: Tensor, k: Tensor) -> RoundedQK:
    """Queries, and keys less their mean, rounded to int8 about a scale for each row.

    Args:
        q, k: [batch, heads, T, head size].

    Returns:
        Both after rounding, in their own types, and q . mean [batch, heads, T] in fp32.
    """
    mean = k.float().mean(2, keepdim=True)
    shift = (q.float() @ mean.transpose(-2, -1)).squeeze(-1)
    return RoundedQK(
        _round_rows(q.float()).to(q.dtype), _round_rows(k.float() - mean).to(k.dtype), shift
    )


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of `x`, and the scale of each row [..., 1]: its largest number becomes 127."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (x / scale).round().to(torch.int8), scale


def _round_rows(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return codes * scale


def _statistics_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _free(*tensors: Tensor) -> bool:
    """Whether no gradient is wanted, so that results may be written over."""
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _on_gpu(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernel takes it: no gradient, no fp64, one head size."""
    fits = q.is_cuda and q.dtype != torch.float64 and q.shape[-1] == v.shape[-1]
    return fits and _free(q, k, v) and importlib.util.find_spec("triton") is not None


def _tiles(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Attended:
    """Dense attention of tiles, all at once; `mask` is added to the scores."""
    if q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and _free(q, k, v) and q.numel():
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        given = None if mask is None else mask.to(q.dtype)[(None,) * (4 - mask.ndim)]
        return Attended(*flash(q, k, v, attn_mask=given, scale=scale))
    scores = (q @ k.transpose(-2, -1)).to(_statistics_of(q)) * scale
    scores = scores if mask is None else scores + mask.to(scores.dtype)
    lse = scores.logsumexp(-1)
    return Attended((scores - lse[..., None]).exp().to(v.dtype) @ v, lse)


def _band(q: Tensor, k: Tensor, v: Tensor, layout: Band, scale: float) -> Attended:
    """A band: tiles whose span of keys is whole in one call, those at the ends one by one."""
    frames, places = layout.tokens.frames, layout.tokens.places
    moved = layout.order == "places"
    if moved:
        q, k, v = (_reordered(x, frames, places) for x in (q, k, v))
    reach, unit, units, height = layout.reach, layout.unit, layout.units, _tile_units(layout)
    first, last = -(-reach // height), (units - reach) // height
    made: list[Attended] = []
    tile = 0
    while tile * height < units:
        if tile == first < last:
            made.append(_whole_tiles(q, k, v, layout, scale, range(first, last)))
            tile = last
            continue
        mine = range(tile * height, min((tile + 1) * height, units))
        near = range(max(mine.start - reach, 0), min(mine.stop + reach, units))
        rows, keys = (slice(r.start * unit, r.stop * unit) for r in (mine, near))
        mask = _band_mask(mine, near, layout, q)
        made.append(_tiles(q[:, :, rows], k[:, :, keys], v[:, :, keys], scale, mask))
        tile += 1
    output = torch.cat([x.output.transpose(1, 2) for x in made], 1).transpose(1, 2)
    lse = torch.cat([x.lse for x in made], 2)
    if not moved:
        return Attended(output, lse)
    back = lse.unflatten(2, (places, frames)).transpose(2, 3).flatten(2)
    return Attended(_reordered(output, places, frames), back)


def _reordered(x: Tensor, outer: int, inner: int) -> Tensor:
    """Tokens [batch, heads, outer * inner, head size] with the inner index outermost."""
    batch, heads, total, size = x.shape
    split = x.transpose(1, 2).unflatten(1, (outer, inner)).transpose(1, 2)
    out: Tensor = split.reshape(batch, total, heads, size).transpose(1, 2)
    return out


def _tile_units(layout: Band) -> int:
    """Units of a tile: rows enough for an efficient product, and a part of the band's reach."""
    rows = max(TILE_ROWS, layout.reach * layout.unit // 4)
    return min(max(1, rows // layout.unit), layout.units)


def _whole_tiles(
    q: Tensor, k: Tensor, v: Tensor, layout: Band, scale: float, tiles: range
) -> Attended:
    """Tiles with `reach` units on both sides, as overlapping views: one call a batch row."""
    reach, unit, height = layout.reach, layout.unit, _tile_units(layout)
    step, count = height * unit, len(tiles)
    start, span = tiles.start * step - reach * unit, (height + 2 * reach) * unit
    mask = _band_mask(range(reach, reach + height), range(height + 2 * reach), layout, q)
    made = []
    for row in range(q.shape[0]):
        strip = _windows(q[row], count, tiles.start * step, step, step)
        keys, values = (_windows(x[row], count, start, span, step) for x in (k, v))
        made.append(_tiles(strip, keys, values, scale, mask))
    outputs = [x.output.transpose(1, 2).flatten(0, 1) for x in made]
    output = outputs[0][None] if len(made) == 1 else torch.stack(outputs)
    lse = torch.stack([x.lse.transpose(0, 1).flatten(1) for x in made])
    return Attended(output.transpose(1, 2), lse)


def _windows(x: Tensor, count: int, start: int, rows: int, step: int) -> Tensor:
    """`count` views of `rows` rows of `x` [heads, T, head size], `step` rows apart."""
    head, row, column = x.stride()
    shape = (count, x.shape[0], rows, x.shape[2])
    return x.as_strided(shape, (step * row, head, row, column), x.storage_offset() + start * row)


def _band_mask(mine: range, seen: range, layout: Band, like: Tensor) -> Tensor:
    """What is added to scores [rows, keys] of units `mine` and `seen`: 0 in the band, else -inf."""
    one, other = (
        torch.arange(r.start, r.stop, device=like.device).repeat_interleave(layout.unit)
        for r in (mine, seen)
    )
    outside = (one[:, None] - other).abs() > layout.reach
    return torch.zeros(outside.shape, dtype=like.dtype, device=like.device).masked_fill_(
        outside, -math.inf
    )


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, layout: Blocks, chosen: Tensor, scale: float
) -> Attended:
    """Blocks of keys are gathered for each block of queries, some blocks of queries at a time."""
    total, size, kept = q.shape[2], layout.size, layout.kept
    short = layout.count * size - total
    if short:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (q, k, v))
    row = kept * size * (k.shape[-1] + v.shape[-1]) * k.element_size()
    at_once = max(1, _GATHERED_BYTES // row)
    made = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (x[b, h].unflatten(0, (-1, size)).flatten(1) for x in (k, v))
            made.append(_gathered(q[b, h], keys, values, chosen[b, h], layout, (at_once, scale)))
    shape = (*q.shape[:2], layout.count * size)
    output = torch.stack([x.output for x in made]).view(*shape, -1)
    lse = torch.stack([x.lse for x in made]).view(shape)
    return Attended(output[:, :, :total], lse[:, :, :total])


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, layout: Blocks, pieces: tuple[int, float]
) -> Attended:
    """One head: q [T, head size]; k, v [blocks, size * head size]; chosen [blocks, kept]."""
    at_once, scale = pieces
    size, kept, count = layout.size, layout.kept, layout.count
    queries = q.unflatten(0, (count, 1, size))
    lacks = layout.tokens.visual % size
    made = []
    for start in range(0, count, at_once):
        mine = chosen[start : start + at_once]
        keys, values = (
            x.index_select(0, mine.flatten()).view(len(mine), 1, kept * size, -1) for x in (k, v)
        )
        mask = None
        if lacks and bool((mine == count - 1).any()):
            place = mine[..., None] * size + torch.arange(size, device=q.device)
            mask = torch.zeros(len(mine), 1, 1, kept * size, dtype=q.dtype, device=q.device)
            mask.masked_fill_((place >= layout.tokens.visual).view(mask.shape), -math.inf)
        made.append(_tiles(queries[start : start + at_once], keys, values, scale, mask))
    return Attended(torch.cat([x.output for x in made]), torch.cat([x.lse for x in made]))
