"""Layouts of sparse attention: which keys each query sees, as bands and lists of key blocks.

A layout says what is kept of the T x T pairs of an attention, and only a twin writes them out. The
tokens are those of a picture, or of a video's frames one after another, with or without text tokens
in the same sequence. Text tokens see all tokens and are seen by all (Re-ttention, arXiv 2505.22918,
its masks for CogVideoX). Three kinds:

- `Band`: keys at most `reach` places before or behind the query. `windowN` keeps 1/N of the places
  around the query: in a picture in raster order, in a video inside the frame and at the same places
  of all frames. `spatialN` and `temporalN` are Sparse VideoGen's two heads (arXiv 2502.01776): a
  band over tokens in order of frames, and one over tokens in order of places.
- `Blocks`: `blockN` keeps for each block of queries the N-th part of the blocks of keys, those with
  the largest products of means (SpargeAttn's idea, arXiv 2502.18137, without its self-similarity).
- `Dense`: everything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention_choice import KINDS

BLOCK_SIZES = (64, 32, 16)


@dataclass(frozen=True)
class Tokens:
    """How the tokens of a sequence are arranged.

    Args:
        total: tokens of the sequence, text included.
        text: text tokens among them.
        frames: frames of the video, each of `places` tokens; 1 for a picture.
        text_first: whether text stands before the picture or behind it.

    Raises:
        ValueError: where the tokens cannot be shared out in equal frames.
    """

    total: int
    text: int = 0
    frames: int = 1
    text_first: bool = True

    def __post_init__(self) -> None:
        visual = self.total - self.text
        if self.text < 0 or self.frames < 1 or visual < 1 or visual % self.frames:
            raise ValueError(
                "tokens besides text are shared out in equal frames, at least one each; given "
                f"{self.total} tokens, {self.text} of text, {self.frames} frames"
            )

    @property
    def visual(self) -> int:
        """Tokens that are no text."""
        return self.total - self.text

    @property
    def places(self) -> int:
        """Tokens of a frame."""
        return self.visual // self.frames

    @property
    def visual_slice(self) -> slice:
        """Where the tokens that are no text stand."""
        return slice(self.text, self.total) if self.text_first else slice(0, self.visual)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens stand."""
        return slice(0, self.text) if self.text_first else slice(self.visual, self.total)


