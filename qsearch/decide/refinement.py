"""refine(model, graph, plan, ...) -> Refined: stand on a plan, price every change of it, change a few layers, measure, and keep what is better.

A table prices choices from full precision, where first order is all there is to the squared error. From a plan the picture is better: the
error E = |f(plan) - f|^2 / |f|^2 has an exact gradient there (its linear term), and probes at the plan give its curvature (Gauss-Newton):

    E(plan + d) ~ E(plan) + <dE/dW, d> + E_v[ <d(v.f)/dW, d>^2 ] / |f|^2

The quadratic problem is solved for at most `radius` changed layers, measured, and kept when the measured error falls; otherwise the radius
halves. That is a trust-region method (Conn, Gould and Toint 2000), with the number of changed layers as the region's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import BitPlan, Budget
from ..core.scheme import KEEP, Scheme
from ..measure.noise import relative_noise
from ..measure.pipelines import Call, forward, run
from ..measure.simulation import QuantizedWeights, calibrated_weights, simulate, weight_of
from .allocation import finish
from .building import make_problem
from .constraints import Constraints
from .problem import Problem
from .solvers import local

_CHANGED = "changed layers"


@dataclass(frozen=True)
class Round:
    """One round: layers that were changed, the error that the model predicted and the one that was measured, and whether it was kept."""

    changed: int
    predicted: float
    measured: float
    kept: bool


@dataclass(frozen=True)
class Refined:
    """The plan after all rounds, its measured relative noise power, that of the plan before, and what the rounds did."""

    plan: BitPlan
    noise: float
    before: float
    rounds: tuple[Round, ...]


def refine(
    model: nn.Module,
    graph: OpGraph,
    plan: BitPlan,
    schemes: Sequence[Scheme | str],
    calls: Sequence[Call],
    *,
    budget: Budget | None = None,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    rounds: int = 6,
    probes: int = 6,
    radius: int | None = None,
    trust: float | None = None,
    seconds: float = 20.0,
    seed: int = 0,
) -> Refined:
    """`plan` made better within its budget (or `budget`), by choices among `schemes` and `keep`, on recorded `calls`.

    `probes`: sign vectors over the outputs, a backward pass each and a call. `radius`: layers changed at the most in the first round (a
    quarter of them by default). `trust`: as in `Problem`, by default what the probes' own noise allows. Never returns a plan that measures
    worse than the one it was given. Activation parts of schemes are priced as the plan has them: only weights are moved.
    """
    limits = budget or plan.budget
    if limits is None:
        raise QSearchError("a plan is refined within a budget; it has none, give one")
    if not calls or probes < 1:
        raise QSearchError("refining needs at least one recorded call and one probe")
    references = [run(model, call) for call in calls]
    options = [*dict.fromkeys(Scheme.parse(s) for s in schemes if Scheme.parse(s) != KEEP), KEEP]
    weights = calibrated_weights(model, graph, {layer.name: [*options, plan.layers[layer.name]] for layer in graph.quantizable}, calls)
    dice = torch.Generator().manual_seed(seed)
    here, noise = plan, measure_noise(model, graph, plan, calls, references, weights)
    before, history = noise, []
    size = radius or max(1, len(graph.quantizable) // 4)
    for _ in range(rounds):
        linear, curved = price_changes(model, graph, here, options, calls, references, weights, probes, dice)
        problem = _region(graph, here, linear, curved, limits, constraints, latency, trust, size)
        chosen, said = local.solve(problem, seconds=seconds, seed=seed)
        moved = finish(graph, problem, chosen, said, limits, latency)
        changed = sum(moved.layers[n] != s for n, s in here.layers.items())
        if changed == 0 and size == 1:
            break
        predicted = noise + problem.total(chosen)
        measured = noise if changed == 0 else measure_noise(model, graph, moved, calls, references, weights)
        kept = measured < noise
        history.append(Round(changed, predicted, measured, kept))
        if kept:
            here, noise = moved, measured
        else:
            size = max(1, min(size, max(changed, 2)) // 2)
    solver = replace(here.solver, name=f"{plan.solver.name}, refined", status="feasible", gap=None, bound=None, objective=noise)
    return Refined(replace(here, budget=limits, solver=solver), noise, before, tuple(history))


def measure_noise(model: nn.Module, graph: OpGraph, plan: BitPlan, calls: Sequence[Call], references: Sequence[Tensor], weights: QuantizedWeights) -> float:
    """Mean over the calls of the relative noise power of the denoiser's output under a plan."""
    with simulate(model, plan, graph, weights):
        return sum(relative_noise(run(model, call), y)[0] for call, y in zip(calls, references, strict=True)) / len(calls)


