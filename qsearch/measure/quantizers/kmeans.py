"""One-dimensional k-means, a codebook of 2^bits values for each group; needs no data.

In one dimension clusters are intervals of the sorted weights, and prefix sums give the error of any interval at once. A dynamic
programme over the borders of at most `CELLS` cells then finds the best partition among those borders, for many groups in one tensor
operation; Lloyd's iterations over all weights, each a few look-ups in the prefix sums, move the borders to where they belong.
Exact (up to the rounding of codebook entries to fp16) for groups of at most `CELLS` weights, where every weight is a cell. For longer ones
it is the optimum over cells, refined: never above it. Optimal one-dimensional k-means for all lengths
(Wang and Song, Ckmeans.1d.dp, 2011) costs k n log n steps a group; `tests/measure/test_kmeans.py` holds it as the slow twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes

needs_inputs = False
CELLS = 64
_ROUNDS = 20  # of Lloyd's iteration at most
_CHUNK = 2**19  # numbers in one tensor at a time, to stay in a core's cache


def supports(scheme: Scheme) -> bool:
    """Codebooks."""
    return scheme.family == "codebook"


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes and codebooks [rows, groups, 2^bits], ascending, of fp32 groups [rows, groups, group]."""
    flat = groups.reshape(-1, groups.shape[-1])
    chunk = max(1, _CHUNK // max(flat.shape[1], (min(CELLS, flat.shape[1]) + 1) ** 2))
    made = [_cluster(part, 2**scheme.bits) for part in flat.split(chunk)]
    codes = torch.cat([codes for codes, _ in made]).reshape(groups.shape)
    levels = torch.cat([levels for _, levels in made]).reshape(*groups.shape[:2], -1)
    ones = torch.ones(1, 1, 1, device=groups.device).expand(*groups.shape[:2], 1)
    return Codes(codes, ones, torch.zeros_like(ones), levels)


def _cluster(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, n] and codebooks [rows, count] of `rows` [rows, n]."""
    ordered = rows.sort(1).values
    if ordered.shape[1] <= count:  # every weight may have an entry of its own
        centres = torch.cat([ordered, ordered[:, -1:].expand(-1, count - ordered.shape[1])], 1)
    else:
        centres = _centres(ordered, count)
    centres = centres.clamp(-65504, 65504).half().float()
    between = (centres[:, 1:] + centres[:, :-1]) / 2
    codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    for border in between.split(1, 1):  # a comparison with each of a few borders costs less than a search among them
        codes += rows > border
    return codes, centres


def _centres(ordered: Tensor, count: int) -> Tensor:
    """Means [rows, count] of the clusters of ascending `ordered` [rows, n], n > count."""
    middle = ordered.mean(1, keepdim=True)
    own = (ordered - middle).double()
    none = own.new_zeros(len(own), 1)
    sums, squares = torch.cat([none, own.cumsum(1)], 1), torch.cat([none, own.square().cumsum(1)], 1)
    edges = _partition(_borders(ordered), sums, squares, count)
    for _ in range(_ROUNDS):
        size = edges.diff(dim=1)
        at_edge = own.gather(1, edges[:, :-1].clamp(max=own.shape[1] - 1))  # an empty cluster lies there
        centres = torch.where(size > 0, sums.gather(1, edges).diff(dim=1) / size.clamp(min=1), at_edge)
        moved = torch.searchsorted(own, (centres[:, 1:] + centres[:, :-1]) / 2)
        if torch.equal(moved, edges[:, 1:-1]):
            break
        edges = torch.cat([edges[:, :1], moved, edges[:, -1:]], 1)
    return centres.float() + middle


def _borders(ordered: Tensor) -> Tensor:
    """Positions [rows, cells + 1] that cut each ascending row into cells: half of them by rank, for the bulk, half by value, for the tails."""
    rows, n = ordered.shape
    if n <= CELLS:
        return torch.arange(n + 1, device=ordered.device).expand(rows, -1)
    span = (ordered[:, -1:] - ordered[:, :1]).clamp(min=torch.finfo(ordered.dtype).tiny)
    place = torch.arange(n, device=ordered.device) / n + (ordered - ordered[:, :1]) / span
    inner = torch.linspace(0, 2, CELLS + 1, device=ordered.device)[1:-1].expand(rows, -1)
    ends = torch.zeros(rows, 1, dtype=torch.long, device=ordered.device)
    return torch.cat([ends, torch.searchsorted(place, inner.contiguous()), ends + n], 1)


def _partition(borders: Tensor, sums: Tensor, squares: Tensor, count: int) -> Tensor:
    """Edges [rows, count + 1] of the best `count` intervals whose ends are `borders`, by prefix sums of the weights and of their squares."""
    s1, s2 = sums.gather(1, borders), squares.gather(1, borders)
    size = borders[:, None, :] - borders[:, :, None]  # [rows, from, to]
    cost = s2[:, None, :] - s2[:, :, None] - (s1[:, None, :] - s1[:, :, None]).square() / size.clamp(min=1)
    last = borders.shape[1] - 1
    backwards = torch.ones(last + 1, last + 1, dtype=torch.bool, device=cost.device).tril(-1)
    cost = cost.clamp(min=0).float().masked_fill(backwards, torch.inf)
    best = [cost[:, 0]]  # best[c][:, j]: the least error of the first j cells in c + 1 clusters
    for _ in range(count - 2):
        best.append((best[-1][:, :, None] + cost).amin(1))
    at = torch.full((len(cost), 1), last, device=cost.device)
    edges = [at]
    for table in reversed(best):
        at = (table + cost.gather(2, at[:, None].expand(-1, last + 1, 1))[:, :, 0]).argmin(1, keepdim=True)
        edges.append(at)
    edges.append(torch.zeros_like(at))
    return borders.gather(1, torch.cat(edges[::-1], 1))
