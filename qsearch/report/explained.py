"""An attribution as tables for a terminal: what contributes most, with what is left and the sum,
one table a method, kind and metric.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..core.metrics import metric_words

if TYPE_CHECKING:
    from ..core.attribution import Attribution

MOST = 15  # rows of a table
#: what a feature's name says, by its beginning
FEATURES = {
    "bits": "stored bits a weight",
    "lost/": (
        "bits taken away from a weight of full precision, mean over the weights of that "
        "role, block, depth or step"
    ),
    "share/": "share of the weights in a kind of format, 0 to 1",
}


def attribution_tables(
    found: Attribution, most: int = MOST, kinds: tuple[str, ...] = ()
) -> list[Table | str]:
    """Of one plan (its own, else the only one) what each name contributes; of many the mean
    absolute contribution; of scores the largest.

    `most`: rows of a table; `kinds`: those of the attribution that are shown, all when empty.
    """
    shown: list[Table | str] = []
    frame: Any = found.frame
    if kinds:
        frame = frame[frame["kind"].isin(kinds)]
    for (method, kind, metric), rows in frame.groupby(["method", "kind", "metric"], sort=False):
        plans = list(rows["plan"].unique())
        of = f"{metric} by {method}, {kind}s"
        unit = _unit(str(metric), str(method))
        if rows["prediction"].isna().all():
            shown.append(_largest(rows, f"{of}: scores, which add up to nothing"))
        elif "plan" in plans or len(plans) == 1:
            own = rows["plan"] == ("plan" if "plan" in plans else plans[0])
            shown += _plan(rows[own], of + unit, most)
        else:
            shown.append(
                _largest(
                    rows,
                    f"{of}: mean absolute contribution to the predictions of {len(plans)} plans",
                )
            )
    if (frame["kind"] == "feature").any():
        shown.append(_legend(frame[frame["kind"] == "feature"]["name"].unique()))
    return shown


def _unit(metric: str, method: str) -> str:
    """The scale on which values are given."""
    words = metric_words(metric)
    if words.link == "loss_db" and not method.startswith("quadratic"):
        return ", in dB of what is lost (-10 log10(1 - value))"
    return f", in {words.unit}" if words.unit else ""


def _legend(names: Iterable[str]) -> str:
    """What the names of features say."""
    told = {start: text for start, text in FEATURES.items() for n in names if n.startswith(start)}
    tables = sorted({n.partition("/")[0] for n in names if "/" in n} - {"lost", "share"})
    told |= {f"{name}/": f"{name} predicted by the table of sensitivities, dB" for name in tables}
    return "features: " + "; ".join(f"{start}: {text}" for start, text in told.items())


def _plan(rows: Any, of: str, most: int) -> list[Table | str]:
    plan, base, prediction = (
        rows["plan"].iloc[0],
        float(rows["base"].iloc[0]),
        float(rows["prediction"].iloc[0]),
    )
    summed = rows.assign(variance=rows["error"] ** 2).groupby(
        ["name", "other"], sort=False, as_index=False
    )
    sums = summed.agg(
        {
            "value": "sum",
            "variance": lambda v: v.sum(skipna=False),
            "choice": "first",
            "data": "first",
        }
    )
    sums = sums.iloc[sums["value"].abs().argsort(kind="stable")[::-1]]
    table = Table(
        title=f"{of}: what each adds for {plan} (~ within two standard errors of zero)",
        title_justify="left",
    )
    for title in ("name", "choice or value", "adds", "±"):
        table.add_column(
            title,
            justify="left" if title in ("name", "choice or value") else "right",
            overflow="fold",
        )
    for row in sums.head(most).itertuples(index=False):
        error = math.sqrt(row.variance) if row.variance >= 0 else math.nan
        mark = "~" if abs(row.value) < 2 * error else ""
        own = row.choice or ("" if math.isnan(row.data) else f"{row.data:.3g}")
        table.add_row(
            f"{row.name} × {row.other}" if row.other else row.name,
            own,
            f"{mark}{row.value:+.2e}",
            "" if math.isnan(error) else f"{error:.0e}",
        )
    rest = sums.iloc[most:]
    if len(rest):
        table.add_row(f"all others ({len(rest)})", "", f"{rest['value'].sum():+.2e}", "")
    table.add_row("sum", "", f"{sums['value'].sum():+.2e}", "", style="bold")
    return [
        table,
        f"{base:.4g} before any + {sums['value'].sum():.4g} = {prediction:.4g}, as predicted",
    ]


def _largest(rows: Any, title: str) -> Table:
    """Names by the mean absolute value over plans and choices."""
    means = (
        rows.groupby(["plan", "name", "choice"], sort=False)["value"]
        .sum()
        .abs()
        .groupby("name", sort=False)
        .mean()
    )
    means = means.sort_values(ascending=False, kind="stable")
    table = Table(title=title, title_justify="left")
    table.add_column("name", overflow="fold")
    table.add_column("mean |value|", justify="right", overflow="fold")
    for name, value in means.head(MOST).items():
        table.add_row(str(name), f"{value:.3g}")
    if len(means) > MOST:
        table.add_row(f"{len(means) - MOST} more", f"at most {means.iloc[MOST]:.2g}")
    return table
