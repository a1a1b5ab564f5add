"""make_problem(graph, values, budget): a problem from a graph, what its choices are worth, a budget and constraints.

Layers that are tied become one site; layers that can't be quantized are paid for first; attentions that `values` speak of are sites
beside them (`attentions.py`). A choice of a site is a scheme for each
range of sampler steps (one, where there is one range). Of the many combinations only those are kept that no other one beats in loss
and in every cost at once. What no choice can reach is refused here, with the best that can be reached, limit by limit; limits that
only together can't be kept are found by the solver (`diagnosis.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.cost import Budget, input_bits, operations, over_steps, select, stored_bits
from ..core.errors import InfeasibleBudget, QSearchError, nearest
from ..core.graph import LayerSpec, OpGraph
from ..core.interactions import trust_of
from ..core.latency import Latency
from ..core.scheme import KEEP, Scheme
from ..core.steps import StepRanges
from .attentions import attention_rest, attention_sites, undominated
from .constraints import Constraints
from .objectives import Values
from .problem import Choice, Problem, schemes_of
from .ranges import Ranges
from .request import AllocationRequest, requested

CostOf = Callable[[LayerSpec, Choice], float]
Scores = Mapping[str, Mapping[str, NDArray[np.float64]]]


def make_problem(
    graph: OpGraph,
    values: Values,
    budget: Budget,
    request: AllocationRequest | None = None,
    *,
    at_most: Mapping[str, tuple[Values, float]] | None = None,
    ranges: Ranges | None = None,
    **named: Any,
) -> Problem:
    """Problem over the quantizable layers, and over the attentions that `values` speak of.

    Args:
        graph: the model's graph.
        values: layer -> scheme -> loss, over all steps.
        budget: limits.
        request: constraints and latency table; `schemes`, choices of those in `values` besides
            `keep`; `scores`, the model of interactions (one range of steps), and how much of it
            counts, by default what its own noise allows (`interactions.trust_of`).
        at_most: metric -> (its losses, the largest sum allowed).
        ranges: how choices may differ between ranges of steps, with the losses of each.
        named: fields of the request by their names.

    Returns:
        The problem.

    Raises:
        QSearchError: a layer without values, rules that contradict each other.
        InfeasibleBudget: a limit is below the cheapest choices; with the best that can be reached.
    """
    asked = requested(request, named)
    constraints, latency = asked.constraints or Constraints(), asked.latency
    scores, trust, schemes = asked.scores, asked.trust, asked.schemes
    ranges = ranges or Ranges()
    wide = len(ranges.steps) > 1
    if wide and (constraints.formats is not None or at_most or scores is not None):
        raise QSearchError(
            "a plan over ranges of steps takes no limit on formats, none on losses, and no interactions; leave them out"
        )
    choices = constraints.choices(graph, _offered(graph, values, schemes))
    groups = constraints.groups(graph, choices)
    sites = [names[0] for names in groups]
    singles = [
        tuple(s for s in choices[names[0]] if all(s in choices[n] for n in names))
        for names in groups
    ]
    options = [
        ranges.choices(single, names[0]) for single, names in zip(singles, groups, strict=True)
    ]
    fixed = [layer for layer in graph if not layer.quantizable]
    priced = costs_of(graph, budget, ranges.steps, latency)
    held = [[graph.layer(n) for n in names] for names in groups]
    costs: dict[str, list[NDArray[np.float64]]] = {
        name: [
            np.array([sum(price(x, c) for x in layers) for c in offered], float)
            for layers, offered in zip(held, options, strict=True)
        ]
        for name, price in priced.items()
    }
    spent = {name: sum(price(x, KEEP) for x in fixed) for name, price in priced.items()}
    if latency is not None and "latency" in spent:
        spent["latency"] += latency.rest
    limits = limits_of(budget)
    for metric, (losses, limit) in (at_most or {}).items():
        costs[f"loss of {metric}"] = [
            _sum(losses, names, offered, metric)
            for names, offered in zip(groups, singles, strict=True)
        ]
        spent[f"loss of {metric}"], limits[f"loss of {metric}"] = 0.0, limit
    worth = [
        _losses(values, ranges, names, offered)
        for names, offered in zip(groups, options, strict=True)
    ]
    if wide:
        for i in range(len(groups)):
            kept = undominated(np.column_stack([worth[i], *(rows[i] for rows in costs.values())]))
            options[i], worth[i] = [options[i][k] for k in kept], worth[i][kept]
            for rows in costs.values():
                rows[i] = rows[i][kept]
    attentions = attention_sites(graph, values, schemes, ranges, budget, latency)
    for name, rows in costs.items():
        spent[name] += attention_rest(graph, attentions, name, latency)
        losses, _ = (at_most or {}).get(name.removeprefix("loss of "), ({}, 0.0))
        for x in attentions:
            none = np.zeros(len(x.choices))
            limited = _sum(losses, [x.spec.site], x.choices, name) if losses else none  # type: ignore[arg-type]  # one range
            rows.append(x.costs.get(name, limited))
    for one in attentions:
        sites.append(one.spec.site)
        groups.append((one.spec.site,))
        singles.append(one.choices)  # type: ignore[arg-type]  # one range where they are read
        options.append(list(one.choices))
        worth.append(one.values)
    for name, rows in costs.items():
        refuse(name, limits[name], spent[name] + float(sum(row.min() for row in rows)))
    made = None if scores is None else _scores(scores, groups, singles)
    return Problem(
        sites=tuple(sites),
        choices=tuple(map(tuple, options)),
        values=tuple(worth),
        costs={name: tuple(rows) for name, rows in costs.items()},
        limits={name: limits[name] - spent[name] for name in costs},
        formats=constraints.formats,
        scores=made,
        trust=1.0 if made is None else trust_of(made) if trust is None else trust,
        spent=spent,
        members=dict(zip(sites, groups, strict=True)),
        steps=ranges.steps,
    )


def check_budget(
    graph: OpGraph,
    budget: Budget,
    schemes: Sequence[Scheme | str],
    *,
    constraints: Constraints | None = None,
) -> None:
    """Raise what `make_problem` would, where it can be known before anything is measured: contradictions, and limits that can't be reached."""
    options = {str(s): 0.0 for s in [*map(Scheme.parse, schemes), KEEP]}
    unknown = ("latency", "attention_share", "total_bit_operations")
    known = {k: v for k, v in budget.content().items() if k not in unknown}
    if known:  # times need a table that may not be there yet, and attentions their choices
        make_problem(
            graph,
            {layer.name: options for layer in graph.quantizable},
            Budget(**known),
            constraints=constraints,
        )


