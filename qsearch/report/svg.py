"""Figures as SVG: an element that follows the colours of a page, or a file of its own."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.artifacts import write_text
from .style import FAINT, INK, PAPER, QUIET, RAISED, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGE = {
    "ink": INK,
    "quiet": QUIET,
    "faint": FAINT,
    "paper": PAPER,
    "raised": RAISED,
}  # what a page in a dark scheme has colours of its own for


def svg(figure: Figure, *, key: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: text stays text, ids begin with `key`, colours
    are the page's `--ink`, `--quiet`, `--faint`, `--paper`, `--raised`.

    `label` is what it says to those who can't see it. The same figure gives the same text every
    time.
    """
    import matplotlib
    from markupsafe import escape

    file = io.StringIO()
    with (
        matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": key}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # the reader's browser has its own fonts
        figure.savefig(
            file,
            format="svg",
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            transparent=True,
        )
    text = file.getvalue()
    text = re.sub(
        r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL
    )  # it would hold for the whole page
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(
        r'\b(?:d|x|y|transform)="[^"]*"',
        lambda m: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(m[0].split())),
        text,
    )  # half the size
    text = re.sub(r'font-family: [^;"<]*', "font-family: inherit", text)
    for name, colour in _PAGE.items():
        text = text.replace(f": {colour}", f": var(--{name})")
    size = r'width="[^"]*" height="[^"]*" '  # the page gives it one; the viewBox keeps the shape
    return re.sub(
        rf"<svg ([^>]*?){size}", rf'<svg role="img" aria-label="{escape(label)}" \1', text, count=1
    )


def save_svg(path: Path, figure: Figure, *, label: str) -> None:
    """The figure as a file of its own, with the light colours of a page filled in."""
    text = svg(figure, key="alone", label=label)
    for name, colour in _PAGE.items():
        text = text.replace(f"var(--{name})", colour)
    text = (
        text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        if " xmlns=" not in text
        else text
    )
    write_text(path, text.replace("font-family: inherit", "font-family: sans-serif"))
