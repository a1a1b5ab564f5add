"""Attribution: what each layer, feature, pair or block contributes to a prediction, with values
that add up, on disk as `attribution.parquet`.

One noun for every explainer: TreeSHAP on a surrogate, exact Shapley values of the probes' quadratic
model, their pairs, a graph predictor's scores. Long form: a row says that, in the prediction of
`metric` for `plan`, `name` contributes `value`. Within a plan, method, kind and metric the values
and `base` add up to `prediction`; that is checked with a tolerance, not believed. Scores, which
share nothing out, have no prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import Header, read_parquet, write_parquet
from .errors import QSearchError, nearest

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "qsearch.attribution/1"
#: what a value may belong to: a layer's choice; a column of features; two layers' choices; an
#: operation or a block of the graph
KINDS = ("layer", "feature", "pair", "operation", "block")
#: column -> type. `plan`: the plan's name. `other`: of a pair the second layer, else "". `choice`:
#: the scheme (of a pair, both, with a space), else "". `step`: step bin (of a trajectory, the
#: sampler step), -1 for all at once. `data`: a feature's own value, else NaN. `error`: standard
#: error or NaN. `base`: the prediction where nothing is attributed; `prediction`: NaN for scores.
COLUMNS = {
    "plan": "str",
    "method": "str",
    "kind": "str",
    "metric": "str",
    "step": "int64",
    "name": "str",
    "other": "str",
    "choice": "str",
    "value": "float64",
    "error": "float64",
    "data": "float64",
    "base": "float64",
    "prediction": "float64",
}
_DEFAULTS = {"other": "", "choice": "", "step": -1, "error": math.nan, "data": math.nan}
_WHOLE = ["plan", "method", "kind", "metric"]
#: of the range of the predictions, by which values and base may miss one
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Attribution:
    """Rows of `COLUMNS` for one graph; `frame` is a pandas DataFrame, never changed in place.
    Refuses values that do not add up.
    """

    graph: str
    frame: pd.DataFrame
    header: Header | None = None

    def __post_init__(self) -> None:
        missing = [c for c in COLUMNS if c not in self.frame.columns]
        if missing:
            raise QSearchError(
                f"an attribution needs the columns {', '.join(COLUMNS)}; "
                f"{', '.join(missing)} missing"
            )
        if unknown := sorted(set(self.frame["kind"]) - set(KINDS)):
            raise QSearchError(
                f"a value belongs to one of {', '.join(KINDS)}; given "
                f"{unknown[0]!r}{nearest(unknown[0], KINDS)}"
            )
        self._check()

    @staticmethod
    def from_rows(graph: str, rows: Iterable[Mapping[str, Any]]) -> Attribution:
        """Attribution from mappings with the keys of `COLUMNS`; `other`, `choice`, `step`, `error`
        and `data` may be left out.

        Args:
            graph: id of the model's graph.
            rows: one for each value.

        Returns:
            The attribution.
        """
        import pandas as pd

        return Attribution(
            graph,
            pd.DataFrame([_DEFAULTS | dict(row) for row in rows], columns=list(COLUMNS)).astype(
                COLUMNS
            ),
        )

    @staticmethod
    def from_columns(graph: str, columns: Mapping[str, Any]) -> Attribution:
        """The same from arrays, a column each; a single value stands for all rows.

        Args:
            graph: id of the model's graph.
            columns: key of `COLUMNS` -> values, all of one length, or a single value.

        Returns:
            The attribution.
        """
        import pandas as pd

        return Attribution(
            graph, pd.DataFrame(_DEFAULTS | dict(columns))[list(COLUMNS)].astype(COLUMNS)
        )

    def _check(self) -> None:
        """Raises `QSearchError` where values and base miss a prediction by more than `TOLERANCE`
        times the range of the predictions and bases.
        """
        sums = self.sums()
        sums = sums[sums["prediction"].notna()]
        for (method, metric), part in sums.groupby(["method", "metric"]):
            spread = float(
                part[["base", "prediction"]].max().max() - part[["base", "prediction"]].min().min()
            )
            off = (part["value"] + part["base"] - part["prediction"]).abs()
            if not (off <= TOLERANCE * spread).all():
                worst = part.iloc[int(off.fillna(math.inf).to_numpy().argmax())]
                raise QSearchError(
                    f"values and base must add up to the prediction; those of {method} "
                    f"for {metric} of plan {worst['plan']} make "
                    f"{worst['value'] + worst['base']:.9g}, predicted is {worst['prediction']:.9g}"
                )

    def sums(self) -> pd.DataFrame:
        """A row a plan, method, kind and metric: the sum of its values, its base and its
        prediction.

        Returns:
            A data frame; values and base add up to the prediction.
        """
        return self.frame.groupby(_WHOLE, as_index=False, sort=False).agg(
            {"value": "sum", "base": "first", "prediction": "first"}
        )

    def select(
        self,
        *,
        plan: str | None = None,
        method: str | None = None,
        kind: str | None = None,
        metric: str | None = None,
    ) -> pd.DataFrame:
        """The rows with the given plan, method, kind and metric.

        Args:
            plan: name of a plan; any where it is left out, as with the others.
            method: how the values were computed.
            kind: what the values belong to: layers, pairs, features.
            metric: which prediction they explain.

        Returns:
            A data frame with the columns `COLUMNS`.

        Raises:
            QSearchError: there is no such row; the message names the nearest name.
        """
        frame = self.frame
        for column, wanted in (
            ("plan", plan),
            ("method", method),
            ("kind", kind),
            ("metric", metric),
        ):
            if wanted is not None:
                known = set(frame[column])
                if wanted not in known:
                    raise QSearchError(
                        f"the attribution has no {column} {wanted!r}{nearest(wanted, known)}"
                    )
                frame = frame[frame[column] == wanted]
        return frame

    def totals(self, *, plan: str, method: str, kind: str, metric: str) -> dict[str, float]:
        """name -> value, summed over steps, largest first.

        Args:
            plan: name of a plan.
            method: how the values were computed.
            kind: what the values belong to: layers, pairs, features.
            metric: which prediction they explain.

        Returns:
            name -> sum over the step bins.
        """
        rows = self.select(plan=plan, method=method, kind=kind, metric=metric)
        found = rows.groupby("name")["value"].sum().sort_values(ascending=False)
        return {str(name): float(value) for name, value in found.items()}

    @staticmethod
    def together(parts: Iterable[Attribution]) -> Attribution:
        """Several attributions of one graph as one.

        Args:
            parts: attributions of one graph.

        Returns:
            One attribution with all rows.
        """
        import pandas as pd

        found = list(parts)
        if len({part.graph for part in found}) != 1:
            raise QSearchError(
                "attributions are put together for one graph; given "
                f"{len({part.graph for part in found})}"
            )
        return Attribution(
            found[0].graph, pd.concat([part.frame for part in found], ignore_index=True)
        )

    def save(
        self, path: Path, *, key: str = "", parents: Mapping[str, str] | None = None, seed: int = 0
    ) -> None:
        """Write `attribution.parquet`.

        Args:
            path: of the file.
            key: digest of what it was made from.
            parents: file -> digest, of the files that it was made from.
            seed: of what was drawn.
        """
        write_parquet(
            path,
            Header(SCHEMA, graph=self.graph, key=key, parents=dict(parents or {}), seed=seed),
            self.frame[list(COLUMNS)],
        )

    @staticmethod
    def load(path: Path, graph: str | None = None) -> Attribution:
        """Read `attribution.parquet`, for the graph with that id where one is given; values that no
        longer add up are refused.

        Args:
            path: of the file.
            graph: id that the file must have.

        Returns:
            The attribution.
        """
        header, frame = read_parquet(path, SCHEMA, graph)
        return Attribution(header.graph, frame, header)
