"""SensitivityTable: what each choice at each site costs, with error bars and a floor, on disk as
`sensitivity.parquet`.

Long form, keys and never positions: one row for a site, scheme, step bin and metric. The metric
`noise` is the squared error of the output over the squared output (SQNR = -10 log10): noise powers
of independent choices add up, decibels do not. Every other metric, too, is a squared distance over
its scale: less is better, and choices add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import sites
from .artifacts import Header, read_parquet, write_parquet
from .cost import Choices, select
from .errors import QSearchError, nearest
from .graph import OpGraph
from .plan import ONE_RANGE, Plan
from .probe_responses import ProbeResponses, from_columns, rows_of, to_columns
from .scheme import KEEP, Scheme

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "qsearch.sensitivity/1"
#: the metric in which each layer is scored by the one that matters for it
SCORED = "scored"
#: column -> type. `step`: index of the step bin (0 = noisiest); `error`: standard error of
#: `estimate`; `floor`: below it `estimate` means nothing
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
    """Rows of `COLUMNS` for one graph; `frame` is a pandas DataFrame, never changed in place.
    `responses` is there where probes made the table.
    """

    graph: str
    frame: pd.DataFrame
    header: Header | None = None
    responses: ProbeResponses | None = None

    def __post_init__(self) -> None:
        missing = [c for c in COLUMNS if c not in self.frame.columns]
        if missing:
            raise QSearchError(
                f"a sensitivity table needs the columns {', '.join(COLUMNS)}; "
                f"{', '.join(missing)} missing"
            )
        if self.frame["estimate"].isna().any():
            site = self.frame.loc[self.frame["estimate"].isna(), "site"].iloc[0]
            raise QSearchError(
                f"every estimate must be a number; the first that is not belongs to {site}"
            )

    @staticmethod
    def from_rows(
        graph: str, rows: Iterable[Mapping[str, Any]], responses: ProbeResponses | None = None
    ) -> SensitivityTable:
        """Table from an iterable of mappings with the keys of `COLUMNS`.

        Args:
            graph: id of the model's graph.
            rows: one for each site, scheme, step bin and metric.
            responses: probe responses that the rows were made from.

        Returns:
            The table.
        """
        import pandas as pd

        return SensitivityTable(
            graph,
            pd.DataFrame(list(rows), columns=list(COLUMNS)).astype(COLUMNS),
            responses=responses,
        )

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the table."""
        return sorted(self.frame["metric"].unique())

    def values(
        self, metric: str = "noise", steps: Iterable[int] | None = None
    ) -> dict[str, dict[str, float]]:
        """site -> scheme -> estimate, averaged over the step bins (all, or those given).

        Args:
            metric: one of the table's.
            steps: step bins, from 0; all where left out.

        Returns:
            Estimates, in the metric's unit.
        """
        rows = self._rows(metric)
        if steps is not None:
            rows = rows[rows["step"].isin(list(steps))]
        out: dict[str, dict[str, float]] = {}
        means = rows.groupby(["site", "scheme"], sort=True, as_index=False)["estimate"].mean()
        for site, scheme, value in zip(
            means["site"], means["scheme"], means["estimate"], strict=True
        ):
            out.setdefault(str(site), {})[str(scheme)] = float(value)
        return out

    def _rows(self, metric: str) -> pd.DataFrame:
        if metric not in self.metrics:
            made = self.frame["estimator"].iloc[0]
            raise QSearchError(
                f"the table, made by {made}, has no metric "
                f"{metric!r}{nearest(metric, self.metrics)}; profile with it, or ask for "
                "one of those"
            )
        return self.frame[self.frame["metric"] == metric]

    def predict(
        self,
        plan: Plan | Mapping[str, Scheme | str],
        metric: str = "noise",
        steps: Iterable[int] | None = None,
        *,
        interactions: bool = True,
    ) -> tuple[float, float]:
        """(predicted error of a whole plan, its standard error over probes and samples), averaged
        over the step bins (all, or those given).

        To first order in the choices' perturbations, with the interactions between them (needs a
        table made by probes), or without: the sum of the choices' own errors, any table will do.
        Layers that the plan keeps, or does not name, add nothing. In a step bin the choices of the
        range that its middle lies in count.

        Args:
            plan: a plan, or site -> scheme; sites that are missing are kept.
            metric: one of the table's.
            steps: step bins, from 0; all where left out.
            interactions: whether products between choices are counted.

        Returns:
            (prediction, standard error).
        """
        ranges = plan.steps if isinstance(plan, Plan) else ONE_RANGE
        held: Mapping[str, Choices] = (
            plan.choices
            if isinstance(plan, Plan)
            else {site: (Scheme.parse(scheme),) for site, scheme in plan.items()}
        )
        chosen = [
            {
                site: str(mine[r if len(mine) > 1 else 0])
                for site, mine in held.items()
                if mine[r if len(mine) > 1 else 0] != KEEP
            }
            for r in range(len(ranges))
        ]
        rows = self._rows(metric)
        known = set(zip(rows["site"], rows["scheme"], strict=True))
        for site, scheme in ((site, s) for part in chosen for site, s in part.items()):
            if (site, scheme) not in known:
                raise QSearchError(
                    f"the table has no {scheme} for "
                    f"{site}{nearest(f'{site} {scheme}', [' '.join(k) for k in known])}"
                )
        count = self.bins(metric)
        bins = sorted(set(rows["step"]) if steps is None else set(rows["step"]) & set(steps))
        if not bins:
            raise QSearchError(
                f"the table has none of the step bins {sorted(steps or [])}; it has "
                f"{sorted(set(rows['step']))}"
            )
        place = {b: ranges.of(2 * b + 1, 2 * count) for b in bins}  # by the middle of the bin
        if not interactions:
            parts = [
                rows[(rows["step"] == b) & (rows["site"].map(chosen[place[b]]) == rows["scheme"])]
                for b in bins
            ]
            total = float(sum(part["estimate"].sum() for part in parts))
            spread = float(sum((part["error"] ** 2).sum() for part in parts)) ** 0.5
            return total / len(bins), spread / len(bins)
        if self.responses is None or any((metric, b) not in self.responses.values for b in bins):
            raise QSearchError(
                f"interactions need probe responses, which probes leave in the table; of {metric} "
                f"by {rows['estimator'].iloc[0]} there are none, ask without them"
            )
        numbers = [rows_of(self.responses, part) for part in chosen]
        found = []
        for b in bins:
            cell = (metric, b)
            if count > 1 or len(ranges) == 1:
                found.append(self.responses.error(cell, numbers[place[b]]))
            else:  # one bin that holds whole trajectories: each step by its own range
                summed = self.responses.over_ranges(cell, numbers, ranges)
                found.append(self.responses.error(cell, [], summed))
        return sum(v for v, _ in found) / len(bins), sum(e * e for _, e in found) ** 0.5 / len(bins)

    def bins(self, metric: str) -> int:
        """How many step bins the metric was measured in.

        Args:
            metric: one of the table's.

        Returns:
            Their number.
        """
        return int(self._rows(metric)["step"].max()) + 1

    def scored(self, scoring: Mapping[str, str]) -> SensitivityTable:
        """The table with one more metric, `SCORED`: each site by the metric that `scoring` names
        for it (see `scorers`).

        It sums what each group of layers does to the metric it matters for; between metrics there
        are no interactions.

        Args:
            scoring: site -> metric, as `scorers` makes it.

        Returns:
            Another table, with rows of the metric `scored`.
        """
        import pandas as pd

        mine = self.frame[self.frame["site"].map(scoring) == self.frame["metric"]].assign(
            metric=SCORED
        )
        return SensitivityTable(
            self.graph,
            pd.concat([self.frame, mine], ignore_index=True),
            self.header,
            self.responses,
        )

    def at_floor(self) -> pd.DataFrame:
        """Rows whose estimate lies within 3 dB of their measurement floor: noise of the
        measurement, not of the choice.

        Returns:
            A data frame with the columns `COLUMNS`.
        """
        return self.frame[self.frame["estimate"] < 2 * self.frame["floor"]]

    def reliability(self, metric: str = "noise") -> float:
        """Share of the variance between sites that another seed would find again, in [0, 1]: an
        intraclass correlation, of log estimates.

        Within each scheme and step bin, 1 - (mean squared relative error) / (variance of the
        logarithms), averaged; 1 for fewer than three sites.

        Args:
            metric: one of the table's.

        Returns:
            A number from 0 to 1.
        """
        import numpy as np

        rows = self._rows(metric)
        found = []
        for _, cell in rows[rows["estimate"] > 0].groupby(["scheme", "step"]):
            spread = float(np.log(cell["estimate"]).var()) if len(cell) > 2 else 0.0
            if spread > 0:
                relative = (cell["error"] / cell["estimate"]).clip(
                    upper=10.0
                )  # one sample has an infinite error
                found.append(min(1.0, max(0.0, 1 - float((relative**2).mean()) / spread)))
        return sum(found) / len(found) if found else 1.0

    def check(self, graph: OpGraph) -> None:
        """Refuse a table of another graph, or one that names layers or sites that the graph lacks.

        Args:
            graph: of the model that is planned.
        """
        if self.graph != graph.id:
            raise QSearchError(
                f"the table was made for graph {self.graph}, {graph.model} is graph "
                f"{graph.id}; profile this model"
            )
        for site in self.frame["site"].unique():
            sites.check(graph, str(site))

    def save(
        self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0
    ) -> None:
        """Write `sensitivity.parquet`; the responses lie beside the numbers they belong to, as
        three more columns.

        Args:
            path: of the file.
            key: digest of what it was made from.
            parents: file -> digest, of the files that it was made from.
            seed: of what was drawn.
        """
        frame = self.frame[list(COLUMNS)].assign(**to_columns(self.responses, self.frame))
        write_parquet(
            path,
            Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed),
            frame,
        )

    @staticmethod
    def load(path: Path, graph: str | None = None) -> SensitivityTable:
        """Read `sensitivity.parquet`, for the graph with that id where one is given.

        Args:
            path: of the file.
            graph: id that the file must have.

        Returns:
            The table.
        """
        header, frame = read_parquet(path, SCHEMA, graph)
        return SensitivityTable(
            header.graph,
            frame[[c for c in COLUMNS if c in frame.columns]],
            header,
            from_columns(frame),
        )


def scorers(
    graph: OpGraph, rule: Mapping[str, str], names: Iterable[str], metrics: Iterable[str]
) -> dict[str, str]:
    """Layer or site -> metric, by a rule on patterns of name, role or block of layers (or names of
    sites): the first that fits counts.

    Raises `QSearchError` for a pattern that matches nothing, a metric that is not measured, and a
    layer that no pattern matches.
    """
    known = list(metrics)
    for metric in rule.values():
        if metric not in known:
            raise QSearchError(
                f"layers are scored by metrics that are measured; {metric!r} is "
                f"not{nearest(metric, known)}"
            )
    fitting = [
        (
            pattern,
            metric,
            set() if sites.is_site(pattern) else {x.name for x in select(graph, pattern)},
        )
        for pattern, metric in rule.items()
    ]
    found = {}
    for name in names:
        fits = [
            metric
            for pattern, metric, layers in fitting
            if (fnmatchcase(name, pattern) if sites.is_site(name) else name in layers)
        ]
        if not fits:
            raise QSearchError(
                "a rule for metrics must speak of every layer; no pattern of "
                f"{', '.join(rule)} matches {name}: add '*' at the end"
            )
        found[name] = fits[0]
    return found
