"""Sparse attention: a part of the keys, corrected between dense steps by statistics of the last
one, or its output kept.

    window8             1/8 of the keys, a band in token order (in a video: one place in all frames)
    spatial8, temporal8 a band over tokens in order of frames, or of places (Sparse VideoGen, arXiv
    2502.01776)
    block8              the blocks of keys with the largest products of means (SpargeAttn, arXiv
                        2502.18137)
    dense+qk8           products of queries and keys in int8 (SageAttention, arXiv 2410.02367); also
                        window8+qk8
    ~rho                the last dense step's share of the softmax in the denominator
    ~residual           the last dense step's output less the sparse one added (DiTFastAttn, arXiv
                        2406.08552)
    ~rettention         both (Re-ttention, arXiv 2505.22918, equations 8 to 10)
    dense~cached        the last dense step's output, and no attention
    ~every4             a dense step every 4 steps; every 5 where nothing is said
    ~drift0.04, ~fit    what rho gains a step: a number, or as calibration measured

Grammar, layouts, carried state and kernels are those of `qsearch_kernels`; here they become a
choice of the plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from qsearch_kernels.attention_choice import KINDS, AttentionChoice

from ...core.errors import QSearchError

if TYPE_CHECKING:
    from torch import Tensor

    from qsearch_kernels.attention_layout import Layout, Tokens
    from qsearch_kernels.carried_attention import Arrangement

    from ...core.attentions import AttentionSpec
    from ..attention import AbstractSparseAttention, Projections

_HEAD = re.compile(rf"({'|'.join(KINDS)})(\d+)?(\+qk8)?(~|$)")
_INT8 = 8


@lru_cache(maxsize=1024)
def _parsed(text: str) -> AttentionChoice:
    try:
        return AttentionChoice.parse(text)
    except ValueError as error:
        raise QSearchError(str(error)) from None


def canonical(text: str) -> str | None:
    """The one spelling; "" for dense; None where the text begins like no choice of ours."""
    if not _HEAD.match(text):
        return None
    choice = _parsed(text)
    return "" if choice == AttentionChoice() else str(choice)


def every(text: str) -> int:
    """Steps from one dense step to the next; 0 where nothing is carried."""
    choice = _parsed(text)
    return choice.every if choice.method else 0


def fitted(text: str) -> bool:
    """Whether the drift of rho is measured by calibration."""
    return _parsed(text).drift is None


def fault(text: str, spec: AttentionSpec) -> str:
    """Tokens that can't be told apart, and parts that the tokens do not have."""
    choice = _parsed(text)
    if choice.kind == "dense":
        return ""
    if spec.text is None:
        return "how its tokens are arranged is not known; dense+qk8 and dense~cached are for any"
    if spec.text:
        return (
            f"{spec.text} of its {spec.tokens} tokens are text, and where they stand is not known; "
            "dense+qk8 and dense~cached are for any"
        )
    try:
        _layout(choice, spec)
    except ValueError as error:
        return str(error)
    return ""


def work(text: str, spec: AttentionSpec, *, bits: int = 0, steps: int = 0) -> float:
    """Products of kept pairs over those of all, the mean over `steps` from a dense one on, or over
    a whole interval.
    """
    from qsearch_kernels.attention_cost import step_flops

    choice = _parsed(text)
    count = (steps or choice.every) if choice.method else 1
    plain = replace(choice, int8_qk=False)
    dense = step_flops(AttentionChoice(), _tokens(spec), spec.heads, spec.head_size)
    done = sum(
        step_flops(plain, _tokens(spec), spec.heads, spec.head_size, i % choice.every)
        for i in range(count)
    )
    low = (1 + (_INT8 / bits) ** 2) / 2 if choice.int8_qk and bits else 1.0
    return low * done / (count * dense)


def simulated(text: str, spec: AttentionSpec, drift: Tensor | None) -> AbstractSparseAttention:
    """The attention with its state."""
    from qsearch_kernels.carried_attention import SparseAttention, SparseAttentionState

    return SparseAttention(_parsed(text), SparseAttentionState(_arrangement(spec), drift))


def made(
    text: str,
    spec: AttentionSpec,
    before: Projections | None,
    drift: Tensor | None,
    scale: float | None,
) -> Callable[[Projections, int], Tensor]:
    """The output at later steps, from what a dense step at `before` carries."""
    from qsearch_kernels.carried_attention import SparseAttentionState, attend

    choice, begun = _parsed(text), SparseAttentionState(_arrangement(spec), drift)
    if choice.method and before is not None:
        attend(*before, choice, begun, 0, scale=scale)

    def output(now: Projections, stale: int) -> Tensor:
        return attend(*now, choice, begun.copied(), stale, scale=scale)

    return output


def observed(text: str, spec: AttentionSpec, now: Projections, scale: float | None) -> Tensor:
    """The kept share of each row's softmax [1, heads, tokens], the mean over the batch."""
    from qsearch_kernels.attention_calibration import row_density

    q, k, _ = now
    return row_density(q, k, _layout(_parsed(text), spec), scale).mean(0, keepdim=True)


def fit(text: str, spec: AttentionSpec, steps: Sequence[Tensor]) -> Tensor:
    """The table of `~fit` [every - 1, heads]: how rho moves after a dense step."""
    from qsearch_kernels.attention_calibration import fit_drift

    try:
        return fit_drift(steps, _parsed(text).every, _tokens(spec))
    except ValueError as error:
        raise QSearchError(
            f"{text} at {spec.module} is fitted on consecutive steps: {error}"
        ) from error


def state_bytes(text: str, spec: AttentionSpec, batch: int) -> int:
    """rho, residual or output of a dense step."""
    from qsearch_kernels.attention_cost import state_bytes as carried

    return carried(_parsed(text), spec.tokens, spec.heads, spec.head_size, batch)


def _tokens(spec: AttentionSpec) -> Tokens:
    return _arrangement(spec).of(spec.tokens)


def _arrangement(spec: AttentionSpec) -> Arrangement:
    from qsearch_kernels.carried_attention import Arrangement

    return Arrangement(spec.text or 0, spec.frames)


def _layout(choice: AttentionChoice, spec: AttentionSpec) -> Layout:
    from qsearch_kernels.attention_layout import layout_of

    return layout_of(choice.kind, choice.parts, _tokens(spec))
