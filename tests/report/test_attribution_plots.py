"""What plots of attributions show: dots that hide none of each other, bars that add up to the
prediction.
"""

from __future__ import annotations

import io
import math
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from qsearch.core.attribution import Attribution
from qsearch.core.errors import QSearchError
from qsearch.report import beeswarm, contributions
from qsearch.report.explained import attribution_tables
from qsearch.report.style import NARROW

from .synthetic import SCHEMES, make_attribution, noise
from .wired import transformer

GRAPH = transformer(2)
WHOLE = make_attribution(GRAPH, plans=30)


def features(
    values: dict[str, list[float]], data: dict[str, list[float]] | None = None
) -> Attribution:
    """A method that adds `values` to zero: name -> a value a plan."""
    count = len(next(iter(values.values())))
    rows = [
        {
            "plan": f"p{p}",
            "method": "shap",
            "kind": "feature",
            "metric": "ssim",
            "name": name,
            "value": row[p],
            "data": (data or {}).get(name, [math.nan] * count)[p],
            "base": 0.0,
            "prediction": math.fsum(r[p] for r in values.values()),
        }
        for p in range(count)
        for name, row in values.items()
    ]
    return Attribution.from_rows("g", rows)


def test_rows_stand_by_their_mean_absolute_value_and_the_rest_is_added_up() -> None:
    data = beeswarm.beeswarm(
        features({"a": [1, -1], "b": [3, -4], "c": [0.5, 0.25], "d": [0.25, 0.5]}),
        metric="ssim",
        method="shap",
        count=2,
    )

    assert data.rows == ("b", "a", "the other 2 together")
    assert data.values.tolist() == [[3, -4], [1, -1], [0.75, 0.75]]
    assert data.rest


def test_what_is_shown_adds_up_to_the_prediction_of_every_plan() -> None:
    data = beeswarm.beeswarm(WHOLE, metric="noise", method="shap", count=3)

    rows = WHOLE.select(method="shap", metric="noise")
    predictions = rows.groupby("plan", sort=False)["prediction"].first().to_numpy()
    np.testing.assert_allclose(data.values.sum(0) + 2.0, predictions, rtol=1e-12)


def test_a_level_is_the_rank_of_the_features_own_value_and_equal_values_share_it() -> None:
    made = features(
        {"a": [1, 2, 3, 4], "b": [1, 1, 1, 1]}, {"a": [7, 5, 5, 100], "b": [2, 2, 2, 2]}
    )

    data = beeswarm.beeswarm(made, metric="ssim", method="shap")

    assert data.levels[0].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1.0])
    assert np.isnan(data.levels[1]).all()  # what never varies has no direction


def test_a_layer_is_coloured_by_the_bits_of_its_choice() -> None:
    data = beeswarm.beeswarm(WHOLE, metric="noise", method="shapley", kind="layer", count=3)

    name = data.rows[0]
    i = [layer.name for layer in GRAPH.quantizable].index(name)
    bits = [int(SCHEMES[(i + p) % 4][4]) for p in range(30)]
    assert np.argsort(data.levels[0][:4]).tolist() == np.argsort(bits[:4]).tolist()
    assert data.colour == "bits of the choice"
    assert data.values[0][0] == pytest.approx(
        sum(noise(i, SCHEMES[i % 4], t) / 2 for t in range(2))
    )


def test_no_dot_hides_another_and_none_leaves_its_row() -> None:
    data = beeswarm.beeswarm(
        features({"a": [1.0] * 25 + [0.0], "b": [0.0] * 26}), metric="ssim", method="shap"
    )

    same = data.offsets[0][:25]
    assert len(set(np.round(same, 9))) == 25
    assert float(np.abs(data.offsets).max()) <= 0.42
    assert data.offsets[0][25] == 0.0


