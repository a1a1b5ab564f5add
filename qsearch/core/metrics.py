"""MetricWords: what a metric says of itself: its direction, its name and unit for tables, and the
scale on which it is learnt.

A metric's plug-in declares these as plain constants, which are read here without running the
plug-in: whoever ranks plans or draws a table of them needs neither torch nor the metric's own
dependencies.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import plugins
from .errors import QSearchError

#: how a metric is put on the scale on which it is learnt and explained; "loss_db": -10 log10 of
#: what is missing to 1
LINKS = ("identity", "loss_db")
_LEAST = 1e-3  # a loss that counts as none
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class MetricWords:
    """What the plug-in of a metric declares; a constant of the same name for each attribute.

    Attributes:
        higher_is_better: the direction; None where it is unknown.
        title: the metric in words, for pages and axes.
        label: the same for the head of a narrow column.
        unit: its unit, "" for none.
        digits: digits behind the point in tables.
        link: "identity", or "loss_db" for a metric that is 1 where nothing is lost: near 1 values
            crowd, and in decibels of what is lost differences there mean as much as elsewhere.
        against_size: whether the report draws it against a plan's size.
    """

    higher_is_better: bool | None
    title: str
    label: str = ""
    unit: str = ""
    digits: int = 3
    link: str = "identity"
    against_size: bool = False

    @property
    def lower_is_better(self) -> bool:
        """Whether less is better, for certain."""
        return self.higher_is_better is False

    @property
    def long(self) -> str:
        """Title and unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    @property
    def short(self) -> str:
        """Label and unit."""
        return f"{self.label or self.title}, {self.unit}" if self.unit else self.label or self.title

    @property
    def arrow(self) -> str:
        """↑ or ↓, towards what is better; nothing where it is not declared."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    def linked(self, values: _Array) -> _Array:
        """Values on the scale on which the metric is learnt."""
        if self.link == "identity":
            return np.asarray(values)
        return np.asarray(-10 * np.log10(np.maximum(1 - values, 0) + _LEAST))

    def unlinked(self, values: _Array) -> _Array:
        """The inverse of `linked`."""
        if self.link == "identity":
            return np.asarray(values)
        return np.asarray(1 + _LEAST - 10 ** (-values / 10))


#: what is measured of the denoiser's own output, by no plug-in: an estimator's squared error, and
#: its ratio in decibels
_OUTPUT = {
    "noise": MetricWords(False, "noise of the denoiser's output", "noise"),
    "output_sqnr": MetricWords(
        True, "SQNR of the denoiser's output", "output SQNR", "dB", 1, against_size=True
    ),
}


def metric_words(name: str) -> MetricWords:
    """What a metric declares; a metric that is not installed here has its name alone, and no
    direction.

    Raises:
        QSearchError: the plug-in declares something that can't be.
    """
    return _OUTPUT[name] if name in _OUTPUT else _declared(name, tuple(sys.path))


@lru_cache(maxsize=256)
def _declared(name: str, path: tuple[str, ...]) -> MetricWords:
    """The same for a plug-in, remembered as long as `path`, where outsiders' are found, is the
    same.
    """
    declared: dict[str, Any] = {}
    if name in plugins.names("metrics", outside=False) or name in plugins.names("metrics"):
        with suppress(ImportError):
            declared = plugins.constants("metrics", name, [f.name for f in fields(MetricWords)])
    words = replace(MetricWords(None, name), **declared)
    if words.link not in LINKS:
        raise QSearchError(
            f"a metric's link is one of {', '.join(LINKS)}; {name} says {words.link!r}"
        )
    if declared and not isinstance(words.higher_is_better, bool):
        raise QSearchError(
            f"a metric says whether higher_is_better, True or False; {name} does not"
        )
    return words
