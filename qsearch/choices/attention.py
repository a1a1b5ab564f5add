"""Choices for a whole attention: what a plug-in in `attentions/` provides.

A choice replaces softmax(QK')V of a self-attention by something that costs less. What it does to
the output at a sampler's step may depend on the last dense step: statistics are carried. So its
perturbation has two arguments, the queries, keys and values of the step that is priced and those of
the step whose statistics it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from ..core import plugins
from ..core.attention_words import AttentionWord

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.attentions import AttentionSpec

    #: queries, keys and values, each [batch, heads, tokens, head size]
    Projections = tuple[Tensor, Tensor, Tensor]


class AbstractSparseAttention(Protocol):
    """What stands for one module's attention; its mistakes in input are `ValueError`s."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, step: int) -> Tensor:
        """The output [batch, heads, T, head size] at a sampler's step."""
        ...

    def reset(self) -> None:
        """A sampling begins, or a range of steps: nothing is carried over from before."""
        ...


class AbstractAttentionChoice(AttentionWord, Protocol):
    """What a module in `choices/attentions/` provides."""

    def simulated(
        self, text: str, spec: AttentionSpec, drift: Tensor | None
    ) -> AbstractSparseAttention:
        """The attention as the choice computes it, with the state that it carries."""
        ...

    def made(
        self,
        text: str,
        spec: AttentionSpec,
        before: Projections | None,
        drift: Tensor | None,
        scale: float | None,
    ) -> Callable[[Projections, int], Tensor]:
        """(projections of a step, steps since `before`) -> the output at that step.

        `before`: of the last dense step; None for choices that carry nothing.
        """
        ...

    def observed(
        self, text: str, spec: AttentionSpec, now: Projections, scale: float | None
    ) -> Tensor:
        """What `fit` needs to know of one step."""
        ...

    def fit(self, text: str, spec: AttentionSpec, steps: Sequence[Tensor]) -> Tensor:
        """What calibration chooses, by `observed` of consecutive steps: `drift` above.

        Raises:
            QSearchError: for fewer steps than it needs.
        """
        ...

    def state_bytes(self, text: str, spec: AttentionSpec, batch: int) -> int:
        """Memory that is carried from step to step, in 16 bits."""
        ...


def attention_plugin(text: str) -> AbstractAttentionChoice:
    """The plug-in of an attention's choice, as a scheme spells it."""
    from ..core.attention_words import attention_name

    plugin: AbstractAttentionChoice = plugins.load("attentions", attention_name(text))
    return plugin
