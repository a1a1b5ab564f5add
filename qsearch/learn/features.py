"""Features: a plan on its graph as named columns, the same for every architecture, so that what one
model taught predicts another.

Everything is an amount that is zero where nothing is done: bits taken away, the share of the
weights in a format, predicted noise. A role or a block that a model lacks, and one that a plan
leaves in full precision, look the same, as they should. Where there is a sensitivity table, its
predictions come in
twice: added up over roles, blocks, depth, step classes and formats (in decibels, above a floor),
    and of the whole plan, with interactions where probes
left responses; the latter are priors that learners start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.cost import over_steps
from ..core.errors import QSearchError
from ..core.format_words import families
from ..core.graph import LayerSpec, OpGraph
from ..core.plan import Plan
from ..core.scheme import FULL_BITS, KEEP
from ..core.sites import cut
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
        """[plans, columns] in the given order. Raises `QSearchError` for columns that are not
        there.
        """
        place = {name: i for i, name in enumerate(self.columns)}
        if missing := [name for name in columns if name not in place]:
            raise QSearchError(
                f"these plans have no column {missing[0]!r}; it comes from a sensitivity "
                "table with this metric: give the one learnt with"
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
    graph: OpGraph, plans: Mapping[str, Plan], tables: Sequence[SensitivityTable] = ()
) -> Features:
    """Columns for each of `plans`: `bits`, `lost/…` (bits taken away, by weight), `share/FORMAT`,
    and for each metric of the tables `METRIC/…` in dB.

    What differs between ranges of steps counts by the share of the steps. Raises `QSearchError` for
    a plan of another graph, one that lacks a layer, or a choice that a table has not priced.
    """
    for name, plan in plans.items():
        if plan.graph != graph.id:
            raise QSearchError(
                f"plan {name} is for graph {plan.graph}, {graph.model} is graph "
                f"{graph.id}; learn from plans of this graph"
            )
        if missing := [layer.name for layer in graph if layer.name not in plan.choices]:
            raise QSearchError(
                f"a plan needs a scheme for every layer (keep is one); {name} has none "
                f"for {missing[0]}"
            )
    layers, known = graph.quantizable, list(plans.values())
    attention = sorted({site for plan in known for site in plan.sites})
    names = [*(layer.name for layer in layers), *attention]
    groups = _groups(graph, layers, attention)
    columns = {"bits": np.array([FULL_BITS - plan.achieved.average_bits for plan in known])}
    weights = np.array([layer.weights for layer in layers], float)
    weights /= weights.sum()
    lost = np.zeros((len(known), len(names)))
    share = {name: np.zeros((len(known), len(names))) for name in families()}
    for i, plan in enumerate(known):
        for j, layer in enumerate(layers):
            for part, scheme in over_steps(plan.steps, plan.choices[layer.name]):
                lost[i, j] += part * (FULL_BITS - scheme.bits) * weights[j]
                if scheme.family in share:
                    share[scheme.family][i, j] += part * weights[j]
    columns |= {f"lost/{name}": lost[:, mask].sum(1) for name, mask in groups.items()}
    columns |= {f"share/{name}": share[name].sum(1) for name in families()}
    for table in tables:
        table.check(graph)
        for metric in table.metrics:
            columns |= _predicted(table, metric, names, known, groups)
    values = (
        np.stack(list(columns.values()), 1).astype(np.float32).astype(np.float64)
    )  # as trees see them, so that who explains a tree takes its branches
    return Features(tuple(plans), tuple(columns), values)


def decibels(power: Array) -> Array:
    """Noise power in dB, no lower than `FLOOR`."""
    return np.asarray(10 * np.log10(np.maximum(power, 0) + 10 ** (FLOOR / 10)))


def _groups(
    graph: OpGraph, layers: Sequence[LayerSpec], attention: Sequence[str]
) -> dict[str, NDArray[np.bool_]]:
    """Name -> which of the layers, and of the sites of attention behind them, it holds."""
    home = {layer: block for block in graph.blocks for layer in block.layers}
    within = {op.rpartition(".")[0]: block for block in graph.blocks for op in block.ops}
    held = [home.get(layer.name) for layer in layers]
    held += [within.get(cut(site)[0]) for site in attention]
    roles = np.array(
        [*(role_group(x.role) for x in layers), *("attention-rest" for _ in attention)]
    )
    kinds = np.array(["rest" if block is None else block_group(block.kind) for block in held])
    last = max((block.position for block in graph.blocks), default=0) + 1
    depth = np.array([0 if block is None else DEPTHS * block.position // last for block in held])
    found = {f"role:{name}": roles == name for name in ROLES} | {
        f"block:{name}": kinds == name for name in BLOCKS
    }
    return found | {f"depth:{i}": depth == i for i in range(DEPTHS)}


def _predicted(
    table: SensitivityTable,
    metric: str,
    names: Sequence[str],
    plans: Sequence[Plan],
    groups: Mapping[str, NDArray[np.bool_]],
) -> dict[str, Array]:
    """One metric of a table: what each choice costs, added up in several ways, and the whole plan's
    prediction.
    """
    rows = table.frame[table.frame["metric"] == metric]
    bins, count = sorted(set(rows["step"])), table.bins(metric)
    priced: dict[tuple[str, str], Array] = {}
    for site, scheme, step, estimate in zip(
        rows["site"], rows["scheme"], rows["step"], rows["estimate"], strict=True
    ):
        priced.setdefault((site, scheme), np.zeros(len(bins)))[bins.index(step)] = estimate
    loss = np.zeros((len(plans), len(names), len(bins)))
    family = np.full(loss.shape, "keep", dtype=object)
    for i, plan in enumerate(plans):
        places = [plan.steps.of(2 * b + 1, 2 * count) for b in bins]
        for j, site in enumerate(names):
            held = plan.choices.get(site, (KEEP,))
            for k, place in enumerate(places):
                scheme = held[place if len(held) > 1 else 0]
                if scheme == KEEP:
                    continue
                if (site, str(scheme)) not in priced:
                    raise QSearchError(
                        f"the table has no {scheme} for {site}; profile with this scheme, "
                        "or learn without a table"
                    )
                loss[i, j, k], family[i, j, k] = priced[site, str(scheme)][k], scheme.family
    mean = loss.mean(2)
    found = {f"{metric}/sum": mean.sum(1), f"{metric}/worst": mean.max(1, initial=0.0)}
    found |= {f"{metric}/{name}": mean[:, mask].sum(1) for name, mask in groups.items()}
    found |= {
        f"{metric}/share:{name}": (loss * (family == name)).mean(2).sum(1) for name in families()
    }
    if len(bins) > 1:
        for i, part in enumerate(np.array_split(np.arange(len(bins)), min(STEPS, len(bins)))):
            found[f"{metric}/step:{i}"] = loss[:, :, part].mean(2).sum(1)
    if table.responses is None or not table.responses.has(metric):
        whole = found[f"{metric}/sum"]
    else:
        whole = np.array([table.predict(plan, metric)[0] for plan in plans])
    return {name: decibels(value) for name, value in found.items()} | {
        f"{metric}/plan": decibels(whole)
    }
