"""Patterns: attention and norms that a model writes by hand become one step each.

Attention: a product of two activations, a softmax, a product with a third; or two products in a row
    without a softmax (linear
attention, as in Sana). Norm: a tensor divided by, or less, a reduction of itself.
"""

from __future__ import annotations

from . import operations as ops
from .folding import Step, consumers


def recognise(steps: list[Step]) -> list[Step]:
    """The same steps with hand-written norms and attention as one step each, and without what they
    were made of.
    """
    for step in steps:
        if step.kind in ("multiply", "add") and len(step.inputs) == 2:
            _norm(step)
    readers = consumers(steps)
    for step in steps:
        if step.kind == "softmax":
            _attention(step, readers)
    for step in steps:
        if step.kind == "matmul":
            _linear_attention(step, readers)
    return _numbered(steps)


def _numbered(steps: list[Step]) -> list[Step]:
    """Steps that something reads, layers, sums (a stream may end unread), inputs and outputs;
    `index` is set.
    """
    kept: list[Step] = []
    wanted: set[Step] = set()
    for step in reversed(steps):
        if step in wanted or step.weight is not None or step.kind in ("input", "output", "add"):
            kept.append(step)
            wanted.update(step.inputs)
    kept.reverse()
    for i, step in enumerate(kept):
        step.index = i
    return kept


def _norm(step: Step) -> None:
    """`x * rsqrt(mean(x²))`, `x - mean(x)`, and one after the other."""
    for x, reduction in (step.inputs, step.inputs[::-1]):
        if (
            ops.plain(reduction.call.op) in ops.REDUCTIONS
            and reduction is not x
            and set(map(_core, reduction.inputs)) == {_core(x)}
        ):
            at = step.inputs.index(x)
            step.kind, step.reads = "norm", step.reads[at : at + 1]
            step.inputs = x.inputs if _by_hand(x) else (x,)
            return


def _by_hand(step: Step) -> bool:
    return step.kind == "norm" and ops.plain(step.call.op) not in ops.NORMS


def _core(step: Step) -> Step:
    """What a norm by hand was taken of."""
    return step.inputs[0] if _by_hand(step) else step


def _attention(softmax: Step, readers: dict[Step, list[Step]]) -> None:
    outs = [s for s in readers[softmax] if s.kind == "matmul" and len(s.inputs) == 2]
    scores = _product(softmax.inputs[0])
    if len(outs) != 1 or scores is None:
        return
    (out,) = outs
    query, key = _roles(scores, softmax)
    value = next(i for i in range(2) if out.inputs[i] is not softmax)
    masked = softmax.inputs[0]
    mask = tuple(i for i in masked.inputs if i is not scores) if masked is not scores else ()
    _become(
        out,
        scores,
        (
            (scores.inputs[query], scores.reads[query]),
            (scores.inputs[key], scores.reads[key]),
            (out.inputs[value], out.reads[value]),
        ),
        mask,
    )
    masked.kind = "masked" if masked is not scores else masked.kind
    for reader in readers[softmax]:  # the attention's weights, where the model returns them too
        if reader is not out:
            reader.inputs = tuple(out if i is softmax else i for i in reader.inputs)


def _linear_attention(out: Step, readers: dict[Step, list[Step]]) -> None:
    for at, inner in enumerate(out.inputs):
        if (
            inner.kind == "matmul"
            and len(inner.inputs) == 2
            and len(out.inputs) == 2
            and readers[inner] == [out]
        ):
            pairs = list(zip(inner.inputs, inner.reads, strict=True))
            # The key went through a feature map, an activation as a rule; without one, the product
            # is written key x value.
            if pairs[1][0].kind == "activation" and pairs[0][0].kind != "activation":
                pairs.reverse()
            _become(out, inner, ((out.inputs[1 - at], out.reads[1 - at]), *pairs), ())
            return


def _become(
    out: Step, inner: Step, parts: tuple[tuple[Step, object], ...], mask: tuple[Step, ...]
) -> None:
    out.kind, out.macs = "attention", out.macs + inner.macs
    out.inputs = tuple(step for step, _ in parts) + mask
    out.reads = tuple(read for _, read in parts)  # type: ignore[misc]


def _product(step: Step) -> Step | None:
    """The product of two activations behind the scores, past a mask or a bias."""
    for _ in range(4):
        if step.kind == "matmul":
            return step if len(step.inputs) == 2 else None
        behind = [
            i
            for i in step.inputs
            if i.kind in ("matmul", "add", "where", "masked_fill", "activation", "multiply")
        ]
        if step.weight is not None or not behind:
            return None
        step = behind[0]
    return None


def _roles(scores: Step, softmax: Step) -> tuple[int, int]:
    """Places of query and key among the factors: the softmax runs over the keys, which lie on the
    last axis as a rule.
    """
    axis, rank = softmax.call.arguments.get("dim", -1), len(softmax.call.shape)
    last = int(axis) % rank == rank - 1
    if ops.plain(scores.call.op) == "einsum":
        terms, _, made = str(scores.call.arguments["equation"]).replace(" ", "").partition("->")
        letter = made[-1 if last else -2]
        return (0, 1) if letter in terms.split(",")[1] else (1, 0)
    return (0, 1) if last else (1, 0)
