"""Specimens: every kernel at shapes of real denoisers, to be looked into without a GPU
(`inspection.py`) or timed on one (`gpu_bench.py`).

Shapes are those that cost most: PixArt-α at 512 pixels and batch 2 (2048 tokens of 1152), Flux
(3072), SDXL's convolutions. Each comes with the operations that it must do and the bytes that it
must move, each once, from which a roofline follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import trellis
from ..layout import row_bytes
from .conv2d_a8 import conv2d_a8
from .dequantize import dequantize
from .launching import Launch
from .linear_a8 import linear_a8
from .linear_packed_a8 import linear_packed_a8
from .linear_trellis import TILES as TRELLIS_TILES
from .linear_trellis import decode, linear_trellis, linear_trellis_a8
from .linear_wna16 import linear_wna16
from .norm_quantize import norm_quantize
from .quantize import quantize_rows
from .rotate import rotate, rotate_quantize_rows
from .tiles import CORRECTING_TILES, FP8_TILES, TILES, UNPACKING_TILES, Tile
from .trellis_encode import encode

TOKENS, WIDTH = 2048, 1152


@dataclass(frozen=True)
class Specimen:
    """`launches` of a call at one shape; `operations` (two a multiplication) on units for `unit`
    ("int8", "fp8", "bf16"), `moved` bytes at least.
    """

    name: str
    launches: tuple[Launch, ...]
    unit: str
    operations: float
    moved: float


def specimens(device: str = "meta") -> Iterator[Specimen]:
    """All of them, one after the other, their tensors on `device` (random numbers, or nothing at
    all on "meta").
    """
    for name, make in _MAKERS.items():
        yield make(name, device)


def names() -> tuple[str, ...]:
    """Their names, without making them."""
    return tuple(_MAKERS)


def specimen(name: str, device: str = "meta") -> Specimen:
    """The one of that name."""
    return _MAKERS[name](name, device)


def _numbers(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    if dtype in (torch.int8, torch.uint8):
        low = -128 if dtype == torch.int8 else 0
        return torch.randint(low, low + 256, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def _linear(
    name: str,
    device: str,
    tile: Tile | None,
    dtype: torch.dtype = torch.int8,
    m: int = TOKENS,
    n: int = WIDTH,
    k: int = WIDTH,
) -> Specimen:
    """With all that the epilogue can do: zeros of the rows, bias, adaLN's gate and the residual."""
    new = partial(_numbers, device)
    integer = dtype == torch.int8
    rows, columns = new(m), new(n)
    launches, _ = linear_a8(
        new(m, k, dtype=dtype), rows, rows if integer else None, None, new(n, k, dtype=dtype),
        columns, None, columns if integer else None,
        columns, new(2, n, dtype=torch.bfloat16), new(m, n, dtype=torch.bfloat16), torch.bfloat16,
        tile,
    )  # fmt: skip
    return Specimen(
        name, launches, "int8" if integer else "fp8", 2.0 * m * n * k, m * k + n * k + 4 * m * n
    )


def _packed(
    name: str,
    device: str,
    tile: Tile | None,
    bits: int,
    group: int = 0,
    zeros: bool = False,
    table: bool = False,
) -> Specimen:
    new, groups = partial(_numbers, device), WIDTH // group if group else 1
    side = new(WIDTH, groups)
    sums = torch.zeros(TOKENS, groups, dtype=torch.int32, device=device)
    levels = new(WIDTH, 2**bits, dtype=torch.int8) if table else None
    packed = new(WIDTH, row_bytes(WIDTH, bits), dtype=torch.uint8)
    rows, columns = new(TOKENS), new(WIDTH)
    launches, _ = linear_packed_a8(
        new(TOKENS, WIDTH, dtype=torch.int8), rows, rows, sums if zeros else None, packed, side,
        side if zeros else None, columns, levels, bits, group,
        columns, new(2, WIDTH, dtype=torch.bfloat16), new(TOKENS, WIDTH, dtype=torch.bfloat16),
        torch.bfloat16, tile,
    )  # fmt: skip
    return Specimen(
        name, launches, "int8", 2.0 * TOKENS * WIDTH**2, TOKENS * WIDTH * 5 + packed.numel()
    )


