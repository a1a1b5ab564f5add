"""One-dimensional k-means, a codebook of 2^bits values for each group; needs no data.

In one dimension clusters are intervals of the sorted weights, and prefix sums give the error of any
interval at once. A dynamic programme over the borders of at most `CELLS` cells then finds the best
partition among those borders, for many groups in one tensor operation; Lloyd's iterations over all
weights, each a few look-ups in the prefix sums, move the borders to where they belong. Exact (up to
the rounding of codebook entries to fp16) for groups of at most `CELLS` weights, where every weight
is a cell. For longer ones it is the optimum over cells, refined: never above it. Optimal
one-dimensional k-means for all lengths (Wang and Song, Ckmeans.1d.dp, 2011) costs k n log n steps a
group; `tests/choices/test_kmeans.py` holds it as the slow twin.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes

needs_inputs = False
integer_zeros = True
learns_blocks = False
CELLS = 64
_ROUNDS = 10  # of Lloyd's iteration at most; ten more lower the error by a ten-thousandth
_CHUNK = 2**19  # numbers in one tensor at a time, to stay in a core's cache


def supports(scheme: Scheme) -> bool:
    """Codebooks."""
    return scheme.family == "codebook"


def quantize(groups: Tensor, scheme: Scheme) -> Codes:
    """Codes and codebooks [rows, groups, 2^bits], ascending, of fp32 groups [rows, groups,
    group].
    """
    flat = groups.reshape(-1, groups.shape[-1])
    chunk = max(1, _CHUNK // max(flat.shape[1], (min(CELLS, flat.shape[1]) + 1) ** 2))
    made = [_cluster(part, 2**scheme.bits) for part in flat.split(chunk)]
    codes = torch.cat([codes for codes, _ in made]).reshape(groups.shape)
    levels = torch.cat([levels for _, levels in made]).reshape(*groups.shape[:2], -1)
    ones = torch.ones(1, 1, 1, device=groups.device).expand(*groups.shape[:2], 1)
    return Codes(codes, ones, torch.zeros_like(ones), levels)


def _cluster(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes [rows, n] and codebooks [rows, count] of `rows` [rows, n]."""
    ordered = _sorted(rows)
    if ordered.shape[1] <= count:  # every weight may have an entry of its own
        centres = torch.cat([ordered, ordered[:, -1:].expand(-1, count - ordered.shape[1])], 1)
    else:
        centres = _centres(ordered, count)
    centres = centres.clamp(-65504, 65504).half().float()
    between = (centres[:, 1:] + centres[:, :-1]) / 2
    codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    for border in between.split(
        1, 1
    ):  # a comparison with each of a few borders costs less than a search among them
        codes += rows > border
    return codes, centres


def _centres(ordered: Tensor, count: int) -> Tensor:
    """Means [rows, count] of the clusters of ascending `ordered` [rows, n], n > count."""
    middle = ordered.mean(1, keepdim=True)
    own = (ordered - middle).double()
    sums = torch.cat([own.new_zeros(len(own), 1), own.cumsum(1)], 1)
    edges = _partition(_borders(ordered), sums, count)
    for _ in range(_ROUNDS):
        size = edges.diff(dim=1)
        at_edge = own.gather(
            1, edges[:, :-1].clamp(max=own.shape[1] - 1)
        )  # an empty cluster lies there
        centres = torch.where(
            size > 0, sums.gather(1, edges).diff(dim=1) / size.clamp(min=1), at_edge
        )
        moved = torch.searchsorted(own, (centres[:, 1:] + centres[:, :-1]) / 2)
        if torch.equal(moved, edges[:, 1:-1]):
            break
        edges = torch.cat([edges[:, :1], moved, edges[:, -1:]], 1)
    return centres.float() + middle


def _borders(ordered: Tensor) -> Tensor:
    """Positions [rows, cells + 1] that cut each ascending row into cells: half of them by rank, for
    the bulk, half by value, for the tails.
    """
    rows, n = ordered.shape
    if n <= CELLS:
        return torch.arange(n + 1, device=ordered.device).expand(rows, -1)
    span = (ordered[:, -1:] - ordered[:, :1]).clamp(min=torch.finfo(ordered.dtype).tiny)
    place = torch.arange(n, device=ordered.device) / n + (ordered - ordered[:, :1]) / span
    inner = torch.linspace(0, 2, CELLS + 1, device=ordered.device)[1:-1].expand(rows, -1)
    ends = torch.zeros(rows, 1, dtype=torch.long, device=ordered.device)
    return torch.cat([ends, torch.searchsorted(place, inner.contiguous()), ends + n], 1)


def _partition(borders: Tensor, sums: Tensor, count: int) -> Tensor:
    """Edges [rows, count + 1] of the best `count` intervals whose ends are `borders`, by prefix
    sums of the weights about their mean.

    The squared error is the weights' square less what their means carry, sum^2 / size for each
    interval, so the latter is made largest. After c intervals at least c cells are behind and count
    - c ahead, so that of the last border only `width` places are looked at.
    """
    at, size = sums.gather(1, borders), borders.diff(dim=1)
    cells, width = size.shape[1], size.shape[1] - count + 1
    gain = (at[:, None, :] - at[:, :, None]).square_() / (
        borders[:, None, :] - borders[:, :, None]
    ).clamp_(min=1)  # [rows, from, to]
    gain = (
        gain if sums.shape[1] <= CELLS + 1 else gain.float()
    )  # exact where every weight is a cell
    gain.masked_fill_(
        torch.ones(cells + 1, cells + 1, dtype=torch.bool, device=gain.device).tril(), -torch.inf
    )
    best = [
        gain[:, 0, 1 : width + 1]
    ]  # best[c - 1][:, w]: the most that the first c + w cells give in c intervals
    half = (width + 1) // 2
    for c in range(2, count):
        step = gain[:, c - 1 : c - 1 + width, c : c + width]
        few = (best[-1][:, :half, None] + step[:, :half, :half]).amax(
            1
        )  # an interval that ends in the first half begins there
        best.append(torch.cat([few, (best[-1][:, :, None] + step[:, :, half:]).amax(1)], 1))
    end = torch.full((len(gain), 1), cells, device=gain.device)
    edges = [end]
    for c in range(count - 1, 0, -1):
        last = gain[:, c : c + width].gather(2, end[:, None].expand(-1, width, 1))[:, :, 0]
        end = c + (best[c - 1] + last).argmax(1, keepdim=True)
        edges.append(end)
    edges.append(torch.zeros_like(end))
    return borders.gather(1, torch.cat(edges[::-1], 1))


def _sorted(rows: Tensor) -> Tensor:
    """Ascending rows; on a CPU by NumPy, whose vectorised sort takes a fifteenth of torch's
    time.
    """
    return (
        torch.from_numpy(np.sort(rows.numpy(), 1))
        if rows.device.type == "cpu"
        else rows.sort(1).values
    )
