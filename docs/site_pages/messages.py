"""Every message by which qsearch refuses something, from the code: a page to search in."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

#: errors whose first argument is the line that a user sees
ERRORS = {"QSearchError", "ArtifactError", "InfeasibleBudget", "GraphMismatch", "SchemeError"}
_SHORTEST = 12


def pages(root: Path) -> dict[str, str | bytes]:
    """One page: messages by room, what differs from case to case as …"""
    parts = [
        "# Every message\n",
        "What qsearch says when it refuses something, as it stands in the code; … is "
        "what you gave, or "
        "what it found. Search for words of the line that you got. The usual reasons are in "
        "[troubleshooting](troubleshooting.md).\n",
    ]
    held: dict[str, list[str]] = {}
    for path in sorted((root / "qsearch").rglob("*.py")):
        room = path.relative_to(root / "qsearch").parts
        found = _messages(ast.parse(path.read_text(encoding="utf-8")))
        held.setdefault(room[0] if len(room) > 1 else "qsearch", []).extend(found)
    for room, found in held.items():
        lines = list(dict.fromkeys(found))
        if lines:
            parts.append(f"## {room}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    return {"how-to/messages.md": "\n".join(parts)}


def navigation(root: Path) -> list[Any]:
    """The page."""
    return ["how-to/messages.md"]


def _messages(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            text = _text(node.args[0])
            if len(text.replace("…", "").strip()) >= _SHORTEST:
                found.append(_escaped(text))
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def _escaped(text: str) -> str:
    for sign in "*_<>[]`{}$":
        text = (
            text.replace(sign, f"\\{sign}")
            if sign not in "<>"
            else text.replace(sign, f"&{'lt' if sign == '<' else 'gt'};")
        )
    return " ".join(text.split())
