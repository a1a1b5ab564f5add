"""The pictures that notebooks and README open with: both denoisers of the zoo, profiled by probes,
planned at 4 bits and measured.

`python notebooks/figures/pictures.py --folder runs/pictures` writes `notebooks/pictures/*.png`;
runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from qsearch.core.graph import OpGraph
from qsearch.core.plan import Plan
from qsearch.core.table import SensitivityTable
from qsearch.report import drawing, plots
from qsearch.report.frontier import draw_frontier
from qsearch.report.graph_heat import draw_graph_heat, graph_heat
from qsearch.report.graph_picture import draw
from qsearch.report.graph_view import model_sketch
from qsearch.report.side_by_side import draw_side_by_side, side_by_side
from qsearch.stages.config import parse
from qsearch.stages.folder import Run
from qsearch.stages.frontier import frontier_of, make_frontier
from qsearch.stages.run import run as whole_job

WHERE = Path(__file__).parent.parent / "pictures"
#: strips that zoo_video.py made, and the pixels of the first four
STRIPS, FIRST = Path(__file__).with_name("zoo-scenes-video.png"), 440
SETTINGS = {
    "sampling": {"steps": 10},
    "profile": {
        "estimator": "probe",
        "schemes": ["uint2-c", "uint3-c", "uint4-c", "uint8-c", "km3-c", "km4-c"],
        "samples": 4,
        "batch": 1,
        "probes": 8,
    },
    "evaluate": {"samples": 16, "metrics": ["sqnr", "ssim", "alignment"]},
}


def keep(name: str, made: Figure | Image.Image) -> None:
    """Write a drawing with 64 colours, a third of the bytes; what a model made in all of its own,
    since banding looks like damage by quantization.
    """
    path = WHERE / f"{name}.png"
    if isinstance(made, Figure):
        file = io.BytesIO()
        made.savefig(file, dpi=1.25 * made.dpi)
        few = Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    else:
        made.convert("RGB").save(path, optimize=True)
    print(f"{path.stat().st_size:>7} bytes  {path}")


def main() -> None:
    """Make the runs, then the pictures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/pictures"))
    folder = parser.parse_args().folder
    WHERE.mkdir(exist_ok=True)
    models: dict[str, tuple[OpGraph, SensitivityTable]] = {}
    for name in ("scenes-unet", "scenes-dit"):
        run = Run(
            parse(
                SETTINGS | {"model": name, "folder": str(folder / name.removeprefix("scenes-"))},
                "pictures.py",
            )
        )
        rows = whole_job(run.config)
        graph = OpGraph.load(run.path("graph.json"))
        models[name] = (graph, SensitivityTable.load(run.path("sensitivity.parquet"), graph.id))
    section, (graph, table) = run.config.allocate, models["scenes-dit"]
    sheet = Image.open(run.path("contact_sheet.png"))
    keep(
        "tour",
        sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS),
    )
    keep("graph", draw(model_sketch(graph)))
    strips = Image.open(STRIPS)
    keep("video", strips.crop((0, 0, strips.width, FIRST)))
    keep("sensitivity", draw_graph_heat(graph_heat(graph, table, "uint4-c")))
    keep(
        "dit_vs_unet", draw_side_by_side(side_by_side(dict(sorted(models.items())), "uint4-c"), 900)
    )
    keep(
        "frontier",
        draw_frontier(
            frontier_of(section, graph, table, make_frontier(section, graph, table), rows)
        ),
    )
    keep(
        "plan",
        drawing.draw_layer_bits(plots.layer_bits(graph, Plan.load(run.path("plan.json"), graph))),
    )


if __name__ == "__main__":
    main()
