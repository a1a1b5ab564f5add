"""Sites: what a scheme may be given to besides a layer: queries, keys, values, weights and output of an attention, as `MODULE:softmax`.

MODULE is the module that calls attention, as the graph names it. Nothing is stored at a site: its schemes are `keep` and `keep+aFORMAT`, and a plan
that says nothing of a site keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from .errors import QSearchError, nearest
from .graph import OpGraph
from .scheme import Scheme

#: what an attention reads, what it weighs with (the softmax of queries times keys), and what it makes
PARTS = ("q", "k", "v", "softmax", "output")


def is_site(name: str) -> bool:
    """Whether `name` is that of a site; layers are paths of modules, which hold no colon."""
    return ":" in name


def cut(name: str) -> tuple[str, str]:
    """Module and part of a site."""
    module, _, part = name.rpartition(":")
    return module, part


def sites_of(graph: OpGraph, patterns: Sequence[str] = ("*",)) -> tuple[str, ...]:
    """The sites of a graph that match any of `patterns`, in order of execution. Raises `QSearchError` for a pattern that matches none."""
    modules = dict.fromkeys(
        op.name.rpartition(".")[0] for op in graph.ops if op.kind == "attention"
    )
    known = [f"{module}:{part}" for module in modules for part in PARTS]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise QSearchError(
                f"a pattern must match a site, MODULE:{'|'.join(PARTS)}; {pattern!r} matches none in {graph.model}{nearest(pattern, known)}"
            )
    return tuple(name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns))


def check(graph: OpGraph, name: str) -> None:
    """Refuse a name that is no layer and no site of the graph, with the nearest that is."""
    if is_site(name):
        sites_of(graph, (name.replace("[", "[[]"),))
    else:
        graph.layer(name)


def allowed(scheme: Scheme) -> bool:
    """Whether a site may have the scheme: nothing is stored there, ranges are each row's own, and there is no weight that a transform could go into."""
    return scheme.format == "keep" and not scheme.transforms and scheme.grain == "token"


def parted(
    graph: OpGraph, plan: Mapping[str, Scheme | str]
) -> tuple[dict[str, Scheme], dict[str, Scheme]]:
    """What a plan says of layers, and what of sites. Raises `QSearchError` for unknown names, and for sites with a scheme they can't have."""
    layers: dict[str, Scheme] = {}
    sites: dict[str, Scheme] = {}
    for name, text in plan.items():
        check(graph, name)
        scheme = Scheme.parse(text)
        if is_site(name) and not allowed(scheme):
            raise QSearchError(
                f"a site is rounded row by row and stores nothing: keep, or keep+aFORMAT such as keep+a8; given {scheme} for {name}"
            )
        (sites if is_site(name) else layers)[name] = scheme
    return layers, sites
