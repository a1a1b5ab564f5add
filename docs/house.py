"""`python docs/house.py`: writes docs/house.md, a line for each module with its caption, in the
order of the import contract.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: rooms from the roof down, each with what happens there
ROOMS = {
    "qsearch": "the table of contents",
    "qsearch/cli": "argv to one stage each",
    "qsearch/stages": "one file a verb: its settings, its cache key, what it reads and writes",
    "qsearch/race": "whole denoisers and layers against the clock, other tools beside",
    "qsearch/report": "what people look at",
    "qsearch/execute": "the plan at work: packed layers, runtime, exporters, importers",
    "qsearch/decide": "plans under budgets",
    "qsearch/learn": "what predicts, and why",
    "qsearch/measure": "what a choice costs",
    "qsearch/choices": "one file a kind of choice",
    "qsearch/graphs": "a model as a graph",
    "qsearch/zoo": "trained small denoisers",
    "qsearch/core": "nouns on disk, steps, plug-ins",
    "kernels/qsearch_kernels": "packed weights: layout, reference, products, Triton kernels",
}
_HEAD = """# Every module

Every module with its caption (the first paragraph of its docstring), rooms from the roof down: a
room imports from those below it.
This page is made by `python docs/house.py`.
"""


def modules() -> list[Path]:
    """Every module of the package and of the kernels."""
    return sorted([*ROOT.glob("qsearch/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def caption(path: Path) -> str:
    """First paragraph of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def page() -> str:
    """The page."""
    held: dict[str, list[Path]] = {room: [] for room in ROOMS}
    for path in modules():
        place = path.relative_to(ROOT).as_posix()
        room = max((r for r in ROOMS if place.startswith(f"{r}/")), key=len)
        held[room].append(path)
    parts = [_HEAD]
    for room, paths in held.items():
        parts.append(f"## {room}/\n\n{ROOMS[room][0].upper()}{ROOMS[room][1:]}.\n")
        lines = [_line(path.relative_to(ROOT / room), caption(path)) for path in paths]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _line(path: Path, words: str) -> str:
    """An item of the list, wrapped; no line begins with a sign that would begin another item."""
    item = f"- `{path.as_posix().removesuffix('__init__.py') or '.'}` · {words}"
    wrapped = textwrap.fill(item, 98, subsequent_indent="  ", break_on_hyphens=False)
    return re.sub(r"\n  ([-+*]) ", r" \1\n  ", wrapped)


if __name__ == "__main__":
    (ROOT / "docs" / "house.md").write_text(page(), encoding="utf-8")
