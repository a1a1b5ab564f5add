"""What does a relative weight error cost in layers of each role, and how well do such guesses rank
the choices of another model?

    python notebooks/figures/quick.py --folder FOLDER

Reads the tables and graphs that `sizes.py types MODEL --folder FOLDER` left, of every model that is
there. Guesses for a model are its relative weight errors, alone and times the prior of the others:
the median, over the layers of a role, of noise over relative weight error. Both are compared with
its measured table over all layers and schemes; the first are what `allocate --quick` goes by.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from figure import publish

from qsearch import zoo
from qsearch.core.graph import OpGraph
from qsearch.core.scheme import Scheme
from qsearch.core.table import SensitivityTable
from qsearch.measure.quick import relative_errors
from qsearch.measure.shards import Weights, key


def main() -> None:
    """Priors of each model, guesses for the others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/sizes"))
    folder = parser.parse_args().folder
    models = sorted(path.name.removesuffix(".graph.json") for path in folder.glob("*.graph.json"))
    cells = {model: measured(folder, model) for model in models}
    rows: list[dict[str, Any]] = []
    for model, own in cells.items():
        others = pd.concat([frame for name, frame in cells.items() if name != model])
        known = prior_of(others)
        factor = own["role"].map(lambda role, k=known: k.get(role, k["any"])["noise"])
        guessed = own["error"] * factor
        within = [
            guessed[own["scheme"] == s].corr(
                own.loc[own["scheme"] == s, "noise"], method="spearman"
            )
            for s in own["scheme"].unique()
        ]
        rows.append(
            {
                "model": model,
                "prior of": ", ".join(name for name in cells if name != model),
                "Spearman with roles": guessed.corr(own["noise"], method="spearman"),
                "weight errors alone": own["error"].corr(own["noise"], method="spearman"),
                "with roles, within a scheme": float(pd.Series(within).median()),
                "cells": len(own),
            }
        )
    publish(__file__, rows, title="Guesses from weights and roles against measured tables", seed=0)


def measured(folder: Path, model: str) -> pd.DataFrame:
    """role, scheme, relative weight error and measured noise (mean over step bins) of every choice
    that rounds weights alone.
    """
    graph = OpGraph.load(folder / f"{model}.graph.json")
    frame = SensitivityTable.load(folder / f"{model}-float32.parquet", graph.id).frame
    noise = frame.groupby(["site", "scheme"])["estimate"].mean()
    place = zoo.folder(model)
    part = next(n for n in ("transformer", "unet") if (place / n / "config.json").is_file())
    weights, rows = Weights(place / part), []
    for layer in graph.quantizable:
        texts = [s for site, s in noise.index if site == layer.name]
        plain = [Scheme.parse(s) for s in texts if not Scheme.parse(s).activation]
        for scheme, error in relative_errors(weights.tensor(key(layer)), layer, plain).items():
            rows.append(
                {
                    "role": layer.role,
                    "scheme": str(scheme),
                    "error": error,
                    "noise": float(noise[layer.name, str(scheme)]),
                }
            )
    return pd.DataFrame(rows)


def prior_of(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """role -> median of noise over relative error, and the factor within which half of the layers
    lie; `any` for all.
    """
    ratio = frame["noise"] / frame["error"]
    found = {}
    for role, own in [*ratio.groupby(frame["role"]), ("any", ratio)]:
        low, middle, high = (float(own.quantile(q)) for q in (0.25, 0.5, 0.75))
        found[str(role)] = {
            "noise": float(f"{middle:.3g}"),
            "spread": max(1.0, float(f"{(high / max(low, 1e-12)) ** 0.5:.3g}")),
        }
    return found


if __name__ == "__main__":
    main()
