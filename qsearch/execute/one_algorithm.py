"""One of ModelOpt's algorithms for all layers of a model that are not kept: FP8 or NVFP4, weights
and inputs.

What readers of such configurations have in common, whether they switch it by steps (`step_policy`)
or quantize by it while they load (`tensorrt_llm`).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.errors import QSearchError
from ..core.graph import LayerSpec
from ..core.scheme import KEEP, Scheme
from .exporting import formats
from .nearest import divides
from .nearest import nearest as nearest_of

#: scheme -> ModelOpt's algorithm
ALGORITHMS = {Scheme.parse("e4m3-t+ae4m3t"): "FP8", Scheme.parse("nvfp4+anvfp4"): "NVFP4"}
FP8, NVFP4 = ALGORITHMS
#: formats of which a plan has one
EITHER = (FP8.format, NVFP4.format)
_BLOCK = 16


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
