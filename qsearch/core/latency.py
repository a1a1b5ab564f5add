"""Latency: how long each layer takes with each scheme on one device, by a roofline or by a
stopwatch, on disk as `latency.json`.

A call takes as long as its operations one after the other: each layer with its own scheme, and the
rest, which no scheme changes. So a plan's time is a sum over layers, and can be a budget like any
other. `graphs/latency.py` makes one from a device's card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .artifacts import Header, read_json, write_json
from .errors import ArtifactError, QSearchError, nearest
from .graph import OpGraph
from .scheme import KEEP, Scheme

SCHEMA = "qsearch.latency/1"


@dataclass(frozen=True)
class Latency:
    """Times of a model's layers on one device.

    Attributes:
        graph: id of the model's graph.
        seconds: layer -> scheme -> seconds of one call.
        rest: seconds of all that no scheme changes.
        device: on what, in words.
        sizes: of the graph whose call was timed (`OpGraph.sizes`), "" where it is not known.
    """

    graph: str
    device: str
    seconds: Mapping[str, Mapping[str, float]]
    rest: float = 0.0
    sizes: str = ""
    header: Header | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        numbers = [
            (name, scheme, s) for name, row in self.seconds.items() for scheme, s in row.items()
        ] + [("the rest", str(KEEP), self.rest)]
        for name, scheme, seconds in numbers:
            if not (math.isfinite(seconds) and seconds >= 0):
                raise QSearchError(
                    f"a time must be finite and not below zero; {name} at {scheme} has {seconds}"
                )

    def of(self, layer: str, scheme: Scheme) -> float:
        """Seconds of one layer with one scheme.

        Args:
            layer: its name.
            scheme: its choices.

        Returns:
            Seconds.

        Raises:
            QSearchError: it was not timed; the message names what was for that layer.
        """
        row = self.seconds.get(layer)
        if row is None:
            raise QSearchError(
                f"the latency table of {self.device} has no layer "
                f"{layer!r}{nearest(layer, self.seconds)}"
            )
        if str(scheme) not in row:
            raise QSearchError(
                f"the latency table of {self.device} has no {scheme} for "
                f"{layer}{nearest(str(scheme), row)}"
            )
        return row[str(scheme)]

    def total(self, layers: Mapping[str, Scheme]) -> float:
        """Seconds of one call with these schemes.

        Args:
            layers: layer -> scheme, of every layer that is timed.

        Returns:
            Seconds.
        """
        return self.rest + math.fsum(self.of(name, scheme) for name, scheme in layers.items())

    def check(self, graph: OpGraph) -> None:
        """Raise `QSearchError` where the table is of another model, or of calls of another size.

        Args:
            graph: of the model that is planned.
        """
        if self.graph != graph.id:
            raise QSearchError(
                f"the latency table was made for graph {self.graph}, {graph.model} is "
                f"graph {graph.id}; time this model"
            )
        if self.sizes and self.sizes != graph.sizes:
            raise QSearchError(
                "the latency table was made for calls of another size (resolution, "
                f"batch, guidance) of {graph.model}; "
                "time it at this size"
            )

    def save(self, path: Path) -> None:
        """Write `latency.json`, one layer a line.

        Args:
            path: of the file.
        """
        content = {
            "device": self.device,
            "sizes": self.sizes,
            "rest": self.rest,
            "seconds": {name: dict(row) for name, row in self.seconds.items()},
        }
        write_json(path, Header(SCHEMA, graph=self.graph), content, lines=("seconds",))

    @staticmethod
    def load(path: Path, graph: str | None = None) -> Latency:
        """Read `latency.json`, for the graph with that id where one is given.

        Args:
            path: of the file.
            graph: id that the file must have.

        Returns:
            The table.
        """
        header, content = read_json(path, SCHEMA, graph)
        try:
            seconds = {
                str(name): {str(Scheme.parse(s)): float(v) for s, v in row.items()}
                for name, row in content["seconds"].items()
            }
            return Latency(
                header.graph,
                str(content["device"]),
                seconds,
                float(content["rest"]),
                str(content.get("sizes", "")),
                header,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is not a whole latency table ({type(error).__name__}: {error}); "
                "make it again"
            ) from error
