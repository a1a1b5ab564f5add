"""Problem: sites x choices with values, costs and limits; all a solver sees.

The value of a choice is its noise power on the output: errors of independent choices add as powers,
not as decibels (a sum of dB mostly buys layers that are cheap, see the reference plans of MixDQ).
Where probes are given, their products say how the errors of two choices interact. `building.py`
makes a problem from a graph, values and a budget; here it is only counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..core.errors import QSearchError
from ..core.plan import ONE_RANGE
from ..core.scheme import Scheme
from ..core.steps import StepRanges

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Picks = NDArray[np.int64]
#: a scheme for all steps, or one for each range of them
Choice = Scheme | tuple[Scheme, ...]
_ROUNDING = 1e-12  # of a sum of costs, as `Budget.excess` allows


@dataclass(frozen=True)
class Problem:
    """Choose one of `choices[i]` for each of `sites`: least total, every sum of `costs` within its
    limit, at most `formats` different formats.

    `values[i]`, `costs[name][i]`: one number a choice. `scores` [probes, sites, choices], padded
    with zeros: probe scores, each squared and averaged over the probes a noise power; `trust` in
    [0, 1]: how much of their products counts (0 = additive). `spent`: what layers that are no sites
    cost, already taken off the limits. `members`: site -> layers, where a site stands for several
    that are tied. `steps`: ranges of sampler steps, where choices are tuples with a scheme for
    each.
    """

    sites: tuple[str, ...]
    choices: tuple[tuple[Choice, ...], ...]
    values: tuple[Vector, ...]
    costs: dict[str, tuple[Vector, ...]]
    limits: dict[str, float]
    formats: int | None = None
    scores: NDArray[np.float64] | None = None
    trust: float = 1.0
    spent: dict[str, float] = field(default_factory=dict)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    steps: StepRanges = ONE_RANGE

    def __post_init__(self) -> None:
        if not self.sites:
            raise QSearchError("a problem needs at least one layer that can be changed")
        if empty := [
            site for site, options in zip(self.sites, self.choices, strict=True) if not options
        ]:
            raise QSearchError(f"every layer needs a choice; {empty[0]} has none")
        if self.scores is not None and self.scores.shape[1:] != (len(self.sites), self.width):
            raise QSearchError(
                f"scores are [probes, sites, choices]; given {self.scores.shape} for "
                f"{len(self.sites)} sites and {self.width} choices"
            )

    @property
    def width(self) -> int:
        """The most choices of a site."""
        return max(len(options) for options in self.choices)

    def picks(self, chosen: Mapping[str, Choice]) -> Picks:
        """Index of each site's choice.

        Args:
            chosen: site -> its choice.

        Returns:
            Indices [sites].
        """
        return np.array(
            [
                options.index(chosen[site])
                for site, options in zip(self.sites, self.choices, strict=True)
            ],
            dtype=np.int64,
        )

    def chosen(self, picks: Picks) -> dict[str, Choice]:
        """The assignment by name.

        Args:
            picks: indices [sites].

        Returns:
            site -> its choice.
        """
        return {
            site: options[int(k)]
            for site, options, k in zip(self.sites, self.choices, picks, strict=True)
        }

    def total(self, chosen: Mapping[str, Choice]) -> float:
        """What a full assignment is worth: the sum of its values, and of the products of its scores
        where there are some.

        Args:
            chosen: site -> its choice.

        Returns:
            What is minimised.
        """
        return self.worth(self.picks(chosen))

    def worth(self, picks: Picks) -> float:
        """`total` of an assignment by index.

        Args:
            picks: indices [sites].

        Returns:
            What is minimised.
        """
        additive = float(sum(v[k] for v, k in zip(self.values, picks, strict=True)))
        if self.scores is None:
            return additive
        taken = self.scores[:, np.arange(len(picks)), picks]
        return additive + self.trust * float((taken.sum(1) ** 2 - (taken**2).sum(1)).mean())

    def used(self, name: str, picks: Picks) -> float:
        """Sum of one cost.

        Args:
            name: of the cost.
            picks: indices [sites].

        Returns:
            The sum over sites.
        """
        return float(sum(c[k] for c, k in zip(self.costs[name], picks, strict=True)))

    def broken(self, picks: Picks) -> dict[str, float]:
        """name -> how far above its limit, for every limit that is broken.

        Args:
            picks: indices [sites].

        Returns:
            Empty where every limit holds.
        """
        over = {name: self.used(name, picks) - limit for name, limit in self.limits.items()}
        return {
            name: x
            for name, x in over.items()
            if x > _ROUNDING * (abs(self.limits[name]) + self.span[name])
        }

    def keeps(self, picks: Picks) -> bool:
        """Whether an assignment is allowed: every limit holds, and the formats are few enough.

        Args:
            picks: indices [sites].

        Returns:
            Whether it is allowed.
        """
        return not self.broken(picks) and (
            self.formats is None or len(self.formats_of(picks)) <= self.formats
        )

    @cached_property
    def span(self) -> dict[str, float]:
        """name -> the largest single cost, the size of its rounding where its limit is zero."""
        return {name: max(float(np.abs(c).max()) for c in self.costs[name]) for name in self.limits}

    def formats_of(self, picks: Picks) -> set[str]:
        """The formats that an assignment uses, `keep` not counted.

        Args:
            picks: indices [sites].

        Returns:
            Words of formats, e.g. `uint4`.
        """
        return {
            f
            for options, k in zip(self.choices, picks, strict=True)
            for f in formats(options[int(k)])
        }

    def only(self, allowed: set[str]) -> tuple[Problem, list[Picks]] | None:
        """The problem with choices of these formats (and `keep`) alone, and each site's old
        indices; None where a site is left without.

        Args:
            allowed: words of formats.

        Returns:
            (the smaller problem, for each site the indices of what is left), or None.
        """
        kept = [
            np.array(
                [k for k, option in enumerate(options) if formats(option) <= allowed], np.int64
            )
            for options in self.choices
        ]
        return None if any(len(k) == 0 for k in kept) else (self.cut(kept), kept)

    def cut(self, kept: list[Picks]) -> Problem:
        """The problem with choices `kept[i]` of each site alone; the number of formats is limited
        no more.

        Args:
            kept: for each site the indices of the choices that stay.

        Returns:
            The smaller problem.
        """
        scores = None
        if self.scores is not None:
            scores = np.zeros((len(self.scores), len(kept), max(map(len, kept))))
            for i, k in enumerate(kept):
                scores[:, i, : len(k)] = self.scores[:, i, k]
        return replace(
            self,
            choices=tuple(
                tuple(options[int(j)] for j in k)
                for options, k in zip(self.choices, kept, strict=True)
            ),
            values=tuple(v[k] for v, k in zip(self.values, kept, strict=True)),
            costs={
                name: tuple(c[k] for c, k in zip(rows, kept, strict=True))
                for name, rows in self.costs.items()
            },
            formats=None,
            scores=scores,
        )

    def layers(self, chosen: Mapping[str, Choice]) -> dict[str, Choice]:
        """The assignment layer by layer: tied layers get what their site got.

        Args:
            chosen: site -> its choice.

        Returns:
            layer -> its choice.
        """
        return {
            layer: choice
            for site, choice in chosen.items()
            for layer in self.members.get(site, (site,))
        }


def schemes_of(choice: Choice) -> tuple[Scheme, ...]:
    """The schemes of a choice: one, or one for each range of steps.

    Args:
        choice: of a site.

    Returns:
        One scheme a range, or one.
    """
    return (choice,) if isinstance(choice, Scheme) else choice


def label(choice: Choice) -> str:
    """A choice as text, by which its numbers are found.

    Args:
        choice: of a site.

    Returns:
        E.g. `uint4-c | keep`.
    """
    return " | ".join(map(str, schemes_of(choice)))


def formats(choice: Choice) -> set[str]:
    """Formats of weights that a choice needs, `keep` not counted.

    Args:
        choice: of a site.

    Returns:
        Words of formats, e.g. `uint4`.
    """
    return {s.format for s in schemes_of(choice) if s.format != "keep"}


def padded(vectors: tuple[Vector, ...], filling: float = np.inf) -> Matrix:
    """Vectors of different lengths as the rows of a matrix.

    Args:
        vectors: one for each site.
        filling: what stands behind the end of the shorter ones.

    Returns:
        A matrix [sites, longest].
    """
    out = np.full((len(vectors), max(map(len, vectors))), filling)
    for row, vector in zip(out, vectors, strict=True):
        row[: len(vector)] = vector
    return out
