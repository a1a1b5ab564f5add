"""An attribution as tables for a terminal: what contributes most, with what is left and the sum, one table a method, kind and metric."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ..core.attribution import Attribution

MOST = 15  # rows of a table


def attribution_tables(found: Attribution) -> list[Table | str]:
    """Of one plan (its own, else the only one) what each name contributes; of many the mean absolute contribution; of scores the largest."""
    shown: list[Table | str] = []
    frame: Any = found.frame
    for (method, kind, metric), rows in frame.groupby(["method", "kind", "metric"], sort=False):
        plans = list(rows["plan"].unique())
        of = f"{metric} by {method}, {kind}s"
        if rows["prediction"].isna().all():
            shown.append(_largest(rows, f"{of}: scores, which add up to nothing"))
        elif "plan" in plans or len(plans) == 1:
            shown += _plan(rows[rows["plan"] == ("plan" if "plan" in plans else plans[0])], of)
        else:
            shown.append(
                _largest(
                    rows,
                    f"{of}: mean absolute contribution to the predictions of {len(plans)} plans",
                )
            )
    return shown


def _plan(rows: Any, of: str) -> list[Table | str]:
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
    for row in sums.head(MOST).itertuples(index=False):
        error = math.sqrt(row.variance) if row.variance >= 0 else math.nan
        mark = "~" if abs(row.value) < 2 * error else ""
        own = row.choice or ("" if math.isnan(row.data) else f"{row.data:.3g}")
        table.add_row(
            f"{row.name} × {row.other}" if row.other else row.name,
            own,
            f"{mark}{row.value:+.2e}",
            "" if math.isnan(error) else f"{error:.0e}",
        )
    rest = sums.iloc[MOST:]
    if len(rest):
        table.add_row(f"the other {len(rest)} together", "", f"{rest['value'].sum():+.2e}", "")
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
