"""Recording: the denoiser's calls in the middle of each range of the sampler's steps, from one
full-precision run of the pipeline.

All calls of a step are recorded: the branches of guidance where they are calls of their own (Wan),
both calls of a solver of second order (Heun). Each is a copy of its arguments, taken when it was
made, and knows what the sampler made of its output. Where text encoders and a VAE are asked for,
their calls come before and after those of the denoisers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.schedulers import arguments_of, overridden
from ..core.steps import StepClock
from ..graphs.components import Components, entry_of
from .calling import StopError, sample
from .calls import Call, Copier, example_inputs, makes_nothing, output_of, patched
from .components import denoisers_of, model_of, schedulers_of, ticking
from .decoding import decode
from .predicted_x0 import SchedulerStep, checked, own_prediction, step_weights
from .prompts import Prompts
from .sampling import Sampling
from .spill import Spill


class NoCallsError(QSearchError):
    """A pipeline called none of its denoisers where a hook hears it."""


@dataclass
class _Recorded:
    """Calls as they come, and the outputs that the sampler has not yet taken, with the numbers of
    their calls.
    """

    calls: list[Call] = field(default_factory=list)
    outputs: list[tuple[int, Tensor]] = field(default_factory=list)


@contextmanager
def _listening(
    pipe: Any, guidance: float, clock: StepClock, named: bool = False
) -> Iterator[_Recorded]:
    """Hears the calls of the denoisers, and what the scheduler makes of them; the pipeline computes
    as ever.

    `named`: calls of an only denoiser have its name, too.
    """
    recorded, spill = _Recorded(), Spill()

    def hooks(name: str, model: nn.Module) -> list[Any]:
        copier = Copier(spill=spill)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal copier
            copier = Copier(copier.known, spill)
            args, kwargs = copier((args, kwargs))
            step = clock.step if clock.known else len(recorded.calls)
            recorded.calls.append(Call(args, kwargs, step, None, clock.total, name))

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if makes_nothing(output):
                recorded.calls.pop()
                return
            recorded.outputs.append((len(recorded.calls) - 1, output_of(output)))

        return [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]

    def stepped(own: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        given = arguments_of(own, args, kwargs)
        predicted = own_prediction(scheduler, given)  # before the step changes what it goes by
        made = own(*args, **kwargs)
        _note(recorded, scheduler, given, made, predicted, guidance)
        recorded.outputs.clear()
        return made

    parts = denoisers_of(pipe)
    single = len(parts) == 1 and not named
    with ExitStack() as stack:
        for name, model in parts.items():
            for handle in hooks("" if single else name, model):
                stack.callback(handle.remove)
        for scheduler in schedulers_of(pipe):
            stack.callback(overridden(scheduler, {"step": stepped}))
        yield recorded


def _note(
    recorded: _Recorded,
    scheduler: Any,
    given: dict[str, Any],
    made: Any,
    predicted: Tensor | None,
    guidance: float,
) -> None:
    """What a step made of the outputs since the last one, into their calls."""
    numbers = [i for i, _ in recorded.outputs]
    given_output, latents = given.get("model_output"), given.get("sample")
    if not numbers or not isinstance(given_output, Tensor) or not isinstance(latents, Tensor):
        return
    outputs = [output for _, output in recorded.outputs]
    weights = step_weights(outputs, given_output, guidance)
    if weights is None:
        why = "what the scheduler was given is no linear combination of the denoiser's outputs"
        held: tuple[float, float] | str = why
    else:
        held = checked(scheduler, given, made, predicted)
    for place, number in enumerate(numbers):
        if isinstance(held, str) or weights is None:
            recorded.calls[number] = replace(recorded.calls[number], unsampled=str(held))
            continue
        others = [
            SchedulerStep(latents, 0.0, 1.0, w, given_output.shape[1]).clean(output)
            for i, (w, output) in enumerate(zip(weights, outputs, strict=True))
            if i != place
        ]
        rest = sum(others[1:], others[0]) if others else None
        sampled = SchedulerStep(latents, *held, weights[place], given_output.shape[1], rest)
        recorded.calls[number] = replace(recorded.calls[number], sampled=sampled)


def record(
    pipe: Any,
    prompts: Prompts,
    sampling: Sampling,
    bins: int,
    batch: int | None = None,
    components: Sequence[str] = (),
) -> list[Call]:
    """The denoisers' calls in the middle of each of `bins` equal ranges of sampler steps, all of
    the middle step: the first that `record_sampling` returns.
    """
    return record_sampling(pipe, prompts, sampling, bins, batch, components)[0]


def record_sampling(
    pipe: Any,
    prompts: Prompts,
    sampling: Sampling,
    bins: int,
    batch: int | None = None,
    components: Sequence[str] = (),
) -> tuple[list[Call], Tensor]:
    """The denoisers' calls in the middle of each of `bins` equal ranges of sampler steps, all of
    the middle step, and what was sampled meanwhile.

    Args:
        pipe: a diffusers pipeline in full precision.
        prompts: what is sampled.
        sampling: how.
        bins: ranges of equal length. A component that runs in the middle of none gets its own
            middle step besides; of more bins than steps, where a step has several calls, every step
            is one.
        batch: samples at a time; each bin has calls for each part of the samples then. All at once
            when left out.
        components: whose calls are wanted (`OpGraph.components`), text encoders and a VAE too; the
            denoisers' when left out.

    Returns:
        Calls ordered by step; those of one step belong to one bin. Those of text encoders come
        first, of a VAE last. And the final latents [N, ...], as `sample` returns them.

    Raises:
        NoCallsError: no denoiser was called where hooks hear it.
        QSearchError: more bins than sampler steps; another component was not called where hooks
            hear it.
    """
    ends, model = [0], model_of(pipe, components)
    several = isinstance(model, Components)
    with ExitStack() as stack:
        clock = stack.enter_context(ticking(pipe))
        recorded = stack.enter_context(_listening(pipe, sampling.guidance, clock, several))
        before = stack.enter_context(_beside(pipe, model, recorded))
        latents = sample(
            pipe,
            prompts,
            replace(sampling, batch=batch or len(prompts)),
            lambda _: ends.append(len(recorded.calls)),
        )
    if not recorded.calls:
        raise NoCallsError(
            f"{type(pipe).__name__} called none of {', '.join(denoisers_of(pipe))} where "
            "a hook hears it, in "
            f"{sampling.steps} sampler steps; is `strength` so low that no step is left, "
            "or its forward replaced?"
        )
    parts = [_numbered(recorded.calls[a:b]) for a, b in itertools.pairwise(ends)]
    wanted = middles(parts[0], bins)
    calls = [call for step in wanted for part in parts for call in part if call.step == step]
    if not isinstance(model, Components):
        return calls, latents
    total = parts[0][0].steps
    after = _decoding(pipe, model, latents, replace(sampling, batch=batch or len(prompts)), prompts)
    first = [replace(call, steps=total) for held in before.values() for call, _ in held]
    last = [replace(call, step=total - 1, steps=total) for call in after]
    found = [call for call in (*first, *calls, *last) if call.component in model.parts]
    for name in model.parts:
        if not any(call.component == name for call in found):
            raise QSearchError(
                f"{type(pipe).__name__} does not call its {name} when it samples; leave "
                "it out of components"
            )
    for call in found:
        model.examples.update({call.component: example_inputs(call, model)[call.component]})
    for name in model.parts:
        inside = any(at not in ends for _, at in before.get(name, ()))
        own = [call.step for call in parts[0] if call.component == name]
        own = list(range(total)) if inside else own
        model.spans[name] = (min(own), max(own) + 1, total) if own else (0, 0, total)
    return found, latents


@torch.no_grad()
def first_call(pipe: Any, prompts: Prompts, sampling: Sampling, *, named: bool = False) -> Call:
    """The first call of a denoiser, as the pipeline is about to make it: the denoiser itself does
    not run.

    Args:
        pipe: a diffusers pipeline.
        prompts: what is sampled.
        sampling: how.
        named: whether a call of an only denoiser has its name, too.

    Raises:
        NoCallsError: no denoiser was called where hooks hear it.
    """
    parts, found = denoisers_of(pipe), list[Call]()
    with ticking(pipe) as clock, ExitStack() as stack:

        def listen(name: str) -> Any:
            def instead(_: Any, *args: Any, **kwargs: Any) -> Any:
                args, kwargs = Copier()((args, kwargs))
                own = name if named or len(parts) > 1 else ""
                found.append(Call(args, kwargs, clock.step, None, clock.total, own))
                raise StopError

            return instead

        for name, part in parts.items():
            stack.enter_context(patched(part, listen(name)))
        stack.enter_context(suppress(StopError))
        sample(pipe, prompts, replace(sampling, batch=len(prompts)))
    if not found:
        raise NoCallsError(
            f"{type(pipe).__name__} called none of {', '.join(parts)} where a hook hears it"
        )
    return found[0]


@contextmanager
def _beside(
    pipe: Any, model: nn.Module, recorded: _Recorded
) -> Iterator[dict[str, list[tuple[Call, int]]]]:
    """Hears the calls of components that do not denoise, each with the number of the denoisers'
    calls before it.
    """
    denoisers = denoisers_of(pipe)
    held = model.parts if isinstance(model, Components) else {}
    others = {n: m for n, m in held.items() if n not in denoisers}
    found: dict[str, list[tuple[Call, int]]] = {name: [] for name in others}

    def hook(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args, kwargs = Copier()((args, kwargs))
            found[name].append((Call(args, kwargs, 0, None, 0, name), len(recorded.calls)))

        return before

    with ExitStack() as stack:
        for name, part in others.items():
            if entry_of(name, part) == "forward":
                handle = part.register_forward_pre_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
        yield found


def _decoding(
    pipe: Any, model: Components, latents: Tensor, sampling: Sampling, prompts: Prompts
) -> list[Call]:
    """The calls that decode final latents, of the components that are called by `decode`."""
    names = [name for name in model.parts if model.entry(name) == "decode"]
    if not names:
        return []
    found: list[Call] = []

    def listen(name: str) -> Any:
        def around(own: Any, *args: Any, **kwargs: Any) -> Any:
            args_, kwargs_ = Copier()((args, kwargs))
            kwargs_.pop("generator", None)  # of decoders that draw nothing; it can't be stored
            found.append(Call(args_, kwargs_, 0, None, 0, name))
            return own(*args, **kwargs)

        return around

    # How the pipeline decodes is found out once, by calls that count for nothing.
    decode(pipe, latents[:1], sampling=sampling, prompts=prompts[:1])
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patched(model.parts[name], listen(name), "decode"))
        for i in range(0, len(latents), sampling.batch):
            part = slice(i, i + sampling.batch)
            decode(pipe, latents[part], sampling=sampling, prompts=prompts[part])
    return found


def _numbered(part: list[Call]) -> list[Call]:
    """Calls without a step number, numbered in their order."""
    if any(call.steps for call in part):
        return part
    return [replace(call, step=i, steps=len(part)) for i, call in enumerate(part)]


def middles(calls: Sequence[Call], bins: int) -> list[int]:
    """The middle step of each of `bins` equal parts of the steps that were recorded, and of each
    component that has none of them.
    """
    recorded = sorted({call.step for call in calls})
    if not 1 <= bins <= len(calls):
        raise QSearchError(
            f"step bins must lie between 1 and the number of denoiser calls; given {bins} bins for "
            f"{len(calls)} calls in {len(recorded)} sampler steps"
        )
    found = {recorded[int((b + 0.5) * len(recorded) / bins)] for b in range(bins)}
    for name in dict.fromkeys(call.component for call in calls):
        own = sorted({call.step for call in calls if call.component == name})
        if not found.intersection(own):
            found.add(own[len(own) // 2])
    return sorted(found)


@torch.no_grad()
def heard_steps(pipe: Any, prompts: Prompts, sampling: Sampling) -> list[tuple[str, int, int]]:
    """(component, sampler step, of how many) of every call of the denoisers, in their order."""
    with ticking(pipe) as clock, _listening(pipe, sampling.guidance, clock) as recorded:
        sample(pipe, prompts, replace(sampling, batch=len(prompts)))
    return [(call.component, call.step, call.steps) for call in _numbered(recorded.calls)]
