"""Costs of a plan, and budgets that limit them: the only place where either is computed.

Solvers are not believed: whatever they return is priced again here, and a plan that breaks its
budget is never written. A layer that is stored in several ways, one for each range of steps, pays
for every copy; work and time are means over the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from .attentions import attention_work
from .errors import InfeasibleBudget, QSearchError, nearest
from .graph import LayerSpec, OpGraph
from .latency import Latency
from .scheme import FULL_BITS, KEEP, Scheme
from .steps import StepRanges
from .words import transform_word

#: what a budget may limit of a group of layers, and of the whole: attention and the rest of the
#: time belong to no layer
LAYER_LIMITS = ("average_bits", "bytes", "bit_operations", "activation_bytes")
LIMITS = (*LAYER_LIMITS, "attention_share", "total_bit_operations", "latency")
#: one scheme for all steps, or one for each range of them
Choices = tuple[Scheme, ...]


@dataclass(frozen=True)
class Cost:
    """What a plan costs.

    Attributes:
        bits: stored bits of all layers' weights, every copy counted.
        average_bits: the same for each weight.
        bytes: the same in bytes, rounded up; weights only.
        bit_operations: sum of MACs x weight bits x activation bits for one call on the example
            inputs, the mean over the steps.
        activation_bytes: inputs of all layers in one call at their activation bits, rounded up
            (what MixDQ budgets; inputs, not the peak of an allocator); of several ranges of steps
            the largest.
        latency: seconds of one call by a latency table, the mean over the steps; None without a
            table.
        groups: what belongs to layers, for each group of layers that a budget names.
        attention_share: FLOPs of self-attentions over those of dense ones, the mean over the steps.
        total_bit_operations: `bit_operations`, and those of attentions' products.
    """

    bits: int
    average_bits: float
    bytes: int
    bit_operations: int
    activation_bytes: int = 0
    latency: float | None = None
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    attention_share: float = 1.0
    total_bit_operations: float = 0.0


def select(graph: OpGraph, pattern: str) -> tuple[LayerSpec, ...]:
    """Layers whose name, role or block matches a pattern (`*` for anything). Raises `QSearchError`
    for one that matches nothing.
    """
    found = tuple(
        x
        for x in graph
        if any(fnmatchcase(text, pattern) for text in (x.name, x.role, x.block) if text)
    )
    if not found:
        known = {text for x in graph for text in (x.name, x.role, x.block) if text}
        raise QSearchError(
            f"a pattern must match the name, role or block of a layer; {pattern!r} "
            f"matches nothing in {graph.model}{nearest(pattern, known)}"
        )
    return found


def stored_bits(layer: LayerSpec, choices: Sequence[Scheme], *, filled: bool = False) -> int:
    """Stored bits of a layer whose choices are one for all steps, or one for each range of them.

    Ranges with the same weight format share one weight, unless a transform scales the weight, which
    is fitted for each range. What transforms keep of each channel is stored for every range.
    `filled` as in `Scheme.stored_bits`.
    """
    place = (layer.weight_shape, layer.channel_axis, layer.parts)
    whole = [scheme.stored_bits(*place, filled=filled) for scheme in choices]
    weights = [scheme.weight_only.stored_bits(*place, filled=filled) for scheme in choices]
    if len(choices) == 1:
        return whole[0]
    shared = {
        scheme.weight_only: bits
        for scheme, bits in zip(choices, weights, strict=True)
        if not scheme.scales_weight
    }
    kept = sum(a - b for a, b in zip(whole, weights, strict=True))
    apart = sum(b for s, b in zip(choices, weights, strict=True) if s.scales_weight)
    return kept + apart + sum(shared.values())


def can_have(layer: LayerSpec, scheme: Scheme) -> bool:
    """Whether a layer is large enough for a format, and of a kind and with channels that the
    transforms serve.
    """
    if layer.kind != "linear" and any(transform_word(t).needs_linear for t in scheme.transforms):
        return False
    try:
        scheme.stored_bits(layer.weight_shape, layer.channel_axis, layer.parts)
    except QSearchError:
        return False
    return True


def operations(layer: LayerSpec, scheme: Scheme) -> int:
    """Bit operations of one call of a layer."""
    return layer.macs * scheme.bits * scheme.activation_bits


def input_bits(layer: LayerSpec, scheme: Scheme) -> int:
    """Bits that one call of a layer reads as its input."""
    return layer.inputs * scheme.activation_bits


def over_steps(steps: StepRanges, choices: Sequence[Scheme]) -> list[tuple[float, Scheme]]:
    """The choices with the share of the steps in which each holds; they add up to 1."""
    shares = steps.shares if len(choices) > 1 else (1.0,)
    return list(zip(shares, choices, strict=True))


def cost(
    graph: OpGraph,
    choices: Mapping[str, Choices | Scheme],
    steps: StepRanges | None = None,
    *,
    latency: Latency | None = None,
    groups: Iterable[str] = (),
) -> Cost:
    """Cost of giving each layer of `graph` its choices (one, or one for each range of `steps`), and
    of each of `groups` alone.

    Raises:
        QSearchError: a layer has no choice, or the latency table is of another model.
    """
    steps = steps or StepRanges()
    held = {n: (c,) if isinstance(c, Scheme) else c for n, c in choices.items()}
    for layer in graph:
        if layer.name not in held:
            raise QSearchError(
                f"a plan needs a scheme for every layer (keep is one); {layer.name} has none"
            )
    if latency is not None:
        latency.check(graph)
    whole = _sums(graph, held, steps)
    share, products = attention_work(graph, held, steps, FULL_BITS)
    shares = {
        pattern: {
            k: v
            for k, v in asdict(_sums(select(graph, pattern), held, steps)).items()
            if k in LAYER_LIMITS
        }
        for pattern in groups
    }
    seconds = None
    if latency is not None:
        seconds = latency.rest + sum(
            share * latency.of(x.name, scheme)
            for x in graph
            for share, scheme in over_steps(steps, held[x.name])
        )
        seconds += sum(
            share * (latency.of(spec.site, scheme) - latency.of(spec.site, KEEP))
            for spec in graph.self_attentions.values()
            for share, scheme in over_steps(steps, held.get(spec.site, (KEEP,)))
            if scheme != KEEP
        )
    return replace(
        whole,
        latency=seconds,
        groups=shares,
        attention_share=share,
        total_bit_operations=whole.bit_operations + products,
    )


def _sums(held: Iterable[LayerSpec], choices: Mapping[str, Choices], steps: StepRanges) -> Cost:
    bits = weights = 0
    work = [0] * len(steps)
    read = [0] * len(steps)
    for layer in held:
        mine = choices[layer.name]
        bits, weights = bits + stored_bits(layer, mine), weights + layer.weights
        for i in range(len(steps)):
            scheme = mine[i if len(mine) > 1 else 0]
            work[i] += operations(layer, scheme)
            read[i] += input_bits(layer, scheme)
    mean = work[0]
    if len(work) > 1:
        mean = round(sum(share * w for share, w in zip(steps.shares, work, strict=True)))
    return Cost(bits, bits / weights, -(-bits // 8), mean, -(-max(read) // 8))


@dataclass(frozen=True)
class Budget:
    """Upper limits that a plan must keep; None = no limit. At least one is given.

    Attributes:
        average_bits: stored bits a weight.
        bytes: stored bytes of all weights.
        bit_operations: weight bits times input bits, summed over products of one call.
        activation_bytes: bytes of all rounded inputs of one call.
        latency: seconds of one call; needs a latency table.
        groups: pattern of layers (see `select`) -> limit -> value, for these layers alone.
        attention_share: FLOPs of attentions, as a share of dense ones, in the mean over steps.
        total_bit_operations: bit operations with those of attentions.
    """

    average_bits: float | None = None
    bytes: int | None = None
    bit_operations: float | None = None
    activation_bytes: int | None = None
    latency: float | None = None
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    attention_share: float | None = None
    total_bit_operations: float | None = None

    def __post_init__(self) -> None:
        if not self.limits and not any(self.groups.values()):
            raise QSearchError(f"a budget needs at least one limit: {', '.join(LIMITS)}")
        for pattern, limits in self.groups.items():
            for name in limits:
                if name not in LAYER_LIMITS:
                    raise QSearchError(
                        f"the group {pattern!r} can't be limited in "
                        f"{name!r}{nearest(name, LAYER_LIMITS)}"
                    )
        flat = [
            *self.limits.items(),
            *(
                (f"{name} of {pattern!r}", x)
                for pattern, limits in self.groups.items()
                for name, x in limits.items()
            ),
        ]
        for name, limit in flat:
            if not limit > 0:
                raise QSearchError(f"a budget must be above zero; {name} is {limit}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the whole that are set, by the name of the cost."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    def excess(self, achieved: Cost) -> dict[str, tuple[float, float]]:
        """name -> (limit, achieved) for every limit that is broken; those of groups are named
        `average_bits of 'pattern'`.

        Args:
            achieved: what a plan costs.

        Returns:
            Empty where every limit is kept.
        """
        asked = {name: (limit, getattr(achieved, name)) for name, limit in self.limits.items()}
        for pattern, limits in self.groups.items():
            asked |= {
                f"{name} of {pattern!r}": (limit, achieved.groups[pattern][name])
                for name, limit in limits.items()
            }
        if any(have is None for _, have in asked.values()):
            raise QSearchError(
                "a budget in latency needs a latency table; give one of a device or of a file"
            )
        return {
            name: (limit, have)
            for name, (limit, have) in asked.items()
            if have > limit * (1 + 1e-12)
        }

    def content(self) -> dict[str, Any]:
        """The limits that are set, as plain data: `Budget(**content)` is the budget again.

        Returns:
            Name of a limit -> its value.
        """
        return {
            **self.limits,
            **(
                {"groups": {pattern: dict(limits) for pattern, limits in self.groups.items()}}
                if self.groups
                else {}
            ),
        }


def check_budget(budget: Budget | None, achieved: Cost) -> None:
    """Raise `InfeasibleBudget` where a cost breaks a budget."""
    if budget is not None and (broken := budget.excess(achieved)):
        words = ", ".join(
            f"{k} {have:.6g} above its limit {limit:.6g}" for k, (limit, have) in broken.items()
        )
        raise InfeasibleBudget(f"the plan breaks its budget: {words}")
