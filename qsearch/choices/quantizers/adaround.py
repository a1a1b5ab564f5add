"""AdaRound: learn for each weight whether to round up or down; needs the layer's inputs.

Nagel et al., arXiv 2004.10568: W~ = (floor(W / s) + h(V)) s with the rectified sigmoid h, the
output's squared error plus a penalty that drives h to 0 or 1 with a falling exponent. The layer's
error is taken whole, by the second moments of its inputs, not by batches. It is counted in units of
nearest rounding's, one a weight, so that the penalty means the same at every layer. Channels are
independent: where learning did not beat nearest rounding in a channel, that channel is rounded to
nearest.
"""

from __future__ import annotations

from torch import Tensor

from ...core.scheme import Scheme
from ..codes import Codes
from ..format import has_grid
from ..learnt_rounding import Gates, gates_between, learn

needs_inputs = True
integer_zeros = True
learns_blocks = True
RATE, STEPS = (
    3e-2,
    200,
)  # of Adam; the authors' 1e-3 asks for ten times the steps, and gives no more


def supports(scheme: Scheme) -> bool:
    """Formats whose scale is any number: integers and floats."""
    return has_grid(scheme)


def quantize(
    groups: Tensor, scheme: Scheme, moments: Tensor, *, rate: float = RATE, steps: int = STEPS
) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for inputs with `moments` [columns, columns], on
    min-max's grid.
    """
    return learn(groups, scheme, moments, rate=rate, steps=steps, scaled=False)


def gates(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Gates:
    """Variables that a reconstruction of a whole block learns, for fp32 groups on the grid of
    `scale` and `zero`.
    """
    return gates_between(groups, scale, zero, scheme, scaled=False)
