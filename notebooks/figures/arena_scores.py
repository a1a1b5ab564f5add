"""The arena's contestants: by what score each of them chooses, from the same schemes, at the same
stored bits, on the same recorded calls.

A contestant's score is its tool's own, as its code or paper has it; what the tools need besides and
a denoiser does not have (labels, a loss of tokens) is replaced and said. Imported by arena.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from qsearch.core.cost import Budget, can_have, stored_bits
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.scheme import KEEP, Scheme
from qsearch.core.table import SensitivityTable
from qsearch.decide.allocation import allocate, random_plan
from qsearch.decide.refinement import measure_noise
from qsearch.measure.calls import Call, forward, run
from qsearch.measure.profiling import profile
from qsearch.measure.quantized_weights import QuantizedWeights, weight_of
from qsearch.measure.simulation import simulate

#: layer -> scheme -> what the choice loses
Losses = dict[str, dict[str, float]]
#: stored bits a weight -> plan
Planner = Callable[[float], Plan]


@dataclass(frozen=True)
class Ring:
    """What all contestants are given: a model with its graph, the schemes, calls and weights.

    Attributes:
        model: the denoiser.
        graph: its graph.
        schemes: choices of each layer.
        calls: recorded, whole batches.
        parts: the same in batches of one sample, for estimators that use probes.
        weights: calibrated on the calls.
        seed: of captions, noise and probes.
        probes: random vectors for each of `parts`.
        plans: random ones that are measured, where a contestant learns from plans.
    """

    model: nn.Module
    graph: OpGraph
    schemes: tuple[str, ...]
    calls: Sequence[Call]
    parts: Sequence[Call]
    weights: QuantizedWeights
    seed: int
    probes: int
    plans: int

    @cached_property
    def references(self) -> list[Tensor]:
        """Outputs in full precision."""
        return [run(self.model, call) for call in self.calls]

    @cached_property
    def options(self) -> dict[str, list[Scheme]]:
        """Layer -> its schemes, cheapest first."""
        return {
            layer.name: sorted(
                (s for s in map(Scheme.parse, self.schemes) if can_have(layer, s)),
                key=lambda s, layer=layer: stored_bits(layer, (s,)),  # type: ignore[misc]
            )
            for layer in self.graph.quantizable
        }

    @cached_property
    def alone(self) -> dict[str, Losses]:
        """`noise` and `kl` of the output with one layer quantized, the others as they are."""
        found: dict[str, Losses] = {"noise": {}, "kl": {}}
        for name, schemes in self.options.items():
            for scheme in schemes:
                with simulate(self.model, {name: scheme}, self.graph, self.weights):
                    made = [run(self.model, call) for call in self.calls]
                pairs = list(zip(made, self.references, strict=True))
                for score, of in (("noise", noise), ("kl", divergence)):
                    value = sum(of(a, b) for a, b in pairs) / len(pairs)
                    found[score].setdefault(name, {})[str(scheme)] = value
        return found

    def priced(self, estimator: str) -> SensitivityTable:
        """A table of ours."""
        return profile(
            self.model,
            self.graph,
            self.schemes,
            self.parts,
            estimator=estimator,
            probes=self.probes,
            weights=self.weights,
            seed=self.seed,
        )

    def solved(self, losses: Mapping[str, Mapping[str, float]] | SensitivityTable) -> Planner:
        """The least sum of losses, solved exactly."""
        return lambda bits: allocate(self.graph, losses, Budget(average_bits=bits))

    def below(self, losses: Losses) -> Planner:
        """Of each layer the cheapest scheme that loses no more than a threshold, full precision
        where none does; the smallest threshold that the budget allows.
        """

        def at(threshold: float) -> Plan:
            chosen = {x.name: KEEP for x in self.graph}
            for name, schemes in self.options.items():
                fine = (s for s in schemes if losses[name][str(s)] <= threshold)
                chosen[name] = next(fine, KEEP)
            return Plan.make(self.graph, chosen)

        edges = sorted({value for row in losses.values() for value in row.values()})

        def planned(bits: float) -> Plan:
            low, high = 0, len(edges) - 1
            while low < high:
                middle = (low + high) // 2
                fits = at(edges[middle]).achieved.average_bits <= bits
                low, high = (low, middle) if fits else (middle + 1, high)
            return at(edges[low])

        return planned

    def products(self) -> Losses:
        """Sum over weights of |gradient x (quantized - weight)|, of a random direction of the
        output, since nobody has a loss.
        """
        layers = {name: weight_of(self.model, name) for name in self.options}
        found: Losses = {
            name: {str(s): 0.0 for s in schemes} for name, schemes in self.options.items()
        }
        before = {name: weight.requires_grad for name, weight in layers.items()}
        dice = torch.Generator().manual_seed(self.seed)
        for weight in layers.values():
            weight.requires_grad_(True)
        try:
            for call in self.parts:
                out = forward(self.model, call)
                (out * torch.randn(out.shape, generator=dice)).sum().backward()
                for name, weight in layers.items():
                    if weight.grad is None:
                        continue  # a layer that this call does not run
                    for scheme in self.options[name]:
                        moved = self.weights.get(name, scheme) - weight.detach()
                        found[name][str(scheme)] += float((weight.grad * moved).abs().sum())
                    weight.grad = None
        finally:
            for name, weight in layers.items():
                weight.requires_grad_(before[name])
                weight.grad = None
        return found

    def learnt(self) -> Losses:
        """What a linear model of measured random plans says of each choice: the logarithm of the
        output's noise, by choice.
        """
        names = [(name, str(s)) for name, schemes in self.options.items() for s in schemes]
        place = {pair: i for i, pair in enumerate(names)}
        rows, noises = np.zeros((self.plans, len(names))), []
        dice = np.random.default_rng(self.seed)
        for i in range(self.plans):
            chosen: dict[str, Any] = {x.name: KEEP for x in self.graph}
            for name, schemes in self.options.items():
                chosen[name] = schemes[dice.integers(len(schemes))]
                rows[i, place[name, str(chosen[name])]] = 1.0
            plan = Plan.make(self.graph, chosen)
            noises.append(
                measure_noise(
                    self.model, self.graph, plan, self.calls, self.references, self.weights
                )
            )
        shares = Ridge(alpha=1.0).fit(rows, np.log(noises)).coef_
        found: Losses = {}
        for (name, scheme), value in zip(names, shares, strict=True):
            found.setdefault(name, {})[scheme] = float(value)
        least = min(v for row in found.values() for v in row.values())
        return {n: {s: v - least for s, v in row.items()} for n, row in found.items()}

    def best_of(self, count: int) -> Planner:
        """The best of random plans that fill the budget, on the calls."""

        def planned(bits: float) -> Plan:
            drawn = [
                random_plan(
                    self.graph, self.schemes, Budget(average_bits=bits), 1000 * self.seed + i
                )
                for i in range(count)
            ]
            noises = [
                measure_noise(
                    self.model, self.graph, plan, self.calls, self.references, self.weights
                )
                for plan in drawn
            ]
            return drawn[int(np.argmin(noises))]

        return planned

    def uniform(self, bits: float) -> Plan:
        """The best scheme that fits, everywhere."""
        fitting = [
            plan
            for s in self.schemes
            if (plan := Plan.uniform(self.graph, s)).achieved.average_bits <= bits
        ]
        return min(
            fitting,
            key=lambda plan: measure_noise(
                self.model, self.graph, plan, self.calls, self.references, self.weights
            ),
        )


def noise(made: Tensor, reference: Tensor) -> float:
    """Squared error over the squared reference."""
    return float((made - reference).double().square().sum() / reference.double().square().sum())


def divergence(made: Tensor, reference: Tensor) -> float:
    """KL divergence of softmaxes over the last dimension, which ModelOpt takes of any output."""
    ours, theirs = (log_softmax(x.double(), -1) for x in (made, reference))
    return float(kl_div(ours, theirs, reduction="batchmean", log_target=True))


def contestants(ring: Ring) -> dict[str, Callable[[], Planner]]:
    """Name -> what makes its plans; the first is ours."""

    def weight_errors() -> Losses:
        table = ring.priced("weight_error")
        return table.values("relative_weight_error")

    def decibels() -> Losses:
        return {
            name: {s: 10 * math.log10(max(v, 1e-12)) + 120 for s, v in row.items()}
            for name, row in ring.alone["noise"].items()
        }

    return {
        "qsearch: probes": lambda: ring.solved(ring.priced("probe")),
        "Qua²SeDiMo: learnt from measured plans": lambda: ring.solved(ring.learnt()),
        "MixDQ: sum of decibels": lambda: ring.solved(decibels()),
        "one layer at a time, sum of noise": lambda: ring.solved(ring.alone["noise"]),
        "ModelOpt: divergence of softmaxes, threshold": lambda: ring.below(ring.alone["kl"]),
        "ModelOpt: squared gradients": lambda: ring.solved(ring.priced("fisher")),
        "AutoRound: |gradient x error|": lambda: ring.solved(ring.products()),
        "SDNQ: weight error, threshold": lambda: ring.below(weight_errors()),
        "Apple: PSNR of one layer, threshold": lambda: ring.below(ring.alone["noise"]),
        "uniform": lambda: ring.uniform,
        "best of 20 random": lambda: ring.best_of(20),
    }
