"""What calibration measures of a sparse attention: the kept share of the softmax, drift, error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_choice import AttentionChoice
from .attention_layout import Dense, Layout, Tokens
from .carried_attention import IMAGE_ONLY, Arrangement, SparseAttentionState, attend
from .sparse_attention import attention


def row_density(q: Tensor, k: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """rho [batch, heads, T]: the share of each row's softmax that a layout keeps."""
    lse = [attention(q, k, k, one, scale=scale).lse for one in (layout, Dense(layout.tokens))]
    return (lse[0] - lse[1]).exp().clamp(max=1.0)


def fit_drift(densities: Sequence[Tensor], every: int, tokens: Tokens) -> Tensor:
    """How rho moves after a dense step, for `~fit`: the mean over batch, visual tokens and starts.

    Args:
        densities: `row_density` of consecutive steps, each [batch, heads, T].
        every: steps from one dense step to the next.
        tokens: the arrangement of the sequence.

    Returns:
        [every - 1, heads]: row n - 1 is rho n steps behind a dense step, less rho at it.

    Raises:
        ValueError: for fewer steps than lie between two dense ones.
    """
    if len(densities) < every:
        raise ValueError(
            f"drifts over {every - 1} steps need {every} steps; given {len(densities)}"
        )
    means = torch.stack([x[:, :, tokens.visual_slice].float().mean((0, 2)) for x in densities])
    return torch.stack([(means[n:] - means[:-n]).mean(0) for n in range(1, every)])


def perturbation(
    now: tuple[Tensor, Tensor, Tensor],
    before: tuple[Tensor, Tensor, Tensor],
    choice: AttentionChoice,
    stale: int,
    arrangement: Arrangement = IMAGE_ONLY,
    drift: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """What a choice does to an attention's output: made with old statistics, less the dense output.

    Args:
        now: q, k, v of the step that is priced.
        before: q, k, v of the last dense step; not read by a choice that carries nothing.
        choice: what is done.
        stale: steps from `before` to `now`; 0 where this step is the dense one.
        arrangement: of the tokens.
        drift: the table of `~fit`.
        scale: 1 / sqrt(head size) where none is given.

    Returns:
        [batch, heads, T, head size].

    Raises:
        ValueError: what `attend` refuses.
    """
    state = SparseAttentionState(arrangement, drift)
    if choice.method and stale:
        attend(*before, choice, state, 0, scale=scale)
    made = attend(*now, choice, state, stale, scale=scale)
    tokens = arrangement.of(now[0].shape[2])
    return made - attention(*now, Dense(tokens), scale=scale).output
