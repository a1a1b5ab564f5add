"""Surrogate: predicts a measured metric of a plan, says how sure it is, and refuses plans of graphs
it has not seen; on disk as `surrogate/METRIC/`.

What is stored: `surrogate.json` (columns, graphs, held-out scores, residuals for intervals) and the
model's own file beside it, as text or safetensors. A surrogate of several graphs predicts for each
of them; `fit(..., by="graph")` says how well one would do on a graph it has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import plugins
from ..core.artifacts import Header, graph_name, read_json, write_json
from ..core.errors import ArtifactError, QSearchError
from ..core.graph import OpGraph
from ..core.metrics import metric_words
from ..core.plan import Plan
from ..core.table import SensitivityTable
from .data import AbstractModel, Data
from .features import Array, Features, featurize
from .nodes import Nodes, Skeleton, prices_of
from .scores import Scores, half_width, unlinked

SCHEMA = "qsearch.surrogate/1"


@dataclass(frozen=True)
class Surrogate:
    """A fitted predictor of one metric.

    Attributes:
        kind: its plug-in.
        metric: what it predicts.
        columns: the features that it reads.
        residuals: held-out errors, for intervals, on the scale on which it learns
            (`scores.linked`), which is also that of `model`.
        graphs: id -> name of the models that it learnt from.
        schemes: those that its plans had.
        scores: of the held-out predictions.
    """

    kind: str
    metric: str
    columns: tuple[str, ...]
    graphs: dict[str, str]
    schemes: tuple[str, ...]
    scores: Scores
    residuals: Array
    model: AbstractModel
    seed: int = 0
    header: Header | None = field(default=None, compare=False)

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return metric_words(self.metric).lower_is_better

    @property
    def has_columns(self) -> bool:
        """Whether it reads columns of features, and can share a prediction out among them; a graph
        predictor scores operations instead.
        """
        return not plugins.load("surrogates", self.kind).needs_graph

    def data(
        self, graph: OpGraph, plans: Mapping[str, Plan], tables: Sequence[SensitivityTable] = ()
    ) -> Data:
        """The plans as this surrogate reads them.

        Args:
            graph: the model's graph.
            plans: name -> plan.
            tables: sensitivity tables, for surrogates that learn from them.

        Returns:
            A row a plan.

        Raises:
            QSearchError: another graph, or plans with schemes that it has never seen.
        """
        if graph.id not in self.graphs:
            known = ", ".join(f"{name} ({id_})" for id_, name in self.graphs.items())
            raise QSearchError(
                f"the surrogate was fitted on {known}; {graph.model} is graph {graph.id}: "
                "fit one with its measured plans"
            )
        for name, plan in plans.items():
            unseen = {str(s) for s in plan.schemes} - {*self.schemes, "keep"}
            if unseen:
                raise QSearchError(
                    f"the surrogate was fitted on the schemes {', '.join(self.schemes)}; plan "
                    f"{name} has {min(unseen)}: measure plans with it first"
                )
        return assemble(self.kind, graph, plans, tables, self.columns)

    def predict(
        self,
        graph: OpGraph,
        plans: Mapping[str, Plan],
        tables: Sequence[SensitivityTable] = (),
        *,
        coverage: float = 0.9,
    ) -> dict[str, tuple[float, float, float]]:
        """plan -> (prediction, lower and upper end of an interval that holds what is measured with
        probability `coverage`).

        Args:
            graph: the model's graph.
            plans: name -> plan.
            tables: sensitivity tables, for surrogates that learn from them.
            coverage: of the interval, between 0 and 1.

        Returns:
            (prediction, lower end, upper end), in the metric's unit.
        """
        found = self.model.predict(self.data(graph, plans, tables))
        wide = half_width(self.residuals, coverage)
        ends = [unlinked(self.metric, x) for x in (found, found - wide, found + wide)]
        return {
            name: (float(y), float(low), float(high))
            for name, y, low, high in zip(plans, *ends, strict=True)
        }

    def save(self, folder: Path) -> None:
        """Write the folder `folder/METRIC`.

        Args:
            folder: `surrogate/` of a run.
        """
        place = Path(folder) / self.metric
        content: dict[str, Any] = {
            "kind": self.kind,
            "metric": self.metric,
            "graphs": self.graphs,
            "schemes": list(self.schemes),
            "scores": {
                k: None if isinstance(v, float) and not np.isfinite(v) else v
                for k, v in asdict(self.scores).items()
            },
            "columns": list(self.columns),
            "residuals": self.residuals.tolist(),
        }
        self.model.save(place)
        write_json(
            place / "surrogate.json",
            Header(SCHEMA, graph=next(iter(self.graphs)), seed=self.seed),
            content,
        )

    @staticmethod
    def load(folder: Path, graph: str | None = None) -> Surrogate:
        """Read `surrogate/METRIC`, for the graph with that id where one is given.

        Args:
            folder: `surrogate/METRIC`.
            graph: id that the files must have.

        Returns:
            The surrogate.
        """
        path = Path(folder) / "surrogate.json"
        header, c = read_json(path, SCHEMA)
        try:
            graphs = {graph_name(id_): name for id_, name in c["graphs"].items()}
            if graph is not None and graph_name(graph) not in graphs:
                known = ", ".join(f"{name} ({id_})" for id_, name in graphs.items())
                raise ArtifactError(
                    f"{path} was fitted on {known}, the model here is graph {graph}; fit "
                    "one with its measured plans"
                )
            held: dict[str, Any] = {
                k: float("nan") if v is None else v for k, v in c["scores"].items()
            }
            scores = Scores(**held)
            model = plugins.load("surrogates", c["kind"]).load(Path(folder))
            columns, residuals = tuple(c["columns"]), np.array(c["residuals"], np.float64)
            return Surrogate(
                c["kind"],
                c["metric"],
                columns,
                graphs,
                tuple(c["schemes"]),
                scores,
                residuals,
                model,
                header.seed,
                header,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole surrogate ({type(error).__name__}: {error}); make "
                "it again with `qsearch fit`"
            ) from error


def assemble(
    kind: str,
    graph: OpGraph,
    plans: Mapping[str, Plan],
    tables: Sequence[SensitivityTable],
    columns: Sequence[str] | None = None,
    features: Features | None = None,
) -> Data:
    """Plans of one graph as data for a surrogate of this kind, with the given columns (all, when
    left out).
    """
    found = features or featurize(graph, plans, tables)
    names = tuple(found.columns if columns is None else columns)
    nodes: tuple[Nodes, ...] = ()
    if plugins.load("surrogates", kind).needs_graph:
        skeleton, prices = Skeleton(graph), prices_of(tables)
        nodes = tuple(skeleton.with_plan(plan, prices) for plan in plans.values())
    return Data(names, found.take(names), nodes)
