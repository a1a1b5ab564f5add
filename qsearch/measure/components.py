"""Components: which modules of a pipeline denoise, and the one model that they are for everything
that measures.

A single denoiser is that model itself. Where a pipeline has several of one class (Wan 2.2: one for
the noisiest steps, one for the rest), or where text encoders and the VAE are asked for too, the
model is a `Components` whose children they are; all of them go by one clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..core.components import DECODERS, DENOISERS, is_denoiser
from ..core.errors import QSearchError, nearest
from ..core.schedulers import overridden
from ..core.steps import StepClock, clock_of, share_clock
from ..graphs.components import Components, plain_class

_models: WeakKeyDictionary[Any, dict[tuple[str, ...], Components]] = WeakKeyDictionary()


def components(pipe: Any) -> dict[str, Any]:
    """Name -> component of a pipeline; of an object that is none, nothing."""
    found = getattr(pipe, "components", {})
    return {name: part for name, part in found.items() if part is not None}


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Component's name -> module, of all that denoise: those that the pipeline's class names in
    `denoising_components`, else its transformer or U-Net, and every further one of its class.

    Raises:
        QSearchError: the pipeline has no denoiser.
    """
    modules = {n: m for n, m in components(pipe).items() if isinstance(m, nn.Module)}
    if said := getattr(pipe, "denoising_components", ()):
        return {name: modules[name] for name in said}
    for name in DENOISERS:  # a custom pipeline may have no `components`
        if isinstance(getattr(pipe, name, None), nn.Module):
            modules.setdefault(name, getattr(pipe, name))
    named = sorted(
        (n for n in modules if is_denoiser(n)),
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
    return plain_class(getattr(module, "_orig_mod", module))


def left_out(pipe: Any) -> tuple[str, ...]:
    """Components that are named like denoisers and are none of `denoisers_of`: another stage's, of
    another class.
    """
    found = denoisers_of(pipe)
    modules = {n: m for n, m in components(pipe).items() if isinstance(m, nn.Module)}
    return tuple(n for n in modules if n not in found and is_denoiser(n))


def model_of(pipe: Any, names: Sequence[str] = ()) -> nn.Module:
    """The pipeline's denoiser; where there are several, one module that holds them, the same at
    every question.

    Args:
        pipe: a diffusers pipeline.
        names: components that are asked for (`OpGraph.components`), such as transformer,
            text_encoder and vae; the denoisers when left out. Of a pipeline's only denoiser the
            model is that itself.

    Raises:
        QSearchError: the pipeline has no denoiser, or lacks a component.
    """
    denoisers = denoisers_of(pipe)
    parts = _asked(pipe, denoisers, names) if names else denoisers
    if len(parts) == 1 and parts == denoisers:
        return next(iter(parts.values()))
    held = _models.setdefault(pipe, {})
    key = tuple(parts)
    known = held.get(key)
    if known is None or known.parts != parts:
        known = held[key] = Components(parts)
        share_clock([*denoisers.values(), *parts.values(), known, *held.values()])
    return known


def _asked(
    pipe: Any, denoisers: dict[str, nn.Module], names: Sequence[str]
) -> dict[str, nn.Module]:
    """The components of those names in order of execution: what reads the prompt, what denoises,
    what decodes.
    """
    modules = {n: m for n, m in components(pipe).items() if isinstance(m, nn.Module)} | denoisers
    for name in names:
        if name not in modules:
            raise QSearchError(
                f"{type(pipe).__name__} has no component {name!r}{nearest(name, modules)}; it has "
                f"{', '.join(modules)}"
            )
    first = [n for n in modules if n not in denoisers and n not in DECODERS]
    last = [n for n in modules if n in DECODERS and n not in denoisers]
    return {n: modules[n] for n in (*first, *denoisers, *last) if n in names}


#: the older name
denoiser_of = model_of


def schedulers_of(pipe: Any) -> list[Any]:
    """The pipeline's schedulers that count steps: a sampler's, and where it has stages those of the
    others.
    """
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
def frozen(pipe: Any, model: nn.Module | None = None) -> Iterator[None]:
    """Inside, only weights of `model`, or the pipeline's denoisers, require gradients; without a
    pipeline nothing changes.
    """
    own: set[int] = set()
    parts = []
    if pipe is not None:
        chosen = [model] if model is not None else list(denoisers_of(pipe).values())
        own = {id(p) for module in chosen for p in module.parameters()}
        parts = [p for p in components(pipe).values() if isinstance(p, nn.Module)]
    flags = {p: p.requires_grad for part in parts for p in part.parameters() if id(p) not in own}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
