"""SensitivityTable: what each choice at each site costs, with error bars and a floor, on disk as `sensitivity.parquet`.

Long form, keys and never positions: one row for a site, scheme, step bin and metric. The metric `noise` is the squared error
of the output over the squared output (SQNR = -10 log10): noise powers of independent choices add up, decibels do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import Header, read_parquet, write_parquet
from .errors import QSearchError, nearest
from .graph import OpGraph

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "qsearch.sensitivity/1"
#: column -> type. `step`: index of the step bin (0 = noisiest); `error`: standard error of `estimate`; `floor`: below it `estimate` means nothing
COLUMNS = {
    "site": "str",
    "scheme": "str",
    "step": "int64",
    "metric": "str",
    "estimate": "float64",
    "error": "float64",
    "floor": "float64",
    "estimator": "str",
    "seed": "int64",
}


@dataclass(frozen=True)
class SensitivityTable:
    """Rows of `COLUMNS` for one graph; `frame` is a pandas DataFrame, never changed in place."""

    graph: str
    frame: pd.DataFrame
    header: Header | None = None

    def __post_init__(self) -> None:
        missing = [c for c in COLUMNS if c not in self.frame.columns]
        if missing:
            raise QSearchError(f"a sensitivity table needs the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing")
        if self.frame["estimate"].isna().any():
            site = self.frame.loc[self.frame["estimate"].isna(), "site"].iloc[0]
            raise QSearchError(f"every estimate must be a number; the first that is not belongs to {site}")

    @staticmethod
    def from_rows(graph: str, rows: Iterable[Mapping[str, Any]]) -> SensitivityTable:
        """Table from an iterable of mappings with the keys of `COLUMNS`."""
        import pandas as pd

        return SensitivityTable(graph, pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the table."""
        return sorted(self.frame["metric"].unique())

    def values(self, metric: str = "noise", steps: Iterable[int] | None = None) -> dict[str, dict[str, float]]:
        """site -> scheme -> estimate, averaged over the step bins (all, or those given)."""
        if metric not in self.metrics:
            raise QSearchError(f"the table has no metric {metric!r}{nearest(metric, self.metrics)}")
        rows = self.frame[self.frame["metric"] == metric]
        if steps is not None:
            rows = rows[rows["step"].isin(list(steps))]
        out: dict[str, dict[str, float]] = {}
        means = rows.groupby(["site", "scheme"], sort=True, as_index=False)["estimate"].mean()
        for site, scheme, value in zip(means["site"], means["scheme"], means["estimate"], strict=True):
            out.setdefault(str(site), {})[str(scheme)] = float(value)
        return out

    def at_floor(self) -> pd.DataFrame:
        """Rows whose estimate lies within 3 dB of their measurement floor: noise of the measurement, not of the choice."""
        return self.frame[self.frame["estimate"] < 2 * self.frame["floor"]]

    def check(self, graph: OpGraph) -> None:
        """Refuse a table of another graph, or one that speaks of layers the graph lacks."""
        if self.graph != graph.id:
            raise QSearchError(f"the table was made for graph {self.graph}, {graph.model} is graph {graph.id}; profile this model")
        for site in self.frame["site"].unique():
            graph.layer(str(site))

    def save(self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0) -> None:
        """Write `sensitivity.parquet`."""
        write_parquet(path, Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed), self.frame[list(COLUMNS)])

    @staticmethod
    def load(path: Path, graph: str | None = None) -> SensitivityTable:
        """Read `sensitivity.parquet`, for the graph with that id where one is given."""
        header, frame = read_parquet(path, SCHEMA, graph)
        return SensitivityTable(header.graph, frame, header)
