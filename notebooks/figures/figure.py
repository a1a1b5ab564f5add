"""What every figure script shares: a table on the screen, and the same numbers as JSON with versions, seed and command."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qsearch.core.artifacts import versions


def publish(
    script: str,
    rows: list[dict[str, Any]],
    *,
    title: str,
    seed: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """Print `rows` (the keys of the first are the columns) and write NAME.json beside the script NAME.py."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    path = Path(script).with_suffix(".json")
    machine = f"{platform.machine()}, {platform.system()}"
    content = {
        "command": " ".join(["python", *sys.argv]),
        "seed": seed,
        "machine": machine,
        "versions": versions(),
        "rows": rows,
        **(extra or {}),
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {path}")
