"""refine(model, graph, plan, ...) -> Refined: stand on a plan, price every change of it, change a
few layers, measure, and keep what is better.

A table prices choices from full precision, where first order is all there is to the squared error.
From a plan the picture is better: the error E = |f(plan) - f|^2 / |f|^2 has an exact gradient there
(its linear term), and probes at the plan give its curvature (Gauss-Newton):

    E(plan + d) ~ E(plan) + <dE/dW, d> + E_v[ <d(v.f)/dW, d>^2 ] / |f|^2

The quadratic problem is solved for at most `radius` changed layers, and what it proposes is
measured. Where the error falls by more than its own standard error over the calls (else a plan
would be fitted to a few captions), the plan is changed, the radius doubles, and everything is
priced anew; otherwise what the proposal cost beyond its prediction is put on the choices in it, and
a region of half the size is tried: measuring takes a fraction of what pricing takes. Of a plan over
ranges of steps a gradient is that of the range that its call lies in: a weight that all ranges
share answers to all calls, one that a range has for itself to its own. That is a trust-region
method (Conn, Gould and Toint 2000), with the number of changed layers as the region's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.cost import Budget
from ..core.errors import QSearchError
from ..core.graph import OpGraph
from ..core.latency import Latency
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..measure.noise import relative_noise
from ..measure.pipelines import Call, forward, run
from ..measure.quantized_weights import QuantizedWeights, fits, weight_of, weights_for
from ..measure.simulation import simulate
from ..measure.streaming import in_memory
from .allocation import finish
from .attentions import LIMITS as ATTENTION_LIMITS
from .building import make_problem
from .constraints import Constraints
from .neighbourhood import around, choice_of, plans_around
from .problem import Choice, Problem, label, schemes_of
from .ranges import Ranges
from .request import AllocationRequest
from .solvers import local

#: layer -> choice -> linear term, and -> one score a probe and call
Priced = tuple[Mapping[str, Mapping[str, float]], Mapping[str, Mapping[str, NDArray[np.float64]]]]
_CHANGED = "changed layers"
_TRIES = 8  # proposals that are measured for each pricing


@dataclass(frozen=True)
class Round:
    """One proposal: layers that it changed, the error that the model predicted and the one that was
    measured, and whether it was kept.
    """

    changed: int
    predicted: float
    measured: float
    kept: bool


@dataclass(frozen=True)
class Refined:
    """The plan after all rounds, its measured relative noise power, that of the plan before, and
    every proposal on the way.
    """

    plan: Plan
    noise: float
    before: float
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class RefineOptions:
    """How a plan is refined.

    `budget`: the plan's own when left out. `weights`: what `calibrated_weights` made for the
    schemes (`weights_for`, where ranges of steps are fitted apart), those of evaluation and of the
    packed model; by default they are calibrated on the calls themselves. `share`: what the ranges
    of steps have in common, as in `decide.ranges.SHARES`. `rounds`: times that all changes are
    priced. `probes`: sign vectors over the outputs, a backward pass each and a call. `radius`:
    layers changed at the most in the first round (a quarter of them by default). `trust`: as in
    `Problem`, by default what the probes' own noise allows. `seconds`: guard on the time of one
    proposal.
    """

    budget: Budget | None = None
    constraints: Constraints | None = None
    latency: Latency | None = None
    weights: QuantizedWeights | None = None
    share: str = "weights"
    rounds: int = 6
    probes: int = 6
    radius: int | None = None
    trust: float | None = None
    seconds: float = 20.0
    seed: int = 0


def refine(
    model: nn.Module,
    graph: OpGraph,
    plan: Plan,
    schemes: Sequence[Scheme | str],
    calls: Sequence[Call],
    options: RefineOptions | None = None,
    **named: Any,
) -> Refined:
    """`plan` made better within its budget, by choices among `schemes` and `keep`.

    Activation parts of schemes are priced as the plan has them: only weights are moved. Of a plan
    over ranges of steps each range keeps its inputs, and the weight is moved in all of them
    together, or in each by itself where they share nothing.

    Args:
        model: the denoiser.
        graph: its graph.
        plan: where to start.
        schemes: choices.
        calls: recorded calls, on which it is priced and measured.
        options: budget, constraints, weights, rounds and the like.
        named: fields of the options by their names, e.g. `rounds=2`.

    Returns:
        The plan, never one that measures worse than the one it was given, and all proposals.

    Raises:
        QSearchError: without a budget, calls or probes; a range of steps in which no call lies.
    """
    asked = replace(options or RefineOptions(), **named)
    weights, probes, radius, seconds = asked.weights, asked.probes, asked.radius, asked.seconds
    rules = AllocationRequest(
        constraints=asked.constraints, latency=asked.latency, trust=asked.trust
    )
    rounds, seed, latency = asked.rounds, asked.seed, asked.latency
    limits = asked.budget or plan.budget
    in_memory(model, "refinement")
    if limits is None:
        raise QSearchError("a plan is refined within a budget; it has none, give one")
    if not calls or probes < 1:
        raise QSearchError("refining needs at least one recorded call and one probe")
    recorded = {plan.steps.of(call.step, call.steps) for call in calls}
    if silent := [i for i in range(len(plan.steps)) if i not in recorded]:
        raise QSearchError(
            f"{len(plan.steps)} ranges of steps need a recorded call each to be refined "
            f"on; range {silent[0]} has none: "
            "record more bins (profile.bins)"
        )
    if stateful := [f"{n}: {c[0]}" for n, c in plan.sites.items() if any(s.carried for s in c)]:
        raise QSearchError(
            "refinement measures recorded calls one by one, and an attention that "
            "carries statistics from step to step has "
            f"none there ({stateful[0]}): allocate without refine"
        )
    room = _of_layers(graph, plan, limits, latency)
    references = [run(model, call) for call in calls]
    offered = [*dict.fromkeys(Scheme.parse(s) for s in schemes if Scheme.parse(s) != KEEP), KEEP]
    if weights is None:
        weights = weights_for(model, graph, plans_around(graph, plan, offered, asked.share), calls)
    dice = torch.Generator().manual_seed(seed)
    here, found = plan, _noises(model, graph, plan, calls, references, weights)
    before = noise = float(found.mean())
    history = []
    widest = size = radius or max(2, len(graph.quantizable) // 4)
    for _ in range(rounds):
        near = around(graph, here, offered, asked.share)
        linear, curved = price_changes(
            model, graph, here, near, calls, references, weights, probes, dice
        )
        for _ in range(_TRIES):
            problem = _region(graph, here, near, (linear, curved), room, rules, size)
            chosen, said = local.solve(problem, seconds=seconds, seed=seed)
            found_plan = finish(graph, problem, chosen, said, room, latency)
            moved = found_plan.replaced(graph, here.sites, latency=latency, steps=plan.steps)
            moved = replace(moved, budget=limits, steps=plan.steps)
            changes = [
                (n, label(choice_of(moved, n))) for n in near if moved.choices[n] != here.choices[n]
            ]
            if not changes:
                break
            predicted = noise + problem.total(chosen)
            there = _noises(model, graph, moved, calls, references, weights)
            measured, gain = float(there.mean()), found - there
            kept = gain.mean() > (gain.std(ddof=1) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0)
            history.append(Round(len(changes), predicted, measured, bool(kept)))
            if kept:
                here, found, noise, size = moved, there, measured, min(2 * size, widest)
                break
            for name, scheme in changes:
                linear[name][scheme] += (measured - predicted) / len(changes)
            size = min(
                widest, max(2, len(changes) // 2)
            )  # a budget that is full leaves room for exchanges of two alone
    solver = replace(
        here.solver,
        name=f"{plan.solver.name}, refined",
        status="feasible",
        gap=None,
        bound=None,
        objective=noise,
    )
    made = replace(here.replaced(graph, {}, latency=latency), budget=limits, solver=solver)
    return Refined(made, noise, before, tuple(history))


def _of_layers(graph: OpGraph, plan: Plan, limits: Budget, latency: Latency | None) -> Budget:
    """What the budget leaves to layers where attentions stay as the plan has them: counted dense,
    they take more.
    """
    dense = plan.replaced(graph, dict.fromkeys(plan.sites, KEEP), latency=latency).achieved
    now = plan.replaced(graph, {}, latency=latency).achieved
    more = {
        name: limit + getattr(dense, name) - getattr(now, name)
        for name, limit in limits.limits.items()
        if name in ATTENTION_LIMITS
    }
    return replace(limits, **more)


def measure_noise(
    model: nn.Module,
    graph: OpGraph,
    plan: Plan,
    calls: Sequence[Call],
    references: Sequence[Tensor],
    weights: QuantizedWeights,
) -> float:
    """Mean over the calls of the relative noise power of the denoiser's output under a plan."""
    return float(_noises(model, graph, plan, calls, references, weights).mean())


