"""Round to nearest on the range from smallest to largest weight; needs no data.

What a format does where a scheme names no method, if that follows from the ends of each group: see
`formats/`.
"""

from __future__ import annotations

from torch import Tensor

from ...core.scheme import Scheme
from ..codes import AbstractCodes
from ..format import format_of

needs_inputs = False
integer_zeros = True
learns_blocks = False


def supports(scheme: Scheme) -> bool:
    """Formats whose codes follow from the ends of each group: integers, floats and block
    formats.
    """
    return scheme.format != "keep" and format_of(scheme).follows_range


def quantize(groups: Tensor, scheme: Scheme) -> AbstractCodes:
    """Codes of fp32 groups [rows, groups, group]: the format's own."""
    return format_of(scheme).quantize(groups, scheme)
