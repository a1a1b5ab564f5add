"""One of ModelOpt's algorithms for all layers of a model that are not kept: FP8 or NVFP4, weights
and inputs.

What readers of such configurations have in common, whether they switch it by steps (`step_policy`)
or quantize by it while they load (`tensorrt_llm`), and how TensorRT-LLM calls the layers that they
leave out: queries, keys and values are one there (`qkv_proj`, `add_qkv_proj`), the layers of a
feed-forward `up_proj` and `down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..core.errors import QSearchError
from ..core.graph import LayerSpec, OpGraph
from ..core.scheme import KEEP, Scheme
from ..decide.constraints import fused
from .exporting import formats
from .nearest import divides
from .nearest import nearest as nearest_of

#: scheme -> ModelOpt's algorithm
ALGORITHMS = {Scheme.parse("e4m3-t+ae4m3t"): "FP8", Scheme.parse("nvfp4+anvfp4"): "NVFP4"}
FP8, NVFP4 = ALGORITHMS
#: formats of which a plan has one
EITHER = (FP8.format, NVFP4.format)
_BLOCK = 16
#: the end of a layer's name -> that of its module in TensorRT-LLM, for layers that are one there
_FUSED = (
    (re.compile(r"\.to_[qkv]$"), ".qkv_proj"),
    (re.compile(r"\.add_[qkv]_proj$"), ".add_qkv_proj"),
)
#: the same for layers that are modules of their own
_RENAMED = (
    (re.compile(r"\.net\.0\.proj$"), ".up_proj"),
    (re.compile(r"\.net\.2$"), ".down_proj"),
    (re.compile(r"\.attn2\.(add_[kv]_proj)$"), r".\1"),
)


def nearest(scheme: Scheme, layer: LayerSpec) -> Scheme:
    """Linear layers: FP8 weights and inputs, a scale a tensor each, or NVFP4 on both sides.

    Args:
        scheme: what a plan asks for.
        layer: where.

    Returns:
        The nearest of the two, or `keep`.
    """
    if layer.kind != "linear" or layer.parts:
        return nearest_of(scheme, layer, [])
    own = scheme.format == NVFP4.format and divides(_BLOCK, layer)
    offer = NVFP4 if own else FP8  # what lacks a format of its own goes with the others
    return offer if nearest_of(scheme, layer, [offer]).format == offer.format else KEEP


def algorithm(layers: Mapping[str, Scheme], what: str) -> str:
    """The algorithm of a plan.

    Args:
        layers: layer -> scheme, of those that `nearest` leaves alone.
        what: what has only one, for the message.

    Returns:
        Its name; FP8 where every layer is kept.

    Raises:
        QSearchError: the plan has both.
    """
    used = {s for s in formats(layers).values() if s != KEEP}
    if len(used) > 1:
        raise QSearchError(
            f"{what} has one algorithm for all layers, FP8 or NVFP4; this plan has "
            f"{' and '.join(sorted(map(str, used)))}"
        )
    return ALGORITHMS[next(iter(used), FP8)]


def modules(graph: OpGraph) -> dict[str, str]:
    """Linear layer -> its module in TensorRT-LLM: one for queries, keys and values that read one
    input.
    """
    one = {name for names in fused(graph) if len(names) == len("qkv") for name in names}
    return {
        x.name: next((end.sub(new, x.name) for end, new in table if end.search(x.name)), x.name)
        for x in graph
        if x.kind == "linear"
        for table in (_FUSED if x.name in one else _RENAMED,)
    }


def ignored(graph: OpGraph, layers: Mapping[str, Scheme]) -> list[str]:
    """Linear layers that are kept, by their own names and by those of modules that are kept
    whole.
    """
    named = modules(graph)
    used = {module for name, module in named.items() if layers[name] != KEEP}
    kept = (pair for pair in named.items() if layers[pair[0]] == KEEP)
    return list(dict.fromkeys(n for pair in kept for n in pair if n not in used))
