"""Wiring: what stands before and behind each step, which branches come back to a residual stream,
which attention reads what.

The questions that roles and blocks ask of the data flow, each answered once. A step is passed
through when it only changes the values that flow (norm, activation, gate, concatenation); layers,
attention, residual sums, inputs and outputs stop the search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import operations as ops
from .folding import Step, consumers
from .reachability import Tokens
from .trace import Call

_CONDITIONS = frozenset({"step", "pooled"})


@dataclass(frozen=True, slots=True)
class Link:
    """Where a search ended: at `step`; "q", "k", "v", "layer", "add", "modulated", "output", … in
    `what`; the kinds it passed in `via`.
    """

    step: Step
    what: str
    via: frozenset[str]


@dataclass(eq=False, slots=True)
class Branch:
    """A residual: `add` sums the stream `skip` and what its branch made of it. `layers`: own ones,
    those of branches within it left out.
    """

    add: Step
    skip: Step
    end: Step
    shortcut: Step | None = None
    layers: list[Step] = field(default_factory=list)
    attentions: list[Step] = field(default_factory=list)
    nested: bool = False


class Wiring:
    """The steps with what each depends on (`sees`) and whose tokens tensors hold (`tokens`); sets
    the kind of modulations.
    """

    def __init__(
        self, steps: list[Step], sees: Mapping[Step, frozenset[str]], tokens: Mapping[Call, Tokens]
    ) -> None:
        self.steps, self.sees, self.tokens = steps, sees, tokens
        self.readers = consumers(steps)
        self.before: dict[Step, int] = {}  # ancestors as the bits of a number
        for step in steps:
            bits = 0
            for made in step.inputs:
                bits |= self.before[made] | 1 << made.index
            self.before[step] = bits
        for step in steps:
            if step.kind in ("add", "multiply") and self.conditions(step):
                step.kind = "modulation"
        self.branches = self._branches()
        self._residuals = {branch.add for branch in self.branches}
        self.targets = {
            step: self._ahead(step) for step in steps
        }  # what the result of a step reaches first

    def conditions(self, step: Step) -> frozenset[int]:
        """Places of the operands that scale, shift or gate the others: they depend on no picture,
        and are smaller or made from the timestep.
        """
        if step.kind not in ("add", "multiply", "modulation") or len(step.inputs) < 2:
            return frozenset()
        kinds = [{kind for kind, _ in self.tokens.get(read, ())} for read in step.reads]
        largest = max(read.numel for read in step.reads)
        found = {
            i
            for i, (made, read) in enumerate(zip(step.inputs, step.reads, strict=True))
            if "image" not in self.sees[made]
            and (
                read.numel < largest
                or (kinds[i] <= _CONDITIONS and any("image" in k for k in kinds))
            )
        }
        return frozenset(found) if len(found) < len(step.inputs) else frozenset()

    def given_sees(self, step: Step) -> frozenset[str]:
        """What a layer's input depends on."""
        return (
            frozenset().union(*(self.sees[made] for made in step.inputs))
            if step.inputs
            else frozenset()
        )

    def holds(self, call: Call) -> frozenset[str]:
        """Kinds of tokens that a tensor holds; those of the timestep or of a pooled text only where
        there are no others.
        """
        kinds = frozenset(kind for kind, _ in self.tokens.get(call, ()))
        return kinds - _CONDITIONS - {"constant"} or kinds

    def attention(self, step: Step) -> str:
        """self, cross or joint: whose tokens the keys are, compared with the queries'; pooling,
        where many tokens become one.
        """
        if (
            step.reads[0].shape[-2:-1] == (1,) != step.reads[1].shape[-2:-1]
            and "image" not in self.sees[step]
        ):
            return "pooling"
        queries, keys = self.holds(step.reads[0]), self.holds(step.reads[1])
        if {"image", "text"} <= keys:
            return "joint"
        return "self" if keys == queries or not keys else "cross"

    def _ahead(self, step: Step) -> tuple[Link, ...]:
        found: dict[tuple[Step, str], frozenset[str]] = {}
        stack: list[tuple[Step, frozenset[str]]] = [(step, frozenset())]
        seen = {step}
        while stack:
            made, via = stack.pop()
            for reader in self.readers[made]:
                for what in self._arrivals(
                    reader, [i for i, x in enumerate(reader.inputs) if x is made]
                ):
                    if what:
                        found.setdefault((reader, what), via)
                    elif reader not in seen:
                        seen.add(reader)
                        stack.append((reader, via | {reader.kind}))
        return tuple(
            Link(s, what, via)
            for (s, what), via in sorted(
                found.items(), key=lambda pair: (pair[0][0].index, pair[0][1])
            )
        )

    def _arrivals(self, reader: Step, places: list[int]) -> set[str]:
        """What it means to arrive at a step by those of its inputs; "" = go on through it."""
        if reader.weight is not None:
            return {"layer"}
        if reader.kind == "attention":
            return {"qkvm"[min(i, 3)] for i in places}
        if reader.kind == "output":
            return {"output"}
        if reader.kind == "modulation" and set(places) <= self.conditions(reader):
            return {"modulated"}
        return {"add"} if reader in self._residuals else {""}

    def sources(self, step: Step) -> tuple[Link, ...]:
        """Where what a step reads comes from."""
        found: dict[Step, frozenset[str]] = {}
        stack: list[tuple[Step, frozenset[str]]] = [(made, frozenset()) for made in self.main(step)]
        seen: set[Step] = set()
        while stack:
            made, via = stack.pop()
            if made in seen:
                continue
            seen.add(made)
            if (
                made.weight is not None
                or made.kind in ("attention", "input")
                or made in self._residuals
            ):
                found[made] = via
            else:
                stack += [(x, via | {made.kind}) for x in self.main(made)]
        return tuple(
            Link(s, "layer" if s.weight is not None else s.kind, via)
            for s, via in sorted(found.items(), key=lambda pair: pair[0].index)
        )

    def main(self, step: Step) -> tuple[Step, ...]:
        """The inputs of a step without those that only scale, shift or gate."""
        left_out = self.conditions(step) if step.kind == "modulation" else frozenset()
        return tuple(made for i, made in enumerate(step.inputs) if i not in left_out)

    def after(self, step: Step, other: Step) -> bool:
        """Whether `step` depends on `other`."""
        return bool(self.before[step] >> other.index & 1)

    def _branches(self) -> tuple[Branch, ...]:
        """The residual branches in order of execution, each layer and attention in the smallest
        that holds it.
        """
        found = [
            branch for step in self.steps if step.kind == "add" and (branch := self._branch(step))
        ]
        inner: dict[Branch, list[Step]] = {}
        for branch in found:
            inner[branch] = [
                s
                for s in self.steps
                if (s.weight is not None or s.kind == "attention") and self._within(s, branch)
            ]
        home: dict[Step, Branch] = {}
        for branch in sorted(found, key=lambda b: len(inner[b])):
            for step in inner[branch]:
                if step in home:
                    branch.nested = True
                else:
                    home[step] = branch
                    (branch.layers if step.weight is not None else branch.attentions).append(step)
            if branch.shortcut is not None:
                home.setdefault(branch.shortcut, branch)
        return tuple(branch for branch in found if inner[branch])

    def _within(self, step: Step, branch: Branch) -> bool:
        return (step is branch.end or self.after(branch.end, step)) and self.after(
            step, branch.skip
        )

    def _branch(self, add: Step) -> Branch | None:
        pairs = [(a, b) for a in add.inputs for b in add.inputs if a is not b]
        for skip, end in pairs:
            if self.after(end, skip):
                return (
                    Branch(add, skip, end)
                    if skip.kind != "input" or "image" in self.sees[skip]
                    else None
                )
        for (
            way,
            end,
        ) in (
            pairs
        ):  # a shortcut: the stream is resampled or projected by one layer on its way to the sum
            layer, at = None, way
            while not self.after(end, at):
                if at.weight is not None:
                    if layer is not None:
                        break
                    layer = at
                elif at.kind not in ("resample", "norm", "activation"):
                    break
                if len(at.inputs) != 1:
                    break
                at = at.inputs[0]
            else:
                given = at.kind == "input" and "image" not in self.sees[at]
                return None if given or self._adapter(end, at) else Branch(add, at, end, layer)
        return None

    def _adapter(self, end: Step, skip: Step) -> bool:
        """Whether layers alone lie between: a low-rank adapter beside its layer, not a branch
        beside its shortcut.
        """
        while end is not skip:
            if end.weight is None or len(end.inputs) != 1:
                return False
            end = end.inputs[0]
        return True


def spatial(step: Step) -> bool:
    """Whether a layer is a convolution over a neighbourhood that mixes channels."""
    assert step.weight is not None
    shape = step.weight.shape
    return step.kind.startswith("conv") and max(shape[2:]) > 1 and not depthwise(step)


def depthwise(step: Step) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    assert step.weight is not None
    return (
        step.kind.startswith("conv")
        and step.weight.shape[1] == 1
        and int(step.call.arguments.get("groups", 1)) > 1
    )


def stride(step: Step) -> int:
    """The largest stride of a convolution, 1 for other layers."""
    given = (
        step.call.arguments.get("stride", 1) if ops.plain(step.call.op) in ops.CONVOLUTIONS else 1
    )
    return (
        max(given)
        if isinstance(given, list | tuple) and given
        else int(given or 1)
        if not isinstance(given, list | tuple)
        else 1
    )
