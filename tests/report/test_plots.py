"""Plots: numbers by hand in what is computed, and figures that show those numbers."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from qsearch.core.cost import Budget
from qsearch.core.errors import QSearchError
from qsearch.core.graph import LayerSpec, OpGraph
from qsearch.core.plan import Plan
from qsearch.core.steps import StepRanges
from qsearch.report import drawing, plots, range_heat, style
from qsearch.report.svg import svg
from tests.report.synthetic import SCHEMES, make_plan, make_rows, make_table, noise, pixart

GRAPH = pixart()
TABLE, PLAN = make_table(GRAPH), make_plan(GRAPH)
WIDTHS = pytest.mark.parametrize("width", [style.WIDE, style.NARROW])


def layers(*blocks: str) -> list[LayerSpec]:
    return [
        LayerSpec(
            f"{block}.layer{i}" if block else f"layer{i}", "linear", "linear", (4, 4), 16, block
        )
        for i, block in enumerate(blocks)
    ]


def test_bits_count_scales_and_zero_points() -> None:
    data = plots.layer_bits(GRAPH, Plan.uniform(GRAPH, "uint4-c"))

    by_name = dict(zip(data.axis.names, zip(data.stored, data.codes, strict=True), strict=True))
    assert by_name["transformer_blocks.0.attn1.to_q"] == (4 + 32 * 16 / 256, 4)
    assert by_name["transformer_blocks.1.ff.net.2"] == (4 + 32 * 16 / 1024, 4)
    assert by_name["embed"] == (16.0, 16)


def test_bits_know_the_average_and_the_limit() -> None:
    data = plots.layer_bits(GRAPH, PLAN)

    weights = [layer.weights for layer in GRAPH]
    assert data.average == pytest.approx(np.average(data.stored, weights=weights), rel=1e-12)
    assert data.limit == 12.0
    assert plots.layer_bits(GRAPH, Plan.make(GRAPH, PLAN.layers, Budget(bytes=10**6))).limit is None


def test_layers_stand_in_order_of_execution_under_the_name_they_have_in_their_block() -> None:
    axis = plots.layer_axis(GRAPH.layers)

    assert axis.names == tuple(layer.name for layer in GRAPH)
    assert axis.labels[5:8] == ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def test_a_long_name_keeps_its_last_whole_words() -> None:
    assert plots.layer_axis(GRAPH.layers).labels[2] == "…embedder.linear_1"


def test_blocks_of_one_kind_are_numbered() -> None:
    axis = plots.layer_axis(GRAPH.layers)

    assert [(s.label, s.start, s.stop) for s in axis.spans] == [("0", 5, 15), ("1", 15, 25)]
    assert axis.key == "numbers are transformer_blocks"


def test_blocks_of_several_kinds_go_by_the_shortest_letters_that_tell_them_apart() -> None:
    axis = plots.layer_axis(
        layers(
            "down_blocks.0.attentions.1", "down_blocks.0.adapters.0", "mid_block.attentions.0", ""
        )
    )

    assert [s.label for s in axis.spans] == ["d0.at1", "d0.ad0", "m.at0"]
    assert axis.key == "d = down_blocks, at = attentions, ad = adapters, m = mid_block"


def test_a_block_that_comes_again_is_a_span_of_its_own() -> None:
    assert [
        (s.start, s.stop) for s in plots.layer_axis(layers("a.0", "a.0.b.0", "a.0", "a.0")).spans
    ] == [(0, 1), (1, 2), (2, 4)]


@pytest.mark.parametrize(
    ("role", "family"),
    [
        ("self-attention-q", "self-attention"),
        ("cross-attention-add-k", "cross-attention"),
        ("feed-forward-in", "feed-forward"),
        ("time-embedding", "conditioning"),
        ("embedding-embedding", "conditioning"),
        ("modulation", "conditioning"),
        ("resnet-conv", "convolution"),
        ("skip", "convolution"),
        ("output", "input and output"),
        ("projection-in", "linear"),
        ("something new", "linear"),
    ],
)
def test_a_role_belongs_to_a_family_that_has_a_colour(role: str, family: str) -> None:
    assert plots.family(role) == family
    assert family in style.FAMILY_COLOURS


def test_noise_is_averaged_over_the_bins_as_power_and_shown_in_decibels() -> None:
    data = plots.noise_by_scheme(GRAPH, TABLE)

    expected = [
        [-10 * math.log10(sum(noise(i, s, t) for t in range(3)) / 3) for s in SCHEMES]
        for i in range(len(GRAPH.quantizable))
    ]
    np.testing.assert_allclose(data.decibels, expected, rtol=1e-12)
    assert data.columns == SCHEMES
    assert data.axis.names == tuple(layer.name for layer in GRAPH.quantizable)


def test_schemes_stand_in_order_of_what_they_store_not_of_their_names() -> None:
    assert plots.by_size(GRAPH, ["uint8-c", "nvfp4", "uint4-c", "int4-t"]) == (
        "int4-t",
        "nvfp4",
        "uint4-c",
        "uint8-c",
    )


def test_the_choice_of_the_plan_is_marked_where_it_was_measured() -> None:
    assert plots.noise_by_scheme(GRAPH, TABLE, PLAN).chosen[:6] == (-1, 1, 2, 3, 0, 1)


def test_what_lies_at_the_measurement_floor_is_no_number() -> None:
    floor = 10**-4.5  # below every noise at 4 bits, above every noise at 8

    data = plots.noise_by_scheme(GRAPH, make_table(GRAPH, floor=floor))

    assert np.isnan(data.decibels[:, 3]).tolist() == [True] * len(GRAPH.quantizable)
    assert np.isfinite(data.decibels[:, :3]).tolist() == [[True] * 3] * len(GRAPH.quantizable)


def test_steps_have_a_column_each_from_noisiest_to_cleanest() -> None:
    data = plots.noise_by_step(GRAPH, TABLE, "uint3-c")

    assert data.columns == ("1, noisiest", "2", "3, cleanest")
    assert data.decibels[4].tolist() == pytest.approx(
        [-10 * math.log10(noise(4, "uint3-c", t)) for t in range(3)], rel=1e-12
    )


def test_a_scheme_that_was_not_measured_is_answered_with_the_nearest() -> None:
    with pytest.raises(QSearchError, match=r"no scheme 'uint3-t'; did you mean 'uint3-c'\?"):
        plots.noise_by_step(GRAPH, TABLE, "uint3-t")


def test_a_metric_that_was_not_measured_is_named() -> None:
    with pytest.raises(QSearchError, match="no metric 'ssim'"):
        plots.noise_by_scheme(GRAPH, TABLE, metric="ssim")


def test_at_most_ten_colours_hold_every_cell() -> None:
    data = plots.noise_by_scheme(GRAPH, TABLE)

    assert data.levels[0] <= data.decibels.min()
    assert data.levels[-1] > data.decibels.max()
    assert 2 <= len(data.levels) <= 11


def test_size_against_quality_leaves_out_full_precision_and_what_was_not_measured() -> None:
    rows = make_rows(GRAPH, PLAN)
    del rows[3]["metrics"]["sqnr"]

    data = plots.size_quality(rows)

    assert data.plans == ("uniform uint4-c", "plan")
    assert data.kilobytes == (rows[1]["bytes"] / 1000, rows[2]["bytes"] / 1000)
    assert (data.means, data.errors) == ((11.3, 17.9), (0.4, 0.6))


def test_results_without_quantized_plans_give_an_empty_plot() -> None:
    data = plots.size_quality(make_rows(GRAPH, PLAN)[:1])

    assert data.plans == data.means == ()
    assert isinstance(drawing.draw_size_quality(data), Figure)


@WIDTHS
def test_bars_are_as_long_as_the_bits_and_coloured_by_family(width: int) -> None:
    data = plots.layer_bits(GRAPH, PLAN)

    [ax] = drawing.draw_layer_bits(data, width).axes

    bars = list(ax.containers[0])  # type: ignore[arg-type]
    lengths = [bar.get_height() if width == style.WIDE else bar.get_width() for bar in bars]
    assert lengths == pytest.approx(data.stored)
    colours = {
        f: tuple(int(c[i : i + 2], 16) / 255 for i in (1, 3, 5))
        for f, c in style.FAMILY_COLOURS.items()
    }
    assert [bar.get_facecolor()[:3] for bar in bars] == [
        pytest.approx(colours[f]) for f in data.families
    ]


@WIDTHS
def test_the_heat_map_shows_every_cell_and_leaves_out_what_is_no_number(width: int) -> None:
    data = plots.noise_by_scheme(GRAPH, make_table(GRAPH, floor=10**-4.5), PLAN)

    ax = drawing.draw_layer_noise(data, width).axes[0]

    [mesh] = [c for c in ax.collections if isinstance(c, QuadMesh)]
    shown = np.ma.filled(
        mesh.get_array().reshape(4, -1).T
        if width == style.WIDE
        else mesh.get_array().reshape(-1, 4),
        math.nan,
    )  # type: ignore[union-attr]
    np.testing.assert_array_equal(shown, data.decibels)


def test_error_bars_reach_one_standard_error_each_way() -> None:
    data = plots.size_quality(make_rows(GRAPH, PLAN), metric="output_sqnr", title="dB")

    [ax] = drawing.draw_size_quality(data).axes

    reach = [
        tuple(c.get_segments()[0][:, 1]) for c in ax.collections if isinstance(c, LineCollection)
    ]
    assert reach == [
        pytest.approx((mean - error, mean + error))
        for mean, error in zip(data.means, data.errors, strict=True)
    ]


@WIDTHS
def test_every_axis_says_what_it_shows(width: int) -> None:
    figures = (
        drawing.draw_layer_bits(plots.layer_bits(GRAPH, PLAN), width),
        drawing.draw_layer_noise(plots.noise_by_step(GRAPH, TABLE, "uint4-c"), width),
        drawing.draw_size_quality(plots.size_quality(make_rows(GRAPH, PLAN)), width),
    )

    titles = [{figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()} for figure in figures]
    layer = "layers in order of execution; numbers are transformer_blocks"
    assert titles == [
        {layer, "stored bits a weight"},
        {layer, "step bin"},
        {"stored size, kB", "SQNR of the final latent, dB"},
    ]


@WIDTHS
@pytest.mark.parametrize("blocks", [8, 12], ids=["86 layers", "126 layers"])
def test_names_of_many_layers_do_not_run_into_each_other(width: int, blocks: int) -> None:
    graph = pixart(blocks)
    figure = drawing.draw_layer_bits(plots.layer_bits(graph, Plan.uniform(graph, "uint4-c")), width)

    figure.draw_without_rendering()

    [ax] = figure.axes
    wide = width == style.WIDE
    boxes = [
        label.get_window_extent()
        for label in (ax.get_xticklabels() if wide else ax.get_yticklabels())
    ]
    assert len(boxes) == 6 + 10 * blocks
    overlaps = [a.x1 - b.x0 if wide else b.y1 - a.y0 for a, b in pairwise(boxes)]
    assert (
        max(overlaps) < 2.0
    )  # pixels: boxes hold the highest letters and the lowest, words rarely have both


def test_a_figure_of_the_same_data_is_the_same_svg() -> None:
    data = plots.noise_by_scheme(GRAPH, TABLE, PLAN)

    first, second = (svg(drawing.draw_layer_noise(data), key="k", label="cells") for _ in range(2))

    assert first == second


def test_an_svg_takes_its_colours_from_the_page_and_keeps_its_text() -> None:
    text = svg(drawing.draw_layer_bits(plots.layer_bits(GRAPH, PLAN)), key="k", label="bars")

    assert text.startswith('<svg role="img" aria-label="bars"')
    assert ">stored bits a weight</text>" in text
    assert {"var(--ink)", "var(--quiet)", "var(--faint)"} <= set(re.findall(r"var\(--\w+\)", text))
    assert [
        colour for colour in (style.INK, style.QUIET, style.FAINT, style.PAPER) if colour in text
    ] == []


def test_ids_of_an_svg_begin_with_its_key_and_all_references_are_found() -> None:
    text = svg(
        drawing.draw_layer_noise(plots.noise_by_scheme(GRAPH, TABLE, PLAN)), key="k", label="cells"
    )

    ids = re.findall(r'\bid="([^"]+)"', text)
    assert ids
    assert len(ids) == len(set(ids))
    assert {i.partition("-")[0] for i in ids} == {"k"}
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_a_name_with_markup_or_mathematics_is_text() -> None:
    graph = OpGraph(
        "m",
        (
            LayerSpec("a<script>x</script>", "linear", "linear", (4, 4), 1),
            LayerSpec("$b_$^$", "linear", "linear", (4, 4), 1),
        ),
    )

    text = svg(
        drawing.draw_layer_bits(plots.layer_bits(graph, Plan.uniform(graph, "uint4-c"))),
        key="k",
        label='<script>"',
    )

    assert "<script" not in text
    assert "a&lt;script&gt;x&lt;/script&gt;" in text
    assert ">$b_$^$</text>" in text


def test_drawing_needs_neither_pyplot_nor_torch() -> None:
    script = (
        "import sys; from qsearch.report import page, drawing, plots; from matplotlib.figure "
        "import Figure; print(*sorted(sys.modules))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    loaded = set(done.stdout.split())
    assert "matplotlib.figure" in loaded
    assert loaded & {"torch", "matplotlib.pyplot"} == set()


def in_ranges(weights: str = "", inputs: str = "") -> Plan:
    """Every layer in `uint4-g64` early; late the first quantizable layer with other weights or
    inputs.
    """
    late = f"{weights or 'uint4-g64'}{inputs}"
    choices: dict[str, str | list[str]] = {x.name: "keep" for x in GRAPH}
    choices |= {x.name: "uint4-g64" for x in GRAPH.quantizable}
    choices[GRAPH.quantizable[0].name] = ["uint4-g64", late]
    return Plan.make(GRAPH, choices, steps=StepRanges((0.25,)))


@pytest.mark.parametrize(
    "weights, inputs, title, early, late",
    [
        ("", "+a8", "bits of the input", 16, 8),
        ("uint8-c", "", "bits of the weight", 4, 8),
        ("uint8-c", "+a8", "weight bits x input bits", 64, 64),
    ],
)
def test_ranges_show_the_bits_of_what_differs_between_them(
    weights: str, inputs: str, title: str, early: int, late: int
) -> None:
    data = range_heat.range_bits(GRAPH, in_ranges(weights, inputs))

    assert data.title == title
    assert data.columns == ("0% to 25%", "25% to 100%")
    assert data.bits.shape == (len(GRAPH.quantizable), 2)
    assert data.bits[0].tolist() == [early, late]
    assert (data.bits[1:] == early).all()


@WIDTHS
def test_ranges_are_drawn_a_cell_a_layer_and_range(width: int) -> None:
    data = range_heat.range_bits(GRAPH, in_ranges("uint8-c"))
    figure = range_heat.draw_range_bits(data, width)

    mesh = next(c for c in figure.axes[0].collections if isinstance(c, QuadMesh))
    shown = np.asarray(mesh.get_array()).reshape(2, -1) if width == style.WIDE else mesh.get_array()
    assert np.array_equal(shown, data.bits.T if width == style.WIDE else data.bits)


def test_a_plan_of_one_range_has_no_ranges_to_draw() -> None:
    with pytest.raises(QSearchError, match="nothing to draw"):
        range_heat.range_bits(GRAPH, PLAN)
