"""Constraints: which layers go together, which stay as they are, and what each may become.

Names are patterns over a layer's name, role or block, as in `core.plan.select`; one that matches
nothing is an error, and so are two that can't both hold: the message names the pair.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.cost import select
from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.scheme import KEEP, Scheme


@dataclass(frozen=True)
class Constraints:
    """What must hold of a plan besides its budget.

    Attributes:
        tied: groups of layers that get one scheme (a fused projection).
        fused: tie the queries, keys and values that read one input.
        protected: patterns of layers that every plan keeps.
        allowed: pattern -> schemes that its layers may have (`keep` too, if it is to be allowed).
        formats: at most so many different formats in the whole plan, `keep` not counted: an engine
            needs a kernel for each.
    """

    tied: Sequence[Sequence[str]] = ()
    fused: bool = False
    protected: Sequence[str] = ()
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    formats: int | None = None

    def __post_init__(self) -> None:
        if self.formats is not None and self.formats < 0:
            raise QSearchError(
                f"a plan has at least 0 formats beside keep; given at most {self.formats}"
            )
        for pattern, schemes in self.allowed.items():
            if not schemes:
                raise QSearchError(
                    f"the layers of {pattern!r} need at least one allowed scheme; keep is one"
                )

    def choices(
        self, graph: OpGraph, offered: Mapping[str, Sequence[Scheme]]
    ) -> dict[str, tuple[Scheme, ...]]:
        """What each quantizable layer may become, of what is `offered` for it. Raises
        `QSearchError` naming two rules that contradict.

        Args:
            graph: the model's graph.
            offered: layer -> schemes that were measured.

        Returns:
            layer -> the schemes that the rules leave it.
        """
        rules: dict[str, list[tuple[str, set[Scheme]]]] = defaultdict(list)
        for pattern in self.protected:
            for layer in select(graph, pattern):
                rules[layer.name].append((f"protected {pattern!r}", {KEEP}))
        for pattern, schemes in self.allowed.items():
            may = {Scheme.parse(s) for s in schemes}
            for layer in select(graph, pattern):
                rules[layer.name].append((f"allowed {pattern!r}: {_listed(may)}", may))
        out = {}
        for layer in graph.quantizable:
            left = tuple(offered[layer.name])
            before = f"what is measured for it: {_listed(left)}"
            for rule, may in rules[layer.name]:
                kept = tuple(s for s in left if s in may)
                if not kept:
                    culprit = next(
                        (r for r, other in rules[layer.name] if r != rule and not other & may),
                        before,
                    )
                    raise QSearchError(
                        f"two rules for {layer.name} contradict each other: {culprit}; and {rule}"
                    )
                left = kept
            out[layer.name] = left
        return out

    def groups(
        self, graph: OpGraph, choices: Mapping[str, Sequence[Scheme]]
    ) -> list[tuple[str, ...]]:
        """The quantizable layers in groups that share a scheme, most of them alone. Raises
        `QSearchError` naming two that can't.

        Args:
            graph: the model's graph.
            choices: layer -> its schemes.

        Returns:
            Names of layers, a tuple a group.
        """
        parent = {layer.name: layer.name for layer in graph.quantizable}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        for names in [*self.tied, *(fused(graph) if self.fused else ())]:
            layers = [graph.layer(name) for name in names]
            for a, b in itertools.pairwise(layers):
                _check_pair(a, b)
                parent[root(b.name)] = root(a.name)
        held: dict[str, list[str]] = defaultdict(list)
        for layer in graph.quantizable:
            held[root(layer.name)].append(layer.name)
        for names in held.values():
            for first, second in itertools.combinations(names, 2):
                if not set(choices[first]) & set(choices[second]):
                    both = f"{_listed(choices[first])}; and {_listed(choices[second])}"
                    raise QSearchError(
                        f"{first} and {second} are tied and have no scheme in common: {both}"
                    )
            if not set.intersection(*(set(choices[n]) for n in names)):
                raise QSearchError(
                    f"{', '.join(names)} are tied and have no scheme in common, though "
                    "each two of them have"
                )
        return [tuple(names) for names in held.values()]


def fused(graph: OpGraph) -> list[tuple[str, ...]]:
    """Queries, keys and values of one attention that read an input of one width: what engines store
    as one weight.
    """
    held: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for layer in graph.quantizable:
        kind, _, part = layer.role.rpartition("-")
        if part in ("q", "k", "v") and kind.endswith("attention") and layer.kind == "linear":
            # Of cross-attention only keys and values read the same tokens.
            source = "q" if part == "q" and kind.startswith("cross") else ""
            held[
                (f"{layer.name.rpartition('.')[0]} {kind}{source}", layer.block, _width(layer))
            ].append(layer.name)
    return [tuple(names) for names in held.values() if len(names) > 1]


def _width(layer: LayerSpec) -> int:
    return layer.weights // max(1, layer.weight_shape[layer.channel_axis])


def _check_pair(a: LayerSpec, b: LayerSpec) -> None:
    for layer in (a, b):
        if not layer.quantizable:
            raise QSearchError(
                f"tied layers must be ones that can be quantized; {layer.name} ({layer.kind}) can't"
            )
    if _width(a) != _width(b):
        raise QSearchError(
            f"tied layers must read rows of one width; {a.name} reads {_width(a)}, "
            f"{b.name} reads {_width(b)}"
        )


def _listed(schemes: Sequence[Scheme] | set[Scheme]) -> str:
    return ", ".join(sorted(str(s) for s in schemes))
