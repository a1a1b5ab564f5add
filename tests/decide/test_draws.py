"""Draws: the same for the same seed, as random as they say, and spread over what a plan can be."""

from __future__ import annotations

import numpy as np
import pytest

from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.decide.draws import DRAWS, draw
from qsearch.learn.contracts import SCHEMES, small_graph, small_table

GRAPH = small_graph(blocks=6)


def schemes_of(plan: Plan) -> list[str]:
    return [str(plan.layers[layer.name]) for layer in GRAPH.quantizable]


@pytest.mark.parametrize("how", DRAWS)
def test_a_draw_is_the_same_for_the_same_seed_and_no_two_plans_are(how: str) -> None:
    first, again, other = (
        draw(GRAPH, SCHEMES, 20, how, seed=s, table=small_table(GRAPH)) for s in (3, 3, 4)
    )

    assert [p.id for p in first.values()] == [p.id for p in again.values()]
    assert len({p.id for p in first.values()}) == 20
    assert not {p.id for p in first.values()} & {p.id for p in other.values()}


def test_no_plan_is_drawn_twice_and_few_layers_have_few_plans() -> None:
    two = OpGraph("two", small_graph(blocks=1).layers[:2], ())

    plans = draw(two, SCHEMES[:2], 12)

    assert len({p.id for p in plans.values()}) == len(plans) == 4
    assert list(plans) == [f"random-0-{i:03d}" for i in range(4)]


@pytest.mark.parametrize("how", ["random", "frontier"])
def test_more_plans_begin_with_the_same_ones(how: str) -> None:
    few, many = (draw(GRAPH, SCHEMES, n, how, table=small_table(GRAPH)) for n in (4, 9))

    assert [(k, p.id) for k, p in few.items()] == [(k, p.id) for k, p in many.items()][:4]


def test_random_plans_of_two_widths_are_drawn_as_qua2sedimo_draws_them() -> None:
    plans = draw(GRAPH, ["uint3-c", "km3-c", "uint4-c", "km4-c"], 400).values()

    narrow = np.array([np.mean([s[-3] == "3" for s in schemes_of(p)]) for p in plans])
    codebook = np.array([np.mean([s.startswith("km") for s in schemes_of(p)]) for p in plans])
    quarters = np.histogram(narrow, [0, 0.25, 0.5, 0.75, 1.0])[0] / 400
    assert quarters == pytest.approx(
        0.25, abs=0.09
    )  # p is uniform; independent layers alone would all lie in the middle
    assert codebook.mean() == pytest.approx(0.5, abs=0.02)
    assert codebook.std() < 0.15


def test_a_hypercube_gives_a_role_one_scheme_and_every_scheme_its_turn() -> None:
    plans = list(draw(GRAPH, SCHEMES, 20, "latin").values())

    roles: dict[str, list[str]] = {}
    for plan in plans:
        for role in {layer.role for layer in GRAPH}:
            found = {str(plan.layers[layer.name]) for layer in GRAPH if layer.role == role}
            assert len(found) == 1
            roles.setdefault(role, []).append(found.pop())
    for drawn in roles.values():
        assert {scheme: drawn.count(scheme) for scheme in SCHEMES} == dict.fromkeys(SCHEMES, 4)


def test_plans_around_the_frontier_are_better_than_random_ones_of_their_size() -> None:
    table = small_table(GRAPH)

    def excess(how: str) -> float:
        found = []
        for plan in draw(GRAPH, SCHEMES, 24, how, table=table).values():
            uniform = np.interp(
                plan.achieved.average_bits,
                *np.array(
                    sorted(
                        (
                            Plan.uniform(GRAPH, s).achieved.average_bits,
                            np.log(table.predict(Plan.uniform(GRAPH, s))[0]),
                        )
                        for s in SCHEMES
                    )
                ).T,
            )
            found.append(np.log(table.predict(plan)[0]) - uniform)
        return float(np.median(found))

    assert excess("frontier") < excess("random") - 0.3


def test_layers_that_are_not_quantizable_are_kept(graph: object) -> None:
    from tests.conftest import make_graph

    assert {
        str(p.layers["embed"]) for p in draw(make_graph(), ["int2-c", "int4-c"], 5).values()
    } == {"keep"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "randm"}, "did you mean 'random'"),
        ({"how": "frontier"}, "need a sensitivity table"),
        ({"count": 0}, "at least one plan is drawn; given 0"),
        ({"schemes": ["int4-c"]}, "differ where a layer may have two schemes; given int4-c"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(QSearchError, match=message):
        draw(**({"graph": GRAPH, "schemes": SCHEMES, "count": 2} | arguments))  # type: ignore[arg-type]
