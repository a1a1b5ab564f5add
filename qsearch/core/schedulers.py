"""Schedulers of diffusers as a clock needs them: their methods overheard, and where in their
schedule a call stands.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def overridden(thing: Any, around: Mapping[str, Callable[..., Any]]) -> Callable[[], None]:
    """Let `thing.name(...)` call `around[name](own, thing, ...)`, where `own` is its own method;
    returns what ends that.

    The methods live in a class made for `thing` alone, under its class's name, and not in its
    `__dict__`: a pipeline that copies its scheduler (LTX-2 has one for sound) gets a copy whose
    methods are the copy's own.
    """
    base = type(thing)
    active = True

    def made(name: str) -> Any:
        own = getattr(base, name)

        @functools.wraps(own)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = functools.partial(own, self)
            if not active or self is not thing:
                return bound(*args, **kwargs)
            return around[name](bound, self, *args, **kwargs)

        return method

    space = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    thing.__class__ = type(
        base.__name__, (base,), {**space, **{name: made(name) for name in around}}
    )
    mine = type(thing)

    def restore() -> None:
        nonlocal active
        active = False
        if type(thing) is mine:
            thing.__class__ = base

    return restore


def arguments_of(own: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that `own` gives them."""
    try:
        found = dict(inspect.signature(own).bind(*args, **kwargs).arguments)
        rest = found.pop("args", ())
        # `scale_model_input(sample, *args)` of a scheduler that scales nothing
        return {**found, **found.pop("kwargs", {}), **({"timestep": rest[0]} if rest else {})}
    except (TypeError, ValueError):  # the call itself says what is wrong with it
        return dict(kwargs)


def then(hook: Callable[..., None], own: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """A scheduler's own method, and then `hook` with what it was given by name."""
    made = own(*args, **kwargs)
    hook(scheduler, arguments_of(own, args, kwargs))
    return made


def order_of(scheduler: Any) -> int:
    """Calls of `step` that make one sampler step: 2 for Heun and KDPM2, as diffusers says in
    `order`.
    """
    return max(1, int(getattr(scheduler, "order", 1) or 1))


def counts(scheduler: Any) -> bool:
    """Whether the scheduler counts its own steps and has begun to."""
    return getattr(scheduler, "step_index", None) is not None


def index_of(scheduler: Any) -> int:
    """Position in `scheduler.timesteps` of the step to come, as far as the scheduler knows."""
    for name in ("step_index", "begin_index"):
        value = getattr(scheduler, name, None)
        if value is not None:
            return int(value)
    return 0


def places_of(scheduler: Any, timestep: Any) -> list[int]:
    """Where `timestep` (a number, or a tensor whose first is taken) stands in the schedule."""
    if timestep is None:
        return []
    flat = getattr(timestep, "flatten", None)
    wanted = float(timestep if flat is None else flat()[0])
    times = scheduler.timesteps
    listed = times.tolist() if callable(getattr(times, "tolist", None)) else list(times)
    return [i for i, t in enumerate(listed) if float(t) == wanted]