def _noises(
    model: nn.Module,
    graph: OpGraph,
    plan: Plan,
    calls: Sequence[Call],
    references: Sequence[Tensor],
    weights: QuantizedWeights,
) -> NDArray[np.float64]:
    with simulate(model, plan, graph, weights):
        return np.array(
            [
                relative_noise(run(model, call), y)[0]
                for call, y in zip(calls, references, strict=True)
            ]
        )


def price_changes(
    model: nn.Module,
    graph: OpGraph,
    plan: Plan,
    options: Mapping[str, Sequence[Choice]],
    calls: Sequence[Call],
    references: Sequence[Tensor],
    weights: QuantizedWeights,
    probes: int,
    dice: torch.Generator,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, NDArray[np.float64]]]]:
    """Of every choice at every layer, from the plan: its linear term, and its scores, one a probe
    and call, whose mean square is its curvature.

    `options`: layer -> its choices, the plan's own among them (`neighbourhood.around`).
    """
    names = list(options)
    parameters = {n: weight_of(model, n) for n in names}
    # Before any weight is exchanged: what is quantized are the model's own.
    steps = {
        n: _differences(weights, n, choice_of(plan, n), options[n], len(plan.steps)) for n in names
    }
    linear = {n: torch.zeros(len(options[n])) for n in names}
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    asked = [p.requires_grad for p in parameters.values()]
    with simulate(model, plan, graph, weights), torch.enable_grad():
        for p in parameters.values():
            p.requires_grad_(True)
        try:
            for call, reference in zip(calls, references, strict=True):
                output, place = forward(model, call), plan.steps.of(call.step, call.steps)
                power = float(reference.square().sum())
                # The error's gradient, exact at the plan, and then the probes: all through one
                # graph.
                seeds = [2 * (output.detach() - reference) / power / len(calls)]
                seeds += [
                    (torch.randint(0, 2, output.shape, generator=dice) * 2.0 - 1.0).to(output)
                    / math.sqrt(power)
                    for _ in range(probes)
                ]
                for i, v in enumerate(seeds):
                    gradients = torch.autograd.grad(
                        output,
                        list(parameters.values()),
                        v.to(output),
                        retain_graph=i < probes,
                        allow_unused=True,
                    )
                    for name, gradient in zip(names, gradients, strict=True):
                        moved = (
                            torch.zeros(len(options[name]))
                            if gradient is None
                            else (steps[name][place] @ gradient.flatten()).float().cpu()
                        )
                        if i == 0:
                            linear[name] += moved
                        else:
                            rows[name].append(moved)
        finally:
            for p, was in zip(parameters.values(), asked, strict=True):
                p.requires_grad_(was)
    scores = {n: torch.stack(found, 1).double().numpy() for n, found in rows.items()}
    named = {n: list(map(label, held)) for n, held in options.items()}
    return {n: dict(zip(named[n], linear[n].tolist(), strict=True)) for n in names}, {
        n: dict(zip(named[n], scores[n], strict=True)) for n in names
    }


