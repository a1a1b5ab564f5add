"""The index of the method cards, from the cards themselves: docs/methods/NAME.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .markdown import table
from .missing import MissingError

#: groups of cards; a card says which one it belongs to in its line "Kind: ..."
KINDS = ("seed", "peer")


def pages(root: Path) -> dict[str, str | bytes]:
    """One page: every card with its one sentence and its verdict."""
    parts = [
        "# Methods\n",
        "A card for each method that this project builds upon (the *seeds*) and for each tool that "
        "does something near it (the *peers*): what the paper or the documentation says, "
        "how to run it here, what was measured here, and what was kept or refuted. Tables on the "
        "cards are made from `notebooks/figures/*.json`; a sentence that says *claimed* repeats "
        "its authors. The [ledger of claims](claims.md) has all verdicts with their numbers.\n",
    ]
    for kind in KINDS:
        rows = [row for row in _rows(root) if row.pop("kind") == kind]
        parts.append(f"## {kind.title()}s\n\n{table(rows)}")
    return {"methods/index.md": "\n".join(parts)}


def navigation(root: Path) -> list[Any]:
    """The index and the cards, seeds first."""
    cards = sorted(_cards(root), key=lambda p: (KINDS.index(_read(p)["kind"]), p.stem))
    return ["methods/index.md", "methods/claims.md", *(f"methods/{p.name}" for p in cards)]


def link_of(root: Path, name: str) -> str:
    """A card's title as a link from beside it. Raises `MissingError` where there is none."""
    path = root / "docs" / "methods" / f"{name}.md"
    if not path.is_file():
        raise MissingError(f"methods/{name}.md: no such card")
    return str(_read(path)["card"])


def _cards(root: Path) -> list[Path]:
    return sorted((root / "docs" / "methods").glob("*.md"))


def _rows(root: Path) -> list[dict[str, Any]]:
    return [_read(path) for path in _cards(root)]


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    found = re.findall(
        r"^\*\*(Kind|In one sentence|Verdict)\*\*: (.+?)$(?=\n\n)", text, re.MULTILINE | re.DOTALL
    )
    fields = {name: " ".join(words.split()) for name, words in found}
    if (
        title is None
        or set(fields) != {"Kind", "In one sentence", "Verdict"}
        or fields["Kind"] not in KINDS
    ):
        raise MissingError(
            f"methods/{path.name}: a card has a title and the lines **Kind** "
            f"({' or '.join(KINDS)}), "
            "**In one sentence** and **Verdict**"
        )
    return {
        "kind": fields["Kind"],
        "card": f"[{title[1]}]({path.name})",
        "in one sentence": fields["In one sentence"],
        "verdict here": fields["Verdict"],
    }
