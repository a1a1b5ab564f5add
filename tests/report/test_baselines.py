"""The pictures themselves: each plot drawn from fixed data looks as it did when somebody last
looked at it.

`python -m tests.report.test_baselines` draws all of them again into `baseline/`: look at every one
that changed before you keep it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.report import (
    beeswarm,
    block_bars,
    boxes,
    contributions,
    drawing,
    frontier,
    graph_heat,
    plots,
    side_by_side,
    style,
)
from tests.report import synthetic, wired

BASELINE = Path(__file__).parent / "baseline"
DPI = 60
#: the matplotlib that drew the baselines: others lay out text in other places
DRAWN_BY = "3.11."
#: root mean square of the differences of pixels (0 to 255) that another version's font may make; a
#: bar or a point out of place makes more
TOLERANCE = 6.0


@cache
def dit() -> tuple[OpGraph, SensitivityTable]:
    graph = wired.transformer(5)
    return graph, synthetic.make_table(graph, floor=1.3e-5)


@cache
def unet() -> tuple[OpGraph, SensitivityTable]:
    graph = wired.unet()
    return graph, synthetic.make_table(graph, floor=1e-6)


def both() -> dict[str, tuple[OpGraph, SensitivityTable]]:
    return {"a DiT": dit(), "a U-Net": unet()}


def planned() -> frontier.Frontier:
    graph, table = dit()
    values = {name: {"keep": 0.0, **row} for name, row in table.values().items()}
    plans = [Plan.make(graph, synthetic.make_plan(graph).layers)]
    rows = synthetic.make_rows(graph, plans[0])
    curve = frontier.frontier(graph, values, [], rows)
    bits = tuple(2.5 + 0.5 * i for i in range(10))
    return frontier.Frontier(
        bits, tuple(8 * math.log2(b) + 6 for b in bits), curve.uniform, curve.title, curve.measured
    )


def attributed() -> beeswarm.Beeswarm:
    return beeswarm.beeswarm(
        synthetic.make_attribution(dit()[0], plans=40), metric="noise", method="shap", count=6
    )


PICTURES: dict[str, Callable[[], Figure]] = {
    "role_boxes": lambda: boxes.draw_role_boxes(boxes.role_boxes({"a DiT": dit()}, "uint8-c"), 400),
    "side_by_side": lambda: side_by_side.draw_side_by_side(
        side_by_side.side_by_side(both(), "uint4-c"), 800
    ),
    "side_by_side_narrow": lambda: side_by_side.draw_side_by_side(
        side_by_side.side_by_side(both(), "uint4-c"), 360
    ),
    "block_bars": lambda: block_bars.draw_block_bars(
        block_bars.block_bars(*unet(), "uint8-c"), 800
    ),
    "block_bars_narrow": lambda: block_bars.draw_block_bars(
        block_bars.block_bars(*dit(), "uint8-c"), 360
    ),
    "layer_bits": lambda: drawing.draw_layer_bits(
        plots.layer_bits(dit()[0], synthetic.make_plan(dit()[0])), 700
    ),
    "layer_noise": lambda: drawing.draw_layer_noise(
        plots.noise_by_scheme(*dit(), synthetic.make_plan(dit()[0])), 700
    ),
    "layer_steps": lambda: drawing.draw_layer_noise(plots.noise_by_step(*dit(), "uint8-c"), 700),
    "graph_heat": lambda: graph_heat.draw_graph_heat(graph_heat.graph_heat(*dit(), "uint8-c")),
    "frontier": lambda: frontier.draw_frontier(planned(), 500),
    "beeswarm": lambda: beeswarm.draw_beeswarm(attributed(), 500),
    "contributions": lambda: contributions.draw_contributions(
        contributions.contributions(
            dit()[0],
            synthetic.make_attribution(dit()[0], plans=2),
            plan="plan 0",
            metric="noise",
            method="shapley",
            count=8,
        ),
        500,
    ),
}


def save(name: str, folder: Path) -> Path:
    figure = PICTURES[name]()
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def differs(name: str, tmp_path: Path) -> str | None:
    from matplotlib.testing.compare import compare_images

    message: str | None = compare_images(
        str(BASELINE / f"{name}.png"), str(save(name, tmp_path)), tol=TOLERANCE
    )
    return message


@pytest.mark.skipif(
    not matplotlib.__version__.startswith(DRAWN_BY),
    reason=f"matplotlib {DRAWN_BY}x drew the baselines, here is {matplotlib.__version__}",
)
@pytest.mark.parametrize("name", PICTURES)
def test_a_plot_looks_as_it_did(name: str, tmp_path: Path) -> None:
    assert differs(name, tmp_path) is None


def test_the_tested_version_is_the_one_that_drew_the_baselines() -> None:
    """Else the comparison above would be skipped everywhere."""
    tested = (BASELINE.parents[2] / "constraints.txt").read_text(encoding="utf-8")

    assert f"\nmatplotlib=={DRAWN_BY}" in tested


def test_a_number_that_changed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, table = dit()
    other = table.frame.assign(
        estimate=table.frame["estimate"].where(
            table.frame["site"] != "proj_out", 100 * table.frame["estimate"]
        )
    )
    monkeypatch.setattr(
        sys.modules[__name__], "dit", lambda: (graph, SensitivityTable(table.graph, other))
    )

    assert "did not match" in (differs("role_boxes", tmp_path) or "")
    assert "did not match" in (differs("block_bars_narrow", tmp_path) or "")


def test_every_baseline_is_of_a_plot_and_small() -> None:
    kept = {path.stem: path.stat().st_size for path in BASELINE.glob("*.png")}

    assert set(kept) == set(PICTURES)
    assert max(kept.values()) < 12_000


def lightness(colour: str) -> float:
    """CIE L* of a colour, 0 black to 100 white: what is left of it in grey."""
    linear = [
        (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    y = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return float(116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y)


def test_two_models_beside_each_other_can_be_told_apart_in_grey() -> None:
    first, second = (lightness(colour) for colour in boxes.SERIES[:2])

    assert abs(first - second) > 20
    assert len(set(boxes.MARKERS)) == len(boxes.SERIES)  # and by their marks


def test_the_colours_of_heat_maps_fall_in_lightness_all_the_way() -> None:
    levels = tuple(float(10 * i) for i in range(11))
    _, steps = style.colour_steps(levels)

    found = [lightness(colour) for colour in steps]
    assert len(found) == 10
    assert [a - b for a, b in itertools.pairwise(found) if a - b < 3] == []


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for one in sys.argv[1:] or PICTURES:
        kept = save(one, BASELINE)
        Image.open(kept).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
            kept, optimize=True
        )  # a third of the size, and nobody sees it
        print(kept, kept.stat().st_size)
