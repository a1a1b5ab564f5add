"""Sampler steps: how a plan cuts them into ranges, and the clock that says which step a call of a
denoiser belongs to.

A plan is made for any number of sampler steps, so its ranges are fractions of the sampler's
schedule. The clock counts sampler steps, not calls of the denoiser: guidance in two calls, two
denoisers, and solvers of second order call more than once a step. It follows the scheduler of a
diffusers pipeline (`set_timesteps` begins a sampling, `step` ends a step), wherever img2img begins.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from .errors import QSearchError
from .schedulers import counts, index_of, order_of, overridden, places_of, then

MOST_RANGES = 64
_ROUNDING = 1e-9  # of a bound times the number of steps


@dataclass(frozen=True)
class StepRanges:
    """Ranges of sampler steps, the noisiest first. Step i of n lies in the range whose number is
    that of the bounds <= i / n.

    Args:
        bounds: where one range ends and the next begins, as ascending fractions of the steps in (0,
            1); none for one range.
        total: sampler steps for which costs are counted that depend on their number; 0 where nobody
            has said.
    """

    bounds: tuple[float, ...] = ()
    total: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        ends = (0.0, *self.bounds, 1.0)
        numbers = all(isinstance(b, int | float) and not isinstance(b, bool) for b in self.bounds)
        if not numbers or not all(a < b for a, b in itertools.pairwise(ends)):
            raise QSearchError(
                "ranges of steps cover the sampler from its first step to its last: "
                "bounds are ascending fractions between 0 and 1; given "
                f"{list(self.bounds)}"
            )
        if len(self) > MOST_RANGES:
            raise QSearchError(
                f"a plan has at most {MOST_RANGES} ranges of steps; given {len(self)}"
            )

    @staticmethod
    def equal(count: int) -> StepRanges:
        """`count` ranges of the same length.

        Args:
            count: how many.

        Returns:
            The ranges.

        Raises:
            QSearchError: `count` is less than one.
        """
        if not 1 <= count <= MOST_RANGES:
            raise QSearchError(f"a plan has 1 to {MOST_RANGES} ranges of steps; given {count}")
        return StepRanges(tuple(i / count for i in range(1, count)))

    def __len__(self) -> int:
        return len(self.bounds) + 1

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of the steps that each range holds; they add up to 1."""
        ends = (0.0, *self.bounds, 1.0)
        return tuple(b - a for a, b in itertools.pairwise(ends))

    def of(self, step: int, total: int) -> int:
        """The range of sampler step `step` (from 0) of `total`.

        Args:
            step: from 0, the noisiest.
            total: how many steps the sampler takes.

        Returns:
            The range's number, from 0.
        """
        return sum(bound * total <= step + _ROUNDING for bound in self.bounds)

    def members(self, total: int) -> tuple[tuple[int, ...], ...]:
        """The steps of each range for a sampler of `total` steps.

        Args:
            total: how many steps the sampler takes.

        Returns:
            A tuple of step numbers for each range.

        Raises:
            QSearchError: a range would be empty, since there are fewer steps than ranges need.
        """
        found = tuple(
            tuple(i for i in range(total) if self.of(i, total) == r) for r in range(len(self))
        )
        if not all(found):
            raise QSearchError(
                f"each of {len(self)} ranges of steps needs a sampler step; range "
                f"{found.index(())} has none of {total}: sample with more steps, or plan "
                "with fewer ranges"
            )
        return found

    def content(self) -> dict[str, Any]:
        """Plain data for a file; `StepRanges.parse` reads it.

        Returns:
            What JSON can hold.
        """
        count = len(self)
        equal = self == StepRanges.equal(count)
        cut = {"ranges": count} if equal else {"bounds": list(self.bounds)}
        return cut | ({"sampler_steps": self.total} if self.total else {})

    def counted(self, total: int) -> StepRanges:
        """The same ranges with costs counted for `total` sampler steps.

        Args:
            total: how many steps the sampler takes.

        Returns:
            Ranges with the same bounds.
        """
        return StepRanges(self.bounds, total)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sampler steps of each range; zeros where their number is not known."""
        places = [self.of(i, self.total) for i in range(self.total)]
        return tuple(places.count(r) for r in range(len(self)))

    @staticmethod
    def parse(content: Mapping[str, Any] | int | None) -> StepRanges:
        """Ranges from `content()`, a number of equal ranges, or nothing.

        Args:
            content: as `content` made it.

        Returns:
            The ranges; one range for None.
        """
        if content is None:
            return StepRanges()
        if isinstance(content, int) and not isinstance(content, bool):
            return StepRanges.equal(content)
        if isinstance(content, Mapping) and "sampler_steps" in content:
            total, cut = content["sampler_steps"], {**content}
            del cut["sampler_steps"]
            if isinstance(total, int) and total > 0:
                return StepRanges.parse(cut).counted(total)
        if isinstance(content, Mapping) and set(content) == {"ranges"}:
            return StepRanges.parse(content["ranges"])
        if (
            isinstance(content, Mapping)
            and set(content) == {"bounds"}
            and isinstance(content["bounds"], list)
        ):
            return StepRanges(tuple(content["bounds"]))
        raise QSearchError(
            f"steps are a number of equal ranges, or {{bounds: [fractions]}}; given {content!r}"
        )


class StepClock:
    """The sampler step that the denoisers of one pipeline are at.

    Attributes:
        step: number of the sampler step, from 0.
        total: sampler steps of the whole schedule; 0 while it is not set.
        samplings: how many times a scheduler that is followed began.
    """

    def __init__(self) -> None:
        self.step, self.total, self.samplings = 0, 0, 0
        self._followed: list[Any] = []
        self._told = 0  # contexts that say which step it is

    def __repr__(self) -> str:
        return f"StepClock(step {self.step} of {self.total})"

    @property
    def known(self) -> bool:
        """Whether the step is known: a scheduler that is followed, or `at`."""
        return self.total > 0

    @contextmanager
    def at(self, step: int, total: int) -> Iterator[None]:
        """Inside, it is step `step` of `total`: for a recorded call."""
        before = self.step, self.total
        self.step, self.total = step, total
        self._told += 1
        try:
            yield
        finally:
            self._told -= 1
            self.step, self.total = before

    def range_of(self, ranges: StepRanges) -> int:
        """The range of now.

        Raises:
            QSearchError: the step is not set, or a range has no step at all.
        """
        if len(ranges) == 1:
            return 0
        if not self.known:
            raise QSearchError(
                f"a plan of {len(ranges)} ranges goes by the sampler's steps, and no "
                "scheduler is followed: "
                "call the denoiser through its diffusers pipeline, or inside "
                "`clock_of(model).at(step, total)`"
            )
        if self.total < len(ranges):
            ranges.members(self.total)
        return ranges.of(self.step, self.total)

    @contextmanager
    def following(self, scheduler: Any) -> Iterator[None]:
        """Inside, the clock goes by a diffusers scheduler."""
        before = self.step, self.total
        detach = self.follow(scheduler)
        self._told += 1
        try:
            yield
        finally:
            self._told -= 1
            detach()
            self.step, self.total = before

    def step_in_call(self, model: Any) -> int:
        """The step of the call of `model` that is being made: by who tells the clock, else by the
        pipeline that calls.

        Raises:
            QSearchError: the step is not set, and no diffusers pipeline is among the callers.
        """
        if not self._told:
            follow_caller(model, self)
        if not self.known:
            raise QSearchError(
                "what attention carries goes by the sampler's steps, and no scheduler is "
                "followed: call the denoiser through its "
                "diffusers pipeline, or inside `clock_of(model).at(step, total)`"
            )
        return self.step

    def range_in_call(self, model: Any, ranges: StepRanges) -> int:
        """The range of the call of `model` that is being made: by who tells the clock, else by the
        pipeline that calls.

        Raises:
            QSearchError: the step is not set, and no diffusers pipeline is among the callers.
        """
        if len(ranges) > 1 and not self._told:
            follow_caller(model, self)
        return self.range_of(ranges)

    def follow(self, scheduler: Any) -> Callable[[], None]:
        """Go by `scheduler` from now on, which may be in the middle of a sampling; returns what
        ends that.

        Raises:
            QSearchError: the scheduler has no `step` or no `set_timesteps`.
        """
        if any(scheduler is one for one in self._followed):
            return lambda: None
        for name in ("set_timesteps", "step"):
            if not callable(getattr(scheduler, name, None)):
                raise QSearchError(
                    "steps are counted by a scheduler's set_timesteps and step; "
                    f"{type(scheduler).__name__} has no {name}"
                )
        hooks = {
            "set_timesteps": self._begun,
            "set_begin_index": self._begun,
            "scale_model_input": self._scaled,
            "step": self._stepped,
        }
        self._followed.append(scheduler)
        restore = overridden(
            scheduler,
            {
                name: functools.partial(then, hook)
                for name, hook in hooks.items()
                if callable(getattr(scheduler, name, None))
            },
        )
        if getattr(scheduler, "timesteps", None) is not None:
            self._go(scheduler, index_of(scheduler))

        def detach() -> None:
            restore()
            self._followed = [one for one in self._followed if one is not scheduler]

        return detach

    def follows(self, scheduler: Any) -> bool:
        """Whether the clock goes by this scheduler."""
        return any(scheduler is one for one in self._followed)

    def _begun(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        self.samplings += 1
        self._go(scheduler, index_of(scheduler))

    def _scaled(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        if counts(scheduler):
            self._go(scheduler, index_of(scheduler))
            return
        if index_of(scheduler):
            return
        found = places_of(scheduler, given.get("timestep"))
        if found and self.step not in [i // order_of(scheduler) for i in found]:
            self._go(scheduler, found[0])

    def _stepped(self, scheduler: Any, given: Mapping[str, Any]) -> None:
        if counts(scheduler):
            self._go(scheduler, index_of(scheduler))
            return
        found = places_of(scheduler, given.get("timestep"))
        order = order_of(scheduler)
        self._go(scheduler, found[0] + 1 if len(found) == 1 else (self.step + 1) * order)

    def _go(self, scheduler: Any, index: int) -> None:
        order = order_of(scheduler)
        self.total = max(1, math.ceil(len(scheduler.timesteps) / order))
        self.step = min(index // order, self.total - 1)


_clocks: WeakKeyDictionary[Any, StepClock] = WeakKeyDictionary()


def clock_of(model: Any) -> StepClock:
    """The clock that calls of a denoiser go by; made at the first question."""
    if model not in _clocks:
        _clocks[model] = StepClock()
    return _clocks[model]


def share_clock(models: Iterable[Any]) -> StepClock:
    """One clock for all of `models`: the denoisers of one pipeline."""
    held = list(models)
    clock = clock_of(held[0])
    for model in held[1:]:
        _clocks[model] = clock
    return clock


def follow_caller(model: Any, clock: StepClock) -> bool:
    """Let `clock` go by the scheduler of the diffusers pipeline that is calling `model` right now;
    False where none is.

    A packed denoiser is loaded before its pipeline exists, so the pipeline is looked for among the
    callers: an object with a `scheduler` and with `model` among its components.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        scheduler = getattr(owner, "scheduler", None)
        if scheduler is not None and any(part is model for part in vars(owner).values()):
            if not clock.follows(scheduler):
                clock.follow(scheduler)
                timestep = frame.f_locals.get("t")
                if (
                    not counts(scheduler)
                    and getattr(scheduler, "begin_index", None) is None
                    and timestep is not None
                ):
                    found = places_of(scheduler, timestep)
                    if len(found) == 1:
                        clock._go(scheduler, found[0])
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