def _differences(
    weights: QuantizedWeights, layer: str, now: Choice, options: Sequence[Choice], ranges: int
) -> list[Tensor]:
    """For each range of steps, [choices, weights]: what each choice's weight is less the plan's."""
    made: dict[tuple[Any, ...], Tensor] = {}
    out = []
    for i in range(ranges):
        own = [_stored(choice, i) for choice in [now, *options]]
        key = tuple(own)
        if key not in made:
            here, *others = (weights.get(layer, scheme, place) for scheme, place in own)
            made[key] = torch.stack([(other - here).flatten() for other in others])
        out.append(made[key])
    return out


def _stored(choice: Choice, place: int) -> tuple[Scheme, int | None]:
    """The scheme of a choice in a range of steps, and the range that its weight is fitted on."""
    fitted = fits(schemes_of(choice))
    fit = fitted[place if len(fitted) > 1 else 0]
    return fit.scheme, fit.stored


def _region(
    graph: OpGraph,
    plan: Plan,
    options: Mapping[str, Sequence[Choice]],
    priced: Priced,
    budget: Budget,
    request: AllocationRequest,
    radius: int,
) -> Problem:
    """The quadratic problem around a plan: change at most `radius` layers, each priced by its
    linear term and its curvature.
    """
    linear, scores = priced
    values = {
        n: {s: row[s] + float((scores[n][s] ** 2).mean()) for s in row} for n, row in linear.items()
    }
    changed = {
        n: {s: float(s != label(choice_of(plan, n))) for s in row} for n, row in linear.items()
    }
    return make_problem(
        graph,
        values,
        budget,
        replace(request, scores=(scores,)),
        at_most={_CHANGED: (changed, float(radius))},
        ranges=Ranges(plan.steps, options=options),
    )
