"""The choices of attentions that a scheme may hold, as plug-ins spell them: read by the grammar and
the costs, without importing torch.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from . import plugins

if TYPE_CHECKING:
    from .attentions import AttentionSpec


class AttentionWord(Protocol):
    """What the grammar and the costs read of a module in `choices/attentions/`.

    The whole is `choices.attention.AbstractAttentionChoice`.
    """

    def canonical(self, text: str) -> str | None:
        """The one spelling of a choice; "" for dense attention; None for text that is none of the
        plug-in's.

        Args:
            text: as it was given.

        Returns:
            The spelling by which choices are compared.

        Raises:
            QSearchError: for the plug-in's words in a combination that means nothing.
        """
        ...

    def every(self, text: str) -> int:
        """Steps from one dense step to the next; 0 where nothing is carried from step to step.

        Args:
            text: a choice in its one spelling.

        Returns:
            Number of steps.
        """
        ...

    def fitted(self, text: str) -> bool:
        """Whether calibration chooses something of it.

        Args:
            text: a choice in its one spelling.

        Returns:
            Whether it needs calibration.
        """
        ...

    def fault(self, text: str, spec: AttentionSpec) -> str:
        """Why an attention can't have the choice, in words; "" where it can.

        Args:
            text: a choice in its one spelling.
            spec: tokens, heads and sizes of the attention.

        Returns:
            The reason, or "".
        """
        ...

    def work(self, text: str, spec: AttentionSpec, *, bits: int = 0, steps: int = 0) -> float:
        """Work over that of dense attention, the mean over so many steps from a dense one on.

        With `bits`, a product of two numbers counts the product of their bits over `bits` squared.
        Without `steps`, the mean over a whole interval from dense step to dense step.

        Args:
            text: a choice in its one spelling.
            spec: tokens, heads and sizes of the attention.
            bits: of the numbers that are multiplied; 0 counts FLOPs.
            steps: how many sampler steps from a dense one on; 0 takes a whole interval.

        Returns:
            1.0 for dense attention.
        """
        ...


def attention_of(text: str) -> str | None:
    """The one spelling of an attention's choice, "" for dense; None where `text` is a layer's
    scheme.

    Args:
        text: as it was given.

    Returns:
        The spelling, "" or None.
    """
    found = _attention(text)
    return None if found is None else found[1]


def attention_name(text: str) -> str:
    """Name of the plug-in of an attention's choice, as a scheme spells it.

    Args:
        text: a choice in its one spelling.

    Returns:
        The plug-in's name.
    """
    found = _attention(text)
    assert found is not None, f"{text} was parsed, so that a plug-in knows it"
    return found[0]


def attention_word(text: str) -> AttentionWord:
    """The plug-in of an attention's choice, as a scheme spells it.

    Args:
        text: a choice in its one spelling.

    Returns:
        The module.
    """
    plugin: AttentionWord = plugins.load("attentions", attention_name(text))
    return plugin


@lru_cache(maxsize=4096)
def _attention(text: str) -> tuple[str, str] | None:
    """(plug-in, spelling)."""
    for name in _attention_names(tuple(sys.path), metadata.entry_points):
        plugin: AttentionWord = plugins.load("attentions", name)
        if (found := plugin.canonical(text)) is not None:
            return name, found
    return None


@lru_cache(maxsize=8)
def _attention_names(path: tuple[str, ...], entry_points: Any) -> tuple[str, ...]:
    """The plug-ins, ours first; remembered as long as the path and what reads it are the same."""
    ours = plugins.names("attentions", outside=False)
    return tuple(dict.fromkeys([*ours, *plugins.names("attentions")]))
