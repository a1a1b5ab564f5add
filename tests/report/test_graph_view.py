"""Graphs for people and other tools: files that others read, sketches that say what is there,
pictures where nothing lies on anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import networkx as nx
import pytest

from qsearch.core.errors import ArtifactError, QSearchError
from qsearch.core.graph import Block, LayerSpec, OpGraph
from qsearch.report import graph_picture, graph_view, text
from qsearch.report.graph_picture import draw, write
from qsearch.report.layered import layered

from .wired import Writer, transformer, unet


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return transformer()


def test_graphml_is_read_back_by_networkx_with_the_same_nodes_and_edges(graph: OpGraph) -> None:
    found = nx.parse_graphml(graph_view.export(graph, "graphml"))

    assert set(found.edges) == set(graph.edges)
    assert list(found) == [op.name for op in graph.ops]
    node = found.nodes["blocks.2.attn2.to_k"]
    assert (
        node["kind"],
        node["layer"],
        node["role"],
        node["weight"],
        node["macs"],
        node["sees"],
    ) == (
        "linear",
        "blocks.2.attn2.to_k",
        "cross-attention-k",
        "32×32",
        8 * 32 * 32,
        "text-only",
    )
    assert (node["block"], node["blockkind"], node["module"]) == (
        "blocks.2.attn2",
        "cross-attention",
        "blocks.2",
    )


def test_json_is_networkx_node_link_form(graph: OpGraph) -> None:
    found = nx.node_link_graph(json.loads(graph_view.export(graph, "json")), edges="edges")

    assert set(found.edges) == set(graph.edges)
    assert found.graph["graph"] == graph.id
    assert sum(fields["macs"] for _, fields in found.nodes(data=True)) == graph.total_macs


def test_dot_names_every_operation_and_edge_once(graph: OpGraph) -> None:
    lines = graph_view.export(graph, "dot").splitlines()

    assert sum(" -> " in line for line in lines) == len(graph.edges)
    assert '  "patch" -> "blocks.0.attn1.norm";' in lines
    assert sum(line.startswith('  "patch" [label=') for line in lines) == 1


def test_dot_keeps_odd_letters_in_names_apart() -> None:
    odd = 'a "b\\n" {c}'
    graph = OpGraph(
        "m",
        (LayerSpec("l", "output", "linear", (2, 2), 4),),
        (transformer().ops[0].__class__(odd, "linear", "l"),),
    )

    assert '"a \\"b\\\\n\\" {c}" [' in graph_view.export(graph, "dot")


def test_an_unknown_form_names_the_nearest(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError,
        match=r"shown as table, graphml, dot, json; given 'graphlm'; did you mean 'graphml'",
    ):
        graph_view.export(graph, "graphlm")


def test_the_whole_model_shows_what_repeats_once_with_its_count(graph: OpGraph) -> None:
    sketch = graph_view.model_sketch(graph)

    assert [(len(g.boxes), g.times) for g in sketch.groups] == [(1, 1), (3, 4), (1, 1)]
    assert [sketch.boxes[name].title for g in sketch.groups for name in g.boxes] == [
        "patchify",
        "self-attention",
        "cross-attention",
        "feed-forward",
        "output",
    ]
    assert (
        sketch.title
        == "written transformer: 45 layers, 68.4 k weights, 4.99 M multiply-accumulates a call"
    )


def test_conditions_are_marks_on_what_they_condition(graph: OpGraph) -> None:
    sketch = graph_view.model_sketch(graph)

    assert [sketch.boxes[name].title for name in sketch.conditions] == [
        "time-embedding",
        "text-embedding",
    ]
    marks = {
        sketch.boxes[name].title: sketch.boxes[name].marks
        for g in sketch.groups
        for name in g.boxes
    }
    assert marks == {
        "patchify": (),
        "self-attention": ("time-embedding",),
        "cross-attention": ("time-embedding", "text-embedding"),
        "feed-forward": ("time-embedding",),
        "output": (),
    }
    assert all(not {a, b} & set(sketch.conditions) for a, b in sketch.edges)


def test_the_edges_of_the_whole_go_forwards_and_connect_every_row(graph: OpGraph) -> None:
    sketch = graph_view.model_sketch(graph)
    order = [name for g in sketch.groups for name in g.boxes]

    assert set(itertools.pairwise(order)) <= set(sketch.edges)
    assert [(a, b) for a, b in sketch.edges if order.index(a) >= order.index(b)] == []


@pytest.mark.parametrize(
    ("letters", "found"),
    [
        ("abcabcabcx", "3x3 1x1"),
        ("xaay", "1x1 1x2 1x1"),
        ("abab", "2x2"),
        ("aaaa", "1x4"),
        ("abcd", "1x1 1x1 1x1 1x1"),
        ("", ""),
        ("aabaab", "3x2"),
    ],
)
def test_repeats_cover_the_most_with_the_shortest_pattern(letters: str, found: str) -> None:
    assert (
        " ".join(f"{period}x{times}" for _, period, times in graph_view.repeats(list(letters)))
        == found
    )


def test_a_block_shows_its_operations_and_where_it_hangs(graph: OpGraph) -> None:
    sketch = graph_view.block_sketch(graph, "blocks.1")

    assert (
        sum(box.colour == "outside" for box in sketch.boxes.values()) == 4
    )  # the block before, timestep, text, the block after
    assert sketch.boxes["blocks.1.attn2.to_k"].title == "attn2.to_k"
    assert sketch.boxes["blocks.1.attn2.to_k"].detail == "linear  32 → 32"
    assert sketch.boxes["blocks.1.ff.up"].colour == "feed-forward"
    assert sketch.boxes["from blocks.0.add"].title == "from blocks.0.add"
    assert sketch.boxes["to blocks.2"].title == "to blocks.2"
    assert ("from caption", "blocks.1.attn2.to_k") in sketch.edges
    inside = {op.name for op in graph.ops if op.block == "blocks.1"}
    assert (
        set(sketch.boxes) - {name for name, box in sketch.boxes.items() if box.colour == "outside"}
        == inside
    )


def test_what_many_operations_of_a_block_read_is_a_mark_on_them() -> None:
    w = Writer()
    for name in ("few", "many"):
        w.op(name, "input", [], (1, 8))
    for i in range(4):
        w.linear(f"m.{i}", "modulation", "many", 1, 8, 8, module="m.0")
    w.linear("m.last", "output", "few", 1, 8, 8, module="m.0")

    sketch = graph_view.block_sketch(w.graph("g"), "m.0")

    assert sketch.conditions == ("from many",)
    assert {name: box.marks for name, box in sketch.boxes.items() if box.marks} == {
        f"m.{i}": ("from many",) for i in range(4)
    }
    assert sketch.edges == (("from few", "m.last"),)


def test_a_repeated_module_is_shown_whole_though_a_block_bears_its_name(graph: OpGraph) -> None:
    named = dataclasses.replace(
        graph,
        blocks=(
            Block("blocks.1", "feed-forward", ("blocks.1.ff.up",), 0, ops=("blocks.1.ff.up",)),
        ),
    )

    assert graph_view.block_sketch(named, "blocks.1") == graph_view.block_sketch(graph, "blocks.1")


def test_a_text_without_an_embedding_is_a_condition_of_the_whole() -> None:
    w = Writer()
    x, words = (
        w.op("input:noise", "input", [], (1, 4, 8)),
        w.op("input:words", "input", [], (1, 3, 8)),
    )
    w._done = 2
    for i in range(4):
        x = w.op(
            f"a.{i}",
            "attention",
            [w.linear(f"q.{i}", "cross-attention-q", x, 4, 8, 8), words],
            (1, 4, 8),
        )
        w.block(f"b.{i}", "cross-attention")

    sketch = graph_view.model_sketch(w.graph("g"))

    assert [sketch.boxes[name].title for name in sketch.conditions] == ["words"]
    assert sketch.boxes["b.0"].marks == ("words",)


def test_only_concatenations_go_around_blocks() -> None:
    skips = graph_view.model_sketch(unet()).edges
    residual = graph_view.model_sketch(transformer()).edges

    assert {(f"down.{i}", f"up.{i}") for i in range(4)} <= set(skips)
    assert len(residual) == 4


def test_a_named_block_shows_only_its_own_operations(graph: OpGraph) -> None:
    sketch = graph_view.block_sketch(graph, "blocks.1.attn2")

    assert {name for name, box in sketch.boxes.items() if box.colour != "outside"} == {
        f"blocks.1.attn2.{part}"
        for part in ("norm", "to_q", "to_k", "to_v", "sdpa", "to_out", "add")
    }


def test_an_unknown_block_names_the_nearest(graph: OpGraph) -> None:
    with pytest.raises(
        QSearchError, match=r"no block 'blocks.1.atn2'; did you mean 'blocks.1.attn2'"
    ):
        graph_view.block_sketch(graph, "blocks.1.atn2")


def test_a_graph_without_blocks_is_no_picture_of_the_whole() -> None:
    with pytest.raises(QSearchError, match=r"holds no blocks, only layers"):
        graph_view.model_sketch(OpGraph("bare", (LayerSpec("l", "output", "linear", (2, 2), 4),)))


@pytest.mark.parametrize("block", ["blocks.1", "blocks.1.attn2"])
def test_boxes_of_a_block_do_not_overlap_and_lines_go_down(graph: OpGraph, block: str) -> None:
    sketch = graph_view.block_sketch(graph, block)
    network = nx.DiGraph(sketch.edges)
    network.add_nodes_from(sketch.boxes)
    sizes = dict.fromkeys(sketch.boxes, (90.0, 30.0))

    laid = layered(network, sizes)

    for (ax, ay), (bx, by) in itertools.combinations(laid.places.values(), 2):
        assert abs(ax - bx) >= 90 or abs(ay - by) >= 30
    for (a, b), points in laid.routes.items():
        assert laid.places[a][1] < laid.places[b][1]
        assert points == sorted(points, key=lambda p: p[1])
    for (
        a,
        b,
    ), points in laid.routes.items():  # a line passes boxes that are not its own at a distance
        for x, y in points[1:-1]:
            assert [
                n
                for n, (nx_, ny) in laid.places.items()
                if n not in (a, b) and abs(nx_ - x) < 45 and abs(ny - y) < 15 - 1e-9
            ] == []


def test_a_unet_folds_where_its_skips_meet() -> None:
    figure = draw(graph_view.model_sketch(unet()))

    heights = {t.get_text(): [] for t in figure.axes[0].texts}
    for t in figure.axes[0].texts:
        heights[t.get_text()].append(t.get_position())
    (input_x, input_y), (output_x, output_y) = heights["input"][0], heights["output"][0]
    assert output_x > input_x + 100
    assert (
        abs(output_y - input_y) < 150
    )  # the second leg ends where the first began, not ten rows below


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_picture_has_the_same_bytes(graph: OpGraph, tmp_path: Path, ending: str) -> None:
    paths = [tmp_path / folder / f"whole.{ending}" for folder in ("a", "b")]
    for path in paths:
        graph_picture.save_picture(graph, path)

    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(paths[0].read_bytes()) > 2000


def test_text_in_an_svg_stays_text(graph: OpGraph, tmp_path: Path) -> None:
    graph_picture.save_picture(graph, tmp_path / "block.svg", "blocks.0")

    assert ">attn1.to_q</text>" in (tmp_path / "block.svg").read_text(encoding="utf-8")


def test_a_picture_of_another_kind_is_refused(graph: OpGraph, tmp_path: Path) -> None:
    with pytest.raises(QSearchError, match=r"\.svg or \.png; given whole\.pdf"):
        write(draw(graph_view.model_sketch(graph)), tmp_path / "whole.pdf")


def test_a_graph_is_shown_with_its_costs_and_its_time_on_a_device(
    graph: OpGraph, tmp_path: Path
) -> None:
    graph.save(tmp_path / "graph.json")

    roles, line, blocks, ops, roofline = text.show(tmp_path / "graph.json", "h200")

    title, table = roles.renderables
    assert str(title).startswith(f"{graph.model}: graph ")
    assert table.row_count == 1 + len({layer.role for layer in graph})
    assert line.startswith("0.000137 GB of weights at 16 bits; ")
    assert blocks == (
        "16 blocks: 4 self-attention, 4 cross-attention, 4 feed-forward, 1 time-embedding, 1 "
        "text-embedding, 1 patchify, 1 output"
    )
    assert "12 norm" in ops
    assert str(roofline.renderables[0]).startswith("at best on NVIDIA H200 SXM")
    assert len(text.show(tmp_path / "graph.json")) == 4


def test_only_a_graph_is_timed_on_a_device(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(
        json.dumps({"header": {"schema": "qsearch.plan/1"}}), encoding="utf-8"
    )

    with pytest.raises(QSearchError, match=r"a device times a graph.json; .* is a qsearch.plan"):
        text.show(tmp_path / "plan.json", "h200")
    with pytest.raises(ArtifactError):
        text.show(tmp_path / "none.json", "h200")