def test_dots_are_drawn_where_the_values_are() -> None:
    data = beeswarm.beeswarm(WHOLE, metric="noise", method="shap", count=3)

    ax = beeswarm.draw_beeswarm(data).axes[0]

    for row, dots in enumerate(ax.collections):
        np.testing.assert_allclose(
            np.asarray(dots.get_offsets()), np.stack([data.values[row], row + data.offsets[row]], 1)
        )


def test_one_plan_is_no_swarm() -> None:
    with pytest.raises(QSearchError, match="a beeswarm shows many plans; shap explains only p0"):
        beeswarm.beeswarm(features({"a": [1.0]}), metric="ssim", method="shap")


def test_a_method_that_explained_nothing_is_answered_with_the_nearest() -> None:
    with pytest.raises(QSearchError, match=r"no method 'shaply'.*'shapley'"):
        beeswarm.beeswarm(WHOLE, metric="noise", method="shaply")


def test_bars_and_the_rest_and_the_base_add_up_to_the_prediction() -> None:
    data = contributions.contributions(
        GRAPH, WHOLE, plan="plan 3", metric="noise", method="shapley", count=5
    )

    assert len(data.rows) == 5
    assert data.rest[0] == len(GRAPH.quantizable) - 5
    assert sum(value for _, _, value, _, _ in data.rows) + data.rest[
        1
    ] + data.base == pytest.approx(data.prediction, rel=1e-12)
    values = [value for _, _, value, _, _ in data.rows]
    assert values == sorted(values, reverse=True)


def test_a_bar_carries_its_choice_its_family_and_the_error_of_both_bins() -> None:
    data = contributions.contributions(
        GRAPH, WHOLE, plan="plan 0", metric="noise", method="shapley", count=100
    )

    found = {name: rest for name, *rest in data.rows}
    i = [layer.name for layer in GRAPH.quantizable].index("blocks.1.ff.up")
    scheme = SCHEMES[i % 4]
    parts = [noise(i, scheme, t) / 2 for t in range(2)]
    assert found["blocks.1.ff.up"] == [
        scheme,
        pytest.approx(sum(parts)),
        pytest.approx(math.hypot(*(v / 4 for v in parts))),
        "feed-forward",
    ]
    assert data.rest == (0, 0.0)


def bars_of(
    values: dict[str, float], choices: dict[str, str] | None = None
) -> contributions.Contributions:
    """The bars of a plan whose layers and sites add `values` to zero."""
    rows = [
        {
            "plan": "plan",
            "method": "shapley",
            "kind": "layer",
            "metric": "noise",
            "name": name,
            "choice": (choices or {}).get(name, ""),
            "value": value,
            "base": 0.0,
            "prediction": math.fsum(values.values()),
        }
        for name, value in values.items()
    ]
    made = Attribution.from_rows(GRAPH.id, rows)
    return contributions.contributions(GRAPH, made, plan="plan", metric="noise", method="shapley")


def test_sites_of_attention_have_bars_among_the_layers() -> None:
    values = {"blocks.0.attn1:attention": 3.0, "blocks.1.attn2:softmax": 2.0, "patch": 1.0}
    choices = dict(zip(values, ("window8~residual", "keep+a8", "keep+a8"), strict=True))

    data = bars_of(values, choices)

    assert [name for name, *_ in data.rows] == list(values)
    assert [row[-1] for row in data.rows][:2] == ["self-attention", "cross-attention"]
    assert data.labels == ("0 attn1:attention", "1 attn2:softmax", "patch")
    assert len(contributions.draw_contributions(data).axes[0].patches) == 3


def test_bars_are_as_long_as_the_values() -> None:
    data = contributions.contributions(
        GRAPH, WHOLE, plan="plan 0", metric="noise", method="shapley", count=4
    )

    ax = contributions.draw_contributions(data).axes[0]

    assert [bar.get_width() for bar in ax.patches] == pytest.approx(
        [value for _, _, value, _, _ in data.rows] + [data.rest[1]]
    )
    assert [label.get_text().split()[-1] for label in ax.get_yticklabels()][:4] == [
        choice for _, choice, *_ in data.rows
    ]


