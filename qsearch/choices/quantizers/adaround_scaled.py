"""FP4DiT's scale-aware AdaRound: the gate is a sigmoid of V / s, s the step at each weight; needs
the layer's inputs.

arXiv 2503.15465, section 3.2. On a floating grid steps differ from weight to weight, and so do the
gradients of plain AdaRound's V, which are in proportion to s; V / s takes that out. With Adam,
which divides by the gradient's size, it amounts to a learning rate of rate / s for each weight.
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
)  # of Adam; FP4DiT's 1e-4 is not in units of the mean step, and it takes 2,500 steps a block


def supports(scheme: Scheme) -> bool:
    """Formats whose scale is any number: integers and floats."""
    return has_grid(scheme)


def quantize(
    groups: Tensor, scheme: Scheme, moments: Tensor, *, rate: float = RATE, steps: int = STEPS
) -> Codes:
    """Codes of fp32 groups [rows, groups, group] for inputs with `moments` [columns, columns], on
    min-max's grid.
    """
    return learn(groups, scheme, moments, rate=rate, steps=steps, scaled=True)


def gates(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Gates:
    """Variables that a reconstruction of a whole block learns, for fp32 groups on the grid of
    `scale` and `zero`.
    """
    return gates_between(groups, scale, zero, scheme, scaled=True)
