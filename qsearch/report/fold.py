"""Fold: hundreds of layers by block and role, as plain data for a page: what each block's layers of
one role got, and how sensitive they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..core.cost import stored_bits
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from .plots import decibels

#: layers from which on figures are folded: one bar a layer would be a hair's breadth
MANY = 150
#: blocks that stand beside each other at most
_MOST = 128


@dataclass(frozen=True)
class Cell:
    """Layers of one role in one block.

    Attributes:
        layers: their names.
        weights: of all of them.
        bits: stored bits a weight, their mean by weight.
        sqnr: the least of their decibels at the scheme asked for; NaN where none was measured.
        schemes: what the plan says of them, the most frequent first.
    """

    layers: tuple[str, ...]
    weights: int
    bits: float
    sqnr: float
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """A plan folded. `blocks`: in order of execution; `roles`: by the place of their first layer;
    `cells`: (role, block) -> what lies there.
    """

    blocks: tuple[str, ...]
    roles: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    scheme: str


def fold(
    graph: OpGraph, plan: Plan, values: Mapping[str, Mapping[str, float]], scheme: str
) -> Folded:
    """`plan` by block and role.

    Args:
        graph: the model's graph.
        plan: the plan.
        values: layer -> scheme -> noise, as of a sensitivity table.
        scheme: where sensitivity is compared.

    Returns:
        The folded plan, of at most `_MOST` blocks: with more, neighbours stand together.
    """
    names = list(dict.fromkeys(home(layer) for layer in graph))
    several = -(-len(names) // _MOST)
    place = {
        name: names[i - i % several]
        if several == 1
        else (
            f"{names[i - i % several]} … "
            f"{names[min(len(names) - 1, i - i % several + several - 1)]}"
        )
        for i, name in enumerate(names)
    }
    held: dict[tuple[str, str], list[LayerSpec]] = {}
    for layer in graph:
        held.setdefault((layer.role, place[home(layer)]), []).append(layer)
    cells = {key: _cell(layers, plan, values, scheme) for key, layers in held.items()}
    blocks = tuple(dict.fromkeys(place[name] for name in names))
    roles = tuple(dict.fromkeys(layer.role for layer in graph))
    return Folded(blocks, roles, cells, scheme)


def home(layer: LayerSpec) -> str:
    """The block of a layer; of one without, the module that it lies in."""
    return layer.block or layer.name.rpartition(".")[0] or layer.name


def _cell(
    layers: Sequence[LayerSpec],
    plan: Plan,
    values: Mapping[str, Mapping[str, float]],
    scheme: str,
) -> Cell:
    weights = sum(layer.weights for layer in layers)
    bits = sum(stored_bits(layer, plan.choices[layer.name]) for layer in layers)
    noises = [values[x.name][scheme] for x in layers if scheme in values.get(x.name, {})]
    texts = [plan.text(layer.name) for layer in layers]
    schemes = sorted(dict.fromkeys(texts), key=lambda text: -texts.count(text))
    return Cell(
        tuple(layer.name for layer in layers),
        weights,
        bits / weights,
        min((decibels(n) for n in noises if n > 0), default=math.nan),
        tuple(schemes),
    )


def levels(found: Folded) -> tuple[float, float, float]:
    """(lowest, median, highest) decibels of the cells; (0, 0, 1) where none was measured."""
    known = sorted(c.sqnr for c in found.cells.values() if math.isfinite(c.sqnr))
    return (known[0], median(known), known[-1]) if known else (0.0, 0.0, 1.0)


def short_block(name: str) -> str:
    """A block's name for a narrow column: `down_blocks.2.attentions.1.transformer_blocks.7` as `d2
    a1 t7`.
    """
    parts = re.split(r"[.]", name.partition(" … ")[0])
    out: list[str] = []
    for part in parts:
        if part.isdigit() and out:
            out[-1] += part
        else:
            out.append(part[:1])
    return " ".join(out)
