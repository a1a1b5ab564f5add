"""The choices that a plan is given, parsed and checked against graph and ranges of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cost import Choices
from .errors import QSearchError
from .graph import OpGraph
from .scheme import Scheme
from .sites import check_site
from .steps import StepRanges


def checked(
    graph: OpGraph,
    choices: Mapping[str, Scheme | str | Sequence[Scheme | str]],
    steps: StepRanges,
) -> dict[str, Choices]:
    """Site -> its choices, parsed; a list of equal ones is one choice where nothing in it is fitted
    for a range.

    Raises:
        QSearchError: an unknown site, a list of another length than there are ranges, a scheme that
            a site can't have.
    """
    made: dict[str, Choices] = {}
    for name, given in choices.items():
        listed = [given] if isinstance(given, str | Scheme) else list(given)
        held = tuple(Scheme.parse(s) for s in listed)
        for scheme in held:
            check_site(graph, name, scheme)
        if len(held) not in (1, len(steps)):
            raise QSearchError(
                f"a site has one scheme, or one for each range of steps; {name} has {len(held)}, "
                f"the plan {len(steps)} ranges"
            )
        if len(set(held)) == 1 and not held[0].fitted_by_range:
            held = held[:1]
        if len(held) > 1:
            _check_active(graph, name, held, steps)
        made[name] = held
    return made


def _check_active(graph: OpGraph, name: str, held: Choices, steps: StepRanges) -> None:
    """Refuse a choice of its own for a range of steps in which a site's component does not run."""
    active, component = graph.active(name, steps), graph.component(name)
    if not active:
        raise QSearchError(
            f"{component} runs in none of the sampler's steps, so {name} has one scheme for all "
            f"ranges; given {' | '.join(map(str, held))}"
        )
    for i, place in enumerate(nearest_active(active, len(held))):
        if held[i] != held[place]:
            first, last, total = graph.spans[component]
            raise QSearchError(
                f"{component} runs in steps {first} to {last - 1} of {total}, not in range {i} of "
                f"{len(steps)}, where {name} is given {held[i]}; say there what range {place} "
                f"says, {held[place]}"
            )


def nearest_active(active: Sequence[int], count: int) -> list[int]:
    """For each of `count` ranges of steps the nearest of those in which a component runs."""
    return [min(active, key=lambda a: abs(a - i)) for i in range(count)]
