"""The ledger of claims: docs/claims.yaml as a table, grouped by card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .markdown import table
from .methods import title_of
from .missing import MissingError

PAGE = "methods/claims.md"
VERDICTS = ("kept", "refuted", "can't tell")
_FIELDS = {"card", "claim", "tried", "found", "verdict"}


def pages(root: Path) -> dict[str, str | bytes]:
    """The page; its numbers are put in as in every page's (`tables.filled`)."""
    held = read(root)
    counted = ", ".join(f"{sum(c['verdict'] == v for c in held)} {v}" for v in VERDICTS)
    parts = [
        "# Ledger of claims\n",
        f"What the papers claim, what was tried here, what was found, and the verdict: {counted}. "
        "Models are those of the [zoo](../start/tour.md), small, so a verdict is on the mechanism "
        "and not on the numbers of a paper. ± is a standard error. Numbers are read from the JSON "
        "files of the [results](../results/index.md), whose pages say command, machine and date.\n",
    ]
    for card in dict.fromkeys(c["card"] for c in held):
        rows = [
            {"claimed": c["claim"], "tried": c["tried"], "found": "FOUND", "verdict": c["verdict"]}
            for c in held
            if c["card"] == card
        ]
        text = table(rows)
        for claim in (c for c in held if c["card"] == card):
            text = text.replace("FOUND", " ".join(claim["found"].split()), 1)
        parts.append(f"## [{title_of(root, card)}]({card}.md)\n\n{text}")
    return {PAGE: "\n".join(parts)}


def read(root: Path) -> list[dict[str, Any]]:
    """The claims. Raises `MissingError` for a field that lacks, another verdict, or no number."""
    held = yaml.safe_load((root / "docs" / "claims.yaml").read_text("utf-8"))
    for claim in held:
        if set(claim) != _FIELDS or claim["verdict"] not in VERDICTS:
            raise MissingError(
                f"claims.yaml: a claim has {', '.join(sorted(_FIELDS))}, its verdict is one of "
                f"{', '.join(VERDICTS)}: {claim}"
            )
        if "<!-- value" not in " ".join(claim["found"].replace("<!--\n", "<!-- ").split()):
            raise MissingError(f"claims.yaml: no measured number in {claim['claim']!r}")
    return list(held)
