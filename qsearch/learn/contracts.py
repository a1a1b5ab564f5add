"""The contract of surrogates, and a small world of plans whose measured quality follows a law that
they must find.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..core.attribution import TOLERANCE
from ..core.contract import Contract
from ..core.graph import Block, LayerSpec, Op, OpGraph
from ..core.plan import Plan
from ..core.probe_responses import ProbeResponses, ratio
from ..core.table import SensitivityTable
from ..core.trials import Trial
from .data import Data
from .features import Array
from .fitting import Study, training_set
from .scores import score

SCHEMES = ("uint2-c", "km2-c", "uint3-c", "uint4-c", "int8-c")
_PARTS = (
    ("self-attention-q", "self-attention"),
    ("self-attention-out", "self-attention"),
    ("feed-forward-in", "feed-forward"),
    ("feed-forward-out", "feed-forward"),
)


def small_graph(blocks: int = 3, width: int = 16, model: str = "world") -> OpGraph:
    """An input layer, blocks of four layers in two blocks each, an output layer, in a chain."""
    layers = [LayerSpec("first", "input", "linear", (width, 8), 128 * width)]
    found = []
    for i in range(blocks):
        own = [
            LayerSpec(
                f"{i}.{role}", role, "linear", (width, width), 16 * width * width, f"blocks.{i}"
            )
            for role, _ in _PARTS
        ]
        found += [
            (
                f"{i}.{kind}",
                kind,
                tuple(x.name for x, (_, k) in zip(own, _PARTS, strict=True) if k == kind),
            )
            for kind in ("self-attention", "feed-forward")
        ]
        layers += own
    layers.append(LayerSpec("last", "output", "linear", (8, width), 128 * width))
    ops = tuple(Op(f"op {x.name}", "linear", x.name, x.block, (1, width), x.macs) for x in layers)
    made = tuple(
        Block(name, kind, names, i, i, tuple(f"op {n}" for n in names))
        for i, (name, kind, names) in enumerate(found)
    )
    return OpGraph(
        model, tuple(layers), ops, tuple((a.name, b.name) for a, b in itertools.pairwise(ops)), made
    )


def small_table(
    graph: OpGraph, seed: int = 0, probes: int = 12, bins: int = 2, metric: str = "noise"
) -> SensitivityTable:
    """ProbeResponses of random probes: 6 dB a bit, layers of very different weight, codebooks
    better than grids.
    """
    dice = np.random.default_rng(seed)
    loud = dice.lognormal(-3, 1, len(graph.layers))
    choices, size = [], []
    for layer, own in zip(graph.layers, loud, strict=True):
        for scheme in SCHEMES:
            choices.append((layer.name, scheme))
            bits = int(scheme.removeprefix("km").lstrip("uint").partition("-")[0]) + (
                0.5 if scheme.startswith("km") else 0
            )
            size.append(own * 2.0**-bits)
    values, power, rows = {}, {}, []
    for b in range(bins):
        found = (
            dice.normal(0, 1, (len(choices), 1, probes, 4))
            * np.array(size)[:, None, None, None]
            * (1 + b)
        )
        values[metric, b], power[metric, b] = found.astype(np.float32), np.ones(4)
        for (site, scheme), own in zip(choices, values[metric, b].astype(np.float64), strict=True):
            estimate, error = ratio(own.sum(0) ** 2, power[metric, b])
            row = {
                "site": site,
                "scheme": scheme,
                "step": b,
                "metric": metric,
                "estimate": estimate,
                "error": error,
            }
            rows.append(row | {"floor": 1e-12, "estimator": "probe", "seed": seed})
    return SensitivityTable.from_rows(graph.id, rows, ProbeResponses(tuple(choices), values, power))


def small_plans(graph: OpGraph, count: int, seed: int = 0) -> dict[str, Plan]:
    """Plans of very different coarseness."""
    found = {}
    for i in range(count):
        dice = np.random.default_rng([seed, i])
        odds = dice.dirichlet(np.ones(len(SCHEMES)))
        found[f"plan {i:03d}"] = Plan.make(
            graph, {x.name: SCHEMES[dice.choice(len(SCHEMES), p=odds)] for x in graph}
        )
    return found


def small_study(
    count: int = 60, seed: int = 0, graph: OpGraph | None = None, noise: float = 0.1
) -> Study:
    """Measured plans: `sqnr` falls with the table's prediction, and more than it says where
    feed-forward layers are coarse; `ssim` follows it.
    """
    graph = graph or small_graph()
    table, plans = small_table(graph), small_plans(graph, count, seed)
    dice = np.random.default_rng(seed + 1)
    trials = []
    for name, plan in plans.items():
        coarse = np.mean(
            [plan.single[x.name].bits == 2 for x in graph if x.role.startswith("feed-forward")]
        )
        sqnr = -8 * np.log10(table.predict(plan)[0]) - 6 * coarse + noise * dice.normal()
        metrics = {
            "sqnr": (float(sqnr), noise),
            "ssim": (float(1 / (1 + np.exp(-sqnr / 10))), 0.01),
            "constant": (0.5, 0.0),
        }
        trials.append(
            Trial(name, plan.choices, metrics, "world", plan.achieved.average_bits, plan.id)
        )
    return Study(graph, trials, (table,))


class SurrogateContract(Contract):
    """What holds for every file in `surrogates/`: it learns, it repeats itself, it comes back from
    disk, and what it shares out adds up.
    """

    kind = "surrogates"

    def lessons(self) -> tuple[Data, Array, Data, Array]:
        """Data and target to learn from, and held-out ones."""
        taken = training_set([small_study(60)], "sqnr", self._name)
        return (
            taken.data.rows(range(40)),
            taken.target[:40],
            taken.data.rows(range(40, 60)),
            taken.target[40:],
        )

    @property
    def _name(self) -> str:
        return (
            "gnn" if self.module.needs_graph else "ridge"
        )  # a module of one's own is given data for one of its kind

    def test_it_ranks_plans_that_it_has_not_seen(self) -> None:
        """Spearman of at least 0.8 on 20 plans, of 40 learnt from."""
        known, target, asked, truth = self.lessons()
        found = score(self.module.fit(known, target, 0).predict(asked), truth).spearman
        assert found >= 0.8, f"Spearman {found:.3f}"

    def test_the_same_seed_gives_the_same_predictions(self) -> None:
        """To the last digit."""
        known, target, asked, _ = self.lessons()
        first, again = (self.module.fit(known, target, 3).predict(asked) for _ in range(2))
        assert np.array_equal(first, again), f"they differ by up to {np.abs(first - again).max()}"

    def test_it_comes_back_from_disk_without_pickles(self) -> None:
        """The same predictions; every file is JSON, text or safetensors."""
        known, target, asked, _ = self.lessons()
        model = self.module.fit(known, target, 0)
        with tempfile.TemporaryDirectory() as folder:
            model.save(Path(folder))
            kinds = {path.suffix for path in Path(folder).iterdir()}
            assert kinds <= {".json", ".txt", ".safetensors"}, f"unexpected files {sorted(kinds)}"
            again = self.module.load(Path(folder)).predict(asked)
        assert np.array_equal(again, model.predict(asked)), "it came back as another"

    def test_what_it_shares_out_adds_up_to_its_prediction(self) -> None:
        """On 1,000 plans, within `TOLERANCE` of the predictions' range; a graph predictor scores
        every layer instead.
        """
        known, target, _, _ = self.lessons()
        model: Any = self.module.fit(known, target, 0)
        if self.module.needs_graph:
            from .nodes import Skeleton

            graph = small_graph()
            layers, blocks = model.scores(Skeleton(graph), known.nodes[0])
            assert set(layers) == {layer.name for layer in graph}, (
                f"layers without a score: {sorted({x.name for x in graph} - set(layers))}"
            )
            assert set(blocks) == {block.name for block in graph.blocks}, "blocks without a score"
            return
        study = small_study(1000, seed=5)
        many = training_set([study], "sqnr", self._name).data
        values, base = model.shares(many)
        predicted = model.predict(many)
        off, spread = np.abs(values.sum(1) + base - predicted).max(), np.ptp(predicted)
        assert off <= TOLERANCE * spread, f"off by {off:.3g} of a range of {spread:.3g}"
