"""Places for the nodes of a graph that flows downwards: ranks, order within a rank, and bends for
the lines between them.

The usual recipe (Sugiyama's): a node stands below all it reads; a line that passes ranks gets a
bend on each; sweeps down and up put every node near the mean of its neighbours, which undoes
crossings; the last sweeps move nodes apart as little as their widths ask. Graphviz does this
better, but is no Python package: `--format dot` writes its input.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

_SWEEPS = 24
_STIFF = 6.0  # a bend weighs more than a node: long lines stay straight, boxes give way


@dataclass(frozen=True)
class Layout:
    """`places`: node -> its middle; `routes`: (node, node) -> points from the lower edge of the one
    to the upper edge of the other.
    """

    places: dict[Hashable, tuple[float, float]]
    routes: dict[tuple[Hashable, Hashable], list[tuple[float, float]]]
    width: float
    height: float


def layered(
    graph: Any, sizes: Mapping[Any, tuple[float, float]], *, gap: float = 14.0, drop: float = 26.0
) -> Layout:
    """Layout of an acyclic `nx.DiGraph` whose nodes have `sizes` (width, height); `gap` between
    neighbours, `drop` between ranks.
    """
    ranks = _ranks(graph)
    bends: dict[tuple[Hashable, Hashable], list[Hashable]] = {}
    rows: list[list[Hashable]] = [[] for _ in range(max(ranks.values(), default=0) + 1)]
    near: dict[Hashable, tuple[list[Hashable], list[Hashable]]] = {}
    widths: dict[Hashable, float] = {}
    for node in graph:
        rows[ranks[node]].append(node)
        widths[node] = sizes[node][0]
        near[node] = ([], [])
    for a, b in graph.edges:
        chain: list[Hashable] = [("bend", a, b, r) for r in range(ranks[a] + 1, ranks[b])]
        bends[a, b] = chain
        for bend, rank in zip(chain, range(ranks[a] + 1, ranks[b]), strict=True):
            rows[rank].append(bend)
            widths[bend] = 4.0
            near[bend] = ([], [])
        for upper, lower in zip([a, *chain], [*chain, b], strict=True):
            near[upper][1].append(lower)
            near[lower][0].append(upper)
    rows = _ordered(rows, near)
    across = _across(rows, near, widths, gap)
    heights = [max((sizes[n][1] for n in row if n in sizes), default=0.0) for row in rows]
    down, y = [], 0.0
    for height in heights:
        down.append(y + height / 2)
        y += height + drop
    places = {n: (across[n], down[ranks[n]]) for n in graph}
    routes = {}
    for (a, b), chain in bends.items():
        middle = []
        for bend, rank in zip(chain, range(ranks[a] + 1, ranks[b]), strict=True):
            middle += [
                (across[bend], down[rank] - heights[rank] / 2),
                (across[bend], down[rank] + heights[rank] / 2),
            ]
        routes[a, b] = [
            (places[a][0], places[a][1] + sizes[a][1] / 2),
            *middle,
            (places[b][0], places[b][1] - sizes[b][1] / 2),
        ]
    return Layout(
        places,
        routes,
        max((across[n] + w / 2 for n, w in widths.items()), default=0.0),
        max(y - drop, 0.0),
    )


def _ranks(graph: Any) -> dict[Hashable, int]:
    """The longest way from a source; what has no fewer readers than it reads itself stands right
    above the first of them.
    """
    ranks: dict[Hashable, int] = {}
    order = list(nx.topological_sort(graph))
    for node in order:
        ranks[node] = 1 + max((ranks[p] for p in graph.predecessors(node)), default=-1)
    for node in reversed(order):
        if graph.out_degree(node) and graph.out_degree(node) >= graph.in_degree(node):
            ranks[node] = min(ranks[s] for s in graph.successors(node)) - 1
    return ranks


def _ordered(
    rows: list[list[Hashable]], near: Mapping[Hashable, tuple[list[Hashable], list[Hashable]]]
) -> list[list[Hashable]]:
    """Rows reordered by the mean place of each node's neighbours, the best of all sweeps by
    crossings.
    """
    best, fewest = rows, _crossings(rows, near)
    for sweep in range(_SWEEPS):
        side = sweep % 2
        rows = [list(row) for row in rows]
        for i in range(len(rows)) if side == 0 else range(len(rows) - 1, -1, -1):
            other = (
                rows[i - 1]
                if side == 0 and i
                else rows[i + 1]
                if side and i + 1 < len(rows)
                else []
            )
            place = {n: k for k, n in enumerate(other)}
            own = {n: k for k, n in enumerate(rows[i])}
            mean = {
                n: sum(place[m] for m in near[n][side]) / len(near[n][side])
                if near[n][side] and other
                else own[n]
                for n in rows[i]
            }
            rows[i].sort(key=lambda n, mean=mean, own=own: (mean[n], own[n]))  # type: ignore[misc]
        found = _crossings(rows, near)
        if found < fewest:
            best, fewest = rows, found
    return best


def _crossings(
    rows: Sequence[Sequence[Hashable]],
    near: Mapping[Hashable, tuple[list[Hashable], list[Hashable]]],
) -> int:
    count = 0
    for upper, lower in itertools.pairwise(rows):
        place = {n: k for k, n in enumerate(lower)}
        ends = [k for n in upper for k in sorted(place[m] for m in near[n][1])]
        count += sum(a > b for i, a in enumerate(ends) for b in ends[i + 1 :])
    return count


def _across(
    rows: Sequence[Sequence[Hashable]],
    near: Mapping[Hashable, tuple[list[Hashable], list[Hashable]]],
    widths: Mapping[Hashable, float],
    gap: float,
) -> dict[Hashable, float]:
    weights = {n: _STIFF if _is_bend(n) else 1.0 for n in widths}
    x: dict[Hashable, float] = {}
    for row in rows:
        x |= dict(
            zip(
                row,
                _apart([0.0] * len(row), [widths[n] for n in row], [1.0] * len(row), gap),
                strict=True,
            )
        )
    for sweep in range(_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = []
            for n in row:
                neighbours = (
                    [*near[n][0], *near[n][1]] if sweep >= _SWEEPS // 2 else near[n][sweep % 2]
                )
                total = sum(weights[m] if _is_bend(n) else 1.0 for m in neighbours)
                wanted.append(
                    sum(x[m] * (weights[m] if _is_bend(n) else 1.0) for m in neighbours) / total
                    if neighbours
                    else x[n]
                )
            x |= dict(
                zip(
                    row,
                    _apart(wanted, [widths[n] for n in row], [weights[n] for n in row], gap),
                    strict=True,
                )
            )
    left = min((x[n] - widths[n] / 2 for n in x), default=0.0)
    return {n: place - left for n, place in x.items()}


def _is_bend(node: Hashable) -> bool:
    return isinstance(node, tuple)  # names of nodes are texts


def _apart(
    wanted: Sequence[float], widths: Sequence[float], weights: Sequence[float], gap: float
) -> list[float]:
    """Places as near to `wanted` as the order and the widths allow: weighted least squares, by
    pooling neighbours that would overlap.
    """
    offsets, at = [], 0.0
    for i, width in enumerate(widths):
        at += 0.0 if i == 0 else (widths[i - 1] + width) / 2 + gap
        offsets.append(at)
    pools: list[
        tuple[float, float, int]
    ] = []  # (mean, weight, count) of wanted place less offset; rises from pool to pool
    for place, offset, weight in zip(wanted, offsets, weights, strict=True):
        mean, heavy, count = place - offset, weight, 1
        while pools and pools[-1][0] > mean:
            before, heavier, many = pools.pop()
            mean, heavy, count = (
                (mean * heavy + before * heavier) / (heavy + heavier),
                heavy + heavier,
                count + many,
            )
        pools.append((mean, heavy, count))
    starts = [mean for mean, _, count in pools for _ in range(count)]
    return [start + offset for start, offset in zip(starts, offsets, strict=True)]
