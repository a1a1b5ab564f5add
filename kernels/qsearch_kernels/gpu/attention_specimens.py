"""Sparse attention at shapes of real denoisers, to be looked into without a GPU or timed on one.

PixArt-Σ at 1024 pixels (4096 tokens, 16 heads of 72), CogVideoX-2B (226 text tokens, 13 frames of
1350, 30 heads of 64), and head sizes 96 and 128, at a batch of two rows for guidance.
"""

from __future__ import annotations

import torch

from ..attention_choice import AttentionChoice
from ..attention_cost import attention_flops
from ..attention_layout import Tokens, layout_of
from .sparse_attention import sparse_attention
from .specimens import Specimen, _numbers

PICTURE, VIDEO = Tokens(4096), Tokens(226 + 13 * 1350, text=226, frames=13)
#: words of the choice, tokens, heads, head size
SHAPES = {
    f"{kind}{'+qk8' * int8} {heads} x {size}{' video' * (tokens is VIDEO)}": (
        f"{kind}{'+qk8' * int8}",
        tokens,
        heads,
        size,
    )
    for kind, tokens in (("window32", PICTURE), ("window32", VIDEO), ("block32", PICTURE))
    for heads, size in ((16, 72), (30, 64), (16, 96), (24, 128))
    for int8 in (False, True)
} | {"dense 16 x 72": ("dense", PICTURE, 16, 72)}


def names() -> tuple[str, ...]:
    """Their names, without making them."""
    return tuple(SHAPES)


def specimen(name: str, device: str = "meta") -> Specimen:
    """The launch of that name, its tensors on `device`: random numbers, or none on "meta"."""
    words, tokens, heads, size = SHAPES[name]
    choice = AttentionChoice.parse(words)
    layout = layout_of(choice.kind, choice.parts, tokens)
    shape = (2, tokens.total, heads, size)
    q, k, v = (_numbers(device, *shape, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    launches, _ = sparse_attention(q, k, v, layout, int8_qk=choice.int8_qk)
    moved = 4 * 2.0 * q.numel()
    return Specimen(name, launches, "bf16", attention_flops(layout, heads, size, 2), moved)
