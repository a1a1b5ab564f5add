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

A tile is 32 rows x 8 columns, 256 weights in the order row by row. Weight t of a tile owns the bits
[bits * t, bits * (t + 1)) of its stream, little-endian, and its state is the window of `states`
bits that begins there; at the end the window goes on at the beginning (tail-biting), so that a tile
takes exactly 256 * bits bits. Windows do not depend on each other: decoding is parallel in any
order.

    packed uint8 [row tiles, column tiles, 32 * bits]     incomplete tiles are stored whole
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 32, 8
LENGTH = ROWS * COLUMNS
BITS = (2, 3, 4)
STATES = (8, 10, 12, 14)
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


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """(row tiles, column tiles) of a weight; incomplete ones count whole."""
    return -(-rows // ROWS), -(-columns // COLUMNS)


def stored_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of the packed codes of a weight [rows, columns], its scales apart."""
    down, across = tiles(rows, columns)
    return down * across * LENGTH * bits // 8


def level_of(state: Tensor) -> Tensor:
    """int8: the level of each state, integers of any type in [0, 2**14)."""
    hashed = (state.long() * MULTIPLIER + ADDEND) & 0xFFFFFFFF
    pairs = (hashed & 0x00FF00FF) + ((hashed >> 8) & 0x00FF00FF)
    return ((((pairs & 0xFFFF) + (pairs >> 16)) >> 2) - 127).to(torch.int8)


def to_tiles(weight: Tensor) -> Tensor:
    """[rows, columns] as [row tiles, column tiles, 256]; incomplete tiles are filled with zeros."""
    down, across = tiles(*weight.shape)
    missing = (0, across * COLUMNS - weight.shape[1], 0, down * ROWS - weight.shape[0])
    whole = F.pad(weight, missing) if any(missing) else weight
    cut = whole.reshape(down, ROWS, across, COLUMNS).transpose(1, 2)
    tiled: Tensor = cut.reshape(down, across, LENGTH)
    return tiled


def from_tiles(tiled: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `to_tiles`: [rows, columns] of [row tiles, column tiles, 256]."""
    down, across = tiled.shape[:2]
    whole = tiled.reshape(down, across, ROWS, COLUMNS).transpose(1, 2)
    return whole.reshape(down * ROWS, across * COLUMNS)[:rows, :columns]


def pack(states: Tensor, bits: int) -> Tensor:
    """States [..., 256] of a tail-biting path as uint8 [..., 32 * bits]: of each its lowest `bits`.

    The other bits of a state are those of the weights after it, which `unpack` finds there.
    """
    symbols = states.long() & (2**bits - 1)
    eight = symbols.unflatten(-1, (-1, 8))  # 8 symbols are `bits` bytes
    word = (eight << (bits * torch.arange(8, device=states.device))).sum(-1)
    places = 8 * torch.arange(bits, device=states.device)
    return ((word[..., None] >> places) & 255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, states: int) -> Tensor:
    """States int32 [..., 256] of packed tiles uint8 [..., 32 * bits].

    Raises `ValueError` where the tiles are of another width.
    """
    check(bits, states)
    if packed.dtype != torch.uint8 or packed.shape[-1] != LENGTH * bits // 8:
        raise ValueError(
            f"a tile of {bits} bits a weight is uint8 [..., {LENGTH * bits // 8}]; "
            f"given {packed.dtype} of shape {tuple(packed.shape)}"
        )
    begin = bits * torch.arange(LENGTH, device=packed.device)
    window = torch.zeros(*packed.shape[:-1], LENGTH, dtype=torch.int32, device=packed.device)
    for place in range(3):  # 14 bits from anywhere in a byte lie in three bytes
        byte = packed[..., (begin // 8 + place) % packed.shape[-1]]
        window += byte.int() << 8 * place
    return (window >> (begin % 8).int()) & (2**states - 1)


def decode(packed: Tensor, bits: int, states: int, rows: int, columns: int) -> Tensor:
    """Levels int8 [rows, columns] of a weight's tiles [row tiles, column tiles, 32 * bits]."""
    if tuple(packed.shape[:2]) != tiles(rows, columns):
        raise ValueError(
            f"a weight of {rows} x {columns} has {tiles(rows, columns)} tiles of {ROWS} x "
            f"{COLUMNS}; given {tuple(packed.shape[:2])}"
        )
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
