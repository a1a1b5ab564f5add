"""OpGraph: what it counts, what it refuses, and that its file is its content."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import LayerSpec, OpGraph


def test_a_graph_comes_back_from_its_file(graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json", key="k")

    loaded = OpGraph.load(tmp_path / "graph.json")
    assert loaded == graph
    assert loaded.id == graph.id
    assert loaded.header is not None
    assert (loaded.header.graph, loaded.header.key) == (graph.id, "k")


def test_the_file_has_a_line_for_each_layer(graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json")

    lines = (tmp_path / "graph.json").read_text().splitlines()
    for layer in graph:
        assert sum(line.startswith(f'    "{layer.name}": {{') for line in lines) == 1


def test_layers_are_found_by_name_and_counted(graph: OpGraph) -> None:
    assert graph.layer("out").weight_shape == (4, 5, 3, 3)
    assert "out" in graph
    assert "in" not in graph
    assert [layer.name for layer in graph] == ["embed", "blocks.0.to_q", "blocks.0.ff", "out"]
    assert [layer.name for layer in graph.quantizable] == ["blocks.0.to_q", "blocks.0.ff", "out"]
    assert graph.weights == 10 * 24 + 24 * 24 + 40 * 24 + 4 * 5 * 9
    assert graph.macs == 16 * 24 * 24 + 16 * 40 * 24 + 64 * 180


def test_an_unknown_layer_is_answered_with_the_nearest(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError, match=r"tiny has no layer 'blocks\.0\.to_k'; did you mean 'blocks\.0\.to_q'\?"
    ):
        graph.layer("blocks.0.to_k")


def test_the_id_does_not_depend_on_the_model_s_name(graph: OpGraph) -> None:
    assert dataclasses.replace(graph, model="renamed").id == graph.id


@pytest.mark.parametrize("changes", [{"layers": 1}, {"ops": 1}, {"edges": 1}, {"blocks": 0}])
def test_the_sizes_depend_on_layers_operations_edges_and_blocks(
    graph: OpGraph, changes: dict[str, int]
) -> None:
    shorter = {name: getattr(graph, name)[:keep] for name, keep in changes.items()}

    assert dataclasses.replace(graph, **shorter).sizes != graph.sizes


def test_the_id_depends_on_layers_and_the_shapes_of_their_weights(graph: OpGraph) -> None:
    first, *rest = graph.layers
    wider = dataclasses.replace(first, weight_shape=(*first.weight_shape[:-1], 7))

    assert dataclasses.replace(graph, layers=graph.layers[:-1]).id != graph.id
    assert dataclasses.replace(graph, layers=(wider, *rest)).id != graph.id


def test_the_id_does_not_depend_on_the_size_of_a_call(graph: OpGraph) -> None:
    larger = tuple(
        dataclasses.replace(x, macs=4 * x.macs, inputs=4 * x.inputs) for x in graph.layers
    )
    other = dataclasses.replace(graph, layers=larger, ops=(), edges=(), blocks=())

    assert other.id == graph.id
    assert other.sizes != graph.sizes


def test_a_graph_without_layers_is_refused() -> None:
    with pytest.raises(QSearchError, match="at least one layer with a weight; empty has none"):
        OpGraph("empty", ())


def test_repeated_layer_names_are_refused(graph: OpGraph) -> None:
    with pytest.raises(QSearchError, match="layer names must be unique; tiny repeats some"):
        OpGraph("tiny", (*graph.layers, graph.layers[0]))


@pytest.mark.parametrize("role", ["", "other"])
def test_a_layer_without_a_role_is_refused(role: str) -> None:
    with pytest.raises(QSearchError, match="every layer needs a role; a has "):
        OpGraph("tiny", (LayerSpec("a", role, "linear", (2, 2), 4),))


def test_a_file_changed_by_hand_is_refused_with_both_ids(graph: OpGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.json")
    whole = json.loads((tmp_path / "graph.json").read_text())
    whole["layers"]["out"]["macs"] += 1
    (tmp_path / "graph.json").write_text(json.dumps(whole))

    with pytest.raises(
        ArtifactError,
        match=f"changed by hand: its content has id {graph.id} and sizes [0-9a-f]{{16}}, it says",
    ):
        OpGraph.load(tmp_path / "graph.json")


@pytest.mark.parametrize(
    "section", ["model", "source", "layers", "order", "ops", "edges", "blocks"]
)
def test_a_file_without_one_of_its_sections_is_refused(
    graph: OpGraph, tmp_path: Path, section: str
) -> None:
    graph.save(tmp_path / "graph.json")
    whole = json.loads((tmp_path / "graph.json").read_text())
    del whole[section]
    (tmp_path / "graph.json").write_text(json.dumps(whole))

    with pytest.raises(
        ArtifactError,
        match=f"is not a whole graph .*{section}.*; make it again with `qsearch extract`",
    ):
        OpGraph.load(tmp_path / "graph.json")