def limits_of(budget: Budget) -> dict[str, float]:
    """Every limit by name, those of groups as `average_bits of 'pattern'`; whole bytes, since half of one can't be stored."""
    flat = dict(budget.limits) | {
        f"{name} of {pattern!r}": x
        for pattern, limits in budget.groups.items()
        for name, x in limits.items()
    }
    return {
        name: float(math.floor(x)) if name.startswith(("bytes", "activation_bytes")) else x
        for name, x in flat.items()
    }


def costs_of(
    graph: OpGraph, budget: Budget, steps: StepRanges, latency: Latency | None = None
) -> dict[str, CostOf]:
    """For every limit of `limits_of`, what one layer with one choice adds to it."""
    if budget.latency is not None and latency is None:
        raise QSearchError(
            "a budget in latency needs a latency table; give one of a device or of a file"
        )
    out: dict[str, CostOf] = {}
    for name in budget.limits:
        out[name] = _cost_of(name, tuple(graph), steps, latency)
    for pattern, limits in budget.groups.items():
        held = select(graph, pattern)
        for name in limits:
            out[f"{name} of {pattern!r}"] = _cost_of(name, held, steps, latency)
    return out


def _cost_of(
    name: str, held: Sequence[LayerSpec], steps: StepRanges, latency: Latency | None
) -> CostOf:
    names = {layer.name for layer in held}
    weights = sum(layer.weights for layer in held)
    if name == "activation_bytes" and len(steps) > 1:
        raise QSearchError(
            "a plan over ranges of steps can't be limited in activation_bytes, whose largest range counts; limit "
            "average_bits, bytes, bit_operations or latency"
        )

    def price(layer: LayerSpec, choice: Choice) -> float:
        if layer.name not in names:
            return 0.0
        schemes = schemes_of(choice)
        if name in ("average_bits", "bytes"):
            return stored_bits(layer, schemes) / (weights if name == "average_bits" else 8)
        if name == "attention_share":
            return 0.0
        timed = over_steps(steps, schemes)
        if name == "latency":
            assert latency is not None
            return sum(share * latency.of(layer.name, s) for share, s in timed)
        if name in ("bit_operations", "total_bit_operations"):
            return sum(share * operations(layer, s) for share, s in timed)
        return sum(share * input_bits(layer, s) for share, s in timed) / 8

    return price