def _conv(
    name: str, device: str, tile: Tile | None, size: int = 64, channels: int = 640
) -> Specimen:
    new = partial(_numbers, device)
    pictures, columns = new(2), new(channels)
    launches, out = conv2d_a8(
        new(2, size, size, channels, dtype=torch.int8), pictures, pictures,
        new(channels, 3, 3, channels, dtype=torch.int8), columns, columns,
        1, 1, 1, columns, new(2, size, size, channels, dtype=torch.bfloat16), torch.bfloat16, tile,
    )  # fmt: skip
    return Specimen(
        name, launches, "int8", 2.0 * out.numel() * channels * 9, 5 * out.numel() + 9 * channels**2
    )


def _rows(name: str, device: str, columns: int, activation: str, form: str = "8") -> Specimen:
    wide = columns * (2 if activation == "geglu" else 1)
    launches, _ = quantize_rows(
        _numbers(device, TOKENS, wide, dtype=torch.bfloat16), form, activation
    )
    return Specimen(name, launches, "bf16", 0.0, TOKENS * (2 * wide + columns))


def _norm(name: str, device: str, columns: int, form: str, group: int = 0) -> Specimen:
    new = partial(_numbers, device, dtype=torch.bfloat16)
    modulation: dict[str, Any] = {
        "modulation_scale": new(2, columns),
        "modulation_shift": new(2, columns),
    }
    launches, _ = norm_quantize(new(TOKENS, columns), form, **modulation, group=group)
    return Specimen(name, launches, "bf16", 0.0, TOKENS * columns * 3)


def _weight(device: str, n: int, bits: int, group: int) -> tuple[Any, ...]:
    groups = WIDTH // group if group else 1
    new = partial(_numbers, device)
    return (
        new(n, row_bytes(WIDTH, bits), dtype=torch.uint8),
        new(n, groups, dtype=torch.float16),
        new(n, groups, dtype=torch.float16),
    )


def _dequantized(name: str, device: str, bits: int, group: int, dtype: torch.dtype) -> Specimen:
    packed, scale, zero = _weight(device, 4 * WIDTH, bits, group)
    launches, out = dequantize(packed, scale, zero, 0.0, None, bits, WIDTH, group, dtype)
    return Specimen(name, launches, "bf16", 0.0, packed.numel() + 2 * out.numel())


def _few_rows(name: str, device: str, bits: int, group: int, table: bool = False) -> Specimen:
    packed, scale, zero = _weight(device, 6 * WIDTH, bits, group)
    levels = _numbers(device, 2**bits, dtype=torch.float16) if table else None
    x = _numbers(device, 2, WIDTH, dtype=torch.bfloat16)
    launches, _ = linear_wna16(
        x,
        packed,
        scale,
        None if table else zero,
        0.0,
        levels,
        bits,
        WIDTH,
        group,
        x.new_empty(6 * WIDTH),
    )
    return Specimen(name, launches, "bf16", 4.0 * 6 * WIDTH**2, packed.numel() + 2 * scale.numel())


def _trellis(name: str, device: str, tile: Tile, bits: int, rounded: bool) -> Specimen:
    new = partial(_numbers, device)
    packed = new(*trellis.packed_shape(WIDTH, WIDTH, bits), dtype=torch.uint8)
    rows, columns = new(TOKENS), new(WIDTH)
    if rounded:
        launches, _ = linear_trellis_a8(
            new(TOKENS, WIDTH, dtype=torch.int8), rows, rows, packed, columns, columns, bits, 12,
            columns, new(2, WIDTH), new(TOKENS, WIDTH, dtype=torch.bfloat16), torch.bfloat16, tile,
        )  # fmt: skip
    else:
        x = new(TOKENS, WIDTH, dtype=torch.bfloat16)
        launches, _ = linear_trellis(x, packed, columns, bits, 12, columns, tile)
    moved = TOKENS * WIDTH * (5 if rounded else 4) + packed.numel()
    unit = "int8" if rounded else "bf16"
    return Specimen(name, launches, unit, 2.0 * TOKENS * WIDTH**2, moved)


def _decoded(name: str, device: str, bits: int) -> Specimen:
    shape = trellis.packed_shape(4 * WIDTH, WIDTH, bits)
    packed = _numbers(device, *shape, dtype=torch.uint8)
    launches, out = decode(packed, None, bits, 12, 4 * WIDTH, WIDTH)
    return Specimen(name, launches, "bf16", 0.0, packed.numel() + out.numel())


