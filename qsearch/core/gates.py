"""Gate: a limit that a metric of a plan must keep, for use in CI: `lpips: "<= 0.15"`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import QSearchError
from .metrics import metric_words

_FORM = re.compile(r"\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


class GateFailed(QSearchError):
    """A plan that was measured keeps not all of its gates: the command line prints it and exits
    with 3.
    """


@dataclass(frozen=True)
class Gate:
    """A limit of one metric.

    Attributes:
        metric: its name.
        at_most: whether the limit is an upper one.
        limit: in the metric's own unit.
    """

    metric: str
    at_most: bool
    limit: float

    @classmethod
    def parse(cls, metric: str, text: str) -> Gate:
        """A gate of a config.

        Args:
            metric: the metric's name.
            text: `<= 0.15` or `>= 30`.

        Raises:
            QSearchError: the text is no limit, or one on the side on which the metric can't fail.
        """
        found = _FORM.fullmatch(str(text))
        if found is None:
            raise QSearchError(
                "a gate is a metric and a limit, such as lpips: '<= 0.15'; given "
                f"{metric}: {text!r}"
            )
        gate = cls(metric, found[1] == "<=", float(found[2]))
        better = metric_words(metric).higher_is_better
        if better is not None and better == gate.at_most:
            right = ">=" if better else "<="
            raise QSearchError(
                f"{metric} is better {'above' if better else 'below'} a limit: write "
                f"{metric}: '{right} {gate.limit:g}'; given '{text}'"
            )
        return gate

    def passes(self, value: float) -> bool:
        """Whether a measured value keeps the limit; one that is not a number does not."""
        if not math.isfinite(value):
            return False
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.at_most else '>='} {self.limit:g}"


def gates_of(spelt: Mapping[str, str]) -> tuple[Gate, ...]:
    """Gates of a config's section. Raises `QSearchError` for one that can't be read."""
    return tuple(Gate.parse(metric, text) for metric, text in spelt.items())


def failures(gates: Sequence[Gate], metrics: Mapping[str, Sequence[float]]) -> list[str]:
    """What is to be said of gates that measured values do not keep.

    Args:
        gates: the limits.
        metrics: metric -> (mean, standard error).

    Returns:
        A phrase a gate that fails; nothing where all pass.

    Raises:
        QSearchError: a gate's metric was not measured.
    """
    found = []
    for gate in gates:
        if gate.metric not in metrics:
            raise QSearchError(
                f"gate {gate}: {gate.metric} was not measured; measured are {', '.join(metrics)}"
            )
        mean, error = metrics[gate.metric]
        if not gate.passes(mean):
            found.append(f"{gate.metric} is {mean:.4g} ± {error:.2g}, the gate is {gate}")
    return found