def test_short_names_are_each_one_layers_and_their_key_is_said() -> None:
    data = contributions.contributions(
        GRAPH, WHOLE, plan="plan 0", metric="noise", method="shapley", count=100
    )

    assert len(set(data.labels)) == len(data.labels)
    assert "1 ff.up" in data.labels
    assert data.key == "numbers are blocks"


def shown(found: Attribution, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for part in attribution_tables(found):
        console.print(part)
    return console.export_text()


def test_the_terminal_shows_the_largest_the_rest_and_the_sum() -> None:
    text = shown(Attribution(WHOLE.graph, WHOLE.select(plan="plan 0", method="shapley")))

    rows = WHOLE.totals(plan="plan 0", method="shapley", kind="layer", metric="noise")
    largest = max(rows, key=lambda name: rows[name])
    assert f"{rows[largest]:+.2e}" in text
    assert f"all others ({len(rows) - 15})" in text
    assert (
        f"0 before any + {sum(rows.values()):.4g} = {sum(rows.values()):.4g}, as predicted" in text
    )


def test_the_terminal_marks_what_may_be_nothing() -> None:
    rows = {
        "plan": "plan",
        "method": "shapley",
        "kind": "layer",
        "metric": "noise",
        "base": 0.0,
        "prediction": 3.0,
    }
    found = Attribution.from_rows(
        "g",
        [
            rows | {"name": "sure", "value": 2.0, "error": 0.1},
            rows | {"name": "unsure", "value": 1.0, "error": 0.6},
        ],
    )

    lines = shown(found).splitlines()

    assert ["~" in line for line in lines if "sure" in line] == [False, True]


def test_the_terminal_shows_means_of_many_plans_and_scores_without_a_sum() -> None:
    scores = {
        "plan": "uniform uint4-c",
        "method": "gnn",
        "kind": "block",
        "metric": "sqnr",
        "base": 0.0,
        "prediction": math.nan,
    }
    found = Attribution.together(
        [
            WHOLE,
            Attribution.from_rows(
                WHOLE.graph, [scores | {"name": "mid", "value": -2.5, "choice": "uint4-c"}]
            ),
        ]
    )

    text = " ".join(shown(found).split())

    assert "mean absolute contribution to the predictions of 30 plans" in text
    assert "sqnr by gnn, blocks: scores, which add up to nothing" in text
    assert "2.5" in text


def test_the_terminal_says_what_features_are_and_on_which_scale_values_stand() -> None:
    names = ("bits", "lost/block:embedding", "share/uint4", "noise/total")

    found = shown(features({name: [1.0] for name in names}), 120)

    text = " ".join(found.split())
    assert "in dB of what is lost (-10 log10(1 - value))" in text
    legend = text[text.index("features: ") :]
    for words in (
        "bits: stored bits a weight",
        "lost/: bits taken away from a weight of full precision",
        "share/: share of the weights in a kind of format",
        "noise/: noise predicted by the table of sensitivities, dB",
    ):
        assert words in legend


@pytest.mark.parametrize("scale", [1e-9, 2.34567e-4, 0.123, 7.0, 98765.0])
def test_numbers_of_an_axis_do_not_run_into_each_other_on_a_telephone(scale: float) -> None:
    data = bars_of({x.name: scale * (i - 2) for i, x in enumerate(GRAPH.quantizable)})

    figure = contributions.draw_contributions(data, NARROW)
    figure.draw_without_rendering()

    left, right = figure.axes[0].get_xlim()
    labels = zip(figure.axes[0].get_xticks(), figure.axes[0].get_xticklabels(), strict=True)
    boxes = [label.get_window_extent() for at, label in labels if left <= at <= right]
    assert len(boxes) > 1
    assert min(b.x0 - a.x1 for a, b in pairwise(boxes)) > 2.0  # pixels


def test_the_terminal_loses_no_number_in_sixty_columns() -> None:
    text = shown(Attribution(WHOLE.graph, WHOLE.select(plan="plan 0", method="shapley")), 60)

    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text
