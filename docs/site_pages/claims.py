"""The ledger of claims: docs/claims.yaml as a table, grouped by card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .markdown import table
from .methods import link_of
from .missing import MissingError
from .tables import filled

PAGE = "methods/claims.md"
VERDICTS = ("kept", "refuted", "can't tell")
_FIELDS = {"card", "claim", "tried", "found", "verdict"}


def pages(root: Path) -> dict[str, str | bytes]:
    """The page, with its numbers put in."""
    held = read(root)
    counted = ", ".join(f"{sum(c['verdict'] == v for c in held)} {v}" for v in VERDICTS)
    parts = [
        "# Ledger of claims\n",
        f"What the papers claim, what was tried here, what was found, and the verdict: {counted}. "
        "Models are those of the [zoo](../start/tour.md), small, so a verdict is on the mechanism "
        "and not on the numbers of a paper. ± is a standard error. In the "
        "[arena](../results/arena.md) plans fill equal stored bits, and beside a paper's recipe "
        "ours takes no more bit operations either; how far ours is ahead is by the final latents' "
        "SQNR, over seeds of captions and noise; below zero it is behind. Numbers are read from "
        "the JSON files of the [results](../results/index.md), whose pages say command, machine "
        "and date.\n",
    ]
    for card in dict.fromkeys(c["card"] for c in held):
        rows = [
            {
                "claimed": c["claim"],
                "tried": c["tried"],
                "found": filled(c["found"], root),
                "verdict": c["verdict"],
            }
            for c in held
            if c["card"] == card
        ]
        parts.append(f"## {link_of(root, card)}\n\n{table(rows)}")
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
        if "<!-- value" not in " ".join(claim["found"].split()):
            raise MissingError(f"claims.yaml: no measured number in {claim['claim']!r}")
    return list(held)
