"""What a sparse attention costs: floating-point operations, and memory carried between steps."""

from __future__ import annotations

from .attention_choice import AttentionChoice
from .attention_layout import Dense, Layout, Tokens, layout_of


def attention_flops(layout: Layout, heads: int, head_size: int, batch: int = 1) -> float:
    """Floating-point operations of both products over the kept pairs, two a multiplication.

    Args:
        layout: what is kept.
        heads: heads of the attention.
        head_size: numbers of a head's query.
        batch: rows of the batch.

    Returns:
        4 * batch * heads * pairs * head_size.
    """
    return 4.0 * batch * heads * layout.pairs * head_size


def state_bytes(
    choice: AttentionChoice,
    tokens: int,
    heads: int,
    head_size: int,
    batch: int = 1,
    element_bytes: int = 2,
) -> int:
    """Memory that a choice carries from step to step: rho in fp32, the rest in the model's type.

    Args:
        choice: what is done.
        tokens: of the sequence.
        heads: of the attention.
        head_size: numbers of a head.
        batch: rows of the batch, guidance's included.
        element_bytes: bytes of a number of the model's.

    Returns:
        Bytes.
    """
    rows = batch * heads * tokens
    wide = choice.method in ("residual", "rettention", "cached")
    return rows * (4 * (choice.method in ("rho", "rettention")) + head_size * element_bytes * wide)


def step_flops(
    choice: AttentionChoice, tokens: Tokens, heads: int, head_size: int, stale: int = 0
) -> float:
    """Floating-point operations of an attention, for each batch row.

    Args:
        choice: what is done.
        tokens: the arrangement of the sequence.
        heads: of the attention.
        head_size: numbers of a head.
        stale: steps since the last dense one; 0 at a dense step, which computes both attentions.

    Returns:
        Operations of the products, two a multiplication.
    """
    layout = layout_of(choice.kind, choice.parts, tokens)
    dense, sparse = (attention_flops(x, heads, head_size) for x in (Dense(tokens), layout))
    if not choice.method:
        return sparse
    if choice.method == "cached":
        return dense if stale == 0 else 0.0
    return dense + sparse if stale == 0 else sparse


def mean_flops(
    choice: AttentionChoice, tokens: Tokens, heads: int, head_size: int, steps: int
) -> float:
    """The mean of `step_flops` over `steps` steps, the first of which is dense."""
    stale = (i % choice.every for i in range(steps))
    return sum(step_flops(choice, tokens, heads, head_size, n) for n in stale) / steps
