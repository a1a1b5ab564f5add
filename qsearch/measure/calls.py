"""Calls: the arguments of a denoiser's call as they were, and the call made again, whatever the
model does to its arguments.

A model may pop an argument's entries (T2I-adapters), write into its tensors, return lists of
samples (Z-Image) or of feature maps (ControlNet). A recorded call is a copy, every run of it gets a
copy of that, and what comes out is one tensor [N, ...].
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import QSearchError
from ..core.steps import clock_of
from ..graphs.components import Components, parts_of
from .predicted_x0 import SchedulerStep
from .spill import Spill

_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)
#: the squared distance of two runs over the squared output, above which they differ by more than
#: rounding in fp32
REPEATS = 1e-9


@dataclass(frozen=True)
class Call:
    """One recorded call of a denoiser; calls of one step are parts of one batch, or the branches of
    guidance.

    Attributes:
        args: positional arguments of its forward.
        kwargs: keyword arguments.
        step: the sampler step, from 0.
        sampled: what the sampler made of the output, where that is known.
        steps: sampler steps of the whole schedule; 0 where they were not counted.
        component: name of the pipeline's component, "" for a single denoiser.
        unsampled: why `sampled` is not known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int
    sampled: SchedulerStep | None = None
    steps: int = 0
    component: str = ""
    unsampled: str = ""


@dataclass
class Copier:
    """Copies arguments: containers are built again, tensors cloned; what is passed twice unchanged
    is copied once.

    Attributes:
        earlier: what the call before copied: a tensor's id -> itself, its version then, its copy.
        spill: keeps the copies, on disk where they are many; in memory when left out.
        known: the same of this call.
    """

    earlier: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    spill: Spill | None = None
    known: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        """A copy that shares no tensor and no container with `value`."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, _PLAIN) or isinstance(value, nn.Module | torch.Generator):
            return value
        if type(value) in (list, tuple, set):
            return type(value)(self(v) for v in value)
        if isinstance(value, tuple):  # a named tuple
            return type(value)(*(self(v) for v in value))
        if type(value) is dict:
            return {k: self(v) for k, v in value.items()}
        with suppress(Exception):  # an object that can't be copied is passed on as it is
            return copy.deepcopy(value)
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        counted = not tensor.is_inference()  # torch counts no writes into inference tensors
        version = tensor._version if counted else 0
        held = self.known.get(id(tensor)) or (self.earlier.get(id(tensor)) if counted else None)
        if held is None or held[1] != version:
            # A tensor that is one number seen as many can't be written into, and stays small.
            dense = 0 not in tensor.stride() or tensor.numel() <= 4096
            held = tensor, version, self._copied(tensor) if dense else tensor.detach()
        self.known[id(tensor)] = held
        return held[2]

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if self.spill is None else self.spill.copy(tensor)


@contextmanager
def _gradients_of_the_caller() -> Iterator[None]:
    """Inside, a model's own `torch.no_grad` does nothing: experts that are evaluated under it
    (HiDream) would cost nothing by their gradients. Those of torch and of this package stay.
    """
    own = torch.no_grad.__enter__

    def enter(self: torch.no_grad) -> None:
        frame = sys._getframe(1)
        name = frame.f_globals.get("__name__", "")
        if name == "torch.utils._contextlib":  # a decorator's
            name = getattr(frame.f_locals.get("func"), "__module__", None) or ""
        if name.partition(".")[0] in ("torch", __name__.partition(".")[0]):
            own(self)
        else:
            self.prev = torch.is_grad_enabled()

    torch.no_grad.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.no_grad.__enter__ = own  # type: ignore[method-assign]


@contextmanager
def measuring(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in evaluation mode and run without torch.compile, whose graphs do not
    call later hooks; gradients are on or off as the caller has them.
    """
    training = [m for model in models for m in model.modules() if m.training]
    with ExitStack() as stack:
        stack.enter_context(_gradients_of_the_caller())
        if "torch._dynamo" in sys.modules:  # else nothing was compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def patched(
    model: nn.Module, around: Callable[..., Any], method: str = "forward"
) -> Iterator[None]:
    """Inside, `model` calls `around(own, ...)` in place of its method `own`."""
    own, before = getattr(model, method), model.__dict__.get(method)

    def called(*args: Any, **kwargs: Any) -> Any:
        return around(own, *args, **kwargs)

    called.__wrapped__ = own  # type: ignore[attr-defined]  # signatures are asked of it
    setattr(model, method, called)
    try:
        yield
    finally:
        if before is None:
            delattr(model, method)
        else:
            setattr(model, method, before)


def forward(model: nn.Module, call: Call) -> Tensor:
    """The denoiser's output [N, ...] for a recorded call, as fp32, with gradients.

    The model is in evaluation mode, runs eagerly, and its clock stands at the call's step.

    Raises:
        QSearchError: the call belongs to a component that the model does not have, or nothing that
            it returns is a tensor.
    """
    part = component(model, call)
    entry = model.entry(call.component) if isinstance(model, Components) else "forward"
    called = part if entry == "forward" else getattr(part, entry)
    args, kwargs = Copier()((call.args, call.kwargs))
    if "return_dict" in inspect.signature(getattr(part, entry)).parameters:
        kwargs = {**kwargs, "return_dict": False}
    with ExitStack() as stack:
        stack.enter_context(measuring(part))
        if call.steps:
            stack.enter_context(clock_of(model).at(call.step, call.steps))
            if part is not model:
                stack.enter_context(clock_of(part).at(call.step, call.steps))
        return output_of(called(*args, **kwargs)).float()


