"""`python -m tests.golden.make`: writes one small file of each schema version that today's qsearch
writes.

A file that is already there is left as it is: golden files are made once, by the version that
introduced them, and must load for ever after.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from qsearch.core import attribution, graph, latency, plan, table, trials
from qsearch.core.cost import Budget
from qsearch.core.steps import StepRanges
from qsearch.learn import surrogate
from qsearch.learn.contracts import small_study
from qsearch.learn.fitting import fit
from tests.conftest import make_graph

FOLDER = Path(__file__).parent
LAYERS = {
    "embed": "keep",
    "blocks.0.to_q": "int2-c",
    "blocks.0.ff": "int4-g16+a8",
    "out": "uint8-t",
}
CHOICES = {**LAYERS, "out": ["uint8-t", "uint4-c+a8t"]}
ROWS = [
    {
        "site": "out",
        "scheme": "int4-c",
        "step": step,
        "metric": "noise",
        "estimate": 0.5 / (step + 1),
        "error": 0.01,
        "floor": 1e-4,
        "estimator": "sweep",
        "seed": 3,
    }
    for step in range(2)
]
SHARES = [
    {
        "plan": "plan",
        "method": "shapley",
        "kind": "layer",
        "metric": "noise",
        "step": step,
        "name": "out",
        "choice": "uint8-t",
        "value": 0.125 * (step + 1),
    }
    | {"other": "", "error": 0.01, "data": 2.0, "base": 0.25, "prediction": 0.625}
    for step in range(2)
]
METRICS = {"noise": (0.25, 0.01), "ssim": (0.9, 0.0)}
SOLVER = plan.Solver("ilp", "optimal", 0.0, 1.5, 1.5, 0.01)


def paths() -> dict[str, Path]:
    """Noun -> where today's version of its file lies, e.g. graph-1.json."""
    nouns = {
        "graph": (graph.SCHEMA, "json"),
        "plan": (plan.SCHEMA, "json"),
        "latency": (latency.SCHEMA, "json"),
        "table": (table.SCHEMA, "parquet"),
        "trials": (trials.STUDY, "db"),
        "attribution": (attribution.SCHEMA, "parquet"),
    }
    found = {
        noun: FOLDER / f"{noun}-{schema.partition('/')[2]}.{ending}"
        for noun, (schema, ending) in nouns.items()
    }
    return found | {
        "surrogate": FOLDER
        / f"surrogate-{surrogate.SCHEMA.partition('/')[2]}.d"
        / "sqnr"
        / "surrogate.json"
    }


def main() -> None:
    """Write the files that are missing."""
    tiny, where = make_graph(), {noun: path for noun, path in paths().items() if not path.exists()}
    chosen = plan.Plan.make(tiny, LAYERS, Budget(average_bits=8.0), SOLVER)
    ranges = plan.Plan.make(
        tiny, CHOICES, Budget(average_bits=9.0), SOLVER, steps=StepRanges.equal(2)
    )
    if "graph" in where:
        tiny.save(where["graph"], key="golden")
    if "table" in where:
        table.SensitivityTable.from_rows(tiny.id, ROWS).save(
            where["table"], key="golden", parents={"graph": tiny.id}, seed=3
        )
    if "plan" in where:
        ranges.save(where["plan"], key="golden", parents={"table": "0123456789abcdef"}, seed=3)
    if "latency" in where:
        seconds = {layer.name: {"keep": 2e-3, LAYERS[layer.name]: 1e-3} for layer in tiny}
        latency.Latency(tiny.id, "a clock", seconds, 5e-4).save(where["latency"])
    if "attribution" in where:
        attribution.Attribution.from_rows(tiny.id, SHARES).save(where["attribution"], key="golden")
    if "surrogate" in where:
        study = small_study(6)
        fit(study.graph, study.trials, metric="sqnr", kind="ridge", folds=2).save(
            where["surrogate"].parent.parent
        )
    if "trials" in where:
        trials.Trials(where["trials"], tiny).add("golden", chosen, METRICS, "setting")
        with closing(sqlite3.connect(where["trials"])) as database:
            database.execute("pragma page_size = 512")  # 40 tables and indices, a page each
            database.execute("vacuum")
    for path in where.values():
        print(f"{path.stat().st_size:>7} bytes  {path.name}")


if __name__ == "__main__":
    main()
