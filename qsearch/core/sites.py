"""Sites: quantizable attention tensors (q, k, v, probabilities, output), as `MODULE:softmax`, and
attention as a whole.

MODULE is the module that calls attention, as the graph names it. Nothing is stored at a site.
Queries, keys, values, softmax and output are rounded: `keep` and `keep+aFORMAT`.
`MODULE:attention`, of a self-attention, is computed in another way (`core/attentions.py`):
`window8~rettention`. A plan that says nothing of a site keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from .attentions import PART, fault_of
from .errors import QSearchError, nearest
from .graph import OpGraph
from .scheme import Scheme

#: what an attention reads, what it weighs with (the softmax of queries times keys), and what it
#: makes
TENSORS = ("q", "k", "v", "softmax", "output")
PARTS = (*TENSORS, PART)


def is_site(name: str) -> bool:
    """Whether `name` is that of a site; layers are paths of modules, which hold no colon."""
    return ":" in name


def cut(name: str) -> tuple[str, str]:
    """Module and part of a site."""
    module, _, part = name.rpartition(":")
    return module, part


def sites_of(graph: OpGraph, patterns: Sequence[str] = ("*",)) -> tuple[str, ...]:
    """The sites of a graph that match any of `patterns`, in order of execution. Raises
    `QSearchError` for a pattern that matches none.
    """
    known = all_sites(graph)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise QSearchError(
                f"a pattern must match a site, MODULE:{'|'.join(PARTS)}; {pattern!r} "
                f"matches none in {graph.model}{nearest(pattern, known)}"
            )
    return tuple(name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns))


def all_sites(graph: OpGraph) -> tuple[str, ...]:
    """Every tensor of every attention in the graph, and every self-attention, in order of
    execution.
    """
    return tuple(
        f"{module}:{part}"
        for module in graph.attentions
        for part in PARTS
        if part != PART or module in graph.self_attentions
    )


def check(graph: OpGraph, name: str) -> None:
    """Refuse a name that is no layer and no site of the graph, with the nearest that is."""
    module, part = cut(name)
    if not is_site(name):
        graph.layer(name)
    elif part not in PARTS or module not in (
        graph.self_attentions if part == PART else graph.attentions
    ):
        sites_of(graph, (name.replace("[", "[[]"),))


def allowed(name: str, scheme: Scheme) -> bool:
    """Whether a site may have the scheme: a choice of attention, or rounding row by row, since
    nothing is stored there.
    """
    if scheme.format != "keep" or scheme.transforms or scheme.static_input:
        return False
    if cut(name)[1] == PART:
        return not scheme.activation
    return not scheme.attention


def fits_site(graph: OpGraph, name: str, scheme: Scheme) -> bool:
    """Whether a known site may have the scheme, and an attention's tokens are enough for it."""
    module, part = cut(name)
    if not allowed(name, scheme):
        return False
    if part != PART:
        return True
    return bool(scheme.attention) and not fault_of(graph.self_attentions[module], scheme)


def check_site(graph: OpGraph, name: str, scheme: Scheme) -> None:
    """Refuse an unknown name, and a scheme that a layer or site can't have."""
    check(graph, name)
    if not is_site(name):
        if scheme.attention:
            raise QSearchError(
                f"{scheme} is for an attention as a whole, MODULE:{PART}; given for the "
                f"layer {name}"
            )
        return
    module, part = cut(name)
    if part == PART:
        if not allowed(name, scheme):
            raise QSearchError(
                "an attention as a whole is dense, or spelt as by `qsearch list "
                "attentions`, such as window8~rettention; "
                f"given {scheme} for {name}"
            )
        if fault := fault_of(graph.self_attentions[module], scheme):
            raise QSearchError(f"{module} can't have {scheme}: {fault}")
    elif not allowed(name, scheme):
        raise QSearchError(
            "a site is rounded row by row and stores nothing: keep, or keep+aFORMAT such "
            f"as keep+a8; given {scheme} for {name}"
        )
