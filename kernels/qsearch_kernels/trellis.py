"""Trellis-coded weights: layout, computed levels and decoding, in plain torch.

A trellis code spends `bits` bits a weight like a scalar code, and comes closer to the
rate-distortion limit because a weight's value depends on more bits than its own: a window of
`states` bits (8 to 14) slides over the bits of a tile, `bits` further for each weight, and the
window is the state (the bit-shift trellis of QTIP, arXiv 2406.11235, section 3.1). A state's level
is computed, not looked up:

    hash  = MULTIPLIER * state + ADDEND                          mod 2**32
    level = (sum of the four bytes of the hash) // 4 - 127       a whole number of 8 bits

The sum of four nearly uniform bytes is nearly Gaussian (section 3.1.1 there, "1MAD"). Dividing by 4
costs nothing that can be measured at 4 bits, and makes every level an int8: a decoded weight is
`scale * level` with one scale a row, which every int8 product here multiplies as it is.

A tile is 4 columns wide, so that feedback by second moments reaches all but three of them, and
about 64 rows high, a multiple of 8 that leaves few rows over (`height`). Weights go row by row.
Weight t of a tile of n owns the bits [bits * t, bits * (t + 1)) of its stream, little-endian, and
its state is the window of `states` bits that begins there; at the end the window goes on at the
beginning (tail-biting), so that a tile takes exactly n * bits bits. Windows do not depend on each
other: decoding is parallel in any order, and the four weights of a row lie in one window of 32
bits.

    packed uint8 [row tiles, column tiles, height * bits / 2]     incomplete tiles are stored whole
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .trellis_layout import BITS, COLUMNS, STATES, height, packed_shape, tiles

__all__ = ["BITS", "COLUMNS", "STATES", "height", "packed_shape", "tiles"]
#: of a thousand random odd multipliers: highest SQNR on Gaussian numbers over BITS and STATES; both
#: below 2**31, and no state below 2**14 has a level beyond -127 to 127
MULTIPLIER, ADDEND = 1760196475, 801192770
#: standard deviation of four independent uniform bytes, over 4: what one deviation of the source is
DEVIATION = ((256**2 - 1) / 12 * 4) ** 0.5 / 4
#: bits -> by how much a Gaussian row is made narrower than the levels before it is encoded; at more
#: bits the largest levels would be too small otherwise
NARROWER = {2: 1.03, 3: 1.09, 4: 1.15}


def check(bits: int, states: int) -> None:
    """Raises `ValueError` for a width or a number of states that there is no trellis for."""
    if bits not in BITS or states not in STATES:
        raise ValueError(
            f"a trellis code has 2, 3 or 4 bits a weight and 2**8, 2**10, 2**12 or 2**14 states; "
            f"given {bits} bits and 2**{states} states"
        )


def level_of(state: Tensor) -> Tensor:
    """int8: the level of each state, integers of any type in [0, 2**14)."""
    hashed = (state.long() * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    pairs = (hashed & 0x00FF00FF) + ((hashed >> 8) & 0x00FF00FF)
    return ((((pairs & 0xFFFF) + (pairs >> 16)) >> 2) - 127).to(torch.int8)


def to_tiles(weight: Tensor) -> Tensor:
    """[rows, columns] as [row tiles, column tiles, height * 4]; incomplete ones end in zeros."""
    rows, columns = weight.shape
    (down, across), high = tiles(rows, columns), height(rows)
    missing = (0, across * COLUMNS - columns, 0, down * high - rows)
    whole = F.pad(weight, missing) if any(missing) else weight
    cut = whole.reshape(down, high, across, COLUMNS).transpose(1, 2)
    tiled: Tensor = cut.reshape(down, across, high * COLUMNS)
    return tiled


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `to_tiles`: [rows, columns] of [row tiles, column tiles, height * 4]."""
    down, across = tiled.shape[:2]
    whole = tiled.reshape(down, across, -1, COLUMNS).transpose(1, 2)
    found: Tensor = whole.reshape(-1, across * COLUMNS)[:rows, :columns]
    return found


def pack(states: Tensor, bits: int) -> Tensor:
    """States [..., n] of a tail-biting path as uint8 [..., n * bits / 8]: of each its lowest
    `bits`.

    n is a multiple of 8. The other bits of a state are those of the weights after it, which
    `unpack` finds there.
    """
    symbols = states.long() & (2**bits - 1)
    eight = symbols.unflatten(-1, (-1, 8))  # 8 symbols are `bits` bytes
    word = (eight << (bits * torch.arange(8, device=states.device))).sum(-1)
    places = 8 * torch.arange(bits, device=states.device)
    packed: Tensor = ((word[..., None] >> places) & 255).to(torch.uint8).flatten(-2)
    return packed


def unpack(packed: Tensor, bits: int, states: int) -> Tensor:
    """States int32 [..., n] of packed tiles uint8 [..., n * bits / 8]."""
    check(bits, states)
    size = packed.shape[-1]
    begin = bits * torch.arange(size * 8 // bits, device=packed.device)
    window = torch.zeros(*packed.shape[:-1], len(begin), dtype=torch.int32, device=packed.device)
    for place in range(3):  # 14 bits from anywhere in a byte lie in three bytes
        window += packed[..., (begin // 8 + place) % size].int() << 8 * place
    found: Tensor = (window >> (begin % 8).int()) & (2**states - 1)
    return found


def check_packed(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> None:
    """Raises `ValueError` where tiles are not those of a weight [rows, columns]."""
    check(bits, states)
    shape = packed_shape(rows, columns, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape:
        raise ValueError(
            f"a weight of {rows} x {columns} at {bits} bits is uint8 {shape}; "
            f"given {packed.dtype} of shape {tuple(packed.shape)}"
        )


def decode(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    """Levels int8 [rows, columns] of a weight's packed tiles.

    Raises `ValueError` where they are not those of such a weight.
    """
    check_packed(packed, bits, states, rows, columns)
    return from_tiles(level_of(unpack(packed, bits, states)), rows, columns)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    bits: int,
    states: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [rows, columns] in `dtype`: level times `scale` [rows, 1], rounded once."""
    level = decode(packed, bits, states, scale.shape[0], columns)
    return (level.double() * scale.double()).to(dtype)
