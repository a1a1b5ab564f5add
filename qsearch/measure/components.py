"""Components: which modules of a pipeline denoise, and the one model that they are for everything that measures.

A single denoiser is that model itself. Where a pipeline has several of one class (Wan 2.2: one for the noisiest steps, one for the
rest), the model is a `Denoisers` whose children they are; all of them go by one clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..core.errors import QSearchError
from ..core.schedulers import overridden
from ..core.steps import StepClock, clock_of, share_clock
from ..graphs.components import Denoisers

DENOISERS = ("transformer", "unet", "prior", "decoder")
_NUMBERED = re.compile(rf"({'|'.join(DENOISERS)})(_\d+)?$")
_models: WeakKeyDictionary[Any, Denoisers] = WeakKeyDictionary()


def components(pipe: Any) -> dict[str, Any]:
    """Name -> component of a pipeline; of an object that is none, nothing."""
    found = getattr(pipe, "components", {})
    return {name: part for name, part in found.items() if part is not None}


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Component's name -> module, of all that denoise: the pipeline's transformer or U-Net, and every further one of its class.

    Raises:
        QSearchError: the pipeline has no denoiser.
    """
    modules = {n: m for n, m in components(pipe).items() if isinstance(m, nn.Module)}
    for name in DENOISERS:  # a pipeline of somebody's own may have no `components`
        if isinstance(getattr(pipe, name, None), nn.Module):
            modules.setdefault(name, getattr(pipe, name))
    named = sorted(
        (n for n in modules if _NUMBERED.match(n)),
        key=lambda n: (DENOISERS.index(n.partition("_")[0]), n),
    )
    if not named:
        raise QSearchError(
            f"{type(pipe).__name__} has none of the components {', '.join(DENOISERS)}; "
            "give the denoiser as a module"
        )
    main = _class(modules[named[0]])
    found = {name: modules[name] for name in named if _class(modules[name]) is main}
    return found | {n: m for n, m in modules.items() if _class(m) is main}


def _class(module: nn.Module) -> type:
    return type(getattr(module, "_orig_mod", module))


def left_out(pipe: Any) -> tuple[str, ...]:
    """Components that are named like denoisers and are none of `denoisers_of`: another stage's, of another class."""
    found = denoisers_of(pipe)
    modules = {n: m for n, m in components(pipe).items() if isinstance(m, nn.Module)}
    return tuple(n for n in modules if n not in found and _NUMBERED.match(n))


def model_of(pipe: Any) -> nn.Module:
    """The pipeline's denoiser; where there are several, one module that holds them, the same at every question.

    Raises:
        QSearchError: the pipeline has no denoiser.
    """
    parts = denoisers_of(pipe)
    if len(parts) == 1:
        return next(iter(parts.values()))
    known = _models.get(pipe)
    if known is None or known.parts != parts:
        known = _models[pipe] = Denoisers(parts)
        share_clock([known, *parts.values()])
    return known


#: the older name
denoiser_of = model_of


def schedulers_of(pipe: Any) -> list[Any]:
    """The pipeline's schedulers that count steps: a sampler's, and where it has stages those of the others."""
    held = [getattr(pipe, "scheduler", None), *components(pipe).values()]
    counting = [
        part
        for part in held
        if all(callable(getattr(part, name, None)) for name in ("set_timesteps", "step"))
    ]
    return list({id(part): part for part in counting}.values())


@contextmanager
def ticking(pipe: Any) -> Iterator[StepClock]:
    """Inside, the clock of the pipeline's denoisers goes by its scheduler."""
    try:
        clock = clock_of(model_of(pipe))
    except QSearchError:  # nothing here goes by steps
        clock = StepClock()
    with ExitStack() as stack:
        for scheduler in schedulers_of(pipe):
            stack.enter_context(clock.following(scheduler))
        yield clock


@contextmanager
def counted(pipe: Any, advance: Callable[[int], None]) -> Iterator[None]:
    """Inside, `advance(1)` is called after every step of the pipeline's samplers."""

    def step(own: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        advance(1)
        return made

    with ExitStack() as stack:
        for scheduler in schedulers_of(pipe):
            stack.callback(overridden(scheduler, {"step": step}))
        yield


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Inside, no weight of the pipeline but the denoiser's wants a gradient; nothing without a pipeline."""
    own: set[int] = set()
    parts = []
    if pipe is not None:
        own = {id(p) for module in denoisers_of(pipe).values() for p in module.parameters()}
        parts = [p for p in components(pipe).values() if isinstance(p, nn.Module)]
    flags = {p: p.requires_grad for part in parts for p in part.parameters() if id(p) not in own}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
