"""Streaming: a model of which one block at a time is in memory, forwards and backwards.

Weights stay in their files (or in RAM, beside a GPU), and the model is cut into units (`units.py`).
Without gradients a unit's weights are read before its call and let go after it; with them a call
goes onto a `Tape`. So peak memory is one unit with its gradients, the next one that is read ahead,
and the tensors between units. Layers, names, hooks and parameters are those of the model as it
would be in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.errors import QSearchError
from ..graphs.components import parts_of, plain_class
from .tape import Tape, Walk, needs_gradient
from .units import SHARE, AbstractSource, Files, Held, Place, Unit, cut, nothing, placed

_METHODS = ("forward", "encode", "decode")

_streams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class AbstractWatcher(Protocol):
    """Told when weights come and go: what a plan changes of them is changed then."""

    def came(self, place: Place) -> None:
        """The weights of a parameter are there."""
        ...

    def goes(self, place: Place) -> None:
        """They are about to be let go."""
        ...


class Stream:
    """The weights of one model, a unit at a time.

    Args:
        model: with parameters on the meta device (`skeletons.skeleton`); its parameters are
            replaced.
        source: where weights come from.
        device: where it computes.
        dtype: type of its weights while they are there; what its class keeps in fp32 stays so.
        largest: bytes that a unit may take; a share of the model when left out.
        hold: keep weights in RAM once they are read, beside a GPU.
        remembers: keep what the model makes of inputs that it has seen, as text encoders do of
            prompts.

    Raises:
        QSearchError: a parameter that the source lacks.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Files,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        largest: int | None = None,
        hold: bool = False,
        remembers: bool = False,
    ) -> None:
        self.model, self.device = model, torch.device(device)
        self.source: AbstractSource = Held(source) if hold else source
        self.watchers: list[AbstractWatcher] = []
        #: called when a unit's gradients are complete and its weights still there
        self.done: list[Callable[[], None]] = []
        #: called with 1 each time that a unit was gone through
        self.passed: list[Callable[[int], None]] = []
        self.tape: Tape | None = None
        self._gathered: list[tuple[Tape, tuple[Tensor | None, ...]]] | None = None
        self._reader = ThreadPoolExecutor(1, "qsearch-read-ahead")
        self._ahead: tuple[Unit, Future[list[Tensor]]] | None = None
        self._after: dict[Unit, Unit] = {}
        self._last: Unit | None = None
        self._known: dict[Any, Any] | None = {} if remembers else None
        self.places = placed(model, source.weights, self.device, dtype)
        whole = sum(p.parameter.numel() * p.parameter.element_size() for p in self.places)
        modules, rest = cut(model, whole * SHARE if largest is None else largest)
        by_id = {id(place.parameter): place for place in self.places}
        owners: dict[int, int] = {}
        for module in modules.values():
            for one in set(map(id, module.parameters())):
                owners[one] = owners.get(one, 0) + 1
        rest |= {one for one, count in owners.items() if count > 1}
        self.units = [
            Unit(n, m, [by_id[id(p)] for p in m.parameters() if id(p) not in rest])
            for n, m in modules.items()
        ]
        self._fill([by_id[one] for one in rest])
        for place in self.places:
            _streams[place.parameter] = (self, place)
        for unit in self.units:
            _become(unit.module, {"__call__": _calls(self, unit)})
        own = {
            n: getattr(type(model), n) for n in _METHODS if callable(getattr(type(model), n, None))
        }
        _become(model, {name: _enters(self, method) for name, method in own.items()})

    @property
    def bytes(self) -> int:
        """What all weights would take."""
        return sum(p.parameter.numel() * p.parameter.element_size() for p in self.places)

    @property
    def largest(self) -> int:
        """What the largest unit takes."""
        return max((unit.bytes for unit in self.units), default=0)

    @contextmanager
    def gathering(self, now: Callable[[int], None]) -> Iterator[None]:
        """Inside, gradients that reach a call of the model wait; at the end they go through it
        together, unit by unit.

        Args:
            now: called with the number of a gradient, in the order in which they came, before
                each part of its way.
        """
        before, self._gathered = self._gathered, []
        try:
            yield
            waiting = self._gathered
        finally:
            self._gathered = before
        tapes: dict[int, list[int]] = {}
        for i, (tape, _) in enumerate(waiting):
            tapes.setdefault(id(tape), []).append(i)
        for numbers in tapes.values():
            tape = waiting[numbers[0]][0]
            tape.pull([waiting[i][1] for i in numbers], functools.partial(_nth, now, numbers))

    @contextmanager
    def loaded(self, unit: Unit, then: Unit | None = None) -> Iterator[None]:
        """Inside, the weights of `unit` are there; those of `then` are read meanwhile."""
        tensors = None
        if self._ahead is not None:
            known, future = self._ahead
            self._ahead = None
            tensors = future.result()  # also where they are another unit's: they would stay
            tensors = tensors if known is unit else None
        self._fill(unit.places, tensors)
        del tensors
        if then is not None and then is not unit:
            self._ahead = then, self._reader.submit(self._read_all, then)
        try:
            yield
        finally:
            for place in unit.places:
                for watcher in self.watchers:
                    watcher.goes(place)
                place.parameter.data = nothing(place.parameter)
                place.loaded = False
            for tell in self.passed:
                tell(1)

    @contextmanager
    def watched(self, watcher: AbstractWatcher) -> Iterator[None]:
        """Inside, `watcher` is told when weights come and go."""
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    def _fill(self, places: Sequence[Place], tensors: Sequence[Tensor] | None = None) -> None:
        for i, place in enumerate(places):
            place.parameter.data = self._read(place) if tensors is None else tensors[i]
            place.loaded = True
        for place in places:
            for watcher in self.watchers:
                watcher.came(place)

    def _read_all(self, unit: Unit) -> list[Tensor]:
        return [self._read(place) for place in unit.places]

    def _read(self, place: Place) -> Tensor:
        kind = place.parameter
        return self.source.read(place.name).to(kind.device, kind.dtype).view(kind.shape)

    def call(self, unit: Unit, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A unit's call, hooks included: with its weights, and onto the tape where one runs."""
        tape = self.tape
        if torch.is_grad_enabled() and tape is not None:
            return tape.run(unit, own, args, kwargs)
        if torch.is_grad_enabled() and needs_gradient(unit.module, (args, kwargs)):
            raise QSearchError(
                "gradients of a streamed model go through calls of "
                f"{' and '.join(_METHODS)}; {unit.name} of "
                f"{type(self.model).__name__} was called by itself: take offload none"
            )
        if self._last is not None:
            self._after[self._last] = unit
        self._last = unit
        with self.loaded(unit, self._after.get(unit)):
            return own(*args, **kwargs)

    def enter(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of the whole model."""
        if self.tape is not None:  # one method of the model called another
            return own(*args, **kwargs)
        if not (torch.is_grad_enabled() and needs_gradient(self.model, (args, kwargs))):
            return self._remembered(own, args, kwargs)
        tape = Tape(self)
        made, spec = tape.record(own, args, kwargs)
        anchor = torch.zeros((), requires_grad=True)
        walked = Walk.apply(tape, anchor, *tape.given, *made)  # type: ignore[no-untyped-call]  # autograd's
        return tape.output(walked, spec)

    def _remembered(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        key = None if self._known is None or self.watchers else _key((args, kwargs))
        if key is None or self._known is None:
            with torch.no_grad():
                return own(*args, **kwargs)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = own(*args, **kwargs)
        return _pytree.tree_map_only(Tensor, torch.clone, self._known[key])

    def gather(self, tape: Tape, gradients: tuple[Tensor | None, ...]) -> bool:
        """Let gradients wait, where they are gathered and nothing before the call needs them."""
        if self._gathered is None or any(t.requires_grad for t in tape.inputs):
            return False
        self._gathered.append((tape, gradients))
        return True


def stream_of(parameter: nn.Parameter) -> tuple[Stream, Place] | None:
    """The stream that brings the weights of a parameter; None for one that is in memory."""
    found: tuple[Stream, Place] | None = _streams.get(parameter)
    return found


def streams_of(model: nn.Module) -> list[Stream]:
    """The streams of a model, or of its components; none where all of it is in memory."""
    found = []
    for part in parts_of(model).values():
        known = next(map(stream_of, part.parameters()), None)
        if known is not None:
            found.append(known[0])
    return found


@contextmanager
def present(module: nn.Module, *, deep: bool = True) -> Iterator[None]:
    """Inside, the weights of a module (a layer) are there, as its files have them; nothing for one
    that is in memory.

    `deep`: those of its children, too.
    """
    known = [
        k for p in module.parameters(deep) if (k := stream_of(p)) is not None and not k[1].loaded
    ]
    for stream, place in known:
        place.parameter.data, place.loaded = stream._read(place), True
    try:
        yield
    finally:
        for _, place in known:
            place.parameter.data, place.loaded = nothing(place.parameter), False


def in_memory(model: nn.Module, what: str) -> None:
    """Refuse a streamed model for what changes weights for long.

    Raises:
        QSearchError: its weights come a block at a time.
    """
    if streams_of(model):
        raise QSearchError(
            f"{what} changes weights for longer than a call, and those of this model come "
            "a block at a time: "
            "take offload none"
        )


def _become(module: nn.Module, methods: dict[str, Any]) -> None:
    """Give one module methods of its own; its class keeps its name, and `plain_class` what it
    was.
    """
    own = type(module)
    module.__class__ = type(
        own.__name__,
        (own,),
        {**methods, "__module__": own.__module__, "_plain_class": plain_class(module)},
    )


def _calls(stream: Stream, unit: Unit) -> Callable[..., Any]:
    own = type(unit.module).__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stream.call(unit, functools.partial(own, self), args, kwargs)

    return call


def _enters(stream: Stream, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return stream.enter(functools.partial(own, self), args, kwargs)

    return method


def _nth(now: Callable[[int], None], numbers: Sequence[int], k: int) -> None:
    now(numbers[k])


def _key(given: Any) -> Any:
    """What tells one call from another: its numbers, of short integer inputs; None for others."""
    found: list[Any] = []
    leaves, spec = _pytree.tree_flatten(given)
    for x in leaves:
        if isinstance(x, Tensor):
            if x.is_floating_point() or x.numel() > 2**16:
                return None
            found.append((str(x.dtype), tuple(x.shape), x.cpu().numpy().tobytes()))
        elif isinstance(x, str | int | float | bool | type(None) | torch.dtype | torch.device):
            found.append(str(x))
        else:
            return None
    return (str(spec), *found)