def _offered(
    graph: OpGraph, values: Values, schemes: Sequence[Scheme | str] | None
) -> dict[str, tuple[Scheme, ...]]:
    allowed = None if schemes is None else {Scheme.parse(s) for s in schemes} | {KEEP}
    known = {s for row in values.values() for s in row}
    for name in sorted(str(s) for s in allowed or ()):
        if name not in known and name != str(KEEP):
            raise QSearchError(f"the table has no scheme {name}{nearest(name, known)}")
    out = {}
    for layer in graph.quantizable:
        if layer.name not in values:
            raise QSearchError(
                f"the table has no values for {layer.name}; profile it, or keep it by making it not quantizable"
            )
        found = tuple(
            s for s in map(Scheme.parse, values[layer.name]) if allowed is None or s in allowed
        )
        if not found:
            raise QSearchError(
                f"the table has none of the schemes that are asked for at {layer.name}{nearest('', values[layer.name])}"
            )
        out[layer.name] = found
    return out


def _sum(
    values: Values, names: Sequence[str], offered: Sequence[Scheme], what: str
) -> NDArray[np.float64]:
    for name in names:
        for scheme in offered:
            if str(scheme) not in values.get(name, {}):
                raise QSearchError(
                    f"the {what} have no number for {scheme} at {name}; measure it, or leave the scheme out"
                )
    return np.array([math.fsum(values[n][str(s)] for n in names) for s in offered], float)


def _scores(
    scores: Scores, groups: Sequence[Sequence[str]], options: Sequence[Sequence[Scheme]]
) -> NDArray[np.float64]:
    count = len(next(iter(next(iter(scores.values())).values())))
    made = np.zeros((count, len(groups), max(map(len, options))))
    for i, (names, offered) in enumerate(zip(groups, options, strict=True)):
        for j, scheme in enumerate(offered):
            if scheme == KEEP and all(str(KEEP) not in scores.get(name, {}) for name in names):
                continue  # from full precision, keeping a layer moves nothing
            for name in names:
                if str(scheme) not in scores.get(name, {}):
                    raise QSearchError(
                        f"the probes have no scores for {scheme} at {name}; profile it with the probe estimator"
                    )
                made[:, i, j] += scores[name][str(scheme)]
    return made


def refuse(name: str, limit: float, best: float) -> None:
    """Raise `InfeasibleBudget` where the least that can be reached is above a limit."""
    if best > limit + 1e-12 * (
        abs(limit) + abs(best)
    ):  # rounding of the sum, as `Budget.excess` allows
        # Rounded up: who asks for the number that is printed gets it.
        whole = name.startswith(("bytes", "activation_bytes", "bit_operations"))
        shown = (
            f"{math.ceil(best)}"
            if whole
            else f"{math.ceil(best * 1e4) / 1e4:.4f}"
            if "bits" in name
            else f"{best * (1 + 1e-6):.6g}"
        )
        raise InfeasibleBudget(
            f"no plan reaches {name} {limit:g}; the least with these choices is {shown}"
        )


def _losses(
    values: Values, ranges: Ranges, names: Sequence[str], offered: Sequence[Choice]
) -> NDArray[np.float64]:
    """What each choice of a group of layers loses."""
    single = [c for c in offered if isinstance(c, Scheme)]
    alone = _sum(values, names, single, "values")
    wide = [
        sum(ranges.loss(name, choice) for name in names)
        for choice in offered
        if not isinstance(choice, Scheme)
    ]
    return np.concatenate([alone, np.array(wide, float)])
