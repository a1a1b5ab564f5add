"""Markdown by the piece: tables, code, cells that a table can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def cell(value: Any) -> str:
    """A value as a cell: four digits of a number, a dash for nothing, no bars or line breaks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {cell(v)}" for k, v in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None) -> str:
    """Rows as a table; the columns are those of all rows when left out, in order of appearance."""
    names = (
        list(columns) if columns is not None else list(dict.fromkeys(k for r in rows for k in r))
    )
    numbers = {
        name
        for name in names
        if all(isinstance(r.get(name), (int, float, type(None))) for r in rows)
    }
    lines = [
        "| " + " | ".join(cell(n) for n in names) + " |",
        "|" + "|".join("---:" if n in numbers else "---" for n in names) + "|",
    ]
    lines += ["| " + " | ".join(cell(r.get(n)) for n in names) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def code(text: str, language: str = "text") -> str:
    """A fenced block."""
    fence = "````" if "```" in text else "```"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def prose(text: str) -> str:
    """Words of code as Markdown: brackets, stars and angles stand for themselves outside of
    backticks.
    """
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for sign, instead in (
            ("<", "&lt;"),
            ("[", r"\["),
            ("]", r"\]"),
            ("*", r"\*"),
            ("_", r"\_"),
        ):
            parts[place] = parts[place].replace(sign, instead)
    return "`".join(parts)