@torch.no_grad()
def run(model: nn.Module, call: Call) -> Tensor:
    """`forward` without gradients."""
    return forward(model, call)


def component(model: nn.Module, call: Call) -> nn.Module:
    """The module that the call was made of: the model itself, or one of several components."""
    if not isinstance(model, Components):
        return model
    if call.component not in model.parts:
        raise QSearchError(
            f"a call belongs to one of the components {', '.join(model.parts)}; this one "
            "was recorded "
            f"of {call.component or 'a single denoiser'}: record it of the pipeline that has them"
        )
    return model.parts[call.component]


def makes_nothing(made: Any) -> bool:
    """Whether a call was made for what it leaves behind, such as keys and values in a cache for
    later calls: its first output is None.
    """
    if is_dataclass(made) and not isinstance(made, type):
        made = tuple(getattr(made, f.name) for f in fields(made))
    return made is None or (isinstance(made, list | tuple) and bool(made) and made[0] is None)


def output_of(made: Any) -> Tensor:
    """What a denoiser returns as one tensor [N, ...].

    A tensor, or the first of a tuple or of diffusers' output classes. A list of tensors that comes
    alone has a sample each (Z-Image); lists that come with more tensors are maps of all samples
    (ControlNet), which are joined as [N, F].
    """
    if isinstance(made, Tensor):
        return made
    values = list(made.values()) if isinstance(made, Mapping) else list(made)
    first, others = (values[0], values[1:]) if values else (None, [])
    if isinstance(first, Tensor):
        return first if not isinstance(made, list) else _stacked(values)
    found = _tensors(first)
    if not found:
        raise QSearchError(
            "a denoiser returns a tensor, or tensors in lists and tuples; this one made "
            f"{type(first).__name__}"
        )
    if _tensors(others) or isinstance(first, Mapping):
        return torch.cat([t.flatten(1) for t in (*found, *_tensors(others))], 1)
    return _stacked(found)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        return [t for v in inner for t in _tensors(v)]
    return []


def _stacked(samples: Sequence[Tensor]) -> Tensor:
    """[N, ...] of N samples; of samples of different sizes [N, F], filled up with zeros."""
    if len({s.shape for s in samples}) == 1:
        return torch.stack(list(samples))
    longest = max(s.numel() for s in samples)
    return torch.stack([F.pad(s.flatten(), (0, longest - s.numel())) for s in samples])


def example_inputs(call: Call, model: nn.Module) -> dict[str, Any]:
    """A recorded call as keyword arguments of the model's forward, for `extract`; of several
    components, component -> such arguments.

    Of a VAE, which is called by `decode`, `{"args": ..., "kwargs": ...}` of that.
    """
    if isinstance(model, Components):
        part = component(model, call)
        own = {"args": call.args, "kwargs": call.kwargs}
        if model.entry(call.component) == "forward":
            own = example_inputs(call, part)
        return {**model.examples, call.component: own}
    signature = inspect.signature(model.forward)
    inputs: dict[str, Any] = {}
    for name, value in signature.bind(*call.args, **call.kwargs).arguments.items():
        inputs |= (
            value
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            else {name: value}
        )
    return inputs


def unsteady(model: nn.Module, again: Callable[[], object]) -> str:
    """The first module (innermost) that makes something else of the same input when `again` runs
    the model a second time.
    """
    runs: list[list[tuple[str, list[float], list[float]]]] = []

    def marks(*values: Any) -> list[float]:
        found = _tensors(list(values))
        return [float(t.double().abs().sum() + 3 * t.double().sum()) for t in found]

    def listen(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            what = f"{name or 'the denoiser itself'} ({type(module).__name__})"
            runs[-1].append((what, marks(args, kwargs), marks(output)))

        return after

    handles = [
        m.register_forward_hook(listen(name), with_kwargs=True)
        for part in parts_of(model).values()
        for name, m in part.named_modules()
    ]
    try:
        with torch.no_grad(), measuring(model):
            for _ in range(2):
                runs.append([])
                again()
    finally:
        for handle in handles:
            handle.remove()
    first, second = runs
    for (name, given, made), (_, given_again, made_again) in zip(first, second, strict=False):
        if _same(given, given_again) and not _same(made, made_again):
            return name
    return "none of its modules: the model's own functions"


def _same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= 1e-6 * abs(a) for a, b in zip(one, other, strict=True)
    )


def repeated(model: nn.Module, again: Callable[[], Tensor], first: Tensor) -> None:
    """Check that `again` makes `first` a second time.

    Raises:
        QSearchError: the outputs differ beyond rounding; names the module where that begins.
    """
    second = again()
    eps = max(
        (torch.finfo(p.dtype).eps for p in model.parameters() if p.dtype.is_floating_point),
        default=0.0,
    )
    allowed = max(REPEATS, min(eps, 0.02) ** 2)
    power = first.double().square().sum()
    if second.shape == first.shape and (
        (second - first).double().square().sum() <= allowed * power or not power.isfinite()
    ):
        return
    raise QSearchError(
        "what is measured must be the same when it is run again; the same call gave "
        "another output, first in "
        f"{unsteady(model, again)}: it draws random numbers or keeps a state from call to "
        "call, take that out of the model"
    )
