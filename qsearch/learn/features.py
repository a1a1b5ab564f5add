"""Features: a plan on its graph as named columns, the same for every architecture, so that what one model taught predicts another.

Everything is an amount that is zero where nothing is done: bits taken away, the share of the weights in a format, predicted noise. A role or a block that
a model lacks, and one that a plan leaves in full precision, look the same, as they should. Where there is a sensitivity table, its predictions come in
twice: added up over roles, blocks, depth, step classes and formats (in decibels, above a floor), and of the whole plan, with interactions where probes
left shares; the latter are priors that learners start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import BitPlan
from ..core.scheme import FULL_BITS, Scheme
from ..core.table import SensitivityTable

Array = NDArray[np.float64]
#: a noise power of nothing at all, in dB
FLOOR = -80.0
_SLOTS = ("q", "k", "v", "out")
_ATTENTIONS = ("self", "cross", "joint")
ROLES = (
    *(f"{side}-attention-{slot}" for side in _ATTENTIONS for slot in _SLOTS),
    *(
        "attention-fused",
        "attention-rest",
        "parallel",
        "feed-forward-in",
        "feed-forward-out",
        "resnet-conv",
        "shortcut",
        "projection",
        "resample",
        "skip",
    ),
    *(
        "modulation",
        "time-embedding",
        "text-embedding",
        "embedding-rest",
        "input",
        "output",
        "rest",
    ),
)
BLOCKS = (
    *(f"{side}-attention" for side in _ATTENTIONS),
    "parallel",
    "feed-forward",
    "resnet",
    "projection",
    "resample",
    "skip",
    "embedding",
    "ends",
    "rest",
)
FAMILIES = ("int", "uint", "float", "block", "codebook")
DEPTHS, STEPS = 4, 3  # quarters of the blocks in order of execution; thirds of the steps


@dataclass(frozen=True)
class Features:
    """`values` [plans, columns] with the names of both."""

    plans: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array

    def column(self, name: str) -> Array:
        """One column [plans]."""
        return self.values[:, self.columns.index(name)]

    def take(self, columns: Sequence[str]) -> Array:
        """[plans, columns] in the given order. Raises `QSearchError` for columns that are not there."""
        place = {name: i for i, name in enumerate(self.columns)}
        if missing := [name for name in columns if name not in place]:
            raise QSearchError(
                f"these plans have no column {missing[0]!r}; it comes from a sensitivity table with this metric: give the one learnt with"
            )
        return self.values[:, [place[name] for name in columns]]


def role_group(role: str) -> str:
    """A role of the graph as one of `ROLES`."""
    if role in ROLES:
        return role
    side, attention, slot = role.partition("-attention-")
    if attention:
        slot = slot.removeprefix("add-")
        known = f"{side}-attention-{slot}"
        return (
            known
            if known in ROLES
            else "attention-fused"
            if set(slot) <= set("qkv")
            else "attention-rest"
        )
    for start in ("parallel", "projection"):
        if role.startswith(start):
            return start
    return (
        "feed-forward-in"
        if role == "feed-forward-mid"
        else "embedding-rest"
        if role.endswith("embedding")
        else "rest"
    )


def block_group(kind: str) -> str:
    """A block's kind as one of `BLOCKS`."""
    if kind in BLOCKS:
        return kind
    return (
        "embedding"
        if kind.endswith("embedding")
        else "ends"
        if kind in ("patchify", "output", "input")
        else "rest"
    )


def featurize(
    graph: OpGraph, plans: Mapping[str, BitPlan], tables: Sequence[SensitivityTable] = ()
) -> Features:
    """Columns for each of `plans`: `bits`, `lost/…` (bits taken away, by weight), `share/FORMAT`, and for each metric of the tables `METRIC/…` in dB.

    Raises `QSearchError` for a plan of another graph, one that lacks a layer, or a choice that a table has not priced.
    """
    for name, plan in plans.items():
        if plan.graph != graph.id:
            raise QSearchError(
                f"plan {name} is for graph {plan.graph}, {graph.model} is graph {graph.id}; learn from plans of this graph"
            )
        if missing := [layer.name for layer in graph if layer.name not in plan.layers]:
            raise QSearchError(
                f"a plan needs a scheme for every layer (keep is one); {name} has none for {missing[0]}"
            )
    layers, chosen = (
        graph.quantizable,
        [[plan.layers[layer.name] for layer in graph.quantizable] for plan in plans.values()],
    )
    groups = _groups(graph, layers)
    columns = {
        "bits": np.array([FULL_BITS - plan.achieved.average_bits for plan in plans.values()])
    }
    weights = np.array([layer.weights for layer in layers], float)
    weights /= weights.sum()
    lost = (
        np.array([[FULL_BITS - s.bits for s in row] for row in chosen], float).reshape(
            len(plans), -1
        )
        * weights
    )
    columns |= {f"lost/{name}": lost[:, mask].sum(1) for name, mask in groups.items()}
    family = np.array([[s.family for s in row] for row in chosen])
    columns |= {f"share/{name}": ((family == name) * weights).sum(1) for name in FAMILIES}
    for table in tables:
        table.check(graph)
        for metric in table.metrics:
            columns |= _predicted(table, metric, layers, chosen, groups, family)
    values = (
        np.stack(list(columns.values()), 1).astype(np.float32).astype(np.float64)
    )  # as trees see them, so that who explains a tree takes its branches
    return Features(tuple(plans), tuple(columns), values)


