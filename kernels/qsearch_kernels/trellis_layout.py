"""Sizes of trellis-coded weights: tiles, and the bytes that they take. Nothing here needs torch."""

from __future__ import annotations

COLUMNS = 4
BITS = (2, 3, 4)
STATES = (8, 10, 12, 14)


def height(rows: int) -> int:
    """Rows of a tile in a weight of so many rows: a multiple of 8, about 64."""
    down = max(1, round(rows / 64))
    return -(-max(1, rows) // (8 * down)) * 8


def tiles(rows: int, columns: int) -> tuple[int, int]:
    """(row tiles, column tiles) of a weight; incomplete ones count whole."""
    return -(-rows // height(rows)), -(-columns // COLUMNS)


def packed_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed tiles, uint8, of a weight [rows, columns]: its bytes, scales apart."""
    return (*tiles(rows, columns), height(rows) * bits // 2)
