"""States of a trellis code and their levels, from packed tiles: what several kernels share.

The layout is that of `trellis.py`: a tile of HIGH rows x 4 columns is a stream of
HIGH * BITS / 8 words, read in a circle; the four weights of a row lie in one window of 32 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def level_of(state, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr):
    """int8: the level of each state (uint32): the sum of the four bytes of its hash // 4 - 127."""
    hashed = state * MULTIPLIER + ADDEND
    pairs = (hashed & 0x00FF00FF) + ((hashed >> 8) & 0x00FF00FF)
    total = (pairs & 0xFFFF) + (pairs >> 16)
    return ((total >> 2).to(tl.int32) - 127).to(tl.int8)


@triton.jit
def trellis_levels(
    words, rows, row_mask, across, k0, BITS: tl.constexpr, STATES: tl.constexpr,
    HIGH: tl.constexpr, MULTIPLIER: tl.constexpr, ADDEND: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """int8 [BN, BK]: levels of `rows` from column k0 on, a multiple of 4.

    `words`: int32 [row tiles, across, HIGH * BITS / 8]. Beyond the last column tile: some level.
    """
    WORDS: tl.constexpr = HIGH * BITS // 8
    four = k0 // 4 + tl.arange(0, BK // 4)
    tile = (rows // HIGH)[:, None].to(tl.int64) * across + four[None, :]
    bit = (rows % HIGH)[:, None] * (4 * BITS)
    word, shift = bit >> 5, (bit & 31).to(tl.uint32)
    mask = row_mask[:, None] & (four < across)[None, :]
    low = tl.load(words + tile * WORDS + word, mask=mask, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words + tile * WORDS + (word + 1) % WORDS, mask=mask, other=0)
    high = high.to(tl.uint32, bitcast=True)
    window = (low >> shift) | ((high << 1) << (31 - shift))
    STATE: tl.constexpr = (1 << STATES) - 1
    a = level_of(window & STATE, MULTIPLIER, ADDEND)
    b = level_of((window >> BITS) & STATE, MULTIPLIER, ADDEND)
    c = level_of((window >> (2 * BITS)) & STATE, MULTIPLIER, ADDEND)
    d = level_of((window >> (3 * BITS)) & STATE, MULTIPLIER, ADDEND)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BN, BK))
