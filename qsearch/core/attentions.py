"""Self-attentions of a graph: tokens, heads and frames of each, and what a plan's choices make of
their work.

The site of a whole attention is `MODULE:attention`. Its choices are words of plug-ins in
`choices/attentions/`. Nothing is stored there; the cost is arithmetic. Where a choice computes a
dense attention every so many steps, its cost depends on how many steps there are
(`StepRanges.total`); without it, it is the mean over one such interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .attention_words import attention_word

if TYPE_CHECKING:
    from .graph import Op, OpGraph
    from .scheme import Scheme
    from .steps import StepRanges

PART = "attention"


@dataclass(frozen=True)
class AttentionSpec:
    """One self-attention of a model.

    Attributes:
        module: the module that calls attention.
        tokens: of its sequence.
        heads: how many there are.
        head_size: numbers of a head's query.
        macs: multiply-accumulates of both products in one call of the denoiser.
        frames: frames that the tokens are shared out in, one after the other; 1 for a picture.
        text: tokens of text in the same sequence; None where the graph does not tell.
    """

    module: str
    tokens: int
    heads: int
    head_size: int
    macs: int
    frames: int = 1
    text: int | None = 0

    @property
    def site(self) -> str:
        """Its name in plans and tables."""
        return f"{self.module}:{PART}"


def self_attentions(ops: Sequence[Op]) -> dict[str, AttentionSpec]:
    """Module -> its self-attention, in order of execution; cross-attentions are left out.

    Frames and text are inferred from the shapes of the model's inputs.
    """
    inputs = [op.shape for op in ops if op.kind == "input"]
    found: dict[str, AttentionSpec] = {}
    for op in ops:
        if op.kind != "attention" or op.inputs != 3 * math.prod(op.shape) or len(op.shape) < 3:
            continue
        module = op.name.rpartition(".")[0]
        if module in found:
            found[module] = replace(found[module], macs=found[module].macs + op.macs)
            continue
        heads = op.shape[1] if len(op.shape) == 4 else 1
        frames, text = _arrangement(op.shape[-2], inputs)
        found[module] = AttentionSpec(
            module, op.shape[-2], heads, op.shape[-1], op.macs, frames, text
        )
    return found


def _arrangement(tokens: int, inputs: Sequence[tuple[int, ...]]) -> tuple[int, int | None]:
    """(frames, text tokens) of a sequence, by the shapes of the model's inputs."""
    texts = [0, *(shape[1] for shape in inputs if len(shape) == 3)]
    pictures: list[tuple[int, int]] = []
    for shape in inputs:
        if len(shape) == 5:  # frames before or behind the channels
            pictures += [(shape[2], shape[3] * shape[4]), (shape[1], shape[3] * shape[4])]
        elif len(shape) == 4:
            pictures.append((1, shape[2] * shape[3]))
    for text in texts:
        visual = tokens - text
        for frames, area in pictures:
            if visual > 0 and visual % frames == 0 and area % (visual // frames) == 0:
                patch = area // (visual // frames)
                if math.isqrt(patch) ** 2 == patch:
                    return frames, text
    if not pictures and len(texts) > 1:  # tokens are given as a sequence
        for text in (0, *texts[2:]):
            if tokens == texts[1] + text:
                return 1, text
    return 1, None


def attention_share(spec: AttentionSpec, scheme: Scheme, steps: int = 0) -> float:
    """FLOPs of a choice over those of dense attention, the mean over `steps` from a dense one on
    (0: a whole interval).
    """
    if not scheme.attention:
        return 1.0
    return attention_word(scheme.attention).work(scheme.attention, spec, steps=steps)


def attention_bit_operations(
    spec: AttentionSpec, scheme: Scheme, full_bits: int, steps: int = 0
) -> float:
    """MACs x bits x bits of both products, the mean over the steps likewise."""
    dense = float(spec.macs * full_bits * full_bits)
    if not scheme.attention:
        return dense
    plugin = attention_word(scheme.attention)
    return dense * plugin.work(scheme.attention, spec, bits=full_bits, steps=steps)


def dense_macs(graph: OpGraph) -> int:
    """Multiply-accumulates of all attentions of one call, cross-attentions among them."""
    return sum(op.macs for op in graph.ops if op.kind == "attention")


def attention_work(
    graph: OpGraph,
    choices: Mapping[str, Sequence[Scheme]],
    steps: StepRanges,
    full_bits: int,
) -> tuple[float, float]:
    """(FLOPs of self-attentions over those of dense ones, bit operations of all attentions), the
    mean over the steps.

    `choices`: site -> one choice, or one for each range of `steps`; attentions that are not named
    are dense.
    """
    whole = sum(spec.macs for spec in graph.self_attentions.values())
    saved, bits = 0.0, float(dense_macs(graph) * full_bits * full_bits)
    for spec in graph.self_attentions.values():
        held = choices.get(spec.site, ())
        for share, length, scheme in _over(steps, held):
            saved += share * spec.macs * (1 - attention_share(spec, scheme, length))
            dense = spec.macs * full_bits * full_bits
            bits -= share * (dense - attention_bit_operations(spec, scheme, full_bits, length))
    return 1 - saved / whole if whole else 1.0, bits


def _over(steps: StepRanges, held: Sequence[Scheme]) -> Iterable[tuple[float, int, Scheme]]:
    """(share of the steps, their number or 0, choice) of each range, or of all steps."""
    if len(held) > 1:
        return zip(steps.shares, steps.lengths, held, strict=True)
    return zip((1.0,) * len(held), (steps.total,) * len(held), held, strict=True)


def fault_of(spec: AttentionSpec, scheme: Scheme) -> str:
    """Why an attention can't have a choice, in words; "" where it can."""
    return (
        attention_word(scheme.attention).fault(scheme.attention, spec) if scheme.attention else ""
    )
