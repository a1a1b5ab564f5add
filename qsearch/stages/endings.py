"""Endings: what is printed when a stage has finished: sizes, decibels, the layers that
matter, and the next command.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.graph import OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.scheme import KEEP, Scheme
from ..core.table import SensitivityTable
from ..core.units import size_of

if TYPE_CHECKING:
    from .folder import Run

#: layers that are named
_NAMED = 3
#: bytes of a weight at 16 bits
_FULL = 2


def most_sensitive(table: SensitivityTable, metric: str, graph: OpGraph) -> str:
    """The layers that lose most in the coarsest scheme, in words; "" where nothing was measured of
    layers.
    """
    from ..report.plots import decibels

    values = table.values(metric)
    layers = {layer.name for layer in graph}
    schemes = {s for name, row in values.items() if name in layers for s in row}
    if not schemes:
        return ""
    coarsest = min(schemes, key=lambda s: (Scheme.parse(s).bits, s))
    losses = {n: row[coarsest] for n, row in values.items() if n in layers and coarsest in row}
    worst = sorted(losses, key=lambda n: -losses[n])[:_NAMED]
    named = ", ".join(f"{n} ({decibels(losses[n]):.1f} dB)" for n in worst)
    return f"most sensitive at {coarsest}: {named}"


def say_profiled(run: Run, graph: OpGraph, table: SensitivityTable) -> None:
    """After profiling."""
    for metric in table.metrics[:1]:
        if words := most_sensitive(table, metric, graph):
            run.progress.say(f"profile: {words}")
    run.say_done(
        f"profile: wrote {run.path('sensitivity.parquet')}", f"qsearch allocate {run.folder}"
    )


def say_allocated(run: Run, graph: OpGraph, table: SensitivityTable, plan: Plan) -> None:
    """After a plan was made: how it was found, its size, what is predicted, where the bits went."""
    settings, solver = run.config.allocate, plan.solver
    before = graph.weights * _FULL
    run.progress.say(
        f"allocate: {plan.achieved.average_bits:.3f} stored bits a weight, {solver.name} says "
        f"{solver.status} in {solver.seconds:.2f} s"
    )
    predicted = ""
    if len(plan.steps) == 1 and not settings.weights:
        value = predicted_decibels(table, plan, settings.metric)
        predicted = f"; predicted {value:.1f} dB" if math.isfinite(value) else ""
    run.progress.say(
        f"allocate: {size_of(plan.achieved.bytes)} of weights, {size_of(before)} at 16 bits"
        f"{predicted}"
    )
    kept = [n for n, held in plan.weights.items() if held == (KEEP,) and graph.layer(n).quantizable]
    finest = sorted(kept, key=lambda n: -graph.layer(n).weights)[:_NAMED]
    if kept and len(kept) == len(graph.quantizable):
        run.progress.say(
            "allocate: no layer is quantized; a smaller plan needs a lower limit (16 stored bits a "
            "weight are full precision)"
        )
    elif kept:
        run.progress.say(
            f"allocate: {len(kept)} layers stay in full precision, such as {', '.join(finest)}"
        )
    run.say_done(f"allocate: wrote {run.path('plan.json')}", f"qsearch evaluate {run.folder}")


def predicted_decibels(table: SensitivityTable, plan: Plan, metric: str) -> float:
    """What the table predicts of a plan, in dB above its error; NaN where there is none, or where
    a scheme was not measured.
    """
    from ..report.plots import decibels
    from ..report.tables import predicted_noise

    return float(decibels(predicted_noise(table, plan, metric=metric)))


def _gaps(row: Mapping[str, Any], beside: Mapping[str, Any]) -> str:
    """What a plan has more than another of each metric that has a value a sample, in words: their
    differences sample by sample, which vary less than either.
    """
    from ..report.tables import difference

    said = []
    for metric in row.get("samples", {}):
        if metric in beside.get("samples", {}):
            words, (gap, error) = metric_words(metric), difference(row, beside, metric)
            unit = f" {words.unit}" if words.unit else ""
            said.append(
                f"{words.label or words.title} {gap:+.{words.digits}f} ± "
                f"{error:.{words.digits}f}{unit}"
            )
    return ", ".join(said)


def say_evaluated(run: Run, plan: Plan, rows: Sequence[Mapping[str, Any]], own: str) -> None:
    """After an evaluation: what was predicted and measured of the plan, its files, and what to do
    with it.
    """
    row = next((r for r in rows if r["plan"] == own), None)
    found = (row or {}).get("metrics", {}).get("output_sqnr")
    if found is not None and run.path("sensitivity.parquet").is_file() and len(plan.steps) == 1:
        table = SensitivityTable.load(run.path("sensitivity.parquet"), plan.graph)
        if "noise" in table.metrics:
            said = predicted_decibels(table, plan, "noise")
            words = f", predicted were {said:.1f} dB" if math.isfinite(said) else ""
            run.progress.say(
                f"evaluate: the denoiser's output stands {found[0]:.1f} ± {found[1]:.1f} dB above "
                f"its error{words}"
            )
    beside = next((r for r in rows if str(r["plan"]).startswith("uniform")), None)
    if row is not None and beside is not None and (gaps := _gaps(row, beside)):
        run.progress.say(f"evaluate: against {beside['plan']}, from the same noise: {gaps}")
    target = run.config.allocate.target or "torchao"
    run.say_done(
        f"evaluate: wrote results.json, trials.db and pictures/ in {run.folder}",
        f"qsearch export {run.folder} --to {target}, or qsearch apply {run.folder}",
    )