@dataclass(frozen=True)
class Dense:
    """Every query sees every key."""

    tokens: Tokens

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are kept, of a head."""
        return self.tokens.total**2

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """True where a pair is kept [1, 1, T, T]. For twins and pictures alone."""
        total = self.tokens.total
        return torch.ones(1, 1, total, total, dtype=torch.bool, device=q.device)


@dataclass(frozen=True)
class Band:
    """Visual tokens at most `reach` units before or behind each other see each other.

    Args:
        tokens: the arrangement of the sequence.
        order: "frames" (as they stand) or "places" (a place's tokens of all frames together).
        unit: neighbouring tokens of that order that are one unit: 1, or a place's frames.
        reach: how many units to either side a query sees.
    """

    tokens: Tokens
    order: Literal["frames", "places"]
    unit: int
    reach: int

    @property
    def units(self) -> int:
        """Units of the visual tokens."""
        return self.tokens.visual // self.unit

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are kept, of a head."""
        kept = self.units * (2 * self.reach + 1) - self.reach * (self.reach + 1)
        return kept * self.unit**2 + self.tokens.total**2 - self.tokens.visual**2

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """True where a pair is kept [1, 1, T, T]. For twins and pictures alone."""
        tokens = self.tokens
        place = torch.arange(tokens.visual, device=q.device)
        if self.order == "places":
            place = place % tokens.places * tokens.frames + place // tokens.places
        unit = place // self.unit
        kept = torch.ones(tokens.total, tokens.total, dtype=torch.bool, device=q.device)
        kept[tokens.visual_slice, tokens.visual_slice] = (unit[:, None] - unit).abs() <= self.reach
        return kept[None, None]


@dataclass(frozen=True)
class Blocks:
    """Each block of visual queries sees `kept` blocks of visual keys, chosen by products of means.

    Args:
        tokens: the arrangement of the sequence.
        size: tokens of a block; the last may have fewer.
        kept: blocks of keys that a block of queries sees.
    """

    tokens: Tokens
    size: int
    kept: int

    @property
    def count(self) -> int:
        """Blocks of the visual tokens."""
        return -(-self.tokens.visual // self.size)

    @property
    def pairs(self) -> int:
        """Pairs that are kept, of a head, at most: the last block may be shorter."""
        text = self.tokens.total**2 - self.tokens.visual**2
        return min(self.tokens.visual * self.kept * self.size, self.tokens.visual**2) + text

    def chosen(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks of keys each block of queries sees.

        Args:
            q, k: [batch, heads, T, head size].

        Returns:
            int64 [batch, heads, blocks, kept], ascending.
        """
        means = [self._means(x[:, :, self.tokens.visual_slice]) for x in (q, k)]
        scores = means[0] @ means[1].transpose(-2, -1)
        return scores.topk(self.kept, -1).indices.sort(-1).values

    def _means(self, x: Tensor) -> Tensor:
        whole = x.shape[2] // self.size * self.size
        means = x[:, :, :whole].float().unflatten(2, (-1, self.size)).mean(3)
        rest = x[:, :, whole:].float()
        return means if not rest.shape[2] else torch.cat([means, rest.mean(2, keepdim=True)], 2)

    def mask(self, q: Tensor, k: Tensor) -> Tensor:
        """True where a pair is kept [batch, heads, T, T]. For twins and pictures alone."""
        tokens, blocks = self.tokens, self.count
        kept = torch.zeros(*q.shape[:2], blocks, blocks, dtype=torch.bool, device=q.device)
        kept.scatter_(-1, self.chosen(q, k), True)
        wide = kept.repeat_interleave(self.size, 2).repeat_interleave(self.size, 3)
        out = q.new_ones(*q.shape[:2], tokens.total, tokens.total, dtype=torch.bool)
        out[:, :, tokens.visual_slice, tokens.visual_slice] = wide[
            :, :, : tokens.visual, : tokens.visual
        ]
        return out


Layout = Dense | Band | Blocks


@functools.lru_cache(maxsize=256)
def layout_of(kind: str, parts: int, tokens: Tokens) -> Layout:
    """The layout that keeps about the `parts`-th part of the visual keys of each visual query.

    A band has floor(n / parts) // 2 units to either side, of n (Re-ttention's released masks), and
    the query's own. Near the ends of the sequence it has fewer. A layout that keeps everything is
    `Dense`: `window1`, or blocks so few that all are kept.

    Args:
        kind: one of `KINDS`.
        parts: N of `windowN`; 1 keeps everything.
        tokens: the arrangement of the sequence.

    Returns:
        The layout.

    Raises:
        ValueError: for an unknown kind, or more parts than there are keys.
    """
    if kind not in KINDS:
        raise ValueError(f"a layout of attention is one of {', '.join(KINDS)}; given {kind!r}")
    count = tokens.places if kind == "window" else tokens.visual
    if kind != "dense" and not 1 <= parts <= count:
        raise ValueError(
            f"{kind}N keeps the N-th part of {count} keys, so N is 1 to {count}; given {parts}"
        )
    if kind == "dense" or parts == 1:
        return Dense(tokens)
    if kind == "block":
        size = next((s for s in BLOCK_SIZES if tokens.visual >= s * parts), BLOCK_SIZES[-1])
        blocks = -(-tokens.visual // size)
        kept = -(-blocks // parts)
        return Dense(tokens) if kept == blocks else Blocks(tokens, size, kept)
    reach = count // parts // 2
    unit = tokens.frames if kind == "window" else 1
    by_place = tokens.frames > 1 and kind in ("window", "temporal")
    return Band(tokens, "places" if by_place else "frames", unit, reach)
