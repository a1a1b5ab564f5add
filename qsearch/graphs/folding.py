"""Folding: a trace becomes the steps that compute, joined by what flows between them; layout, casts
and constants go into the edges.

An operation is folded into the one whose result it rearranges, scales by a constant or puts
together again from pieces: so rotary positions, `1 + scale` and head reshapes vanish, and the query
projection's next step is the attention. Writes in place are followed through views, since export
keeps them and Wan's rotary embedding is made of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import operations as ops
from .trace import Call, Trace


@dataclass(eq=False, slots=True)
class Step:
    """One operation that computes. `inputs`: the steps it reads (of attention: query, key, value,
    then the mask), `reads`: the tensors themselves.

    `weight`: the parameter of a layer, else None; `transposed`: its output channels are on the last
    axis.
    """

    kind: str
    call: Call
    inputs: tuple[Step, ...] = ()
    reads: tuple[Call, ...] = ()
    weight: Call | None = None
    transposed: bool = False
    macs: int = 0
    index: int = -1

    @property
    def layer(self) -> str:
        """Name of the layer's parameter, or ""."""
        return self.weight.name if self.weight else ""

    @property
    def width(self) -> int:
        """Channels that a layer reads; 0 for other steps."""
        first = self.transposed or self.kind.startswith("conv-")
        return self.weight.shape[0 if first else 1] if self.weight else 0


def fold(trace: Trace, structure: frozenset[str]) -> list[Step]:
    """The steps of a trace in order of execution. Inputs named in `structure` (positions, masks)
    count as constants.
    """
    folder = _Folder(structure)
    for call in trace.calls:
        folder.read(call)
    for i, call in enumerate(trace.outputs):
        if isinstance(call, Call) and (made := folder.source(call)) is not None:
            folder.steps.append(
                Step("output", Call("output", shape=call.shape, name=str(i)), (made,), (call,))
            )
    return folder.steps


class _Folder:
    def __init__(self, structure: frozenset[str]) -> None:
        self.structure = structure
        self.steps: list[Step] = []
        self.made: dict[Call, Step | None] = {}  # None: a constant
        self.owner: dict[Call, Call] = {}  # a view -> the tensor whose memory it shows
        self.written: dict[
            Call, Step | None
        ] = {}  # a tensor written in place -> the step that wrote last
        self.roots: dict[Call, Call] = {}  # a constant -> the largest parameter it is made from
        self.turned: dict[Call, bool] = {}  # ... and whether that was transposed on the way

    def source(self, call: Call) -> Step | None:
        """The step whose result a tensor holds now; None for a constant."""
        owner = self.owner.get(call, call)
        return self.written[owner] if owner in self.written else self.made.get(call)

    def read(self, call: Call) -> None:
        op, given = ops.plain(call.op), call.given
        if op in ops.IGNORED:
            return
        if call.op in ("input", "parameter", "constant"):
            self.made[call] = (
                self._step(Step("input", call))
                if call.op == "input" and call.name not in self.structure
                else None
            )
            if call.op == "parameter" and len(call.shape) >= 2:
                self.roots[call] = call
            return
        if given and (op in ops.LAYOUT or (op == "einsum" and len(given) == 1)):
            self.made[call] = self.source(given[0])
            if op in ops.LAYOUT - ops.COPIES:
                self.owner[call] = self.owner.get(given[0], given[0])
            self._inherit(
                call,
                given[:1],
                turns=op in ("t", "transpose", "permute", "mT", "numpy_T", "adjoint", "swapaxes"),
            )
            return
        made = None if op in ops.SHAPES else self._layer(call) or self._compute(call, op)
        self.made[call] = made
        if ops.in_place(call.op) and given:
            self.owner[call] = self.owner.get(given[0], given[0])
            self.written[self.owner[call]] = made

    def _step(self, step: Step) -> Step:
        self.steps.append(step)
        return step

    def _inherit(self, call: Call, given: tuple[Call, ...], *, turns: bool = False) -> None:
        found = [g for g in given if g in self.roots]
        if found:
            best = max(found, key=lambda g: self.roots[g].numel)
            self.roots[call] = self.roots[best]
            self.turned[call] = self.turned.get(best, False) ^ turns

    def _layer(self, call: Call) -> Step | None:
        """A step with a weight: an operation of which one factor comes from a parameter alone."""
        op = ops.plain(call.op)
        if op in ops.MATMULS:
            factors = ops.operands(call)
        elif op in ops.CONVOLUTIONS | ops.EMBEDDINGS:
            names = ("input", "weight", "indices")
            factors = tuple(
                call.arguments[n] for n in names if isinstance(call.arguments.get(n), Call)
            )
        else:
            return None
        weight = next((f for f in factors if f in self.roots and self.source(f) is None), None)
        if weight is None:
            return None
        data = tuple(
            (f, made) for f in factors if f is not weight and (made := self.source(f)) is not None
        )
        if not data and op in ops.MATMULS - {"linear"}:
            return None  # a weight in the making, as by spectral norm
        root, first = self.roots[weight], weight is factors[0] and op not in ops.EMBEDDINGS
        kind = ops.weight_kind(call, root)
        # y = x @ W has its output channels last; the transposed weight of addmm, and a weight on
        # the left, have them first.
        last = (
            kind == "linear" and op != "linear" and not first and not self.turned.get(weight, False)
        )
        step = Step(
            kind,
            call,
            tuple(m for _, m in data),
            tuple(f for f in factors if f is not weight),
            root,
            last,
            ops.macs(call),
        )
        return self._step(step)

    def _compute(self, call: Call, op: str) -> Step | None:
        """What an operation without a weight gives: a constant, what it is folded into, or a new
        step.
        """
        given = ops.operands(call) if op in ops.MATMULS else call.given
        data = [(g, made) for g in given if (made := self.source(g)) is not None]
        if (
            op in ops.CONCATENATIONS
            and ops.in_place(call.op)
            and len(data) > 1
            and call.given[0].shape == self.owner.get(call.given[0], call.given[0]).shape
        ):
            data = data[1:]  # the whole tensor is written over
        if not data:
            self._inherit(call, call.given)
            return None
        sources = {id(made) for _, made in data}
        squared = len({id(g) for g, _ in data}) == 1
        if len(sources) == 1 and (
            op in ops.ELEMENTWISE - ops.PRODUCTS | ops.CONCATENATIONS
            or (op in ops.PRODUCTS and (squared or len(data) == 1))
        ):
            return data[0][1]
        return self._step(
            Step(
                ops.kind_of(op),
                call,
                tuple(m for _, m in data),
                tuple(g for g, _ in data),
                macs=ops.macs(call),
            )
        )


def consumers(steps: list[Step]) -> dict[Step, list[Step]]:
    """Step -> the steps that read it, in order of execution, each once."""
    out: dict[Step, list[Step]] = {step: [] for step in steps}
    for step in steps:
        for made in dict.fromkeys(step.inputs):
            out[made].append(step)
    return out
