"""Nodes: a plan as a labelled graph, for predictors that read graphs: what each operation is, and
what the plan does to it.

The graph is the model's operations and edges as `extract` found them, for any architecture; nothing
is listed by hand. A hop level h has roots: the last operation of every block whose layers reach it
in at most h steps (h = 0: the operations with weights; the last level: everything), so that what is
read at a level is what a network of h rounds of messages can have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..core.cost import over_steps
from ..core.graph import OpGraph
from ..core.plan import Plan
from ..core.scheme import FULL_BITS, KEEP
from ..core.sites import cut
from ..core.table import SensitivityTable
from .features import BLOCKS, FLOOR, ROLES, Array, block_group, decibels, role_group

#: rounds of messages, and so the last hop level
HOPS = 4
_KINDS = (
    "linear",
    "conv2d",
    "attention",
    "add",
    "norm",
    "activation",
    "modulation",
    "multiply",
    "concat",
)
#: what a node is: role, kind, block (one of each), size, place
STATIC = len(ROLES) + len(_KINDS) + len(BLOCKS) + 3
#: what a plan does to it: format (one of), bits taken away, predicted noise in dB above the floor
#: families of formats that saved networks were trained with, a column each; others are told by bits
#: and price
FAMILIES = ("int", "uint", "float", "block", "codebook")
CHOICE = len(FAMILIES) + 2


@dataclass(frozen=True)
class Nodes:
    """One plan on one graph. `values` [nodes, STATIC + CHOICE], `edges` [2, edges] in the direction
    of the data, `roots`: hop level -> node numbers.
    """

    values: NDArray[np.float32]
    edges: NDArray[np.int64]
    roots: tuple[NDArray[np.int64], ...]


class Skeleton:
    """What all plans of a graph share."""

    def __init__(self, graph: OpGraph) -> None:
        self.graph = graph
        self.place = {op.name: i for i, op in enumerate(graph.ops)}
        self.of_layer = {op.layer: i for i, op in enumerate(graph.ops) if op.layer}
        self.of_attention = {
            op.name.rpartition(".")[0]: i
            for i, op in enumerate(graph.ops)
            if op.kind == "attention"
        }

    @cached_property
    def static(self) -> NDArray[np.float32]:
        """[nodes, STATIC]."""
        graph = self.graph
        home = {op: block for block in graph.blocks for op in block.ops}
        values = np.zeros((len(graph.ops), STATIC), np.float32)
        last = max((block.position for block in graph.blocks), default=0) + 1
        for i, op in enumerate(graph.ops):
            if op.layer:
                layer = graph.layer(op.layer)
                values[i, ROLES.index(role_group(layer.role))] = 1
                values[i, -3] = np.log10(1 + layer.weights) / 6
            if op.kind in _KINDS:
                values[i, len(ROLES) + _KINDS.index(op.kind)] = 1
            if op.name in home:
                block = home[op.name]
                values[i, len(ROLES) + len(_KINDS) + BLOCKS.index(block_group(block.kind))] = 1
                values[i, -1] = block.position / last
            values[i, -2] = np.log10(1 + op.macs) / 9
        return values

    @cached_property
    def edges(self) -> NDArray[np.int64]:
        """[2, edges]."""
        pairs = [
            (self.place[a], self.place[b])
            for a, b in self.graph.edges
            if a in self.place and b in self.place
        ]
        return np.array(pairs, np.int64).reshape(-1, 2).T

    @cached_property
    def roots(self) -> tuple[NDArray[np.int64], ...]:
        """Node numbers for hop levels 0 to `HOPS`; a level without roots of its own reads those of
        the level below.
        """
        weighted = np.array(sorted(self.of_layer.values()), np.int64)
        levels = [weighted]
        for hop in range(1, HOPS):
            found = [root for root, distance in self.blocks.values() if 0 < distance <= hop]
            levels.append(np.array(found, np.int64) if found else levels[-1])
        return (*levels, np.arange(len(self.graph.ops), dtype=np.int64))

    @cached_property
    def blocks(self) -> dict[str, tuple[int, int]]:
        """Block -> (its last operation, steps from the farthest of its layers to it)."""
        before: dict[int, list[int]] = {}
        for a, b in self.edges.T:
            before.setdefault(int(b), []).append(int(a))
        found = {}
        for block in self.graph.blocks:
            inside = [self.place[op] for op in block.ops if op in self.place]
            if not inside:
                continue
            root, reached, front, distance = max(inside), {max(inside): 0}, [max(inside)], 0
            while front:
                distance += 1
                front = sorted(
                    {
                        a
                        for b in front
                        for a in before.get(b, ())
                        if a in inside and a not in reached
                    }
                )
                reached |= dict.fromkeys(front, distance)
            own = [self.of_layer[layer] for layer in block.layers if layer in self.of_layer]
            found[block.name] = root, max((reached.get(i, 0) for i in own), default=0)
        return found

    def with_plan(self, plan: Plan, prices: Mapping[tuple[str, str], float]) -> Nodes:
        """The graph labelled with a plan's choices. `prices`: (layer, scheme) -> predicted noise in
        dB.
        """
        choice = np.zeros((len(self.graph.ops), CHOICE), np.float32)
        for name, held in plan.choices.items():
            i = self.of_layer.get(name, self.of_attention.get(cut(name)[0]))
            if i is None:
                continue
            for share, scheme in over_steps(plan.steps, held):
                if scheme == KEEP:
                    continue
                if scheme.family in FAMILIES:
                    choice[i, FAMILIES.index(scheme.family)] += share
                choice[i, -2] += share * (FULL_BITS - scheme.bits) / FULL_BITS
                price = (prices.get((name, str(scheme)), FLOOR) - FLOOR) / -FLOOR
                choice[i, -1] = max(choice[i, -1], share * price)
        return Nodes(np.concatenate([self.static, choice], 1), self.edges, self.roots)


def prices_of(tables: Sequence[SensitivityTable]) -> dict[tuple[str, str], float]:
    """(layer, scheme) -> predicted noise in dB, by the first metric of the first table; empty
    without one.
    """
    if not tables:
        return {}
    values = tables[0].values(tables[0].metrics[0])
    keys = [(site, scheme) for site, row in values.items() for scheme in row]
    made: Array = decibels(np.array([values[site][scheme] for site, scheme in keys]))
    return {key: float(x) for key, x in zip(keys, made, strict=True)}