def decibels(power: Array) -> Array:
    """Noise power in dB, no lower than `FLOOR`."""
    return np.asarray(10 * np.log10(np.maximum(power, 0) + 10 ** (FLOOR / 10)))


def _groups(graph: OpGraph, layers: Sequence[LayerSpec]) -> dict[str, NDArray[np.bool_]]:
    """Name -> which layers it holds."""
    home = {layer: block for block in graph.blocks for layer in block.layers}
    roles = np.array([role_group(layer.role) for layer in layers])
    kinds = np.array(
        [block_group(home[layer.name].kind) if layer.name in home else "rest" for layer in layers]
    )
    last = max((block.position for block in graph.blocks), default=0) + 1
    depth = np.array(
        [
            DEPTHS * home[layer.name].position // last if layer.name in home else 0
            for layer in layers
        ]
    )
    found = {f"role:{name}": roles == name for name in ROLES} | {
        f"block:{name}": kinds == name for name in BLOCKS
    }
    return found | {f"depth:{i}": depth == i for i in range(DEPTHS)}


def _predicted(
    table: SensitivityTable,
    metric: str,
    layers: Sequence[LayerSpec],
    chosen: Sequence[Sequence[Scheme]],
    groups: Mapping[str, NDArray[np.bool_]],
    family: NDArray[np.str_],
) -> dict[str, Array]:
    """One metric of a table: what each choice costs, added up in several ways, and the whole plan's prediction."""
    rows = table.frame[table.frame["metric"] == metric]
    bins = sorted(set(rows["step"]))
    priced: dict[tuple[str, str], Array] = {}
    for site, scheme, step, estimate in zip(
        rows["site"], rows["scheme"], rows["step"], rows["estimate"], strict=True
    ):
        priced.setdefault((site, scheme), np.zeros(len(bins)))[bins.index(step)] = estimate
    nothing = np.zeros(len(bins))
    loss = np.zeros((len(chosen), len(layers), len(bins)))
    for i, row in enumerate(chosen):
        for j, (layer, scheme) in enumerate(zip(layers, row, strict=True)):
            cost = (
                nothing
                if scheme.format == "keep" and not scheme.activation
                else priced.get((layer.name, str(scheme)))
            )
            if cost is None:
                raise QSearchError(
                    f"the table has no {scheme} for {layer.name}; profile with this scheme, or learn without a table"
                )
            loss[i, j] = cost
    mean = loss.mean(2)
    found = {f"{metric}/sum": mean.sum(1), f"{metric}/worst": mean.max(1, initial=0.0)}
    found |= {f"{metric}/{name}": mean[:, mask].sum(1) for name, mask in groups.items()}
    found |= {f"{metric}/share:{name}": (mean * (family == name)).sum(1) for name in FAMILIES}
    if len(bins) > 1:
        for i, part in enumerate(np.array_split(np.arange(len(bins)), min(STEPS, len(bins)))):
            found[f"{metric}/step:{i}"] = loss[:, :, part].mean(2).sum(1)
    if table.shares is None:
        whole = found[f"{metric}/sum"]
    else:
        names = [
            {layer.name: s for layer, s in zip(layers, row, strict=True) if s.format != "keep"}
            for row in chosen
        ]
        whole = np.array([_quadratic(table, metric, bins, plan) for plan in names])
    return {name: decibels(value) for name, value in found.items()} | {
        f"{metric}/plan": decibels(whole)
    }


def _quadratic(
    table: SensitivityTable, metric: str, bins: Sequence[int], plan: Mapping[str, Scheme]
) -> float:
    from ..core.shares import rows_of

    assert table.shares is not None
    rows = rows_of(table.shares, {site: str(scheme) for site, scheme in plan.items()})
    return sum(table.shares.error((metric, b), rows)[0] for b in bins) / len(bins)
