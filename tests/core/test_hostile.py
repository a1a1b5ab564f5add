"""Hostile files: whatever happened to a plan or a graph on disk, the answer is a QSearchError or a
noun that works.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsearch.core.cost import Budget, cost
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan, Solver

MUTATIONS = 300
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 10**30, 1e308, float("nan"), float("inf")),
    *("", "keep", "int4-g7", "int4-c+a8@x", "qsearch.plan/2", "\ud800", "x" * 1000),
    *([], [[]], [1, 2], ["a"], {}, {"a": 1}, {"name": {}}, [None, {}]),
)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON tree."""
    items = (
        list(node.items() if isinstance(node, dict) else enumerate(node))
        if isinstance(node, dict | list)
        else []
    )
    return [(node, key) for key, _ in items] + [
        place for _, value in items for place in places(value)
    ]


def mutate_tree(text: str, rng: random.Random) -> bytes:
    """The file with one to three of its values replaced, removed, renamed or doubled."""
    whole = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(whole) or [([None], 0)])
        action = rng.choice(("replace", "replace", "remove", "rename", "swap"))
        if action == "remove":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[rng.choice(("", "x", "graph", "schema", "layers"))] = container.pop(key)
        elif action == "swap":
            other, place = rng.choice(places(whole) or [(container, key)])
            container[key] = json.loads(json.dumps(other[place]))
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))  # a later round may change it
    return json.dumps(whole).encode()


def mutate_bytes(text: str, rng: random.Random) -> bytes:
    """The file cut short, or with some bytes changed, removed or repeated."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(data)), rng.randint(1, 40)
        action = rng.choice(("cut", "change", "remove", "repeat"))
        if action == "cut":
            del data[max(1, at) :]
        elif action == "change":
            data[at] = rng.randrange(256)
        elif action == "remove":
            del data[at : min(at + length, at + len(data) - 1)]
        else:
            data[at:at] = data[at : at + length]
    return bytes(data)


def use_graph(path: Path) -> None:
    graph = OpGraph.load(path)
    assert [graph.layer(layer.name) for layer in graph] == list(graph.layers)
    Plan.uniform(graph, "int4-g8")


@pytest.fixture(params=["graph", "plan"])
def artefact(
    request: pytest.FixtureRequest, graph: OpGraph, tmp_path: Path
) -> tuple[Path, Callable[[Path], None]]:
    """A valid file, and what a user does with it."""
    path = tmp_path / f"{request.param}.json"
    if request.param == "graph":
        graph.save(path)
        return path, use_graph

    def use_plan(path: Path) -> None:
        plan = Plan.load(path, graph)
        groups = plan.budget.groups if plan.budget else ()
        found = cost(graph, plan.layers, groups=groups)
        assert replace(found, latency=plan.achieved.latency) == plan.achieved
        assert plan.budget is None or plan.budget.excess(plan.achieved) == {}

    layers = {
        "embed": "keep",
        "blocks.0.to_q": "int2-c",
        "blocks.0.ff": "int4-g16+a8",
        "out": "uint8-t",
    }
    Plan.make(
        graph, layers, Budget(average_bits=8.0), Solver("ilp", "optimal", 0.0, 1.0, 1.0, 0.1)
    ).save(path)
    return path, use_plan


@pytest.mark.parametrize("mutate", [mutate_tree, mutate_bytes])
def test_a_mutated_file_is_refused_in_words_or_works(
    artefact: tuple[Path, Callable[[Path], None]], mutate: Callable[[str, random.Random], bytes]
) -> None:
    path, use = artefact
    whole, failures, refused = path.read_text(), {}, 0

    for seed in range(MUTATIONS):
        path.write_bytes(mutate(whole, random.Random(seed)))
        try:
            use(path)
        except QSearchError as error:
            refused += 1
            if not str(error).strip():
                failures[seed] = "says nothing"
        except Exception as error:
            failures[seed] = f"{type(error).__name__}: {error}"

    assert failures == {}
    assert refused > MUTATIONS // 3  # else the mutations would be too kind to show anything
