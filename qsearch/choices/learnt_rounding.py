"""Learnt rounding: gates between the two neighbours of each weight on its grid, trained on the
output's error.

What `adaround`, `adaround_scaled` and block-wise reconstruction share; the two methods differ in
what the gate's variable is measured in. Gates, penalty and schedule are AdaRound's (arXiv
2004.10568, section 4): zeta = 1.1, gamma = -0.1, no penalty in the first fifth, then an exponent
from 20 down to 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.scheme import Scheme
from .codes import Codes, qparams_from_range, quantize_to_grid
from .format import grid_of
from .moments import columns_of, from_columns, output_error

ZETA, GAMMA = 1.1, -0.1
WARM, BETAS = 0.2, (20.0, 2.0)
# in units of nearest rounding's error; under 1 the gates stay undecided, from 10 to 100 nothing
# changes
PENALTY = 30.0


class Gates:
    """A variable for each weight, between the grid's value below it (`low`) and the one above (`low
    + step`); it starts where the weight lies.

    `scaled`: the gate is h(V / s) and not h(V), s the step at a weight in units of the mean step,
    so that a rate serves weights of any size.
    """

    def __init__(self, weight: Tensor, low: Tensor, step: Tensor, *, scaled: bool) -> None:
        self.low, self.step = low, step
        share = ((weight - low) / step).clamp(0, 1)
        gate = -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)
        self.size = step / step.mean() if scaled else torch.ones_like(step)
        self.variable = (gate * self.size).requires_grad_()

    def shares(self) -> Tensor:
        """How far each weight is moved from `low` towards `low + step`, with gradients."""
        return ((self.variable / self.size).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self, shares: Tensor) -> Tensor:
        """The weights while they are learnt, with gradients; `shares` is what `shares()` gave."""
        return self.low + shares * self.step

    def hard(self) -> Tensor:
        """The weights on the grid."""
        return self.low + (self.variable.detach() >= 0) * self.step


def gates_between(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, *, scaled: bool
) -> Gates:
    """Gates of fp32 groups [rows, groups, group] between their neighbours on the grid that scale,
    zero and scheme span.
    """
    return Gates(groups, *neighbours(groups, scale, zero, scheme), scaled=scaled)


def rounding_regularizer(shares: Tensor, progress: float) -> Tensor:
    """The penalty on gates that are neither open nor closed, in units of nearest rounding's error a
    weight; `progress` from 0 to 1. With gradients.
    """
    if progress < WARM:
        return shares.new_zeros(())
    beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARM) / (1 - WARM)
    return PENALTY * (1 - (2 * shares - 1).abs().pow(beta)).sum()


def learn(
    groups: Tensor, scheme: Scheme, moments: Tensor, *, rate: float, steps: int, scaled: bool
) -> Codes:
    """Codes of fp32 groups [rows, groups, group] whose rounding minimises the output error for
    inputs with `moments` [columns, columns].

    Deterministic: gates start where the weights lie, and the loss is that of all inputs at once.
    """
    scale, zero = qparams_from_range(
        groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), scheme
    )
    simple = quantize_to_grid(groups, scale, zero, scheme)
    low, step = neighbours(groups, scale, zero, scheme)
    weight, plain, low, step = (
        columns_of(t, scheme, moments) for t in (groups, simple.values(), low, step)
    )
    square = moments.to(weight)
    before = output_error(plain - weight, square)
    unit = before.sum() / weight.numel()
    if not unit > 0:  # nothing went into the layer, or its weights lie on the grid
        return simple
    with torch.enable_grad():
        gates = Gates(weight, low, step, scaled=scaled)
        optimizer = torch.optim.Adam([gates.variable], lr=rate)
        for i in range(steps):
            shares = gates.shares()
            loss = output_error(
                gates.soft(shares) - weight, square
            ).sum() / unit + rounding_regularizer(shares, i / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    learnt = gates.hard()
    worse = output_error(learnt - weight, square) >= before
    return quantize_to_grid(
        from_columns(torch.where(worse[:, None], plain, learnt), groups, scheme),
        scale,
        zero,
        scheme,
    )


def neighbours(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """The grid's value at or below each weight and the step to the one above; a weight beyond the
    grid's end gets its last two.
    """
    table = grid_of(scheme).level_table(scheme.format, groups.device)
    if table is None:
        code = (groups / scale + zero).floor().clamp(0, 2**scheme.bits - 2)
        return scale * (code - zero), scale.expand_as(groups)
    values = table[~table.isnan()].unique()  # ascending, zero once
    place = torch.searchsorted(values, (groups / scale).contiguous(), right=True).clamp(
        1, len(values) - 1
    )
    return scale * values[place - 1], scale * (values[place] - values[place - 1])
