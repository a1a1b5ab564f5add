"""Draws a folded plan: a cell for the layers of one role in one block, as SVG whose cells say what
they hold when they are pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from .fold import Cell, Folded, levels, short_block

if TYPE_CHECKING:
    from markupsafe import Markup

#: pixels: a row, what lies between cells, and what a page and a telephone have room for; columns
#: are as wide as that allows, so that words are not scaled
_HIGH, _GAP = 14, 1
_PAGE, _TELEPHONE = 1206, 356
#: colours from few bits (or much noise) to many (or little), distinct in grey as well
_BITS = ("#d73027", "#fc8d59", "#fee090", "#91bfdb", "#4575b4", "#313695")
_BIT_STEPS = (2.6, 3.6, 5.0, 7.0, 12.0)
_NOISE = ("#7f0000", "#c23b22", "#ef8a62", "#fddbc7", "#b2cfe3", "#3a76af")


def bits_map(found: Folded, *, narrow: bool = False) -> Markup:
    """Stored bits a weight, blocks along the width of a screen or down a telephone."""

    def colour(cell: Cell) -> str:
        return _BITS[sum(cell.bits > step for step in _BIT_STEPS)]

    return _map(found, colour, "stored bits a weight", narrow)


def noise_map(found: Folded, *, narrow: bool = False) -> Markup:
    """The most sensitive layer's decibels at one scheme; red is the most noise."""
    low, _, high = levels(found)
    width = max(high - low, 1e-9) / len(_NOISE)

    def colour(cell: Cell) -> str:
        if not math.isfinite(cell.sqnr):
            return "var(--faint)"
        return _NOISE[min(len(_NOISE) - 1, int((cell.sqnr - low) / width))]

    return _map(found, colour, f"SQNR at {found.scheme}", narrow)


def legend(kind: str, found: Folded) -> list[tuple[str, str]]:
    """(colour, what it stands for), for the words below a map of `kind` "bits" or "noise"."""
    if kind == "bits":
        ends = [
            "up to 2.6",
            *(f"to {s:g}" for s in _BIT_STEPS[1:]),
            f"above {_BIT_STEPS[-1]:g}",
        ]
        return list(zip(_BITS, ends, strict=True))
    low, _, high = levels(found)
    step = (high - low) / len(_NOISE)
    digits = 0 if step >= 2 else 1
    return [
        (colour, f"{low + i * step:.{digits}f} to {low + (i + 1) * step:.{digits}f} dB")
        for i, colour in enumerate(_NOISE)
    ]


def _map(found: Folded, colour: Callable[[Cell], str], title: str, narrow: bool) -> Markup:
    from markupsafe import Markup, escape

    across, down = (found.roles, found.blocks) if narrow else (found.blocks, found.roles)
    label, head, beyond = (62, 118, 48) if narrow else (126, 62, 20)
    room = (_TELEPHONE if narrow else _PAGE) - label - beyond
    pitch = min(_HIGH, room / max(1, len(across)))
    width, height = label + pitch * len(across) + beyond, head + _HIGH * len(down) + 4
    upright = pitch < 11  # then slanted words would touch
    start = (
        f'<svg class="fold" role="img" aria-label="{escape(title)}, {len(found.roles)} roles by '
        f'{len(found.blocks)} blocks; the table of all layers has the numbers." '
        f'viewBox="0 0 {width:g} {height:g}" style="--natural: {width:g}px">'
    )
    parts = [start]
    for i, name in enumerate(across):
        x = label + pitch * (i + 0.5) + (3 if upright else 2)
        text = name if narrow else short_block(name)
        parts.append(
            f'<text transform="translate({x:.1f} {head - 5}) rotate({-90 if upright else -60})"'
            f' style="font-size: {min(9.0, pitch):.1f}px">{escape(text[:22])}'
            f"<title>{escape(name)}</title></text>"
        )
    for i, name in enumerate(down):
        text = short_block(name) if narrow else name
        parts.append(
            f'<text class="end" x="{label - 6}" y="{head + _HIGH * i + 10}">{escape(text[:24])}'
            f"<title>{escape(name)}</title></text>"
        )
    for (role, block), cell in found.cells.items():
        place = (found.roles.index(role), found.blocks.index(block))
        column, row = place if narrow else place[::-1]
        parts.append(
            f'<rect x="{label + pitch * column:.1f}" y="{head + _HIGH * row}" '
            f'width="{pitch - _GAP:.1f}" height="{_HIGH - _GAP}" rx="2" fill="{colour(cell)}" '
            f'data-find="{escape(cell.layers[0])}">'
            f"<title>{escape(_said(role, block, cell, found.scheme))}</title></rect>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def _said(role: str, block: str, cell: Cell, scheme: str) -> str:
    count = len(cell.layers)
    sqnr = f"; at least {cell.sqnr:.1f} dB at {scheme}" if math.isfinite(cell.sqnr) else ""
    return (
        f"{block}: {count} x {role}, {', '.join(cell.schemes[:2])}, {cell.bits:.2f} stored bits a "
        f"weight{sqnr}"
    )
