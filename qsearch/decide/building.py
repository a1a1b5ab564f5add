"""make_problem(graph, values, budget): a problem from a graph, what its choices are worth, a budget and constraints.

Layers that are tied become one site; layers that can't be quantized are paid for first. What no choice can reach is refused here, with
the best that can be reached, limit by limit; limits that only together can't be kept are found by the solver (`diagnosis.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InfeasibleBudget, QSearchError, nearest
from ..core.graph import LayerSpec, OpGraph
from ..core.interactions import trust_of
from ..core.latency import Latency
from ..core.plan import Budget, parts, select
from ..core.scheme import KEEP, Scheme
from .constraints import Constraints
from .objectives import Values
from .problem import Problem

Bill = Callable[[LayerSpec, Scheme], float]
Scores = Mapping[str, Mapping[str, NDArray[np.float64]]]


def make_problem(
    graph: OpGraph,
    values: Values,
    budget: Budget,
    *,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    at_most: Mapping[str, tuple[Values, float]] | None = None,
    schemes: Sequence[Scheme | str] | None = None,
    scores: Scores | None = None,
    trust: float | None = None,
) -> Problem:
    """Problem over the quantizable layers with the schemes in `values` (layer -> scheme -> loss), or with those of them in `schemes` and `keep`.

    `at_most`: metric -> (its losses, the largest sum allowed). `scores`: layer -> scheme -> one number a probe, the model of interactions;
    `trust`: how much of it counts, by default what its own noise allows (`interactions.trust_of`). Raises `QSearchError` for a layer without
    values, `InfeasibleBudget`, with the best reachable, for a limit below the cheapest choices.
    """
    constraints = constraints or Constraints()
    choices = constraints.choices(graph, _offered(graph, values, schemes))
    groups = constraints.groups(graph, choices)
    sites = tuple(names[0] for names in groups)
    options = [
        tuple(s for s in choices[names[0]] if all(s in choices[n] for n in names))
        for names in groups
    ]
    fixed = [layer for layer in graph if not layer.quantizable]
    priced = bills(graph, budget, latency)
    costs: dict[str, list[NDArray[np.float64]]] = {name: [] for name in priced}
    held = [[graph.layer(n) for n in names] for names in groups]
    for name, bill in priced.items():
        costs[name] = [
            np.array([sum(bill(x, s) for x in layers) for s in offered], float)
            for layers, offered in zip(held, options, strict=True)
        ]
    spent = {name: sum(bill(x, KEEP) for x in fixed) for name, bill in priced.items()}
    if latency is not None and "latency" in spent:
        spent["latency"] += latency.rest
    limits = limits_of(budget)
    for metric, (losses, limit) in (at_most or {}).items():
        costs[f"loss of {metric}"] = [
            _sum(losses, names, offered, metric)
            for names, offered in zip(groups, options, strict=True)
        ]
        spent[f"loss of {metric}"], limits[f"loss of {metric}"] = 0.0, limit
    for name, rows in costs.items():
        refuse(name, limits[name], spent[name] + float(sum(row.min() for row in rows)))
    made = None if scores is None else _scores(scores, groups, options)
    return Problem(
        sites=sites,
        choices=tuple(options),
        values=tuple(
            _sum(values, names, offered, "values")
            for names, offered in zip(groups, options, strict=True)
        ),
        costs={name: tuple(rows) for name, rows in costs.items()},
        limits={name: limits[name] - spent[name] for name in costs},
        formats=constraints.formats,
        scores=made,
        trust=1.0 if made is None else trust_of(made) if trust is None else trust,
        spent=spent,
        members=dict(zip(sites, groups, strict=True)),
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
    known = (
        Budget(**{k: v for k, v in budget.content().items() if k != "latency"})
        if budget.latency is not None and len(budget.content()) > 1
        else budget
    )
    if known.latency is None:  # times need a table that may not be there yet
        make_problem(
            graph,
            {layer.name: options for layer in graph.quantizable},
            known,
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


def bills(graph: OpGraph, budget: Budget, latency: Latency | None = None) -> dict[str, Bill]:
    """For every limit of `limits_of`, what one layer with one scheme adds to it."""
    if budget.latency is not None and latency is None:
        raise QSearchError(
            "a budget in latency needs a latency table; give one of a device or of a file"
        )
    out: dict[str, Bill] = {}
    for name in budget.limits:
        out[name] = (
            latency_bill(latency)
            if name == "latency" and latency is not None
            else _bill(name, tuple(graph))
        )
    for pattern, limits in budget.groups.items():
        held = select(graph, pattern)
        for name in limits:
            out[f"{name} of {pattern!r}"] = _bill(name, held)
    return out


def latency_bill(latency: Latency) -> Bill:
    """Seconds of one layer."""
    return lambda layer, scheme: latency.of(layer.name, scheme)


def _bill(name: str, held: Sequence[LayerSpec]) -> Bill:
    names = {layer.name for layer in held}
    weights = sum(layer.weights for layer in held)
    place, unit = {
        "average_bits": (0, weights),
        "bytes": (0, 8),
        "bit_operations": (1, 1),
        "activation_bytes": (2, 8),
    }[name]
    return lambda layer, scheme: parts(layer, scheme)[place] / unit if layer.name in names else 0.0


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
