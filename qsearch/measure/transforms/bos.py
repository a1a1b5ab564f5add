"""MixDQ's text: the first token's output is computed beforehand in full precision and takes no part in rounding.

A causal text encoder gives the same first token for every prompt, and an outlying one, so that a layer of text keys or values has one constant
output for it (MixDQ, arXiv 2405.17873, section 3.1). Only where calibration saw that it is constant: encoders that look both ways (T5)
change it with the prompt, and are refused. Ranges are those of the other tokens.
"""

from __future__ import annotations

from torch import Tensor

from ...core.errors import QSearchError
from ...core.scheme import Scheme
from ..calibration import LayerInputs
from ..treatment import Transform

needs_linear = True


def fit(weight: Tensor, inputs: LayerInputs, scheme: Scheme, amount: float) -> Transform:
    """The constant token. Raises `QSearchError` where calibration does not show one."""
    if inputs.rest is None:
        raise QSearchError(
            "~bos is for layers that see text alone, a row a token (the keys and values of cross-attention)"
        )
    if inputs.first is None:
        raise QSearchError(
            "~bos needs a causal text encoder, whose first token is the same for every prompt; calibration saw it change, or saw one prompt only"
        )
    return Transform(first=inputs.first)
