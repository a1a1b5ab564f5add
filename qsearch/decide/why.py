"""why(...): the choices of one layer with value, cost and price; what a little more or less budget
changes, and what the next-best choice costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..core import plugins
from ..core.errors import InfeasibleBudget, QSearchError, nearest
from ..core.plan import Plan
from ..core.scheme import KEEP
from ..core.sites import is_site
from .heuristics import shadow
from .problem import Choice, Problem
from .relaxation import relax

STEP = 0.1  # stored bits a weight that are given or taken


@dataclass(frozen=True)
class Option:
    """One choice of a layer. `value`: its own loss; `costs`: what it takes of each limit; `priced`:
    value + shadow prices x costs, less the least of the layer; `plan`: total loss of the best plan
    with this choice, inf where there is none.
    """

    choice: str
    value: float
    costs: dict[str, float]
    priced: float
    plan: float
    chosen: bool


@dataclass(frozen=True)
class Why:
    """Why a layer got its choice. `prices`: limit -> what one unit more of it takes off the total;
    `with_less`, `with_more`: (the layer's choice, total loss) at `STEP` bits less and more, None
    where there is no plan, or no limit in average bits; `tied`: layers that share the choice.
    """

    layer: str
    tied: tuple[str, ...]
    total: float
    prices: dict[str, float]
    options: tuple[Option, ...]
    with_less: tuple[str, float] | None
    with_more: tuple[str, float] | None

    @property
    def next_best(self) -> Option | None:
        """The other choice with which the best plan loses least."""
        others = [o for o in self.options if not o.chosen and math.isfinite(o.plan)]
        return min(others, key=lambda o: o.plan, default=None)


def why(
    problem: Problem, plan: Plan, layer: str, *, solver: str = "ilp", seconds: float = 10.0
) -> Why:
    """Ask `problem`, from which `plan` came, about one layer. The plan may be another one: what is
    shown as chosen is the plan's choice.

    Prices are those of the linear relaxation; what another choice or budget would change is solved
    anew. Raises `QSearchError` with the nearest name for a layer that is no choice of the problem.
    """
    held: dict[str, Choice] = dict.fromkeys((n for n in problem.sites if is_site(n)), KEEP)
    held |= {n: c if len(c) > 1 else c[0] for n, c in plan.choices.items()}
    home = {name: site for site in problem.sites for name in problem.members.get(site, (site,))}
    if layer not in home:
        raise QSearchError(f"{layer!r} is no layer that a plan chooses for{nearest(layer, home)}")
    i = problem.sites.index(home[layer])
    relaxed = relax(replace(problem, scores=None))
    prices = dict.fromkeys(problem.limits, 0.0) if relaxed is None else shadow(problem, relaxed)
    own = {name: rows[i] for name, rows in problem.costs.items()}
    priced = problem.values[i] + sum(
        (prices[name] * row for name, row in own.items()), np.zeros(len(problem.values[i]))
    )
    options = []
    for k, choice in enumerate(problem.choices[i]):
        kept = [np.arange(len(c)) for c in problem.choices]
        kept[i] = np.array([k], np.int64)
        answer = _solve(replace(problem.cut(kept), formats=problem.formats), solver, seconds)
        chosen = choice == held.get(layer)
        found = math.inf if answer is None else problem.total(answer)
        costs = {name: float(row[k]) for name, row in own.items()}
        options.append(
            Option(
                text(choice),
                float(problem.values[i][k]),
                costs,
                float(priced[k] - priced.min()),
                found,
                chosen,
            )
        )
    total = (
        problem.total({s: held[s] for s in problem.sites}) if _holds(problem, held) else math.nan
    )
    less, more = (_at(problem, home[layer], by, solver, seconds) for by in (-STEP, STEP))
    tied = tuple(n for n in problem.members.get(home[layer], ()) if n != layer)
    return Why(
        layer,
        tied,
        total,
        prices,
        tuple(sorted(options, key=lambda o: (next(iter(o.costs.values()), 0.0), o.choice))),
        less,
        more,
    )


def text(choice: Choice) -> str:
    """A choice in words: a scheme, or one for each range of steps."""
    return " | ".join(str(s) for s in choice) if isinstance(choice, tuple) else str(choice)


def _holds(problem: Problem, held: Mapping[str, Choice]) -> bool:
    return all(
        held.get(site) in options
        for site, options in zip(problem.sites, problem.choices, strict=True)
    )


def _at(
    problem: Problem, site: str, by: float, solver: str, seconds: float
) -> tuple[str, float] | None:
    if "average_bits" not in problem.limits:
        return None
    answer = _solve(
        replace(
            problem, limits={**problem.limits, "average_bits": problem.limits["average_bits"] + by}
        ),
        solver,
        seconds,
    )
    return None if answer is None else (text(answer[site]), problem.total(answer))


def _solve(problem: Problem, solver: str, seconds: float) -> Mapping[str, Choice] | None:
    try:
        chosen: Mapping[str, Choice] = plugins.load("solvers", solver).solve(
            problem, seconds=seconds
        )[0]
    except InfeasibleBudget:
        return None
    return chosen