def _viterbi(name: str, device: str, bits: int, states: int) -> Specimen:
    tiles = _numbers(device, 16384, trellis.COLUMNS * trellis.height(WIDTH)).to(torch.int32)
    levels = _numbers(device, 2**states).to(torch.int32)
    launches, _ = encode(tiles, levels, bits, states, 40)
    return Specimen(name, launches, "bf16", 0.0, 8 * tiles.numel())


def _rotated(name: str, device: str, columns: int, group: int, form: str = "") -> Specimen:
    x = _numbers(device, TOKENS, columns, dtype=torch.bfloat16)
    launches, _ = rotate_quantize_rows(x, group, form) if form else rotate(x, group)
    return Specimen(name, launches, "bf16", 0.0, TOKENS * columns * (3 if form else 4))


def _title(tile: Tile) -> str:
    return f"{tile.m} x {tile.n}"


_MAKERS: dict[str, Callable[[str, str], Specimen]] = {
    **{f"linear_a8 int8 {_title(t)}": partial(_linear, tile=t) for t in TILES},
    **{
        f"linear_a8 fp8 {_title(t)}": partial(_linear, tile=t, dtype=torch.float8_e4m3fn)
        for t in FP8_TILES
    },
    **{
        f"linear_packed_a8 4 bits {_title(t)}": partial(_packed, tile=t, bits=4)
        for t in UNPACKING_TILES
    },
    **{
        f"linear_packed_a8 {bits} bits": partial(_packed, tile=UNPACKING_TILES[0], bits=bits)
        for bits in (2, 3, 5)
    },
    "linear_packed_a8 4 bits, groups of 64": partial(
        _packed, tile=UNPACKING_TILES[0], bits=4, group=64
    ),
    "linear_packed_a8 4 bits, groups of 64, zeros": partial(
        _packed, tile=CORRECTING_TILES[0], bits=4, group=64, zeros=True
    ),
    "linear_packed_a8 codebooks of 16": partial(
        _packed, tile=UNPACKING_TILES[0], bits=4, table=True
    ),
    "linear_packed_a8 codebooks of 8": partial(
        _packed, tile=UNPACKING_TILES[0], bits=3, table=True
    ),
    **{f"conv2d_a8 3 x 3 {_title(t)}": partial(_conv, tile=t) for t in UNPACKING_TILES},
    "norm_quantize adaLN 1152": partial(_norm, columns=1152, form="8"),
    "norm_quantize adaLN 3072 fp8": partial(_norm, columns=3072, form="e4m3"),
    "norm_quantize adaLN 1152, sums of 64": partial(_norm, columns=1152, form="8", group=64),
    "quantize_rows 1152": partial(_rows, columns=1152, activation=""),
    "quantize_rows gelu-tanh 4608": partial(_rows, columns=4608, activation="gelu-tanh"),
    "quantize_rows geglu 5120": partial(_rows, columns=5120, activation="geglu"),
    "quantize_rows gelu-tanh 15360 fp8": partial(
        _rows, columns=15360, activation="gelu-tanh", form="e4m3"
    ),
    "dequantize 4 bits, groups of 64": partial(
        _dequantized, bits=4, group=64, dtype=torch.bfloat16
    ),
    "dequantize 3 bits": partial(_dequantized, bits=3, group=0, dtype=torch.bfloat16),
    "linear_wna16 4 bits, groups of 64": partial(_few_rows, bits=4, group=64),
    "linear_wna16 3 bits": partial(_few_rows, bits=3, group=0),
    "linear_wna16 codebook of 16": partial(_few_rows, bits=4, group=0, table=True),
    **{
        f"linear_trellis {kind} {bits} bits {_title(t)}": partial(
            _trellis, tile=t, bits=bits, rounded=kind == "a8"
        )
        for kind in ("a8", "bf16")
        for bits in trellis.BITS
        for t in TRELLIS_TILES
    },
    **{f"decode_trellis {bits} bits": partial(_decoded, bits=bits) for bits in trellis.BITS},
    "viterbi 2 bits, 2^12 states": partial(_viterbi, bits=2, states=12),
    "viterbi 3 bits, 2^14 states": partial(_viterbi, bits=3, states=14),
    "viterbi 4 bits, 2^12 states": partial(_viterbi, bits=4, states=12),
    "rotate 1152 by 64": partial(_rotated, columns=1152, group=64),
    "rotate_quantize 1152 by 64": partial(_rotated, columns=1152, group=64, form="8"),
    "rotate_quantize 5120 by 256": partial(_rotated, columns=5120, group=256, form="8"),
}
