"""Sites: what a scheme may be given to besides a layer: queries, keys, values, weights and output of an attention, as `MODULE:softmax`.

MODULE is the module that calls attention, as the graph names it. Nothing is stored at a site: its schemes are `keep` and `keep+aFORMAT`, and a plan
that says nothing of a site keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    known = all_sites(graph)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise QSearchError(
                f"a pattern must match a site, MODULE:{'|'.join(PARTS)}; {pattern!r} matches none in {graph.model}{nearest(pattern, known)}"
            )
    return tuple(name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns))


def all_sites(graph: OpGraph) -> tuple[str, ...]:
    """Every tensor of every attention in the graph, in order of execution."""
    return tuple(f"{module}:{part}" for module in graph.attentions for part in PARTS)


def check(graph: OpGraph, name: str) -> None:
    """Refuse a name that is no layer and no site of the graph, with the nearest that is."""
    module, part = cut(name)
    if not is_site(name):
        graph.layer(name)
    elif module not in graph.attentions or part not in PARTS:
        sites_of(graph, (name.replace("[", "[[]"),))


def allowed(scheme: Scheme) -> bool:
    """Whether a site may have the scheme: nothing is stored there, ranges are each row's own, and there is no weight that a transform could go into."""
    return scheme.format == "keep" and not scheme.transforms and not scheme.static_input


def check_site(graph: OpGraph, name: str, scheme: Scheme) -> None:
    """Refuse an unknown name, and a scheme that a site of attention can't have."""
    check(graph, name)
    if is_site(name) and not allowed(scheme):
        raise QSearchError(
            f"a site is rounded row by row and stores nothing: keep, or keep+aFORMAT such as keep+a8; given {scheme} for {name}"
        )
