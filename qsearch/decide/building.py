"""make_problem(graph, values, budget): a problem from a graph, what its choices are worth, a budget
and constraints.

Layers that are tied become one site; layers that can't be quantized are paid for first; attentions
that `values` names are sites beside them (`attentions.py`). A choice of a site is a scheme for
each range of sampler steps (one, where there is one range). Of the many combinations only those are
kept that no other one beats in loss and in every cost at once. What no choice can reach is refused
here, with the best that can be reached, limit by limit; limits that only together can't be kept are
found by the solver (`diagnosis.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.cost import Budget, can_have, input_bits, operations, over_steps, select, stored_bits
from ..core.errors import InfeasibleBudget, QSearchError, nearest
from ..core.graph import LayerSpec, OpGraph
from ..core.interactions import Scores, shrinkage_weight
from ..core.latency import Latency
from ..core.plan import ONE_RANGE
from ..core.scheme import KEEP, Scheme
from ..core.steps import StepRanges
from .attentions import attention_rest, attention_sites, undominated
from .constraints import Constraints
from .objectives import Values
from .problem import Choice, Problem, label, schemes_of
from .ranges import Ranges
from .request import AllocationRequest, requested

CostOf = Callable[[LayerSpec, Choice], float]


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
    """Problem over the quantizable layers, and over the attentions that `values` names.

    Args:
        graph: the model's graph.
        values: layer -> scheme -> loss, over all steps.
        budget: limits.
        request: constraints and latency table; `schemes`, choices of those in `values` besides
            `keep`; `scores`, the model of interactions in each range of steps, and how much of it
            counts, by default what its own noise allows (`interactions.shrinkage_weight`).
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
    spelt = ranges.options is not None
    wide = len(ranges.steps) > 1 and not spelt
    if wide and (constraints.formats is not None or at_most):
        raise QSearchError(
            "a plan over ranges of steps takes no limit on formats and none on losses; leave them "
            "out"
        )
    if scores is not None and len(scores) != (len(ranges.steps) if wide else 1):
        raise QSearchError(
            f"interactions are given for each of {len(ranges.steps)} ranges of steps; given "
            f"{len(scores)}"
        )
    offers = _spelt(ranges.options) if ranges.options else _offered(graph, values, schemes)
    choices = constraints.choices(graph, offers)
    groups = constraints.groups(graph, choices)
    sites = [names[0] for names in groups]
    singles = [
        tuple(s for s in choices[names[0]] if all(s in choices[n] for n in names))
        for names in groups
    ]
    options = [
        _common(ranges, single, names, _active(graph, names, ranges.steps))
        for single, names in zip(singles, groups, strict=True)
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
    limits = limits_of(budget, ranges.steps)
    for metric, (losses, limit) in (at_most or {}).items():
        costs[f"loss of {metric}"] = [
            _sum(losses, names, offered, metric)
            for names, offered in zip(groups, options, strict=True)
        ]
        spent[f"loss of {metric}"], limits[f"loss of {metric}"] = 0.0, limit
    worth = [
        _sum(values, names, offered, "values") if spelt else _losses(values, ranges, names, offered)
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
            limited = _sum(losses, [x.spec.site], x.choices, name) if losses else none
            rows.append(x.costs.get(name, limited))
    for one in attentions:
        sites.append(one.spec.site)
        groups.append((one.spec.site,))
        options.append(list(one.choices))
        worth.append(one.values)
    for name, rows in costs.items():
        raise_infeasible(name, limits[name], spent[name] + float(sum(row.min() for row in rows)))
    made = None if scores is None else _scores(scores, groups, options)
    if made is not None and wide:  # the own error of a choice over the ranges, exactly
        worth = [(made[:, i, : len(c)] ** 2).mean(0) for i, c in enumerate(options)]
    return Problem(
        sites=tuple(sites),
        choices=tuple(map(tuple, options)),
        values=tuple(worth),
        costs={name: tuple(rows) for name, rows in costs.items()},
        limits={name: limits[name] - spent[name] for name in costs},
        formats=constraints.formats,
        scores=made,
        trust=1.0 if made is None else shrinkage_weight(made) if trust is None else trust,
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
    """Raise what `make_problem` would, where it can be known before anything is measured:
    contradictions, and limits that can't be reached.
    """
    options = {str(s): 0.0 for s in [*map(Scheme.parse, schemes), KEEP]}
    unknown = ("latency", "attention_share", "total_bit_operations")
    known = {k: v for k, v in budget.content().items() if k not in unknown}
    if known:  # times need a table that may not be there yet, and attentions their choices
        make_problem(
            graph,
            {
                x.name: {s: v for s, v in options.items() if can_have(x, Scheme.parse(s))}
                for x in graph.quantizable
            },
            Budget(**known),
            constraints=constraints,
        )


def limits_of(budget: Budget, steps: StepRanges = ONE_RANGE) -> dict[str, float]:
    """Every limit by name, those of groups as `average_bits of 'pattern'`; whole bytes, since half
    of one can't be stored.

    `activation_bytes` is the largest of all ranges of steps, and so a limit in each of them.
    """
    flat = {part: x for name, x in budget.limits.items() for part in _parts(name, steps)} | {
        f"{part} of {pattern!r}": x
        for pattern, limits in budget.groups.items()
        for name, x in limits.items()
        for part in _parts(name, steps)
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
        for i, part in enumerate(_parts(name, steps)):
            out[part] = _cost_of(name, tuple(graph), steps, latency, i)
    for pattern, limits in budget.groups.items():
        held = select(graph, pattern)
        for name in limits:
            for i, part in enumerate(_parts(name, steps)):
                out[f"{part} of {pattern!r}"] = _cost_of(name, held, steps, latency, i)
    return out


def _parts(name: str, steps: StepRanges) -> list[str]:
    """The limits that one of a budget is: of what the largest range counts, one for each range of
    steps.
    """
    if name != "activation_bytes" or len(steps) == 1:
        return [name]
    return [f"{name} in range {i}" for i in range(len(steps))]


def _cost_of(
    name: str,
    held: Sequence[LayerSpec],
    steps: StepRanges,
    latency: Latency | None,
    place: int,
) -> CostOf:
    """What one layer adds to a limit; `place`: the range of steps, of a limit on each."""
    names = {layer.name for layer in held}
    weights = sum(layer.weights for layer in held)

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
        return input_bits(layer, schemes[place if len(schemes) > 1 else 0]) / 8

    return price


def _spelt(options: Mapping[str, Sequence[Choice]]) -> dict[str, tuple[Scheme, ...]]:
    """Layer -> the schemes in the choices that are spelt out for it."""
    return {
        name: tuple(dict.fromkeys(s for choice in held for s in schemes_of(choice)))
        for name, held in options.items()
    }


def _common(
    ranges: Ranges, schemes: Sequence[Scheme], names: Sequence[str], active: Sequence[int]
) -> list[Choice]:
    """Choices over the ranges that all layers of a group have."""
    first = ranges.choices(schemes, names[0], active)
    if ranges.options is None:
        return first
    others = [set(ranges.choices(schemes, name)) for name in names[1:]]
    return [choice for choice in first if all(choice in held for held in others)]


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
                f"the table has no values for {layer.name}; profile it, or keep it by "
                "making it not quantizable"
            )
        found = tuple(
            s for s in map(Scheme.parse, values[layer.name]) if allowed is None or s in allowed
        )
        if not found:
            raise QSearchError(
                "the table has none of the schemes that are asked for at "
                f"{layer.name}{nearest('', values[layer.name])}"
            )
        out[layer.name] = found
    return out


def _sum(
    values: Values, names: Sequence[str], offered: Sequence[Choice], what: str
) -> NDArray[np.float64]:
    for name in names:
        for choice in offered:
            if label(choice) not in values.get(name, {}):
                raise QSearchError(
                    f"the {what} have no number for {label(choice)} at {name}; measure "
                    "it, or leave the scheme out"
                )
    return np.array([math.fsum(values[n][label(c)] for n in names) for c in offered], float)


def _scores(
    scores: Sequence[Scores], groups: Sequence[Sequence[str]], options: Sequence[Sequence[Choice]]
) -> NDArray[np.float64]:
    """[probes, sites, choices]: what each choice adds to each probe, over all ranges of steps."""
    count = len(next(iter(next(iter(scores[0].values())).values())))
    made = np.zeros((count, len(groups), max(map(len, options))))
    for i, (names, offered) in enumerate(zip(groups, options, strict=True)):
        for j, choice in enumerate(offered):
            for r, own in enumerate(scores):
                apart = len(scores) > 1 and not isinstance(choice, Scheme)
                scheme = label(choice[r] if apart else choice)  # type: ignore[index]
                if scheme == str(KEEP) and not any(scheme in own.get(name, {}) for name in names):
                    continue  # from full precision, keeping a layer moves nothing
                for name in names:
                    if scheme not in own.get(name, {}):
                        raise QSearchError(
                            f"the probes have no scores for {scheme} at {name}; "
                            "profile it with the probe estimator"
                        )
                    made[:, i, j] += own[name][scheme]
    return made


def raise_infeasible(name: str, limit: float, best: float) -> None:
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


def _active(graph: OpGraph, names: Sequence[str], steps: StepRanges) -> tuple[int, ...]:
    """The ranges in which layers that share a scheme run; none where these differ, so that they get
    one for all.
    """
    first, *others = {graph.active(name, steps) for name in names}
    return () if others else first


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
