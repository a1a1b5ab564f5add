"""What plots of sensitivity show: boxes by role, bars by block, models beside each other, the graph
with its cells; numbers by hand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.patches import PathPatch, Rectangle

from qsearch.core.attribution import Attribution
from qsearch.core.errors import QSearchError
from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.report import block_bars, boxes, graph_heat, plots, side_by_side
from qsearch.report.frontier import frontier

from .synthetic import make_plan, make_rows, make_table, noise, pixart
from .wired import transformer, unet

DIT, UNET = transformer(6), unet()


def table_of(graph: OpGraph, losses: dict[str, tuple[float, float, float]]) -> SensitivityTable:
    """One scheme, one bin: layer -> (estimate, error, floor); other layers have 1e-3, 1e-4 and
    0.
    """
    fixed = {"scheme": "uint4-c", "step": 0, "metric": "noise", "estimator": "sweep", "seed": 0}
    rows = [(layer.name, *losses.get(layer.name, (1e-3, 1e-4, 0.0))) for layer in graph.quantizable]
    return SensitivityTable.from_rows(
        graph.id,
        [{"site": n, "estimate": x, "error": e, "floor": f, **fixed} for n, x, e, f in rows],
    )


def test_a_loss_is_the_mean_over_the_bins_and_its_error_falls_with_their_number() -> None:
    losses = plots.losses(make_table(DIT), "uint4-c")

    name = DIT.quantizable[3].name
    values = [noise(3, "uint4-c", t) for t in range(3)]
    assert losses[name].estimate == pytest.approx(sum(values) / 3)
    assert losses[name].error == pytest.approx(math.sqrt(sum((0.1 * v) ** 2 for v in values)) / 3)
    assert not losses[name].at_floor
    assert plots.Loss(1.0, 0.0, 0.6).at_floor


def test_a_box_has_the_quartiles_of_its_layers_and_whiskers_that_leave_out_what_lies_far() -> None:
    powers = {
        f"blocks.{i}.attn1.to_q": 10 ** -(d / 10) for i, d in enumerate((30, 31, 32, 33, 34, 60))
    }

    data = boxes.role_boxes(
        {"m": (DIT, table_of(DIT, {n: (p, 0.0, 0.0) for n, p in powers.items()}))}, "uint4-c"
    )

    [box] = data.boxes[data.roles.index("self-attention-q")]
    assert box.values == pytest.approx((30, 31, 32, 33, 34, 60))
    low, middle, high = np.quantile(box.values, (0.25, 0.5, 0.75))
    assert box.summary == pytest.approx((30, low, middle, high, 34))
    assert data.boxes[data.roles.index("output")][0].summary is None  # one layer is a point, no box


def test_roles_stand_with_the_most_sensitive_first() -> None:
    data = boxes.role_boxes(
        {"m": (DIT, table_of(DIT, {"proj_out": (0.1, 0.0, 0.0), "caption": (1e-9, 0.0, 0.0)}))},
        "uint4-c",
    )

    assert (data.roles[0], data.roles[-1]) == ("output", "text-embedding")


def test_a_layer_at_the_floor_is_a_bound_and_not_a_number() -> None:
    data = boxes.role_boxes({"m": (DIT, table_of(DIT, {"proj_out": (3e-5, 0.0, 5e-5)}))}, "uint4-c")

    [box] = data.boxes[data.roles.index("output")]
    assert box.values == ()
    assert box.bounds == pytest.approx((40.0,))  # 10 log10 of twice the floor
    ax = boxes.draw_role_boxes(data).axes[0]
    assert [
        line.get_xdata()[0]
        for line in ax.lines
        if line.get_marker() == ">" and len(line.get_xdata())
    ] == pytest.approx([40.0])


def test_boxes_are_drawn_where_their_quartiles_are() -> None:
    data = boxes.role_boxes({"m": (DIT, make_table(DIT))}, "uint4-c")

    ax = boxes.draw_role_boxes(data).axes[0]

    drawn = sorted(
        (round(min(v), 6), round(max(v), 6))
        for p in ax.patches
        if isinstance(p, PathPatch)
        for v in [p.get_path().vertices[:, 0]]
    )
    meant = sorted(
        (round(b.summary[1], 6), round(b.summary[3], 6))
        for held in data.boxes
        for b in held
        if b.summary
    )
    assert drawn == meant
    assert len(drawn) == 10


def test_a_scheme_that_was_not_measured_is_answered_with_the_nearest() -> None:
    with pytest.raises(QSearchError, match=r"no scheme 'uint4-t'; did you mean 'uint4-c'\?"):
        boxes.role_boxes({"m": (DIT, make_table(DIT))}, "uint4-t")


def test_a_table_of_another_model_is_refused() -> None:
    for plot in (
        lambda: boxes.role_boxes({"m": (UNET, make_table(DIT))}, "uint4-c"),
        lambda: block_bars.block_bars(UNET, make_table(DIT), "uint4-c"),
    ):
        with pytest.raises(QSearchError, match="the table was made for graph"):
            plot()


def test_shares_of_noise_and_of_weights_each_add_up_to_one_in_every_model() -> None:
    data = side_by_side.side_by_side(
        {"a": (DIT, make_table(DIT)), "b": (UNET, make_table(UNET))}, "uint4-c"
    )

    for i in range(2):
        assert sum(held[i].noise for held in data.shares) == pytest.approx(1.0)
        assert sum(held[i].weights for held in data.shares) == pytest.approx(1.0)
    rows = dict(zip(data.boxes.roles, data.shares, strict=True))
    assert rows["convolution"][0] == side_by_side.Share(0.0, 0.0, 0.0)
    assert rows["convolution"][1].weights > 0.9


def test_the_error_of_a_share_is_that_of_a_ratio() -> None:
    """Against ten thousand draws of the same estimates."""
    rng = np.random.default_rng(0)
    losses = {
        layer.name: (1e-3 * (1 + i % 3), 1e-4 * (1 + i % 2), 0.0)
        for i, layer in enumerate(UNET.quantizable)
    }

    data = side_by_side.side_by_side({"m": (UNET, table_of(UNET, losses))}, "uint4-c")

    own = np.array([plots.family(layer.role) == "convolution" for layer in UNET.quantizable])
    means, errors = (
        np.array([losses[layer.name][k] for layer in UNET.quantizable]) for k in (0, 1)
    )
    drawn = rng.normal(means, errors, (10_000, len(means)))
    expected = (drawn[:, own].sum(1) / drawn.sum(1)).std()
    assert data.shares[data.boxes.roles.index("convolution")][0].error == pytest.approx(
        expected, rel=0.05
    )


def test_the_noise_of_a_block_is_the_sum_over_its_layers() -> None:
    table = table_of(
        DIT, {"blocks.2.ff.up": (5e-3, 3e-4, 0.0), "blocks.2.ff.down": (2e-3, 4e-4, 0.0)}
    )

    data = block_bars.block_bars(DIT, table, "uint4-c")

    i = data.axis.names.index("blocks.2.ff")
    assert data.noise[i] == pytest.approx(7e-3)
    assert data.errors[i] == pytest.approx(5e-4)
    assert (data.axis.labels[i], data.families[i], data.at_floor[i]) == (
        "feed-forward",
        "feed-forward",
        False,
    )
    assert data.axis.names == tuple(b.name for b in sorted(DIT.blocks, key=lambda b: b.position))


@pytest.mark.parametrize("width", [1200, 360])
def test_bars_of_blocks_end_at_their_noise_and_those_at_the_floor_are_hollow(width: int) -> None:
    data = block_bars.block_bars(DIT, table_of(DIT, {"proj_out": (1e-4, 1e-5, 1e-4)}), "uint4-c")

    ax = block_bars.draw_block_bars(data, width).axes[0]

    bars = [p for p in ax.containers[0] if isinstance(p, Rectangle)]  # type: ignore[attr-defined]
    ends = [bar.get_height() if width == 1200 else bar.get_width() for bar in bars]
    assert ends == pytest.approx([100 * x for x in data.noise])
    assert [i for i, bar in enumerate(bars) if bar.get_facecolor()[3] == 0] == [
        data.axis.names.index("out")
    ]


def test_a_graph_without_blocks_has_no_bars_and_says_how_to_get_them() -> None:
    graph = pixart()

    with pytest.raises(
        QSearchError, match="holds no blocks, only layers; make it again with `qsearch extract`"
    ):
        block_bars.block_bars(graph, make_table(graph), "uint4-c")


def test_every_block_has_its_cell_in_the_graph_in_order_of_execution() -> None:
    losses = {f"blocks.{i}.attn1.to_q": (10.0 ** -(1 + i), 0.0, 0.0) for i in range(6)}

    data = graph_heat.graph_heat(DIT, table_of(DIT, losses), "uint4-c")

    cells = data.cells["blocks.0.attn1"]
    assert cells == pytest.approx([-10 * math.log10(10.0 ** -(1 + i) + 3e-3) for i in range(6)])
    assert sorted(len(row) for row in data.cells.values()) == [
        1,
        1,
        1,
        1,
        6,
        6,
        6,
    ]  # time, text, patches and output once, three that repeat


def test_cells_at_the_floor_are_hatched() -> None:
    data = graph_heat.graph_heat(DIT, table_of(DIT, {"proj_out": (1e-9, 0.0, 1e-8)}), "uint4-c")

    assert math.isnan(data.cells["out"][0])
    ax = graph_heat.draw_graph_heat(data).axes[0]
    assert len([p for p in ax.patches if p.get_hatch()]) == 2  # the cell, and its key


def test_one_block_shows_a_cell_a_layer() -> None:
    data = graph_heat.graph_heat(DIT, make_table(DIT), "uint4-c", "blocks.3")

    assert set(data.cells) == {layer.name for layer in DIT if layer.block == "blocks.3"}
    assert {len(row) for row in data.cells.values()} == {1}


def test_the_graph_without_cells_is_coloured_by_kind_as_before() -> None:
    from qsearch.report.graph_picture import draw
    from qsearch.report.graph_view import model_sketch

    plain, heated = (
        draw(model_sketch(DIT)),
        graph_heat.draw_graph_heat(graph_heat.graph_heat(DIT, make_table(DIT), "uint4-c")),
    )

    assert len(heated.axes[0].patches) > len(plain.axes[0].patches)
    assert heated.get_size_inches()[1] > plain.get_size_inches()[1]


def test_measured_plans_stand_beside_what_was_predicted_where_it_is_the_same_quantity() -> None:
    plan = make_plan(DIT)
    values = {name: {"keep": 0.0, **row} for name, row in make_table(DIT).values().items()}
    rows = make_rows(DIT, plan)

    measured = frontier(DIT, values, [], rows).measured

    assert [m[0] for m in measured] == ["uniform uint4-c", "plan", "random"]
    assert measured[1] == ("plan", plan.achieved.average_bits, 21.3, 0.1)
    assert frontier(DIT, values, [], rows, power=False).measured == ()
    assert (
        frontier(DIT, values, [Plan.uniform(DIT, "uint4-c")]).title
        == "predicted SQNR of the output, dB"
    )


def test_scores_of_a_graph_predictor_stand_by_role_with_the_schemes_beside_each_other() -> None:
    whole = {
        "method": "gnn",
        "kind": "operation",
        "metric": "sqnr",
        "base": 0.0,
        "prediction": math.nan,
    }
    rows = [
        whole
        | {
            "plan": f"uniform {s}",
            "choice": s,
            "name": layer.name,
            "value": i + (layer.role == "output") * -500.0,
        }
        for s in ("uint4-c", "km4-c")
        for i, layer in enumerate(DIT.quantizable)
    ]
    scores = Attribution.from_rows(DIT.id, rows)

    data = boxes.score_boxes(DIT, scores, metric="sqnr", method="gnn")

    assert data.roles[0] == "output"
    assert data.models == ("uint4-c", "km4-c")
    assert data.boxes[0][0].values == (len(DIT.quantizable) - 501,)
    with pytest.raises(QSearchError, match=r"no scores at 'km3-c'; did you mean 'km4-c'\?"):
        boxes.score_boxes(DIT, scores, metric="sqnr", method="gnn", schemes=["km3-c"])