def price_changes(
    model: nn.Module,
    graph: OpGraph,
    plan: BitPlan,
    options: Sequence[Scheme],
    calls: Sequence[Call],
    references: Sequence[Tensor],
    weights: QuantizedWeights,
    probes: int,
    dice: torch.Generator,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, NDArray[np.float64]]]]:
    """Of every choice at every layer, from the plan: its linear term, and its scores, one a probe and call, whose mean square is its curvature."""
    names = [layer.name for layer in graph.quantizable]
    mine = {n: [*dict.fromkeys([*options, plan.layers[n]])] for n in names}
    linear = {n: {str(s): 0.0 for s in mine[n]} for n in names}
    rows: dict[str, dict[str, list[float]]] = {n: {str(s): [] for s in mine[n]} for n in names}
    for name in names:  # before any weight is exchanged: what is quantized are the model's own
        for scheme in mine[name]:
            if scheme.format != "keep":
                weights.get(name, scheme.weight_only)
    parameters = {n: weight_of(model, n) for n in names}
    full = {n: p.data for n, p in parameters.items()}
    asked = [p.requires_grad for p in parameters.values()]
    with simulate(model, plan, graph, weights), torch.enable_grad():
        for p in parameters.values():
            p.requires_grad_(True)
        try:
            for call, reference in zip(calls, references, strict=True):
                output = forward(model, call)
                power = float(reference.square().sum())
                # The error's gradient, exact at the plan, and then the probes': all through one graph.
                seeds = [2 * (output.detach() - reference) / power / len(calls)]
                seeds += [(torch.randint(0, 2, output.shape, generator=dice) * 2.0 - 1.0).to(output) / math.sqrt(power) for _ in range(probes)]
                for i, v in enumerate(seeds):
                    gradients = torch.autograd.grad(output, list(parameters.values()), v.to(output), retain_graph=i < probes, allow_unused=True)
                    for name, gradient in zip(names, gradients, strict=True):
                        for scheme in mine[name]:
                            moved = 0.0 if gradient is None else _along(gradient, full[name], plan.layers[name], scheme, name, weights)
                            if i == 0:
                                linear[name][str(scheme)] += moved
                            else:
                                rows[name][str(scheme)].append(moved)
        finally:
            for p, was in zip(parameters.values(), asked, strict=True):
                p.requires_grad_(was)
    return linear, {n: {s: np.array(x) for s, x in found.items()} for n, found in rows.items()}


def _along(gradient: Tensor, full: Tensor, now: Scheme, then: Scheme, name: str, weights: QuantizedWeights) -> float:
    """Inner product of a gradient with the step from one scheme's weight to another's."""
    if now == then:
        return 0.0
    old, new = (full if s.format == "keep" else weights.get(name, s.weight_only) for s in (now, then))
    return float((gradient * (new - old)).sum())


def _region(
    graph: OpGraph,
    plan: BitPlan,
    linear: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]],
    budget: Budget,
    constraints: Constraints | None,
    latency: Latency | None,
    trust: float | None,
    radius: int,
) -> Problem:
    """The quadratic problem around a plan: change at most `radius` layers, each priced by its linear term and its curvature."""
    values = {n: {s: row[s] + float((scores[n][s] ** 2).mean()) for s in row} for n, row in linear.items()}
    changed = {n: {s: float(s != str(plan.layers[n])) for s in row} for n, row in linear.items()}
    return make_problem(
        graph, values, budget, constraints=constraints, latency=latency, scores=scores, trust=trust, at_most={_CHANGED: (changed, float(radius))}
    )
