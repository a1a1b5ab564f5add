"""Tape: a call of a streamed model with gradients, unit by unit.

The call runs without gradients, and what goes into each unit is kept. Its backward goes through the
units from the last to the first, reads the weights of each, computes it again and goes through it,
for every gradient that waits (those of several probes) before the next one. What lies between units
(sums, concatenations) is autograd's own graph, over tensors that are leaves where units end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..core.steps import clock_of
from .units import Unit

if TYPE_CHECKING:
    from .streaming import Stream


class Tape:
    """One call of a streamed model: its units in the order of their calls, with what went in."""

    def __init__(self, stream: Stream) -> None:
        clock = clock_of(stream.model)
        self.stream, self._clock, self._at = stream, clock, (clock.step, clock.total)
        kind = stream.device.type
        self._cast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._entries: list[_Entry] = []
        self.given: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def record(self, own: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[Tensor], Any]:
        """Run the model; its output's tensors without their graph, and how they are put
        together.
        """
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        self.given = [x for x in leaves if isinstance(x, Tensor)]
        self.inputs = [leaf(x, x.requires_grad) for x in self.given]
        again, keywords = refilled(leaves, self.inputs, spec)
        self.stream.tape = self
        try:
            made, form = _pytree.tree_flatten(own(*again, **keywords))
        finally:
            self.stream.tape = None
        self.outputs = [x for x in made if isinstance(x, Tensor)]
        return [x.detach() for x in self.outputs], (made, form)

    @staticmethod
    def output(tensors: Sequence[Tensor], form: Any) -> Any:
        """The model's output of these tensors."""
        leaves, spec = form
        found = iter(tensors)
        return _pytree.tree_unflatten(
            [next(found) if isinstance(x, Tensor) else x for x in leaves], spec
        )

    def run(self, unit: Unit, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A unit's call: without gradients now, with them when the tape is gone through."""
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        again, keywords = refilled(leaves, [x.detach() for x in tensors], spec)
        stream = self.stream
        if self._entries:
            stream._after[self._entries[-1].unit] = unit
        with torch.no_grad(), stream.loaded(unit, stream._after.get(unit)):
            made, form = _pytree.tree_flatten(own(*again, **keywords))
        wanted = needs_gradient(unit.module, tensors)
        made = [
            leaf(x, wanted and x.is_floating_point()) if isinstance(x, Tensor) else x for x in made
        ]
        outputs = [x for x in made if isinstance(x, Tensor)]
        self._entries.append(_Entry(unit, own, leaves, spec, tensors, outputs))
        return _pytree.tree_unflatten(made, form)

    def pull(
        self, gradients: Sequence[tuple[Tensor | None, ...]], now: Callable[[int], None]
    ) -> list[list[Tensor | None]]:
        """Take gradients of the output through the units from the last to the first.

        Args:
            gradients: of the output's tensors, for each of several vectors.
            now: called with the number of a vector before a part of its way.

        Returns:
            Gradients of the tensors that went in, for each vector.
        """
        ends = [x for x in self.inputs if x.requires_grad]
        ends += [x for e in self._entries for x in e.outputs if x.requires_grad]
        held: list[dict[int, Tensor]] = [{} for _ in gradients]

        def between(k: int, tensors: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
            """Through what lies before these tensors, to the ends of units."""
            now(k)
            if not backward(tensors, given, retain=True):
                return
            for x in ends:
                if x.grad is not None:
                    known = held[k].get(id(x))
                    held[k][id(x)] = x.grad if known is None else known + x.grad
                    x.grad = None

        for k, given in enumerate(gradients):
            between(k, self.outputs, given)
        for i in reversed(range(len(self._entries))):
            entry = self._entries[i]
            given_ = [[own.pop(id(x), None) for x in entry.outputs] for own in held]
            if all(g is None for one in given_ for g in one):
                continue
            then = self._entries[i - 1].unit if i else None
            with self.stream.loaded(entry.unit, then), self._as_it_was():
                found = entry.through(given_, now)
                for finish in self.stream.done:
                    finish()
            for k, one in enumerate(found):
                between(k, entry.tensors, one)
        return [[own.get(id(x)) for x in self.inputs] for own in held]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The clock and autocast as they were when the call was made."""
        with ExitStack() as stack:
            if self._at[1]:
                stack.enter_context(self._clock.at(*self._at))
            if self._cast[0]:
                stack.enter_context(torch.autocast(self.stream.device.type, self._cast[1]))
            yield


@dataclass(eq=False)
class _Entry:
    """One call of a unit on a tape."""

    unit: Unit
    own: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    tensors: list[Tensor]
    outputs: list[Tensor]

    def through(
        self, gradients: Sequence[Sequence[Tensor | None]], now: Callable[[int], None]
    ) -> list[list[Tensor | None]]:
        """Compute the unit again, and take each vector's gradients through it."""
        inputs = [leaf(x, x.requires_grad) for x in self.tensors]
        again, keywords = refilled(self.leaves, inputs, self.spec)
        with torch.enable_grad():
            made = [
                x
                for x in _pytree.tree_leaves(self.own(*again, **keywords))
                if isinstance(x, Tensor)
            ]
        found = []
        for k, given in enumerate(gradients):
            now(k)
            backward(made, given, retain=k < len(gradients) - 1)
            found.append([x.grad for x in inputs])
            for x in inputs:
                x.grad = None
        return found


class Walk(torch.autograd.Function):
    """The output of a taped call; its backward goes through the tape."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the call made."""
        ctx.tape = tape
        return tuple(x.view_as(x) for x in tensors[len(tape.given) :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Gradients of what went in; none where they wait."""
        tape: Tape = ctx.tape
        nothing = (None,) * (2 + len(tape.given) + len(tape.outputs))
        if tape.stream.gather(tape, gradients):
            return nothing
        (found,) = tape.pull([gradients], lambda _: None)
        return (None, None, *found, *(None,) * len(tape.outputs))


def leaf(tensor: Tensor, wanted: bool) -> Tensor:
    """The tensor without its graph."""
    return tensor.detach().requires_grad_(wanted)


def refilled(leaves: Sequence[Any], tensors: Sequence[Tensor], spec: Any) -> Any:
    """(args, kwargs) with other tensors."""
    found = iter(tensors)
    return _pytree.tree_unflatten(
        [next(found) if isinstance(x, Tensor) else x for x in leaves], spec
    )


def needs_gradient(module: nn.Module, given: Any) -> bool:
    """Whether a call gives gradients: to what goes in, or to weights."""
    tensors = (x for x in _pytree.tree_leaves(given) if isinstance(x, Tensor))
    return any(x.requires_grad for x in tensors) or any(
        p.requires_grad for p in module.parameters()
    )


def backward(
    tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], *, retain: bool
) -> bool:
    """Autograd's backward of those tensors that have a gradient and want it; whether there were
    any.
    """
    pairs = [
        (x, g) for x, g in zip(tensors, gradients, strict=True) if g is not None and x.requires_grad
    ]
    if pairs:
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs], retain_graph=retain)
    return bool(pairs)
